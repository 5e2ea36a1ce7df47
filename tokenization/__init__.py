"""The offline job that turns a folder of audio into a data set of EnCodec tokens."""

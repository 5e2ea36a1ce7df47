"""The offline job that turns captioned audio into a data set of EnCodec tokens."""

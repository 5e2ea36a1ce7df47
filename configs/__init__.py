"""One file a run: a docstring with its command, and `config`, a delta on the defaults."""

"""One file a run: a docstring with its command, and `config`, a delta on the defaults.

`ablations.py` alone holds many: the variants of one run that the paper compares.
"""

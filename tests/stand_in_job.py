"""Runs `tokenization.job` or `tokenization.beam` with a codec that costs nothing.

python stand_in_job.py job|beam ARGUMENTS
"""

import os
import sys
from types import SimpleNamespace

from tokenizing import stub_codec

from tokenization import maker, workers

# Workers are started afresh, and import this file as well.
os.environ.setdefault("CODEC_SECONDS", "0.02")
maker.load_codec = stub_codec
workers.import_torch = lambda: SimpleNamespace(set_num_threads=lambda count: None)

if __name__ == "__main__":
    if sys.argv.pop(1) == "beam":
        from tokenization import beam

        beam.main()
    else:
        from tokenization import job

        job.main()

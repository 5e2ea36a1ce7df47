"""Runs `tokenization.job` or `tokenization.beam` with a codec that costs nothing.

python stand_in_job.py job|beam ARGUMENTS. With BREAK_CODEC=1 it raises a `UserError`.
"""

import os
import sys
import time
from types import SimpleNamespace

import numpy as np

from magnet_jax.codec.encodec import read_spec
from magnet_jax.errors import UserError
from tokenization import job


def load_codec(source, device, num_codebooks):
    spec = read_spec(source, num_codebooks)
    hop = round(spec.sample_rate / spec.frame_rate)

    def encode(wav_BCN):
        if os.environ.get("BREAK_CODEC"):
            raise UserError("the codec is broken")
        time.sleep(0.02)
        level_BT = np.abs(wav_BCN[:, 0].reshape(len(wav_BCN), -1, hop)).sum(axis=2)
        codes_BT = (1000 * level_BT).astype(np.int64)
        codes = [(codes_BT + 7 * k) % spec.codebook_size for k in range(spec.num_codebooks)]
        return np.stack(codes, axis=1).astype(np.int16)

    return SimpleNamespace(
        spec=spec, hop=hop, encode=encode, config=SimpleNamespace(norms_over_clip=True)
    )


# (workers are started afresh, and import this file as well)
job.load_codec = load_codec
job.import_torch = lambda: SimpleNamespace(set_num_threads=lambda count: None)

if __name__ == "__main__":
    if sys.argv.pop(1) == "beam":
        from tokenization import beam

        beam.main()
    else:
        job.main()

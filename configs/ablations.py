"""The ablations of the paper, all of music_small_10s: section 5.3, Table 2, Table 6 and Fig. 7.

python -m launch.train --config music_small_10s_span5_full --data DATA --out RUN

    music_small_10s_span{1,2,3,4,5,10}        Table 2: frames in a masked span
    music_small_10s_span{1,2,3,4,5,10}_full   Table 2: without the restricted context
    music_small_10s_guidance{A}to{B}          Table 6: guidance annealed from A to B
    music_small_10s_first{5,10,20,50,100}     Fig. 7: decoding steps of the first codebook
    music_small_10s_others{1,5,10,20}         Fig. 7: decoding steps of each further codebook

Those of Table 2 are trained. The others change `decode` alone, which a run lets change, and need
no training of their own once music_small_10s is trained. span3, guidance10to1, first20 and others10
are music_small_10s itself, so that each result has its name.
"""

import dataclasses

from configs import music_small_10s
from magnet_jax.config import RunConfig

_NAME = "music_small_10s"


def _changed(section: str, **settings) -> RunConfig:
    base = music_small_10s.config
    section_of_base = getattr(base, section)
    return dataclasses.replace(base, **{section: dataclasses.replace(section_of_base, **settings)})


SPANS = (1, 2, 3, 4, 5, 10)
GUIDANCES = ((1, 1), (3, 3), (10, 10), (10, 1), (20, 20), (20, 1))
FIRST_STEPS = (5, 10, 20, 50, 100)
OTHER_STEPS = (1, 5, 10, 20)

variants: dict[str, RunConfig] = {
    **{f"{_NAME}_span{n}": _changed("model", span_length=n) for n in SPANS},
    **{f"{_NAME}_span{n}_full": _changed("model", span_length=n, local_context=0) for n in SPANS},
    **{
        f"{_NAME}_guidance{first}to{last}": _changed(
            "decode", max_guidance=float(first), min_guidance=float(last)
        )
        for first, last in GUIDANCES
    },
    **{f"{_NAME}_first{n}": _changed("decode", steps=(n, 10, 10, 10)) for n in FIRST_STEPS},
    **{f"{_NAME}_others{n}": _changed("decode", steps=(20, n, n, n)) for n in OTHER_STEPS},
}

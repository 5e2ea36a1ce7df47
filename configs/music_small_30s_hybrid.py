"""Hybrid-MAGNeT small, text to music, 30 s (section 5.2, Appendix E): music_small_30s that also
learns to begin a clip one step after another.

python -m launch.train --config music_small_30s_hybrid --data DATA --out RUN
"""

from configs import music_small_30s
from magnet_jax.config import with_hybrid_objective

config = with_hybrid_objective(music_small_30s.config)

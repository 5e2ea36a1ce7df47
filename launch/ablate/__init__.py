"""The paper's ablations at a small scale: trains, generates, scores and draws them.

python -m launch.ablate spans        # Table 2: frames in a masked span, restricted context
python -m launch.ablate guidance --checkpoint MODEL    # Table 6: guidance
python -m launch.ablate steps --checkpoint MODEL       # Fig. 7: decoding steps
python -m launch.ablate rescoring    # Table 3: with an autoregressive model's say
python -m launch.ablate hybrid       # Fig. 2c: beginnings made one step after another

Each writes OUT/STUDY.json, OUT/STUDY.md and OUT/STUDY.png. The same command goes on where it was
stopped, and a second one beside it shares the work. docs/ablations.md says more.
"""

"""Measures what this machine does, as ratios of things run one after the other.

python -m launch.benchmark tokenize               the tokenization job against the bare codec
python -m launch.benchmark loader --data DATA     frames/s of the loader against the train step's
python -m launch.benchmark train --data DATA      a run's share of the machine's peak
python -m launch.benchmark decode --checkpoint RUN     time, FLOPs and programs of making clips
python -m launch.benchmark decode --model small --peer     the same at full size, against PyTorch
python -m launch.benchmark autoregressive --model small     a MusicGen against transformers'
python -m launch.benchmark tradeoff --model small     latency by prompt, steps and rescoring
python -m launch.benchmark editing                holes filled, errors found, and what an edit costs
python -m launch.benchmark serving                a server under load against batches without it
python -m launch.benchmark text                   whether blends, negative texts and timelines steer
python -m launch.benchmark loops                  how well loops close, and what one costs
python -m launch.benchmark long                   clips longer than the window, in every way
"""

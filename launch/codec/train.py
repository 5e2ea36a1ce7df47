"""Trains a small EnCodec on a folder of audio; see docs/recipe.md.

python -m launch.codec.train --audio data/recipe/train --valid data/recipe/valid \
    --init-from embedded --out runs/codec
"""

from collections.abc import Sequence

from launch.codec.training import Training, train
from magnet_jax import cli, errors
from magnet_jax.io import machine


def main(words: Sequence[str] | None = None) -> None:
    machine.keep_freed()
    settings = cli.parse(Training, words, prog="python -m launch.codec.train")
    for values in train(settings):
        numbers = (f"{name} {value:.4g}" for name, value in values.items() if name != "step")
        print(f"step {values['step']}: {', '.join(numbers)}", flush=True)
    print(f"{settings.out / 'codec'}: step {settings.steps}")


if __name__ == "__main__":
    with errors.reported():
        main()

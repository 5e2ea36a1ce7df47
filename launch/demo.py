"""The model that ships, heard, and then the main job, whole and small.

That is audio to tokens, a model trained on them, WAVs, and an export.

python -m launch.demo --out demo
"""

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from launch import export, sample
from magnet_jax import cli, errors
from magnet_jax.config import ASSETS
from magnet_jax.errors import UserError
from magnet_jax.io.files import is_left_over, replacing_file

SHIPPED_PROMPTS = (
    "A slow, solemn piece on the church organ in G minor",
    "A fast and lively fiddle tune in D major",
    "A calm, gentle melody played on the harp",
)
PROMPTS = (
    "A Bach chorale played on church organ, slow, in G minor",
    "A fiddle tune played on violin, lively, in F major",
    "An Irish dance tune played on harp, slow, in A major",
)
SEED = 0
ABOUT_SHIPPED = """\
Three clips in {shipped}: listen. This model has 10 M parameters, and learnt for a few hours on
two CPU cores from old tunes that a synthesizer played. It has learned how such music sounds and,
mostly, which of eleven instruments a text asks for; expect textures more than tunes, and no voices,
drums or bands. Its scores are in {card}. The rest shows how such models are made."""

ABOUT_MADE = """\
  heard      {shipped}, the model that ships
  data set   {data}
  run        {run}; losses in {run}/metrics.jsonl
  music      {wavs}
  export     {exported}
This second model, trained for minutes on twenty clips, has learned what such music sounds like, not
how to compose it. Try next:
  python -m launch.sample --checkpoint {run} --prompt "A slow tune on the flute" --seconds 5 \\
    --seed 1 --out more
  python -m tokenization.job --audio YOUR_MUSIC --out my_tokens
  python -m launch.train --config demo --data my_tokens --out my_run --steps 5000 \\
    --optimizer.schedule-steps 5000"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    out: Path = Path("demo")
    """Folder for everything that the demo makes. The same command goes on where it was."""


def draw(run: Path, wav: Path, path: Path) -> None:
    """The loss curve, the decoding's masks (Fig. 6 of the paper) and a sample's spectrogram."""
    import matplotlib
    import soundfile

    from magnet_jax.checkpoints import pretrained
    from magnet_jax.decode import sampling
    from magnet_jax.train import watch

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    loaded = pretrained.load(run)
    config = loaded.config
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(18, 5), layout="constrained")

    scalars = watch.read_scalars(run)
    lines = {
        f"train/loss_{k}": f"training, codebook {k + 1}" for k in range(config.model.num_codebooks)
    }
    lines |= {"train/loss": "training, mean", "validation/loss": "validation, mean"}
    for name, label in lines.items():
        points = [(line["step"], line[name]) for line in scalars if name in line]
        if points:
            style = {"train/loss": "k-", "validation/loss": "ko"}.get(name, "-")
            left.plot(*zip(*points), style, lw=1, label=label)
    left.axhline(np.log(config.model.codebook_size), color="gray", ls=":", label="chance")
    left.set(xlabel="step", ylabel="masked cross-entropy (nats)", title="Loss")
    left.legend(fontsize=8)

    generated = sampling.generate(
        loaded,
        PROMPTS,
        num_frames=sampling.segment_frames(config, loaded.codec),
        decoding=config.decode,
        seed=SEED,
    )
    kept_PT = ~generated.hidden_PBT[:, 0]
    middle.imshow(kept_PT, aspect="auto", cmap="viridis", interpolation="nearest")
    ends = np.cumsum(config.decode.steps)
    for end in ends[:-1]:
        middle.axhline(end - 0.5, color="white", lw=1.5)
    middle.set(xlabel="frame", ylabel="codebook", title="Decoding steps, downwards: kept (yellow)")
    centres = ends - np.array(config.decode.steps) / 2 - 0.5
    middle.set_yticks(centres, [f"{k + 1}" for k in range(len(ends))])

    samples, rate = soundfile.read(wav)
    right.specgram(samples, NFFT=1024, Fs=rate, noverlap=768, vmin=-140)
    right.set(xlabel="seconds", ylabel="Hz", title=PROMPTS[0])
    with replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)


def _words(command: str, prompts: tuple[str, ...] = (), **options: Any) -> list[str]:
    """A command line: `python -m` and these words do the same as the demo's part."""
    words = [command, *(word for prompt in prompts for word in ("--prompt", prompt))]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def demo(args: Args) -> None:
    """Runs the six parts; each says the command that does the same by itself."""
    began = time.perf_counter()
    parts = ("shipped", "tokens", "run", "wavs", "export")
    there = {path.name for path in args.out.glob("*") if not is_left_over(path.name)}
    if others := sorted(there - {*parts, "demo.png"}):
        raise UserError(f"--out {args.out}: holds other files ({others[0]}); name another folder")
    # JAX is slow to load
    from launch import train
    from magnet_jax.train import loop, watch
    from tokenization import job

    shipped, data, run, wavs, exported = (args.out / name for name in parts)

    def announce(number: int, what: str, words: list[str]) -> list[str]:
        seconds = time.perf_counter() - began
        tqdm.write(f"\n[{number}/6, {seconds:.0f} s] {what}\n  python -m {shlex.join(words)}")
        return words[1:]

    words = _words("launch.sample", SHIPPED_PROMPTS, checkpoint="demo", out=shipped, seed=SEED)
    words = announce(1, "texts to music, by the model that ships", words)
    sample.sample(sample.parse(words))
    tqdm.write(ABOUT_SHIPPED.format(shipped=shipped, card=ASSETS / "demo" / "README.md"))

    clips = ASSETS / "clips"
    # 15 % of twenty clips are two.
    words = _words("tokenization.job", audio=clips, out=data, validation_percent=15)
    words = announce(2, "audio to tokens", words)
    print(job.run(cli.parse(job.Job, words, prog="python -m tokenization.job")))

    words = announce(
        3, "tokens to a model", _words("launch.train", config="demo", data=data, out=run)
    )
    config = train.parse(words)
    loop.train(config)

    words = _words("launch.sample", PROMPTS, checkpoint=run, out=wavs, seed=SEED)
    written = sample.sample(sample.parse(announce(4, "texts to music", words)))

    words = _words("launch.export", checkpoint=run, out=exported, overwrite=True)
    words = announce(5, "model to AudioCraft and safetensors", words)
    export.main(cli.parse(export.Args, words, prog="python -m launch.export"))

    picture = args.out / "demo.png"
    tqdm.write(f"\n[6/6, {time.perf_counter() - began:.0f} s] a picture of it all: {picture}")
    draw(run, written[0], picture)

    losses = [line["train/loss"] for line in watch.read_scalars(run) if "train/loss" in line]
    chance = np.log(config.model.codebook_size)
    tqdm.write(
        f"\nDone in {time.perf_counter() - began:.0f} s. The loss fell from {losses[0]:.2f} to "
        f"{losses[-1]:.2f} nats a token (chance: {chance:.2f}).\n"
        + ABOUT_MADE.format(shipped=shipped, data=data, run=run, wavs=wavs, exported=exported)
    )


if __name__ == "__main__":
    with errors.reported():
        demo(cli.parse(Args, prog="python -m launch.demo", description=__doc__))

"""The model that ships, heard; then the main job, whole and small: audio to tokens, a model trained
on them, WAVs, an export.

python -m launch.demo --out demo
"""

import dataclasses
import json
import shlex
import time
from pathlib import Path

import matplotlib
import numpy as np
import soundfile
from tqdm import tqdm

from launch import export, sample
from launch.train import load_config
from magnet_jax import cli, errors
from magnet_jax.checkpoints import pretrained
from magnet_jax.config import ASSETS
from magnet_jax.decode import sampling
from magnet_jax.errors import UserError
from magnet_jax.io.files import is_left_over, replacing_file
from magnet_jax.train import loop, watch
from tokenization import job

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    out: Path = Path("demo")
    """Folder for everything the demo makes; run again, it goes on where it was."""


def draw(args: Args, wav: Path) -> Path:
    """The loss curve, the decoding's masks (Fig. 6 of the paper) and a sample's spectrogram."""
    loaded = pretrained.load(args.out / "run")
    config = loaded.config
    generated = sampling.generate(
        loaded,
        PROMPTS,
        num_frames=sampling.segment_frames(config, loaded.codec),
        decoding=config.decode,
        seed=SEED,
    )
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(18, 5), layout="constrained")

    scalars = watch.read_scalars(args.out / "run")
    for codebook in range(config.model.num_codebooks):
        name = f"train/loss_{codebook}"
        points = [(line["step"], line[name]) for line in scalars if name in line]
        left.plot(*zip(*points), lw=1, alpha=0.6, label=f"training, codebook {codebook + 1}")
    for name, style in (("train/loss", "k-"), ("validation/loss", "ko")):
        points = [(line["step"], line[name]) for line in scalars if name in line]
        if points:
            left.plot(*zip(*points), style, label=f"{name.split('/')[0]}, mean")
    chance = np.log(config.model.codebook_size)
    left.axhline(chance, color="gray", ls=":", label="chance")
    left.set(xlabel="step", ylabel="masked cross-entropy (nats)", title="Loss")
    left.legend(fontsize=8)

    kept_PT = ~generated.hidden_PBT[:, 0]
    middle.imshow(kept_PT, aspect="auto", cmap="viridis", interpolation="nearest")
    for end in np.cumsum(config.decode.steps)[:-1]:
        middle.axhline(end - 0.5, color="white", lw=1.5)
    middle.set(
        xlabel="frame", ylabel="codebook", title="Decoding steps, downwards: kept tokens (yellow)"
    )
    middle.set_yticks(
        np.cumsum((0, *config.decode.steps[:-1])) + np.array(config.decode.steps) / 2 - 0.5,
        [f"{k + 1}" for k in range(config.model.num_codebooks)],
    )

    samples, rate = soundfile.read(wav)
    right.specgram(samples, NFFT=1024, Fs=rate, noverlap=768, vmin=-140)
    right.set(xlabel="seconds", ylabel="Hz", title="A sample")
    right.text(
        0.5, 0.97, PROMPTS[0], transform=right.transAxes, ha="center", va="top", color="white"
    )
    path = args.out / "demo.png"
    with replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)
    return path


def demo(args: Args) -> None:
    """Runs the six parts; each says the command that does the same by itself."""
    began = time.perf_counter()
    parts = ("shipped", "tokens", "run", "wavs", "export")
    there = {path.name for path in args.out.glob("*") if not is_left_over(path.name)}
    if others := sorted(there - {*parts, "demo.png"}):
        raise UserError(f"--out {args.out}: holds other files ({others[0]}); name another folder")
    config = load_config("demo")
    shipped, data, run, wavs, exported = (args.out / name for name in parts)

    def announce(number: int, what: str, *command: str) -> None:
        seconds = time.perf_counter() - began
        tqdm.write(f"\n[{number}/6, {seconds:.0f} s] {what}\n  python -m {shlex.join(command)}")

    def options(prompts: tuple[str, ...]) -> list[str]:
        return [word for prompt in prompts for word in ("--prompt", prompt)]

    words = ["--checkpoint", "demo", *options(SHIPPED_PROMPTS), "--out", str(shipped)]
    words += ["--seed", str(SEED)]
    announce(1, "texts to music, by the model that ships", "launch.sample", *words)
    sample.sample(sample.parse(words))
    tqdm.write(ABOUT_SHIPPED.format(shipped=shipped, card=ASSETS / "demo" / "README.md"))

    clips = ASSETS / "clips"
    # 15 %: of twenty clips, two.
    announce(
        2, "audio to tokens", "tokenization.job", "--audio", str(clips), "--out", str(data),
        "--validation-percent", "15",
    )  # fmt: skip
    print(job.run(job.Job(audio=clips, out=data, validation_percent=15.0)))

    announce(
        3, "tokens to a model", "launch.train", "--config", "demo", "--data", str(data),
        "--out", str(run),
    )  # fmt: skip
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, path=str(data)), out=str(run)
    )
    loop.train(config)

    announce(
        4, "texts to music", "launch.sample", "--checkpoint", str(run), *options(PROMPTS),
        "--out", str(wavs), "--seed", str(SEED),
    )  # fmt: skip
    written = sample.sample(
        sample.Args(checkpoint=run, out=wavs, prompt=PROMPTS, seed=SEED, decode=config.decode)
    )

    announce(
        5, "model to AudioCraft and safetensors", "launch.export", "--checkpoint", str(run),
        "--out", str(exported), "--overwrite",
    )  # fmt: skip
    export.main(export.Args(checkpoint=run, out=exported, overwrite=True))

    tqdm.write(f"\n[6/6, {time.perf_counter() - began:.0f} s] a picture of it all")
    picture = draw(args, written[0])

    scalars = [line for line in watch.read_scalars(run) if "train/loss" in line]
    first, last = scalars[0]["train/loss"], scalars[-1]["train/loss"]
    seconds = json.loads(written[0].with_suffix(".json").read_text())["seconds"]
    tqdm.write(
        f"\nDone in {time.perf_counter() - began:.0f} s. The loss fell from {first:.2f} to "
        f"{last:.2f} nats a token (chance: {np.log(config.model.codebook_size):.2f}).\n"
        f"  heard      {shipped}  (the model that ships)\n"
        f"  data set   {data}\n  run        {run}  (tensorboard --logdir {run})\n"
        f"  music      {wavs}  ({len(written)} WAVs of {seconds:g} s)\n  export     {exported}\n"
        f"  picture    {picture}\n"
        "This second model, trained for minutes on twenty clips, has learned what such music "
        "sounds like, not how to compose it. Try next:\n"
        f'  python -m launch.sample --checkpoint {run} --prompt "A slow tune on the flute" '
        "--seconds 5 --seed 1 --out more\n"
        "  python -m tokenization.job --audio YOUR_MUSIC --out my_tokens\n"
        "  python -m launch.train --config demo --data my_tokens --out my_run --steps 5000 "
        "--optimizer.schedule-steps 5000"
    )


if __name__ == "__main__":
    with errors.reported():
        demo(cli.parse(Args, prog="python -m launch.demo", description=__doc__))

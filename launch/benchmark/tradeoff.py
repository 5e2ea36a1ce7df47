"""What a clip costs by length of the prompt, decoding steps and rescoring, and how good it is."""

import dataclasses
import functools
import json
import math
import shlex
from pathlib import Path
from typing import Literal, NamedTuple

import jax
from tqdm import tqdm

from launch.benchmark import models
from launch.benchmark.decoding import TEXTS, clip_frames, open_rescorer
from launch.benchmark.peaks import seconds_of
from launch.evaluate import prompts, stages
from launch.evaluate import settings as evaluate
from magnet_jax.checkpoints import pretrained
from magnet_jax.config import (
    DecodeConfig,
    HybridConfig,
    RescoreConfig,
    SamplingConfig,
)
from magnet_jax.decode import placement, sampling
from magnet_jax.errors import UserError
from magnet_jax.evaluation import scores
from magnet_jax.io import bucket
from magnet_jax.io.files import replacing_file
from magnet_jax.model import precision

PROMPT_SECONDS = (0.0, 0.5, 1.0, 2.0, 5.0)
PROMPT = "prompt"
FIRST = "first codebook"
OTHERS = "other codebooks"
RESCORED = "rescoring"
TITLES = {
    PROMPT: "Seconds generated one step after another (Fig. 2c)",
    FIRST: "Steps of the first codebook (Fig. 7)",
    OTHERS: "Steps of each other codebook (Fig. 7)",
    RESCORED: "Rescoring (Table 3)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Latency against prompt length, steps a codebook, and rescoring: the paper's Table 3, Fig. 2c
    and Fig. 7."""

    checkpoint: str | Path | None = None
    """A MAGNeT, or a hybrid for the prompts as well, as for launch.sample; or --model."""
    model: Literal["small", "medium"] | None = None
    """A hybrid of a published size with random weights, made in memory; or --checkpoint."""
    seconds: float | None = None
    """Length of a clip, cut down to whole spans; None is what the model was trained on."""
    batch_size: int = 1
    """Clips at once."""
    repeats: int = 3
    """Calls timed for each point, of which the fastest counts; the first compiles beforehand."""
    prompt_seconds: tuple[float, ...] | None = None
    """Of a hybrid: lengths of its autoregressive beginning, by default 0, 0.5, 1, 2 and 5; the
    whole clip comes in addition."""
    first_steps: tuple[int, ...] = (5, 10, 20, 40)
    """Steps of the first codebook; the others have theirs from the model."""
    other_steps: tuple[int, ...] = (1, 2, 5, 10)
    """Steps of each of the other codebooks; the first has its from the model."""
    rescorer: str | Path | None = None
    """A second model, as for launch.sample: also with and without it."""
    rescorer_weight: float = RescoreConfig.weight
    """The rescorer's share of the scores, as for launch.sample."""
    rescorer_guidance: float = RescoreConfig.guidance
    """Guidance coefficient of the rescorer; 1 is none, and half the work of any other."""
    prompts: Path | None = None
    """Captions, as for launch.evaluate: also generates a clip for each at each point, and scores
    them. Needs --checkpoint, --reference and --out."""
    limit: int | None = None
    """Only so many of them."""
    reference: Path | None = None
    """Folder of real audio to score against."""
    out: Path | None = None
    """Folder for the generated clips, their scores, tradeoff.json and tradeoff.png."""

    def __post_init__(self):
        if self.repeats < 1 or self.batch_size < 1:
            raise UserError("--repeats and --batch-size must be at least 1")
        if self.seconds is not None and not 0 < self.seconds <= 600:
            raise UserError("--seconds must be positive, and at most 600")
        if min((*self.first_steps, *self.other_steps), default=1) < 1:
            raise UserError("--first-steps and --other-steps must be numbers of at least 1")
        # (nan is not even below 0)
        if not all(seconds >= 0 for seconds in self.prompt_seconds or ()):
            raise UserError("--prompt-seconds must be numbers of at least 0")
        rescoring = RescoreConfig(weight=self.rescorer_weight, guidance=self.rescorer_guidance)
        if self.rescorer is None and rescoring != RescoreConfig():
            raise UserError("--rescorer-weight and --rescorer-guidance need --rescorer")
        if self.rescorer_weight == 0:
            raise UserError("--rescorer-weight 0 is no rescorer: there is nothing to compare")
        if self.limit is not None and (self.limit < 1 or self.prompts is None):
            raise UserError("--limit must be at least 1, and goes with --prompts")
        scored = (self.prompts, self.reference)
        if any(scored) and not (all(scored) and self.checkpoint and self.out):
            raise UserError(
                "scores need --prompts, --reference, --checkpoint and --out, all of them"
            )


class Point(NamedTuple):
    """One way to make a clip."""

    kind: str
    value: float | int | str
    sampling: SamplingConfig
    rescored: bool

    def options(self, args: Args) -> str:
        """What makes `launch.sample` do it."""
        hybrid = isinstance(self.sampling, HybridConfig)
        steps = (self.sampling.decode if hybrid else self.sampling).steps
        words = ["--decode.steps", *map(str, steps)]
        words += ["--prompt-seconds", str(self.sampling.prompt_seconds)] if hybrid else []
        if self.rescored:
            words += ["--rescorer", str(args.rescorer)]
            words += ["--rescorer-weight", str(args.rescorer_weight)]
            words += ["--rescorer-guidance", str(args.rescorer_guidance)]
        return shlex.join(words)


def points(args: Args, own: SamplingConfig, clip_seconds: float) -> list[Point]:
    """All that is to be measured; what is not varied is the model's `own`, without any prompt."""
    hybrid = isinstance(own, HybridConfig)
    decode: DecodeConfig = own.decode if hybrid else own

    def point(
        kind: str, value: float | str, steps: tuple[int, ...], prompt: float = 0.0, by: bool = False
    ) -> Point:
        settings = dataclasses.replace(decode, steps=steps)
        if hybrid:
            settings = dataclasses.replace(own, decode=settings, prompt_seconds=prompt)
        return Point(kind, value, settings, by)

    found, (first, *others) = [], decode.steps
    if hybrid:
        asked = PROMPT_SECONDS if args.prompt_seconds is None else args.prompt_seconds
        lengths = sorted({s for s in asked if s < clip_seconds} | {clip_seconds})
        found += [point(PROMPT, seconds, decode.steps, seconds) for seconds in lengths]
    found += [point(FIRST, count, (count, *others)) for count in sorted(args.first_steps)]
    found += [
        point(OTHERS, count, (first, *(count for _ in others)))
        for count in sorted(args.other_steps)
    ]
    if args.rescorer is not None:
        found += [
            point(RESCORED, "without", decode.steps),
            point(RESCORED, "with", decode.steps, by=True),
        ]
    return found


def check(args: Args) -> None:
    """Raises `UserError` for what can be known to fail before anything is loaded."""
    if args.checkpoint is not None and args.model is None:
        model, own = pretrained.read_defaults(args.checkpoint)
        if not model.parallel:
            raise UserError(f"a model of kind {model.kind} has no decoding steps to vary")
        if model.kind != "hybrid" and args.prompt_seconds is not None:
            raise UserError(
                f"--prompt-seconds is for models of kind hybrid, and this is a {model.kind}: "
                "leave it out"
            )
        if not points(args, own, math.inf):  # (whatever the clip's length is)
            raise UserError(
                "nothing is to be varied: give --first-steps, --other-steps or --rescorer"
            )
        if args.rescorer is not None:
            sampling.check_rescored(own)
    if args.prompts is not None:
        prompts.read(args.prompts, args.limit)
        scores.find_audio(args.reference)
    if args.out is not None and bucket.is_url(args.out):
        raise UserError(f"--out {args.out}: needs a folder on disk; copy it from there")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file, and the scores need a folder")
    if args.out is not None:
        _check_own(args.out)


def _check_own(out: Path) -> None:
    """Raises `UserError` for files that would be replaced and that no tradeoff wrote."""
    table, picture = out / "tradeoff.json", out / "tradeoff.png"
    try:
        first = json.loads(table.read_text())[0]
        is_own = first.keys() >= {"kind", "value", "seconds", "options"}
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        is_own = False
    for path in (table, picture):
        if path.exists() and not is_own:
            raise UserError(f"{path}: is there, and no tradeoff wrote it; name another --out")


def measure(args: Args) -> None:
    """Measures, prints, and writes what `args` asks for."""
    check(args)
    with models.opened(args.checkpoint, args.model, "hybrid") as (name, loaded):
        config = loaded.config
        frames = clip_frames(loaded, args.seconds)
        clip_seconds = frames / loaded.codec.frame_rate
        loaded = placement.prepare(loaded)
        rescorer = None
        if args.rescorer is not None:
            rescorer = open_rescorer(
                args.rescorer, loaded, args.rescorer_guidance, args.rescorer_weight
            )
        rows = []
        print(
            f"{name}, {args.batch_size} clip(s) of {clip_seconds:g} s, "
            f"{precision.compute_dtype(config).name} on {jax.devices()[0].device_kind}; from text "
            f"to tokens, the fastest of {args.repeats}",
            flush=True,
        )
        beyond = [f"{s:g}" for s in args.prompt_seconds or () if s > clip_seconds]
        if beyond:
            print(f"left out, as longer than the clip: --prompt-seconds {' '.join(beyond)}")
        for point in tqdm(points(args, config.sampling, clip_seconds), "points", leave=False):
            latency = latency_of(loaded, point, rescorer, frames, args)
            row = {"kind": point.kind, "value": point.value, "seconds": latency}
            row["options"] = point.options(args)
            if args.prompts is not None:
                row |= quality_of(args, point, clip_seconds)
            rows.append(row)
            tqdm.write(line(row))
            if args.out is not None:  # (at once, as a later point may fail)
                with replacing_file(args.out / "tradeoff.json") as temporary:
                    temporary.write_text(json.dumps(rows, indent=2) + "\n")
    if args.out is not None:
        draw(args.out / "tradeoff.png", rows, f"{name}, {clip_seconds:g} s")
        print(f"{args.out}/tradeoff.json, {args.out}/tradeoff.png")


def latency_of(
    loaded: pretrained.Loaded,
    point: Point,
    rescorer: sampling.Rescorer | None,
    num_frames: int,
    args: Args,
) -> float:
    """Seconds from texts to tokens."""

    def generate(seed: int) -> None:
        sampling.generate(
            loaded,
            [TEXTS[i % len(TEXTS)] for i in range(args.batch_size)],
            num_frames=num_frames,
            decoding=point.sampling,
            seed=seed,
            rescorer=rescorer if point.rescored else None,
        )

    generate(0)
    return min(seconds_of(functools.partial(generate, seed)) for seed in range(args.repeats))


def quality_of(args: Args, point: Point, clip_seconds: float) -> dict[str, float]:
    """The scores of `launch.evaluate` with the embedder that ships, without intervals."""
    name = f"{point.kind}_{point.value}".replace(" ", "_")
    if point.rescored:  # (others are made otherwise, and may lie beside these)
        name += f"_{args.rescorer_weight:g}_guidance_{args.rescorer_guidance:g}"
    evaluation = evaluate.Args(
        checkpoint=str(args.checkpoint),
        prompts=args.prompts,
        limit=args.limit,
        reference=args.reference,
        seconds=clip_seconds,
        resamples=0,
        sample_options=point.options(args),
        out=args.out / name,
    )
    scores = stages.run(evaluation)["scores"]["generated"]["musicnn"]
    return {name: score["value"] for name, score in scores.items() if isinstance(score, dict)}


def line(row: dict[str, float | str]) -> str:
    scores = {k: v for k, v in row.items() if k not in ("kind", "value", "seconds", "options")}
    return "  ".join(
        [f"{row['kind']:<16}", f"{row['value']!s:>8}", f"{row['seconds']:8.3f} s"]
        + [f"{name} {value:.3g}" for name, value in scores.items()]
    )


def draw(path: Path, rows: list[dict], title: str) -> None:
    """A panel for each thing that is varied: latency, and FAD where it is known."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in TITLES if any(row["kind"] == kind for row in rows)]
    figure = Figure(figsize=(4.2 * len(kinds), 3.6), layout="constrained")
    for kind, axes in zip(kinds, figure.subplots(1, len(kinds), squeeze=False)[0]):
        own = [row for row in rows if row["kind"] == kind]
        values = [row["value"] for row in own]
        joined = "" if kind == RESCORED else "-"  # (nothing lies between with and without)
        seconds = [row["seconds"] for row in own]
        axes.plot(values, seconds, f"o{joined}", label="latency (s)")
        axes.set(title=TITLES[kind], ylim=(0, 1.1 * max(seconds)), ylabel="latency (s)")
        if kind == RESCORED:
            axes.margins(x=0.5)
        axes.grid(alpha=0.3)
        if all("fad" in row for row in own):
            beside = axes.twinx()
            dashed = joined and "--"
            beside.plot(values, [row["fad"] for row in own], f"s{dashed}", color="tab:orange")
            beside.set_ylabel("FAD (squares)")
    figure.suptitle(title, fontsize="medium")
    with replacing_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")

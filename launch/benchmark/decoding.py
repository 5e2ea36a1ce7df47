"""Time and work of making clips: a part, a batch size, and against a peer."""

import contextlib
import dataclasses
import functools
import json
import math
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax
import numpy as np
from tqdm import tqdm

from launch.benchmark import models, peaks, report, rescoring
from launch.benchmark.peaks import seconds_of
from launch.compile import flops
from magnet_jax import programs
from magnet_jax.checkpoints import pretrained
from magnet_jax.codec import decoding
from magnet_jax.codec.encodec import Decoder
from magnet_jax.config import ComputeDtype, DecodeConfig, Preset, RescoreConfig, preset_steps
from magnet_jax.convert import lm_rules
from magnet_jax.decode import placement, rescore, sampling
from magnet_jax.errors import UserError
from magnet_jax.model import precision

if TYPE_CHECKING:
    from launch.benchmark import torch_peer

TEXTS = (
    "A lively fiddle tune with acoustic guitar and upright bass, recorded live at a dance",
    "Slow ambient pads with a soft piano melody and distant rain",
    "An energetic rock song with distorted guitars and a driving drum beat",
    "A string quartet plays a sad and thoughtful piece in a minor key",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Seconds and FLOPs a clip for several batch sizes, by part, and the programs compiled."""

    checkpoint: str | Path | None = None
    """Folder of a training run, an export or an AudioCraft checkpoint; or --model."""
    model: Literal["small", "medium"] | None = None
    """A model of a published size with random weights, made in memory; or --checkpoint."""
    seconds: float | None = None
    """Length of a clip, cut down to whole spans; None is what the model was trained on."""
    batch_sizes: tuple[int, ...] = (1, 2, 4)
    """Clips at once."""
    repeats: int = 3
    """Calls timed a batch size, of which the fastest counts; the first without its compilation."""
    steps: tuple[int, ...] | None = None
    """Decoding steps of each codebook; None is the model's own."""
    preset: Preset | None = None
    """Decoding steps by name: paper, paper-30s, balanced or draft."""
    compute_dtype: ComputeDtype | None = None
    """Precision of the products; None is the model's own."""
    parts: bool = True
    """Time the parts of a call at the first batch size, which compiles one more program."""
    rescorer: str | Path | None = None
    """Also time rescoring by this model at the first batch size, against its own passes alone."""
    rescorer_weight: float = RescoreConfig.weight
    """The rescorer's share of the scores, as for launch.sample; above 0, it changes no cost."""
    rescorer_guidance: float = RescoreConfig.guidance
    """Guidance coefficient of the rescorer; 1 is none, and half the work of any other."""
    peer: bool = False
    """Also time the PyTorch peer, on the same weights, text states and schedule."""
    peer_device: str = "cpu"
    """PyTorch device of the peer."""
    peer_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the peer."""
    peer_steps: int | None = None
    """Cut the schedule to so many steps a codebook, for both alike."""
    vs: str | None = None
    """Another command to time: its wall seconds, or the "seconds" of a line of JSON it prints."""
    json: Path | None = None
    """File for all figures."""
    picture: Path | None = None
    """PNG, PDF or SVG file for latency and throughput against the batch size."""

    def __post_init__(self):
        for name in ("batch_sizes", "steps"):
            numbers = getattr(self, name)
            if numbers is not None and (not numbers or min(numbers) < 1):
                raise UserError(f"{report.option(name)} must be numbers of at least 1")
        if self.steps and self.preset:
            raise UserError("give --steps or --preset, not both")
        if self.repeats < 1:
            raise UserError("--repeats must be at least 1")
        if self.seconds is not None and not 0 < self.seconds <= 600:
            raise UserError("--seconds must be positive, and at most 600")
        if not self.peer and (self.peer_device, self.peer_dtype) != ("cpu", "float32"):
            raise UserError("--peer-device and --peer-dtype need --peer")
        rescoring = RescoreConfig(weight=self.rescorer_weight, guidance=self.rescorer_guidance)
        if self.rescorer is None and rescoring != RescoreConfig():
            raise UserError("--rescorer-weight and --rescorer-guidance need --rescorer")
        if self.rescorer_weight == 0:
            raise UserError("--rescorer-weight 0 is no rescorer: there is nothing to time")
        if self.peer_steps is not None and (self.peer_steps < 1 or not self.peer):
            raise UserError("--peer-steps must be at least 1, and needs --peer")
        if self.picture and self.picture.suffix not in (".png", ".pdf", ".svg"):
            raise UserError(f"--picture {self.picture}: must end in .png, .pdf or .svg")
        for name in ("json", "picture"):
            report.check_parent(report.option(name), getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What every call of a measurement shares."""

    loaded: pretrained.Loaded
    decoder: Decoder
    num_frames: int
    decoding: DecodeConfig

    def texts(self, batch: int) -> list[str]:
        return [TEXTS[i % len(TEXTS)] for i in range(batch)]

    def tokens(
        self,
        batch: int,
        repeat: int,
        on_step: Callable | None = None,
        rescorer: sampling.Rescorer | None = None,
    ) -> np.ndarray:
        """From texts to tokens, as users have it, with settings that differ a repeat."""
        # Other numbers, not other shapes: no new program.
        temperature = self.decoding.temperature * (1 + repeat / 64)
        decoding = dataclasses.replace(self.decoding, temperature=temperature)
        return sampling.generate(
            self.loaded,
            self.texts(batch),
            num_frames=self.num_frames,
            decoding=decoding,
            seed=repeat,
            rescorer=rescorer,
            on_step=on_step,
        ).codes_BKT

    def audio(self, codes_BKT: np.ndarray) -> np.ndarray:
        return decoding.decode_audio(self.decoder, codes_BKT)

    def text_states(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Text encoder states cut to the longest text, and the texts' lengths."""
        return models.text_states(self.loaded, self.texts(batch))


def measure(args: Args) -> None:
    """Measures, prints, and writes what `args` asks for."""
    with models.opened(args.checkpoint, args.model) as (name, loaded):
        if args.compute_dtype is not None:
            config = dataclasses.replace(loaded.config, compute_dtype=args.compute_dtype)
            loaded = loaded._replace(config=config)
        if args.peer:  # (its module imports torch)
            from launch.benchmark.torch_peer import check_device

            check_device(args.peer_device)
        job = make_job(args, loaded)
        rescorer = make_rescorer(args, job)
        dtype = precision.compute_dtype(loaded.config)
        facts = report.Facts(
            model=name,
            parameters=int(sum(leaf.size for leaf in jax.tree.leaves(loaded.params["lm"]))),
            device=jax.devices()[0].device_kind,
            dtype=dtype.name,
            num_frames=job.num_frames,
            clip_seconds=job.num_frames / loaded.codec.frame_rate,
            steps=job.decoding.steps,
            steps_cut_from=own_steps(args, loaded) if args.peer_steps else None,
            peak=peaks.jax_peak(dtype),
            peer_dtype=args.peer_dtype if args.peer else None,
            peer_device=args.peer_device if args.peer else None,
            peer_peak=peaks.torch_peak(args.peer_dtype, args.peer_device) if args.peer else None,
        )
        print(report.heading(facts), flush=True)
        vs_seconds = None
        if args.vs:  # (first, as it may fail)
            vs_seconds = min(time_command(args.vs) for _ in range(args.repeats))
        rows = measure_batches(args, job, facts)
        num_programs = programs.count()
        print(f"{num_programs} programs for {len(rows)} shapes", flush=True)
        parts = measure_parts(job, args.batch_sizes[0]) if args.parts else None
        if parts:
            print(report.parts_table(parts, rows[0], facts), flush=True)
        rescored = None
        if rescorer is not None:
            rescored = rescoring.measure(job, rescorer, args.batch_sizes[0], args.repeats)
            print(report.rescoring_line(rescored), flush=True)
        if args.vs:
            print(report.vs_line(args.vs, vs_seconds, rows[0]), flush=True)
    if args.json:
        report.write_json(args.json, facts, rows, num_programs, parts, rescored, vs_seconds)
    if args.picture:
        report.draw(args.picture, facts, rows)


def own_steps(args: Args, loaded: pretrained.Loaded) -> tuple[int, ...]:
    if args.preset:
        return preset_steps(args.preset, loaded.config.model.num_codebooks)
    return args.steps or loaded.config.decode.steps


def make_job(args: Args, loaded: pretrained.Loaded) -> Job:
    """The work to time; raises `UserError` where the options do not fit the model."""
    model = loaded.config.model
    if model.kind != "magnet":
        raise UserError(f"a model of kind {model.kind}: this measures the decoding of magnet")
    steps = own_steps(args, loaded)
    if args.peer_steps:
        steps = tuple(min(count, args.peer_steps) for count in steps)
    num_frames = clip_frames(loaded, args.seconds)
    return Job(
        loaded=placement.prepare(loaded),
        decoder=pretrained.load_decoder(loaded, str(args.checkpoint)),
        num_frames=num_frames,
        decoding=dataclasses.replace(loaded.config.decode, steps=steps),
    )


def clip_frames(loaded: pretrained.Loaded, seconds: float | None) -> int:
    """Frames of a clip (None: of training), cut to whole spans; `UserError` below one of them."""
    frames = sampling.segment_frames(loaded.config, loaded.codec)
    if seconds is not None:
        frames = round(seconds * loaded.codec.frame_rate)
    span = loaded.config.decode.span_length or loaded.config.model.span_length
    if frames < span:
        raise UserError(f"--seconds {seconds}: shorter than one span of {span} frames")
    return frames // span * span


def open_rescorer(
    source: str | Path, loaded: pretrained.Loaded, guidance: float, weight: float
) -> sampling.Rescorer:
    """The second model; raises `UserError` where there is none that fits."""
    return rescore.from_model(
        rescore.load(source), loaded, guidance=guidance, weight=weight, name=str(source)
    )


def make_rescorer(args: Args, job: Job) -> sampling.Rescorer | None:
    """The second model, if one is asked for; raises `UserError` where there is none that fits."""
    if args.rescorer is None:
        return None
    sampling.check_rescored(job.decoding)
    return open_rescorer(args.rescorer, job.loaded, args.rescorer_guidance, args.rescorer_weight)


def measure_batches(args: Args, job: Job, facts: report.Facts) -> list[report.Row]:
    """A row a batch size. Ours and the peer take turns, so that a busy moment hits both."""
    peer = make_peer(args, job) if args.peer else None
    programs.forget()
    rows = []
    print(report.column_names(facts), flush=True)
    for batch in args.batch_sizes:
        states_BSE, lengths_B = job.text_states(batch)
        codes_BKT = np.zeros((batch, job.loaded.config.model.num_codebooks, job.num_frames), int)
        job.audio(codes_BKT)  # compiles
        first_call, tokens, codec, peer_runs = None, [], [], []
        for repeat in tqdm(range(args.repeats), f"batch {batch}", leave=False):
            before, started = programs.seconds(), time.perf_counter()
            codes_BKT = job.tokens(batch, repeat)
            took = time.perf_counter() - started
            first_call = first_call or took
            tokens.append(took - (programs.seconds() - before))
            codec.append(seconds_of(functools.partial(job.audio, codes_BKT)))
            if peer:
                peer_runs.append(peer_stages(peer, job, states_BSE, lengths_B, repeat))
        row = report.Row(
            batch_size=batch,
            first_call=first_call,
            tokens=min(tokens),
            codec=min(codec),
            flops=our_flops(job, states_BSE.shape[1]),
            peer_stages=min(peer_runs, key=sum, default=None),
            peer_flops=peer_flops(job, states_BSE.shape[1]),
        )
        rows.append(row)
        print(report.line(row, facts), flush=True)
    return rows


def our_flops(job: Job, text_tokens: int) -> float:
    """What a clip must cost here."""
    model, steps = job.loaded.config.model, job.decoding.steps
    return flops.floor_flops(model, job.num_frames, text_tokens, steps)


def measure_parts(job: Job, batch: int) -> report.Parts:
    """Seconds of each part of a call, from the clock at every step."""
    stamps = {}

    def on_step(done: int, total: int) -> None:
        stamps[int(done)] = time.perf_counter()

    encode = functools.partial(job.text_states, batch)
    text = min(seconds_of(encode) for _ in range(3))
    for repeat in range(2):  # the first call compiles
        started = time.perf_counter()
        codes_BKT = job.tokens(batch, repeat, on_step)
        ended = time.perf_counter()
        jax.effects_barrier()
    # A stage ends with its last step; the first begins where the text has been read.
    ends = [stamps[done] for done in np.cumsum(job.decoding.steps)]
    starts = [started + text, *ends[:-1]]
    return report.Parts(
        batch_size=batch,
        text=text,
        stages=tuple(end - start for start, end in zip(starts, ends)),
        rest=ended - ends[-1],
        codec=seconds_of(functools.partial(job.audio, codes_BKT)),
    )


# --- what ours is held against -------------------------------------------------------------------


def make_peer(args: Args, job: Job) -> "torch_peer.Peer":
    """The PyTorch peer with the same weights, warmed up."""
    from launch.benchmark import torch_peer

    model = job.loaded.config.model
    # The peer's weights have been rounded like ours; it computes in its own precision.
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), job.loaded.params["lm"])
    state_dict = lm_rules.to_audiocraft(params, model)
    peer = torch_peer.Peer(state_dict, model, args.peer_device, args.peer_dtype)
    short = dataclasses.replace(job.decoding, steps=(1,) * model.num_codebooks)
    states_BSE, lengths_B = job.text_states(1)
    peer.generate(states_BSE, lengths_B, num_frames=job.num_frames, decoding=short)
    return peer


def peer_stages(
    peer: "torch_peer.Peer", job: Job, states_BSE: np.ndarray, lengths_B: np.ndarray, seed: int
) -> tuple[float, ...]:
    """Seconds of each stage of the peer's generation, from text states to tokens."""
    seconds = [0.0] * len(job.decoding.steps)
    last = time.perf_counter()

    def on_step(stage: int, step: int) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[stage] += now - last
        last = now

    peer.generate(
        states_BSE,
        lengths_B,
        num_frames=job.num_frames,
        decoding=job.decoding,
        seed=seed,
        on_step=on_step,
    )
    return tuple(seconds)


def peer_flops(job: Job, text_tokens: int) -> float:
    """What a clip costs by the reference's law, which is the peer's."""
    model, steps = job.loaded.config.model, job.decoding.steps
    return flops.reference_flops(model, job.num_frames, text_tokens, steps)


def time_command(command: str) -> float:
    """Seconds that a shell command took, or that it reports in a line of JSON.

    Raises `UserError` if it fails.
    """
    started = time.perf_counter()
    done = subprocess.run(command, shell=True, capture_output=True, text=True, errors="replace")
    wall = time.perf_counter() - started
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise UserError(f"--vs {command!r} failed with status {done.returncode}: {said[:200]}")
    for text in reversed(done.stdout.splitlines()):
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and "seconds" in line:
                return _positive_seconds(line["seconds"], command)
    return wall


def _positive_seconds(value: object, command: str) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise UserError(f'--vs {command!r}: its "seconds" must be a number above 0, not {value!r}')
    return float(value)

"""Time and work of making clips: a part, a batch size, and against a peer."""

import contextlib
import dataclasses
import functools
import json
import math
import subprocess
import time
from typing import TYPE_CHECKING

import jax
import numpy as np
from tqdm import tqdm

from launch.benchmark import models, peaks, report, rescoring
from launch.benchmark.options import Decode
from launch.benchmark.peaks import seconds_of
from launch.compile import flops
from magnet_jax import programs
from magnet_jax.checkpoints import pretrained
from magnet_jax.config import preset_steps
from magnet_jax.convert import lm_rules
from magnet_jax.decode import placement, sampling
from magnet_jax.errors import UserError
from magnet_jax.model import precision

if TYPE_CHECKING:
    from launch.benchmark import torch_peer


def measure(args: Decode) -> None:
    """Measures, prints, and writes what `args` asks for."""
    with models.opened(args.checkpoint, args.model) as (name, loaded):
        if args.compute_dtype is not None:
            config = dataclasses.replace(loaded.config, compute_dtype=args.compute_dtype)
            loaded = loaded._replace(config=config)
        if args.peer:  # whose module imports torch
            from launch.benchmark.torch_peer import check_device

            check_device(args.peer_device)
        job = make_job(args, loaded)
        rescorer = make_rescorer(args, job)
        facts = facts_of(args, name, job)
        print(report.heading(facts), flush=True)
        found = {"facts": dataclasses.asdict(facts), "vs_seconds": None}
        if args.vs:  # first, as it may fail
            found["vs_seconds"] = min(time_command(args.vs) for _ in range(args.repeats))
        rows = measure_batches(args, job, facts)
        found |= {"rows": [row.figures() for row in rows], "programs": programs.count()}
        print(f"{found['programs']} programs for {len(rows)} shapes", flush=True)
        first = args.batch_sizes[0]
        parts = measure_parts(job, first) if args.parts else None
        if parts:
            print(report.parts_table(parts, rows[0], facts), flush=True)
        rescored = None
        if rescorer is not None:
            rescored = rescoring.measure(job, rescorer, first, args.repeats)
            print(rescored.line(), flush=True)
        if args.vs:
            print(report.vs_line(args.vs, found["vs_seconds"], rows[0]), flush=True)
    found["parts"] = parts and dataclasses.asdict(parts)
    found["rescoring"] = rescored and rescored.figures()
    report.write_json(args.json, found)


def facts_of(args: Decode, name: str, job: models.Job) -> report.Facts:
    """What all rows of the report share."""
    loaded, peer = job.loaded, args.peer
    dtype = precision.compute_dtype(loaded.config)
    return report.Facts(
        model=name,
        parameters=int(sum(leaf.size for leaf in jax.tree.leaves(loaded.params["lm"]))),
        device=jax.devices()[0].device_kind,
        dtype=dtype.name,
        num_frames=job.num_frames,
        clip_seconds=job.num_frames / loaded.codec.frame_rate,
        steps=job.decoding.steps,
        steps_cut_from=own_steps(args, loaded) if args.peer_steps else None,
        peak=peaks.jax_peak(dtype),
        peer_dtype=args.peer_dtype if peer else None,
        peer_device=args.peer_device if peer else None,
        peer_peak=peaks.torch_peak(args.peer_dtype, args.peer_device) if peer else None,
    )


def own_steps(args: Decode, loaded: pretrained.Loaded) -> tuple[int, ...]:
    if args.preset:
        return preset_steps(args.preset, loaded.config.model.num_codebooks)
    return args.steps or loaded.config.decode.steps


def make_job(args: Decode, loaded: pretrained.Loaded) -> models.Job:
    """The work to time; raises `UserError` where the options do not fit the model."""
    model = loaded.config.model
    if model.kind != "magnet":
        raise UserError(f"a model of kind {model.kind}: this measures the decoding of magnet")
    steps = own_steps(args, loaded)
    if args.peer_steps:
        steps = tuple(min(count, args.peer_steps) for count in steps)
    num_frames = models.clip_frames(loaded, args.seconds)
    return models.Job(
        loaded=placement.prepare(loaded),
        decoder=pretrained.load_decoder(loaded, str(args.checkpoint)),
        num_frames=num_frames,
        decoding=dataclasses.replace(loaded.config.decode, steps=steps),
    )


def make_rescorer(args: Decode, job: models.Job) -> sampling.Rescorer | None:
    """The second model, if one is asked for; raises `UserError` where there is none that fits."""
    if args.rescorer is None:
        return None
    sampling.check_rescored(job.decoding)
    return models.open_rescorer(
        args.rescorer, job.loaded, args.rescorer_guidance, args.rescorer_weight
    )


def measure_batches(args: Decode, job: models.Job, facts: report.Facts) -> list[report.Row]:
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


def our_flops(job: models.Job, text_tokens: int) -> float:
    """What a clip must cost here."""
    model, steps = job.loaded.config.model, job.decoding.steps
    return flops.floor_flops(model, job.num_frames, text_tokens, steps)


def measure_parts(job: models.Job, batch: int) -> report.Parts:
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


def make_peer(args: Decode, job: models.Job) -> "torch_peer.Peer":
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
    peer: "torch_peer.Peer",
    job: models.Job,
    states_BSE: np.ndarray,
    lengths_B: np.ndarray,
    seed: int,
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


def peer_flops(job: models.Job, text_tokens: int) -> float:
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

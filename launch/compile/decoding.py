"""The decoding of a batch of clips, for chips that are not there."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from launch.compile import report
from launch.make_random_checkpoint import SIZES
from magnet_jax import attention, decode, flops, hlo, sampling, targets, transformer
from magnet_jax.config import DecodeConfig, KernelConfig, ModelConfig, SamplingMeshConfig
from magnet_jax.errors import UserError

Saving = Literal["null_text", "last_guidance", "last_window", "masked_head"]
FRAME_RATE = 50  # frames a second of the published codec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """The program that decodes a batch of clips from the text encoder's states."""

    topology: str
    """What to compile for: v5e:2x2, v5p:2x2x1, v6e:4x8, h100:8, cpu:1, ..."""
    model: Literal["small", "medium"] = "small"
    """420 M or 1.8 B parameters."""
    seconds: float = 10.0
    """Length of a clip."""
    batch: int = 1
    """Clips at once."""
    text_tokens: int = 64
    """Positions that cross-attention sees."""
    steps: tuple[int, ...] = DecodeConfig().steps
    """Decoding steps of each codebook."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of matrix products and their weights; auto is float32 on a CPU, else bfloat16."""
    mesh: SamplingMeshConfig = SamplingMeshConfig()
    """The topology's first devices are used, one by default."""
    kernels: KernelConfig = KernelConfig()
    without: tuple[Saving, ...] = ()
    """Savings to do without, to see what they are worth."""
    json: Path | None = None
    """File for everything that was found out, costs of one device and of a clip."""


# --- the program ---


def decode_frames(args: Decode, model: ModelConfig) -> int:
    """Frames decoded for a clip: whole spans, and as many on every device."""
    multiple = math.lcm(model.span_length, args.mesh.frames)
    return math.ceil(args.seconds * FRAME_RATE / multiple) * multiple


def lower_decode(args: Decode, model: ModelConfig, mesh: Mesh, platform: str) -> jax.stages.Lowered:
    """The decoding program, traced with shapes in place of arrays."""
    config = DecodeConfig(steps=args.steps)
    frames, dtype = decode_frames(args, model), _dtype(args, platform)
    choice, limit = decode.choice_of(config.greedy, config.top_k, config.top_p)
    static = dict(
        config=model,
        kernels=attention.choose_kernels(
            args.kernels,
            platform,
            model,
            frames // mesh.shape["frames"],
            dtype,
            split=mesh.shape["frames"] > 1,
        ),
        choice=choice,
        span_score=config.span_score,
        guided=decode.guided_steps(config, True),
        dtype=dtype,
        savings=decode.Savings(**dict.fromkeys(args.without, False)),
    )
    static |= {f"{a}_axis": a if mesh.shape[a] > 1 else None for a in ("guidance", "frames")}

    def rounded_params(key: jax.Array) -> dict:
        return decode.round_weights(transformer.init_params(model, key), dtype)

    rows, whole = P("data"), P()
    arguments = (
        (whole, jax.eval_shape(rounded_params, jax.random.key(0))),
        (rows, jax.ShapeDtypeStruct((args.batch, args.text_tokens, model.text_width), dtype)),
        (rows, jax.ShapeDtypeStruct((args.batch, args.text_tokens), jnp.bool_)),
        (rows, jax.ShapeDtypeStruct((args.batch,), jnp.int32)),
        (rows, jax.eval_shape(decode.sample_keys, 0, np.arange(args.batch))),
        (rows, jax.ShapeDtypeStruct((args.batch, model.num_codebooks, frames), jnp.int32)),
        (whole, np.int32(0)),
        (
            whole,
            decode.make_schedule(
                config, num_frames=frames, num_prompt=0, span_length=model.span_length
            ),
        ),
        (whole, np.float32(limit)),
    )
    program = functools.partial(decode.generate, **static)
    if mesh.size > 1:
        program = jax.shard_map(
            program,
            mesh=mesh,
            in_specs=tuple(spec for spec, _ in arguments),
            out_specs=decode.Decoded(rows, P(None, "data")),
            check_vma=False,
        )
    return jax.jit(program).lower(*(_shapes(tree, mesh, spec) for spec, tree in arguments))


def _shapes(tree: Any, mesh: Mesh, spec: P) -> Any:
    """The tree with shapes on the mesh's devices in place of arrays."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=sharding), tree
    )


def _dtype(args: Decode, platform: str) -> jnp.dtype:
    automatic = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(automatic if args.dtype == "auto" else args.dtype)


def decode_costs(args: Decode) -> dict[str, Any]:
    """Compiles the decoding program and compares it with the least and with the reference."""
    if not 0 < args.seconds <= 600 or args.batch < 1 or args.text_tokens < 1:
        raise UserError("--seconds (at most 600), --batch and --text-tokens must be positive")
    report.check_file("--json", args.json)
    model = ModelConfig(**SIZES[args.model])
    if len(args.steps) != model.num_codebooks:
        raise UserError(f"--steps needs {model.num_codebooks} numbers, one a codebook")
    target = targets.load(args.topology)
    mesh = sampling.make_mesh(args.mesh, target.devices)
    if args.batch % mesh.shape["data"]:
        raise UserError(f"--batch {args.batch} does not divide by mesh.data {mesh.shape['data']}")
    frames = decode_frames(args, model)
    found = report.compiled_costs(lower_decode(args, model, mesh, target.platform), target)
    text = found.pop("text")
    if not found["readable"]:
        raise UserError(f"{args.topology}: this release of JAX does not read what was compiled")
    # A fused program has no scores; one that is not has them, for T frames or T padded to tiles.
    scores = hlo.square_arrays(text, frames, at_most=math.ceil(frames / 512) * 512)
    # The reference leaves out a last, partial span.
    whole_spans = int(args.seconds * FRAME_RATE) // model.span_length * model.span_length
    floor = flops.floor_flops(model, frames, args.text_tokens, args.steps)
    seconds = found["estimated_seconds"]
    return {
        "program": "decode",
        "arguments": dataclasses.asdict(args) | {"json": None},
        "dtype": _dtype(args, target.platform).name,
        "num_devices": mesh.size,
        "frames": frames,
        **found,
        "flops_a_clip": found["flops"] * mesh.size / args.batch,
        "floor_flops_a_clip": floor,
        "reference_flops_a_clip": flops.reference_flops(
            model, whole_spans, args.text_tokens, args.steps
        ),
        "estimated_seconds_a_clip": seconds and seconds / args.batch,
        "estimated_mfu": report.share_of_peak(args.batch * floor, seconds, target, mesh.size),
        "square_arrays": report.described(scores),
    }


# --- the table ---


def decode_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to say of decoding beyond that."""
    own, floor = found["flops_a_clip"], found["floor_flops_a_clip"]
    reference = found["reference_flops_a_clip"]
    rows = [
        (
            "FLOPs a clip",
            f"{report.size(own, 'FLOP')}: {own / floor:.3f} times the least "
            f"({report.size(floor, 'FLOP')}), {own / reference:.3f} times the reference's "
            f"({report.size(reference, 'FLOP')})",
        )
    ]
    if found["estimated_mfu"] is not None:
        rows.append(
            (
                "time a clip",
                f"{found['estimated_seconds_a_clip']:.3f} s by the compiler's estimate: the least "
                f"FLOPs at {found['estimated_mfu']:.1%} of the peak",
            )
        )
    rows.append(
        (
            f"arrays of {found['frames']} x {found['frames']}",
            report.listed(
                [
                    f"{one['type']}{'' if one['in_memory'] else ' within fusions'}"
                    for one in found["square_arrays"]
                ]
            ),
        )
    )
    return rows


def run(args: Decode) -> None:
    found = decode_costs(args)
    report.write_json(args.json, found)
    devices = f"{found['num_devices']} device{'s' * (found['num_devices'] > 1)}"
    title = (
        f"decode, {args.model}, {args.batch} x {args.seconds:g} s, {found['dtype']}, for {devices} "
        f"of {args.topology}; a device's share:"
    )
    report.show(title, report.cost_rows(found) + decode_rows(found))

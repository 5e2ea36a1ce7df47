"""Compiles programs for hardware that is not there, and says what they cost.

python -m launch.compile decode --topology v5e:2x2 --model small --seconds 10

Needs no weights, and no TPU or GPU: pip install "magnet-jax[aot-tpu]" or "magnet-jax[aot-gpu]".
Memory, FLOPs, copies and collectives are those of the program; seconds are the TPU compiler's
estimate, good to about a third, which leaves out kernels, sorts and collectives.
"""

import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from launch import cli
from launch.make_random_checkpoint import SIZES
from magnet_jax import attention, decode, flops, hlo, sampling, targets, transformer
from magnet_jax.config import DecodeConfig, KernelConfig, ModelConfig, SamplingMeshConfig
from magnet_jax.errors import UserError, reported

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


# --------------------------------------------------------------------------- the programs


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


# ------------------------------------------------------------------------------ their costs


def compiled_costs(lowered: jax.stages.Lowered, target: targets.Target) -> dict[str, Any]:
    """Compiles a program and lists what one of its devices does: `hlo.Costs` and more.

    Raises `UserError` where the compiler refuses, as for want of memory.
    """
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"{target.name}: {str(error).splitlines()[0]}") from error
    found = {"compile_seconds": time.perf_counter() - started}
    found |= dataclasses.asdict(hlo.costs(compiled))
    clock = target.chip and target.chip.clock
    estimable = clock and found["cycles"] is not None
    found["estimated_seconds"] = found["cycles"] / clock if estimable else None
    found["largest_arrays"] = _described(hlo.largest_arrays(compiled.as_text(), 5))
    return found | {"text": compiled.as_text()}


def _described(uses: list[hlo.ArrayUse]) -> list[dict[str, Any]]:
    return [
        {
            "type": str(use.array),
            "bytes": use.array.bytes,
            "opcodes": use.opcodes,
            "in_memory": use.in_memory,
        }
        for use in uses
    ]


def _share_of_peak(
    operations: float, seconds: float | None, target: targets.Target, num_devices: int
) -> float | None:
    if seconds is None or target.chip is None:
        return None
    return operations / (seconds * num_devices * target.chip.peak_flops / target.chip.devices)


def decode_costs(args: Decode) -> dict[str, Any]:
    """Compiles the decoding program and compares it with the least and with the reference."""
    if not 0 < args.seconds <= 600 or args.batch < 1 or args.text_tokens < 1:
        raise UserError("--seconds (at most 600), --batch and --text-tokens must be positive")
    if args.json and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: no such folder {args.json.absolute().parent}")
    model = ModelConfig(**SIZES[args.model])
    if len(args.steps) != model.num_codebooks:
        raise UserError(f"--steps needs {model.num_codebooks} numbers, one a codebook")
    target = targets.load(args.topology)
    mesh = sampling.make_mesh(args.mesh, target.devices)
    if args.batch % mesh.shape["data"]:
        raise UserError(f"--batch {args.batch} does not divide by mesh.data {mesh.shape['data']}")
    frames = decode_frames(args, model)
    found = compiled_costs(lower_decode(args, model, mesh, target.platform), target)
    text = found.pop("text")
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
        "estimated_mfu": _share_of_peak(args.batch * floor, seconds, target, mesh.size),
        "square_arrays": _described(scores),
    }


# -------------------------------------------------------------------------------- the table


def _size(count: float, unit: str = "B") -> str:
    """A number to three digits with its prefix: 31847415349248 -> '31.8 T'."""
    for prefix in ("", "k", "M", "G", "T"):
        if count < 999.5 or prefix == "T":
            return f"{count:.3g} {prefix}{unit}"
        count /= 1000
    raise AssertionError


def _listed(items: list[str] | tuple[str, ...]) -> str:
    return ", ".join(items) or "none"


def cost_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to say of any program, one device's share."""
    cycles, seconds = found["cycles"], found["estimated_seconds"]
    time_ = "no estimate for this hardware" if seconds is None else f"{seconds:.3f} s"
    return [
        ("compiled in", f"{found['compile_seconds']:.1f} s"),
        ("FLOPs", _size(found["flops"], "FLOP")),
        (
            "memory",
            ", ".join(
                f"{name} {_size(found[f'{name}_bytes'])}"
                for name in ("argument", "output", "temp", "code", "peak")
            ),
        ),
        ("time", time_ if cycles is None else f"{_size(cycles, '')}cycles, {time_}"),
        (
            "copies",
            f"{found['copy_runs']} from {found['copy_places']} places, "
            f"{_size(found['copy_bytes'])}; between memories {found['prefetch_runs']}, "
            f"{_size(found['prefetch_bytes'])}",
        ),
        (
            "collectives",
            _listed(
                [
                    f"{kind} {runs} from {found['collective_places'][kind]} places, "
                    f"{_size(found['collective_bytes'][kind])}"
                    for kind, runs in found["collective_runs"].items()
                ]
            ),
        ),
        ("attention", f"fused: {_listed(found['fused_attention'])}"),
        (
            "largest arrays",
            _listed([f"{one['type']} {_size(one['bytes'])}" for one in found["largest_arrays"]]),
        ),
        ("unknown loops", _listed(found["unknown_loops"])),
        ("not counted", _listed([f"{name} x {n}" for name, n in found["uncounted"].items()])),
    ]


def decode_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to say of decoding beyond that."""
    own, floor = found["flops_a_clip"], found["floor_flops_a_clip"]
    reference = found["reference_flops_a_clip"]
    rows = [
        (
            "FLOPs a clip",
            f"{_size(own, 'FLOP')}: {own / floor:.3f} times the least "
            f"({_size(floor, 'FLOP')}), {own / reference:.3f} times the reference's "
            f"({_size(reference, 'FLOP')})",
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
            _listed(
                [
                    f"{one['type']}{'' if one['in_memory'] else ' within fusions'}"
                    for one in found["square_arrays"]
                ]
            ),
        )
    )
    return rows


def show(title: str, rows: list[tuple[str, str]]) -> None:
    print(title)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:{width}}  {value}")


def decoding(args: Decode) -> None:
    found = decode_costs(args)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2, default=str) + "\n")
    devices = f"{found['num_devices']} device{'s' * (found['num_devices'] > 1)}"
    title = (
        f"decode, {args.model}, {args.batch} x {args.seconds:g} s, {found['dtype']}, for {devices} "
        f"of {args.topology}; a device's share:"
    )
    show(title, cost_rows(found) + decode_rows(found))


# One command alone would not be named on the command line; tyro pads such unions the same way.
Command = Annotated[Decode, tyro.conf.subcommand("decode")] | Annotated[None, tyro.conf.Suppress]


def main(argv: list[str] | None = None) -> None:
    args = cli.parse(Command, argv, prog="python -m launch.compile", description=__doc__)
    {Decode: decoding}[type(args)](args)


if __name__ == "__main__":
    # JAX would keep programs that only a machine with the devices can read back.
    jax.config.update("jax_enable_compilation_cache", False)
    with reported():
        main()

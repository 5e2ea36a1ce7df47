"""The program from texts to audio, for chips that are not there."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from launch.compile import flops, hlo, report, targets
from launch.compile.options import FRAME_RATE, Decode
from launch.make_random_checkpoint import CODEC_SETTINGS, SIZES
from magnet_jax import arguments
from magnet_jax.checkpoints import pretrained
from magnet_jax.codec import encodec
from magnet_jax.config import (
    CodecSpec,
    DataConfig,
    DecodeConfig,
    ModelConfig,
    RunConfig,
    preset_steps,
)
from magnet_jax.convert import codec_rules, t5_files
from magnet_jax.convert.codec_rules import SeanetConfig
from magnet_jax.decode import canvas, magnet, placement, sampler, sampling, tokens_of_text
from magnet_jax.errors import UserError
from magnet_jax.model import precision, t5, transformer

Saving = Literal[tuple(field.name for field in dataclasses.fields(magnet.Savings))]

# --- the program ---


def lower_decode(
    args: Decode, target: targets.Target, mesh: Mesh
) -> tuple[jax.stages.Lowered, RunConfig, int]:
    """The program of `sampling.generate`, traced with shapes in place of arrays.

    Also the model's config, and the frames that are decoded.
    """
    loaded, decoder = _published(args, target.platform)
    config = loaded.config
    batch = sampling.Batch(
        text=tokens_of_text.Text(
            np.zeros((args.batch_size, args.text_tokens), np.int32),
            np.ones((args.batch_size, args.text_tokens), bool),
            np.zeros(args.batch_size, np.int32),
        ),
        sample_B=np.arange(args.batch_size),
        seed=0,
        canvas=canvas.blank(
            args.batch_size, config.model.num_codebooks, round(args.seconds * FRAME_RATE)
        ),
        decoding=config.decode,
        decoder=decoder,
    )
    inputs, made_for = sampling.make_program(
        loaded,
        batch,
        placement.Execution(
            kernels=args.kernels,
            mesh=args.mesh,
            savings=dataclasses.replace(magnet.ALL_SAVINGS, **dict.fromkeys(args.without, False)),
        ),
        platform=target.platform,
        mesh=mesh if mesh.size > 1 else None,
    )
    shapes = sampler.Inputs(
        *(_shapes(tree, mesh, spec) for tree, spec in zip(inputs, sampler.SPECS, strict=True))
    )
    num_frames = inputs.canvas.codes_BKT.shape[-1]
    return sampler.sample.lower(shapes, sampler=made_for), config, num_frames


def _published(args: Decode, platform: str) -> tuple[pretrained.Loaded, encodec.Decoder | None]:
    """A model of a published size and its codec's decoder, with shapes for parameters."""
    model, decode = ModelConfig(**SIZES[args.model]), args.decode
    if args.preset:
        steps = preset_steps(args.preset, model.num_codebooks)
        decode = dataclasses.replace(decode, steps=steps)
    config = RunConfig(
        model=model,
        data=DataConfig(segment_seconds=args.seconds),
        decode=decode,
        compute_dtype=args.compute_dtype,
    )
    dtype = precision.compute_dtype(config, platform)
    t5_config = t5_files.PUBLISHED["t5-base"]

    def rounded(init: Callable[[jax.Array], dict]) -> dict:
        return jax.eval_shape(
            lambda key: precision.round_weights(init(key), dtype), jax.random.key(0)
        )

    spec = CodecSpec(
        source="facebook/encodec_32khz",
        sha256="",
        sample_rate=CODEC_SETTINGS["sampling_rate"],
        channels=1,
        frame_rate=float(FRAME_RATE),
        num_codebooks=model.num_codebooks,
        codebook_size=model.codebook_size,
    )
    loaded = pretrained.Loaded(
        config=config,
        codec=spec,
        codec_source=spec.source,
        params={"lm": rounded(functools.partial(transformer.init_params, model))},
        t5_config=t5_config,
        t5_params=rounded(functools.partial(t5.init, t5_config)),
        tokenizer=None,
        step=0,
        lineage={},
    )
    if args.tokens_only:
        return loaded, None
    fields = {field.name for field in dataclasses.fields(SeanetConfig)}
    seanet = SeanetConfig(**{k: v for k, v in CODEC_SETTINGS.items() if k in fields})
    layout = codec_rules.codec_layout(CODEC_SETTINGS, model.num_codebooks)
    ones = {name: np.broadcast_to(np.float32(1), shape) for name, _, shape in layout}
    params = codec_rules.decoder_params(ones, seanet, model.num_codebooks)
    return loaded, encodec.Decoder(spec, seanet, params)


def _shapes(tree: Any, mesh: Mesh, spec: P) -> Any:
    """The tree with shapes on the mesh's devices in place of arrays."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=sharding), tree
    )


def decode_costs(args: Decode) -> dict[str, Any]:
    """Compiles the decoding program and compares it with the least and with the reference."""
    arguments.check(tuple[Saving, ...], args.without, "--without")
    report.check_file("--json", args.json)
    if args.preset and args.decode.steps != DecodeConfig.steps:
        raise UserError("give either --decode.steps or --preset")
    target = targets.load(args.topology)
    mesh = placement.sampling_mesh(args.mesh, target.devices)
    if args.batch_size % mesh.shape["data"]:
        raise UserError(
            f"--batch-size {args.batch_size} does not divide by mesh.data {mesh.shape['data']}"
        )
    lowered, config, frames = lower_decode(args, target, mesh)
    found = report.compiled_costs(lowered, target)
    text = found.pop("text")
    if not found["readable"]:
        raise UserError(f"{args.topology}: this release of JAX does not read what was compiled")
    # A fused program has no scores; one that is not has them, for T frames or T padded to tiles.
    scores = hlo.square_arrays(text, frames, at_most=math.ceil(frames / 128) * 128)
    model, steps = config.model, config.decode.steps
    floor = flops.floor_flops(model, frames, args.text_tokens, steps)
    # The reference leaves out a last, partial span.
    whole_spans = int(args.seconds * FRAME_RATE) // model.span_length * model.span_length
    seconds = found["estimated_seconds"]
    return {
        "program": "decode",
        "arguments": dataclasses.asdict(args) | {"json": None},
        "dtype": precision.compute_dtype(config, target.platform).name,
        "num_devices": mesh.size,
        "frames": frames,
        **found,
        "flops_a_clip": found["flops"] * mesh.size / args.batch_size,
        "floor_flops_a_clip": floor,
        "reference_flops_a_clip": flops.reference_flops(
            model, whole_spans, args.text_tokens, steps
        ),
        "estimated_seconds_a_clip": seconds and seconds / args.batch_size,
        "estimated_mfu": report.share_of_peak(args.batch_size * floor, seconds, target, mesh.size),
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
        f"decode, {args.model}, {args.batch_size} x {args.seconds:g} s, {found['dtype']}, for "
        f"{devices} of {args.topology}; a device's share:"
    )
    report.show(title, report.cost_rows(found) + decode_rows(found))

"""From texts to tokens and audio with a loaded model, of any kind.

The whole way, from the tokens of the texts to the samples of the audio, is one program
(`clip_program`): no host in between, and few shapes. Texts go in buckets, as do the lengths of
MAGNeT. A `Rescorer` takes part in that program. A MusicGen is to it a hybrid whose clips are
beginning from end to end.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from magnet_jax import arguments, programs
from magnet_jax.arguments import Between, Seed
from magnet_jax.checkpoints.pretrained import Loaded
from magnet_jax.codec import encodec, seanet
from magnet_jax.config import (
    SAMPLING_CONFIGS,
    AutoregressiveConfig,
    CodecSpec,
    DecodeConfig,
    HybridConfig,
    KernelConfig,
    ModelConfig,
    RescoreConfig,
    RunConfig,
    SamplingConfig,
    SamplingMeshConfig,
)
from magnet_jax.convert.codec_rules import SeanetConfig
from magnet_jax.decode import autoregressive, hybrid, parallel
from magnet_jax.errors import UserError
from magnet_jax.model import t5
from magnet_jax.model.kernels import choose_kernels

TextPadLen = Literal["batch"] | Annotated[int, Between(0, 2**16)] | None
SHORTEST_TEXT = 16  # tokens of the smallest text bucket; the others double
AXES = ("data", "guidance", "frames")
# Frames whose samples are computed at once: all those of a clip would take most of the memory.
AUDIO_PIECE = 32
# Rows that the codec's LSTM is filled up to: with fewer than 8 a TPU multiplies in vector units.
LSTM_ROWS = {"cpu": 1, "gpu": 1, "tpu": 8}


class Generated(NamedTuple):
    codes_BKT: np.ndarray  # int32 token ids
    # bool, True where step P of parallel decoding predicted; None of clips made in windows
    hidden_PBT: np.ndarray | None
    wav_BCN: np.ndarray | None = None  # float32 audio, where a decoder was given


class Text(NamedTuple):
    """The tokens of a batch of texts, as the text encoder and the network take them."""

    ids_BS: np.ndarray
    mask_BS: np.ndarray
    num_zero_keys_B: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How sampling runs on the hardware. It changes nothing but the rounding of floats."""

    kernels: KernelConfig = KernelConfig()
    mesh: SamplingMeshConfig = SamplingMeshConfig()
    savings: parallel.Savings | None = None
    """None: those that pay on the platform, `parallel.default_savings`."""
    say: programs.Say | None = None
    """Takes a line when a program is compiled, and one when it is done."""


class Rescorer(NamedTuple):
    """A second model that judges what MAGNeT is about to keep; rescore.py has those that ship.

    Any two functions will do, such as
    `Rescorer(read, {"table": table_V}, lambda texts, text_pad_len: np.zeros(len(texts)))`.
    """

    read: Callable[..., Callable[..., jax.Array]]
    """(params, texts, *, num_frames, length) -> probabilities, traced once a clip: prepares what
    all steps share, and gives the function that `parallel.Rescoring` describes. `length` is None or
    the frames that exist of `num_frames`. One function object, one program."""
    params: Any
    """Arrays, in trees; on a mesh every device has all of them."""
    tokenize: Callable[[Sequence[str], int | Literal["batch"] | None], Any]
    """(texts, text_pad_len) -> texts as `read` takes them: arrays of a row a clip, in trees. For
    the arguments see `tokenize_texts`."""


def compute_dtype(config: RunConfig, platform: str | None = None) -> jnp.dtype:
    """Precision of the matrix products on a platform; None is this machine's."""
    if config.compute_dtype == "auto":
        platform = platform or jax.default_backend()
        return jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.compute_dtype)


def place(decoder: encodec.Decoder, execution: Execution) -> encodec.Decoder:
    """The decoder with its parameters on all devices, as `prepare` does with the model's."""
    mesh = make_mesh(execution.mesh)
    if mesh.size == 1:
        return decoder
    return decoder._replace(params=jax.device_put(decoder.params, NamedSharding(mesh, P())))


def make_mesh(config: SamplingMeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over the first of these devices (this machine's), or all of them.

    Raises `UserError` if there are not as many.
    """
    devices = jax.devices() if devices is None else devices
    others = config.guidance * config.frames
    data = max(len(devices) // others, 1) if config.data == -1 else config.data
    if data * others > len(devices):
        raise UserError(
            f"mesh data={data} guidance={config.guidance} frames={config.frames} needs "
            f"{data * others} devices; there are {len(devices)}"
        )
    grid = np.asarray(devices[: data * others]).reshape(data, config.guidance, config.frames)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def prepare(loaded: Loaded, execution: Execution = Execution()) -> Loaded:
    """The model as it is sampled from: weights in the precision of the products, on all devices.

    Nothing needs it; without, weights are rounded at every step and sent at every call.

    Raises `UserError` where the model cannot be run so.
    """
    check_execution(loaded.config.model, execution)
    return on_devices(loaded, execution)


def on_devices(loaded: Loaded, execution: Execution) -> Loaded:
    """`prepare` for a model that may be another's rescorer, which runs where that one does."""
    dtype, mesh = compute_dtype(loaded.config), make_mesh(execution.mesh)
    place = NamedSharding(mesh, P()) if mesh.size > 1 else mesh.devices.item()
    params = jax.device_put(loaded.params, place)
    t5_params = jax.device_put(loaded.t5_params, place)
    if dtype != jnp.float32:
        params = params | {"lm": parallel.round_weights(params["lm"], dtype)}
        t5_params = parallel.round_weights(t5_params, dtype)
    return loaded._replace(params=params, t5_params=t5_params)


def segment_frames(config: RunConfig, spec: CodecSpec) -> int:
    """Frames of a clip in training."""
    return round(config.data.segment_seconds * spec.frame_rate)


def notes_on_cut_texts(loaded: Loaded, texts: Sequence[str]) -> list[str]:
    """A line for each text that is longer than what the model reads."""
    max_tokens = loaded.config.text.max_tokens
    return [
        f"cut to the {max_tokens} tokens that the model reads: {text[:60]}..."
        for text in texts
        if len(loaded.tokenizer.encode(text).ids) > max_tokens
    ]


def tokenize_texts(loaded: Loaded, texts: Sequence[str], text_pad_len: TextPadLen = None) -> Text:
    """The tokens of descriptions, of which an empty one stands for no text.

    `text_pad_len` attends over zeros up to that many positions behind each text, 'batch' up to
    the longest text of the batch, which is what AudioCraft does. By default a text is all that is
    attended over, and no sample depends on its neighbours.

    The width S is the least of 16, 32, 64, ... that holds the longest text: few shapes, and short
    texts are cheap.
    """
    text_pad_len = arguments.check(TextPadLen, text_pad_len, "text_pad_len")
    if not texts:
        raise UserError("no clips are asked for: give at least one text, '' for none")
    max_tokens = loaded.config.text.max_tokens
    tokens = [t5.tokenize(loaded.tokenizer, text, max_tokens) for text in texts]
    ids_BS = np.stack([ids for ids, _ in tokens])
    mask_BS = np.stack([mask for _, mask in tokens])
    lengths_B = mask_BS.sum(-1)
    longest = int(lengths_B.max(initial=0))
    bucket = min(max_tokens, max(SHORTEST_TEXT, 2 ** math.ceil(math.log2(max(longest, 1)))))
    width = {None: 0, "batch": longest}.get(text_pad_len, text_pad_len)
    zeros_B = np.where(lengths_B > 0, np.maximum(width - lengths_B, 0), 0)
    return Text(ids_BS[:, :bucket], mask_BS[:, :bucket], zeros_B.astype(np.int32))


def frame_bucket(num_frames: int, usual: int, multiple: int) -> int:
    """How many frames are computed for a clip of `num_frames`: a multiple of `multiple`.

    The usual length is computed as it is; others are rounded up to one of eight lengths an octave,
    so that few programs serve all.
    """
    if num_frames != usual:
        step = max(2 ** (num_frames.bit_length() - 4), 1)
        num_frames = math.ceil(num_frames / step) * step
    return math.ceil(num_frames / multiple) * multiple


def generate(
    loaded: Loaded,
    texts: Sequence[str],
    *,
    num_frames: int,
    decoding: SamplingConfig,
    seed: int,
    first_sample: int = 0,
    prompt_BKP: np.ndarray | None = None,
    text_pad_len: TextPadLen = None,
    decoder: encodec.Decoder | encodec.Codec | None = None,
    rescorer: Rescorer | None = None,
    rescorer_weight: float = RescoreConfig.weight,
    execution: Execution = Execution(),
    on_step: Callable[[int, int], None] | None = None,
) -> Generated:
    """Generates the tokens of one clip a text and, with a `decoder`, its audio.

    Args:
      loaded: the model.
      texts: descriptions; an empty one is generated without text.
      num_frames: frames of a clip, the prompt's included.
      decoding: schedule and sampling, of the model's kind.
      seed, first_sample: clip i depends on (seed, first_sample + i) and its text alone.
      prompt_BKP: given first frames of each clip.
      text_pad_len: see `tokenize_texts`.
      decoder: turns the tokens into audio, in JAX as part of the program, or in PyTorch.
      rescorer: a second model that takes part in scoring spans, of MAGNeT.
      rescorer_weight: its share of the scores, from 0 (as without it, bit for bit) to 1 (it alone).
      execution: how to run on the hardware.
      on_step: called with (steps done, steps in all) while the program runs; one function object,
        one program.

    Raises:
      UserError: the decoding, the prompt, the rescorer or the hardware does not fit the model.
    """
    model, batch = loaded.config.model, len(texts)
    seed = arguments.check(Seed, seed, "seed")
    if not isinstance(decoding, SAMPLING_CONFIGS[model.kind]):
        raise UserError(f"{type(decoding).__name__} cannot steer a model of kind {model.kind}")
    if prompt_BKP is None:
        prompt_BKP = np.zeros((batch, model.num_codebooks, 0), np.int32)
    if prompt_BKP.shape[-1] >= num_frames:
        raise UserError(
            f"a prompt of {prompt_BKP.shape[-1]} frames leaves nothing to generate of "
            f"{num_frames}: ask for more seconds, or give a shorter prompt"
        )
    RescoreConfig(weight=rescorer_weight)  # checks it
    if rescorer is not None and not model.parallel:
        raise UserError(f"a model of kind {model.kind} has no spans to score: leave out rescorer")
    rescoring = None
    if rescorer is not None and rescorer_weight != 0:
        rescoring = _Rescoring(
            rescorer, rescorer.tokenize(texts, text_pad_len), np.float32(rescorer_weight)
        )
    generated = _run(
        loaded,
        tokenize_texts(loaded, texts, text_pad_len),
        np.arange(first_sample, first_sample + batch),
        seed,
        np.asarray(prompt_BKP, np.int32),
        num_frames,
        decoding,
        decoder.config if isinstance(decoder, encodec.Decoder) else None,
        decoder.params if isinstance(decoder, encodec.Decoder) else None,
        execution,
        on_step,
        rescoring=rescoring,
    )
    if isinstance(decoder, encodec.Codec):
        return generated._replace(wav_BCN=decode_audio(decoder, generated.codes_BKT))
    return generated


_SAMPLES = 2**16  # by which the numbers of a clip's windows lie apart


def window_stride(loaded: Loaded, seconds: float | None, name: str) -> float:
    """Seconds by which the windows of `generate_in_windows` lie apart; None is 0.6 of a window.

    Raises `UserError`, which calls the number `name`, for what is no part of a window.
    """
    window, frames = loaded.config.data.segment_seconds, segment_frames(loaded.config, loaded.codec)
    if seconds is None:
        return 0.6 * window
    if not 0 < seconds < window or not 1 <= round(seconds * loaded.codec.frame_rate) < frames:
        raise UserError(
            f"{name} must lie between 0 and {window:g} seconds, the length of a window, not "
            f"{seconds:g}"
        )
    return seconds


def generate_in_windows(
    loaded: Loaded,
    texts: Sequence[str],
    *,
    num_frames: int,
    stride_seconds: float,
    decoder: encodec.Decoder | encodec.Codec,
    first_sample: int = 0,
    prompt_BKP: np.ndarray | None = None,
    **keywords,
) -> Generated:
    """`generate` of a MusicGen, which knows no positions beyond the length it was trained on.

    Longer clips are made in windows of that length, each of which goes on from what the one before
    made of it.

    Args:
      stride_seconds: by which windows lie apart, see `window_stride`.
      loaded, texts, num_frames, decoder, first_sample, prompt_BKP, keywords: see `generate`.
    """
    rate, window = loaded.codec.frame_rate, segment_frames(loaded.config, loaded.codec)
    if prompt_BKP is None:
        prompt_BKP = np.zeros((len(texts), loaded.config.model.num_codebooks, 0), np.int32)
    if prompt_BKP.shape[-1] >= min(window, num_frames):
        raise UserError(
            f"a prompt of {prompt_BKP.shape[-1] / rate:g} s leaves nothing to generate of "
            f"{min(window, num_frames) / rate:g} s"
        )
    if first_sample + len(texts) > _SAMPLES:
        raise UserError(f"clips longer than a window are numbered up to {_SAMPLES - 1}")
    stride = max(1, round(stride_seconds * rate))
    codes_BKT, start, number = prompt_BKP, 0, 0
    while codes_BKT.shape[-1] < num_frames:
        generated_BKT = generate(
            loaded,
            texts,
            num_frames=min(window, num_frames - start),
            # each window has random numbers of its own
            first_sample=first_sample + number * _SAMPLES,
            prompt_BKP=codes_BKT[..., start:],
            **keywords,
        ).codes_BKT
        codes_BKT = np.concatenate([codes_BKT[..., :start], generated_BKT], axis=-1)
        start, number = start + stride, number + 1
    return Generated(codes_BKT, None, decode_audio(decoder, codes_BKT))


def _clips(count: int, num_frames: int, loaded: Loaded) -> str:
    """What a program is for, in words."""
    seconds = num_frames / loaded.codec.frame_rate
    return f"{count} clip{'s' * (count > 1)} of {seconds:.3g} s"


# --- the program --------------------------------------------------------------------------------


class _Rescoring(NamedTuple):
    """A rescorer at work on a batch."""

    rescorer: Rescorer
    texts: Any
    weight: np.float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipProgram:
    """What a program is made for, beside its shapes."""

    model: ModelConfig
    t5_config: t5.T5Config
    decoder: SeanetConfig | None
    kernels: KernelConfig
    choice: parallel.Choice
    span_score: Literal["max", "prod"]
    span_arrangement: Literal["nonoverlap", "stride1"]
    guided: parallel.GuidedSteps
    dtype: jnp.dtype
    audio_frames: int | None  # None where it is traced, as is the length of the clip
    savings: parallel.Savings
    platform: str
    mesh: Mesh | None
    on_step: Callable[[int, int], None] | None
    read_rescorer: Callable[..., Callable[..., jax.Array]] | None
    beginning: hybrid.Beginning | None  # of clips that begin one step after another


# How the arguments of `clip_program` lie on a mesh: parameters everywhere, clips split.
CLIP_SPECS = (P(),) * 3 + (P("data"),) * 3 + (P(),) * 6 + (P(), P("data"), P())


@functools.partial(jax.jit, static_argnames="made_for", donate_argnames="codes_BKT")
def clip_program(
    params: dict,
    t5_params: dict,
    decoder_params: dict | None,
    text: Text,
    keys_B: jax.Array,
    codes_BKT: jax.Array,
    num_prompt: jax.Array,
    length: jax.Array | None,
    audio_length: jax.Array | None,
    schedule: tuple[parallel.Schedule, ...],
    limit: jax.Array,
    beginning_sampling: autoregressive.Sampling | None,
    rescorer_params: Any,
    rescorer_texts: Any,
    rescorer_weight: jax.Array | None,
    *,
    made_for: ClipProgram,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """From the tokens of texts to tokens of audio, and to audio.

    Args:
      params, t5_params, decoder_params: of the transformer, of T5, of EnCodec's decoder.
      text: from `tokenize_texts`; of no rows where no clip has a text.
      keys_B, schedule, limit, num_prompt: see `parallel.decode`.
      codes_BKT: the prompt, then mask ids; donated.
      beginning_sampling: of clips that begin one step after another.
      length, audio_length: frames of the clip in whole spans and of its audio, where those are
        fewer than T; None where the shapes say it all.
      rescorer_params, rescorer_texts, rescorer_weight: see `Rescorer`; None where there is none.
      made_for: everything else.

    Returns:
      codes_BKT, hidden_PBT, and wav_BCN or None.
    """
    mesh = made_for.mesh
    run = functools.partial(_clips_of, made_for=made_for)
    if mesh is not None:
        run = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=CLIP_SPECS,
            out_specs=(P("data"), P(None, "data"), P("data")),
            check_vma=False,
        )
    return run(
        params, t5_params, decoder_params, text, keys_B, codes_BKT, num_prompt, length,
        audio_length, schedule, limit, beginning_sampling, rescorer_params, rescorer_texts,
        rescorer_weight,
    )  # fmt: skip


def _clips_of(
    params, t5_params, decoder_params, text, keys_B, codes_BKT, num_prompt, length, audio_length,
    schedule, limit, beginning_sampling, rescorer_params, rescorer_texts, rescorer_weight, *,
    made_for: ClipProgram,
):  # fmt: skip
    """`clip_program` on one device of the mesh."""
    rescoring = None
    if made_for.read_rescorer is not None:
        # (the whole rescorer on every device: of its axes a mesh splits it by `data` alone)
        probabilities = made_for.read_rescorer(
            rescorer_params, rescorer_texts, num_frames=codes_BKT.shape[-1], length=length
        )
        rescoring = parallel.Rescoring(probabilities, rescorer_weight)
    axis_size = dict(made_for.mesh.shape) if made_for.mesh else dict.fromkeys(AXES, 1)
    states_BSE = t5.encode(
        t5_params, made_for.t5_config, text.ids_BS, text.mask_BS, dtype=made_for.dtype
    )
    if made_for.beginning is None:
        generate = functools.partial(
            parallel.generate,
            kernels=made_for.kernels,
            guidance_axis="guidance" if axis_size["guidance"] > 1 else None,
            frames_axis="frames" if axis_size["frames"] > 1 else None,
        )
    else:
        generate = functools.partial(
            hybrid.generate,
            beginning=made_for.beginning,
        )
    decoded = generate(
        params,
        states_BSE,
        text.mask_BS,
        text.num_zero_keys_B,
        keys_B,
        codes_BKT,
        num_prompt if made_for.beginning is None else beginning_sampling,
        schedule,
        limit,
        config=made_for.model,
        choice=made_for.choice,
        span_score=made_for.span_score,
        span_arrangement=made_for.span_arrangement,
        guided=made_for.guided,
        length=length,
        dtype=made_for.dtype,
        savings=made_for.savings,
        rescoring=rescoring,
        on_step=made_for.on_step,
    )
    wav_BCN = None
    if made_for.decoder is not None:
        wav_BCN = _audio(
            decoder_params,
            decoded.codes_BKT[..., : made_for.audio_frames],
            audio_length,
            config=made_for.decoder,
            platform=made_for.platform,
        )
    return *decoded, wav_BCN


def clip_arguments(
    loaded: Loaded,
    text: Text,
    sample_B: np.ndarray,
    seed: int,
    prompt_BKP: np.ndarray,
    num_frames: int,
    decoding: SamplingConfig,
    decoder_config: SeanetConfig | None,
    decoder_params: dict | None,
    execution: Execution,
    on_step: Callable[[int, int], None] | None,
    *,
    platform: str,
    mesh: Mesh | None,
    rescoring: _Rescoring | None = None,
) -> tuple[tuple, ClipProgram]:
    """The arguments of `clip_program`, arrays and `made_for`."""
    model, axis_size = loaded.config.model, dict(mesh.shape) if mesh else dict.fromkeys(AXES, 1)
    any_text = bool(text.mask_BS.any())
    num_prompt = prompt_BKP.shape[-1]
    spans = decoding.decode if isinstance(decoding, HybridConfig) else decoding
    if isinstance(spans, DecodeConfig):
        if spans.span_length > num_frames:
            raise UserError(
                f"span_length {spans.span_length} is longer than the clip, which has {num_frames} "
                "frames: give fewer"
            )
        if spans.span_length:
            model = dataclasses.replace(model, span_length=spans.span_length)
        # (first, as a hybrid's beginning may be all that is left of a clip)
        num_frames, _ = decoded_frames(model, spans, num_frames)
    if num_prompt >= num_frames:
        raise UserError(f"the prompt leaves nothing to generate of {num_frames} whole-span frames")
    beginning, beginning_sampling = None, None
    if model.autoregressive:
        beginning, beginning_sampling, decoding = _beginning(
            loaded, decoding, num_prompt, num_frames, any_text, platform
        )
    whole = beginning is not None and beginning.whole  # then nothing is decoded in spans
    if not whole and len(decoding.steps) != model.num_codebooks:
        raise UserError(
            f"decode.steps has {len(decoding.steps)} numbers, the model {model.num_codebooks} "
            "codebooks: give one number a codebook"
        )
    if rescoring is not None:
        check_rescored(decoding, whole=whole)
    usual = segment_frames(loaded.config, loaded.codec)
    if whole:
        usual = bucket = num_decoded = num_frames
        prompts = num_frames
    else:
        _, usual = decoded_frames(model, decoding, usual)
        _, num_decoded = decoded_frames(model, decoding, num_frames)
        shards = axis_size["frames"]
        grid = 1 if decoding.span_arrangement == "stride1" else model.span_length
        bucket = frame_bucket(num_decoded, usual, math.lcm(shards, grid))
        prompts = num_prompt
        if beginning is not None:
            prompts = beginning.of_codebooks(model.delays, num_decoded)
    dtype = compute_dtype(loaded.config, platform)
    savings = execution.savings or parallel.default_savings(platform)
    kernels = choose_kernels(
        execution.kernels,
        platform,
        model,
        bucket // axis_size["frames"],
        dtype,
        split=axis_size["frames"] > 1,
    )
    # (a bucket that is full by chance shares its program with shorter clips)
    exact = bucket == num_decoded == usual
    null_text = savings.null_text and model.null_text_adds_nothing
    if not any_text and mesh is None and null_text:
        text = Text(*(x[:0] for x in text))
    batch = len(sample_B)
    padded = math.ceil(batch / axis_size["data"]) * axis_size["data"]
    codes_BKT = np.full((batch, model.num_codebooks, bucket), model.mask_id, np.int32)
    codes_BKT[..., :num_prompt] = prompt_BKP

    def fill(x):  # the last clip again, where devices would be idle
        return np.concatenate([x, np.repeat(x[-1:], padded - batch, axis=0)])

    if mesh is not None:
        text = Text(*map(fill, text))
    rescorer_arguments = (None, None, None)
    if rescoring is not None:
        texts = jax.tree.map(fill, rescoring.texts)
        rescorer_arguments = (rescoring.rescorer.params, texts, rescoring.weight)
    choice, limit = parallel.choice_of(decoding.greedy, decoding.top_k, decoding.top_p)
    made_for = ClipProgram(
        model=model,
        t5_config=loaded.t5_config,
        decoder=decoder_config,
        kernels=kernels,
        choice=choice,
        span_score=decoding.span_score,
        span_arrangement=decoding.span_arrangement,
        guided=parallel.guided_steps(decoding, any_text),
        dtype=dtype,
        audio_frames=num_frames if exact else None,
        savings=savings,
        platform=platform,
        mesh=mesh,
        on_step=on_step,
        read_rescorer=None if rescoring is None else rescoring.rescorer.read,
        beginning=beginning,
    )
    arrays = (
        loaded.params["lm"],
        loaded.t5_params,
        decoder_params,
        text,
        parallel.sample_keys(seed, jnp.asarray(fill(sample_B))),
        jnp.asarray(fill(codes_BKT)),
        np.int32(num_prompt),
        None if exact else np.int32(num_decoded),
        None if exact else np.int32(num_frames),
        ()
        if whole
        else parallel.make_schedule(
            decoding, num_frames=num_decoded, num_prompt=prompts, span_length=model.span_length
        ),
        np.float32(limit),
        beginning_sampling,
        *rescorer_arguments,
    )
    return arrays, made_for


def check_rescored(decoding: SamplingConfig, *, whole: bool = False) -> None:
    """Raises `UserError` where a rescorer would never be asked; `whole` as of `Beginning`."""
    if whole:
        raise UserError(
            "nothing is rescored of a clip that is made one step after another to its end: leave "
            "out the rescorer, or give a hybrid fewer prompt seconds"
        )
    spans = decoding.decode if isinstance(decoding, HybridConfig) else decoding
    if max(spans.steps) == 1:
        raise UserError(
            "nothing is rescored where every codebook has one step: leave out the rescorer, or "
            "give more decoding steps"
        )


def _beginning(
    loaded: Loaded,
    decoding: AutoregressiveConfig | HybridConfig,
    num_given: int,
    num_frames: int,
    any_text: bool,
    platform: str,
) -> tuple[hybrid.Beginning, autoregressive.Sampling, DecodeConfig]:
    """How clips of a model that can be autoregressive begin, and how they go on."""
    if isinstance(decoding, AutoregressiveConfig):
        first, first_frames, rest = decoding, num_frames, DecodeConfig()
    else:
        first, rest = decoding.autoregressive, decoding.decode
        wanted = decoding.prompt_seconds * loaded.codec.frame_rate
        first_frames = max(num_given, round(min(wanted, num_frames)))
    choice, limit = parallel.choice_of(first.greedy, first.top_k, first.top_p)
    beginning = hybrid.Beginning(
        num_given=num_given,
        num_frames=first_frames,
        whole=first_frames == num_frames,
        choice=choice,
        guided=any_text and first.guidance != 1,
        apart=platform == "cpu",
    )
    numbers = (first.temperature, limit, first.guidance)
    return beginning, autoregressive.Sampling(*map(np.float32, numbers)), rest


def _run(
    loaded, text, sample_B, seed, prompt_BKP, num_frames, decoding, *rest, rescoring=None
) -> Generated:
    *_, execution, _ = rest
    mesh = make_mesh(execution.mesh)
    if mesh.size == 1:
        mesh = None  # (a mesh of one would pin to it what lies elsewhere, such as a run's)
    else:
        loaded = prepare(loaded, execution)
        if rescoring is not None:
            params = jax.device_put(rescoring.rescorer.params, NamedSharding(mesh, P()))
            rescorer = rescoring.rescorer._replace(params=params)
            rescoring = rescoring._replace(rescorer=rescorer)
    arrays, made_for = clip_arguments(
        loaded, text, sample_B, seed, prompt_BKP, num_frames, decoding, *rest,
        platform=jax.default_backend(), mesh=mesh, rescoring=rescoring,
    )  # fmt: skip
    batch = len(sample_B)
    if made_for.beginning is None or not made_for.beginning.whole:
        spans = decoding.decode if isinstance(decoding, HybridConfig) else decoding
        num_frames, _ = decoded_frames(made_for.model, spans, num_frames)
    codes_BKT, hidden_PBT, wav_BCN = programs.call(
        clip_program,
        *arrays,
        what=_clips(batch, num_frames, loaded),
        say=execution.say,
        made_for=made_for,
    )
    computed_frames = codes_BKT.shape[-1]
    codes_BKT = np.asarray(codes_BKT)[:batch, :, :num_frames]
    if (codes_BKT >= made_for.model.codebook_size).any():  # see `parallel.choose_token`
        raise UserError(
            f"the model{' or its rescorer' * bool(made_for.read_rescorer)} computes NaN in place "
            "of probabilities, and no clip was made: its weights are damaged, or their training "
            "diverged"
        )
    if wav_BCN is not None:
        hop = wav_BCN.shape[-1] // (made_for.audio_frames or computed_frames)
        wav_BCN = _sound(np.asarray(wav_BCN)[:batch, :, : num_frames * hop])
    return Generated(codes_BKT, np.asarray(hidden_PBT)[:, :batch, :num_frames], wav_BCN)


def decoded_frames(model: ModelConfig, decoding: DecodeConfig, num_frames: int) -> tuple[int, int]:
    """Frames of a clip, and frames to decode for it, of which the rest is cut off.

    Spans on a grid fill whole spans only. The last, partial one is decoded whole and cut, or, with
    `whole_spans`, left out.
    """
    span = model.span_length
    if decoding.span_arrangement == "stride1":
        return num_frames, max(num_frames, span)
    if decoding.whole_spans:
        num_frames = max(num_frames // span, 1) * span
    return num_frames, math.ceil(num_frames / span) * span


# --- what programs share ------------------------------------------------------------------------

_encode = jax.jit(t5.encode, static_argnames=("config", "dtype"))


def check_execution(model: ModelConfig, execution: Execution) -> None:
    """Raises `UserError` for what a model of kind musicgen or hybrid does not have."""
    mesh = dataclasses.replace(execution.mesh, data=1)
    asked = (mesh, execution.kernels)
    if model.autoregressive and asked != (SamplingMeshConfig(), KernelConfig()):
        raise UserError(
            f"a model of kind {model.kind} has one kernel of attention, and splits a batch alone: "
            "leave out kernels, mesh.guidance and mesh.frames"
        )


def encode_texts(loaded: Loaded, text: Text) -> jax.Array:
    """The text encoder's states, float32 [B, S, E]."""
    return _encode(
        loaded.t5_params,
        config=loaded.t5_config,
        text_ids_BS=text.ids_BS,
        text_mask_BS=text.mask_BS,
        dtype=compute_dtype(loaded.config),
    )


# --- audio --------------------------------------------------------------------------------------


def _audio(
    params: dict,
    codes_BKT: jax.Array,
    length: jax.Array | None,
    *,
    config: SeanetConfig,
    platform: str,
) -> jax.Array:
    """`seanet.decode` as the platform likes it; [B, C, T * hop]."""
    run = functools.partial(
        seanet.decode,
        params,
        config=config,
        length=length,
        lstm_rows=LSTM_ROWS[platform],
        piece=AUDIO_PIECE,
    )
    if platform != "cpu":
        return run(codes_BKT)
    # A CPU gains nothing from batches, whose convolutions round otherwise than a clip's alone.
    return jax.lax.map(lambda codes_KT: run(codes_KT[None])[0], codes_BKT)


_decode = jax.jit(_audio, static_argnames=("config", "platform"))


def _decode_codes(config: SeanetConfig, params: dict, codes_BKT: jax.Array) -> np.ndarray:
    platform = jax.default_backend()
    return np.asarray(_decode(params, codes_BKT, None, config=config, platform=platform))


def decode_audio(decoder: encodec.Decoder | encodec.Codec, codes_BKT: np.ndarray) -> np.ndarray:
    """Audio [B, C, N] (float32) of tokens, a clip's the same whatever is decoded with it."""
    if isinstance(decoder, encodec.Decoder):
        encodec.check_codes(codes_BKT, decoder.spec)
        return _sound(_decode_codes(decoder.config, decoder.params, codes_BKT))
    # One at a time: PyTorch's convolutions round differently in batches.
    return _sound(np.concatenate([decoder.decode(codes_KT[None]) for codes_KT in codes_BKT]))


def _sound(wav_BCN: np.ndarray) -> np.ndarray:
    """The audio; raises `UserError` where the codec's numbers overflowed."""
    if not np.isfinite(wav_BCN).all():
        raise UserError(
            "the codec computes NaN or infinity in place of audio, and no clip was made: its "
            "weights are damaged, or their training diverged"
        )
    return wav_BCN

"""From texts to tokens and audio with a loaded model, of any kind.

Here is what the host does: it makes the inputs of a program (sampler.py), few shapes of them, and
reads what comes out.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from magnet_jax import arguments, programs, prompts
from magnet_jax.arguments import Seed
from magnet_jax.checkpoints.pretrained import Loaded
from magnet_jax.codec import decoding as audio
from magnet_jax.codec import encodec
from magnet_jax.config import (
    SAMPLING_CONFIGS,
    AutoregressiveConfig,
    CodecSpec,
    DecodeConfig,
    EditConfig,
    ModelConfig,
    RescoreConfig,
    RunConfig,
    SamplingConfig,
    SamplingMeshConfig,
    decode_of,
)
from magnet_jax.decode import autoregressive, canvas, choose, placement, segments
from magnet_jax.decode import schedule as schedules
from magnet_jax.decode.canvas import Canvas
from magnet_jax.decode.joint import Windows
from magnet_jax.decode.parallel import Rules
from magnet_jax.decode.placement import Execution
from magnet_jax.decode.ring import Ring
from magnet_jax.decode.sampler import Inputs, Rescorer, Sampler
from magnet_jax.decode.sampler import sample as sampler_program
from magnet_jax.decode.spans import Spans
from magnet_jax.decode.tokens_of_text import Text, TextPadLen, tokenize_texts
from magnet_jax.errors import UserError
from magnet_jax.model import precision
from magnet_jax.model.kernels import choose_kernels
from magnet_jax.prompts import Description


class Generated(NamedTuple):
    codes_BKT: np.ndarray  # int32 token ids
    # bool, True where step P of parallel decoding predicted; None of clips made in windows
    hidden_PBT: np.ndarray | None
    wav_BCN: np.ndarray | None = None  # float32 audio, where a decoder was given


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """What is asked of a model."""

    text: Text
    sample_B: np.ndarray
    """Numbers of the clips, which with the seed decide their random numbers."""
    seed: int | np.ndarray
    """One for all clips, or [B]."""
    canvas: Canvas
    """As long as the clips."""
    decoding: SamplingConfig
    origin_B: np.ndarray | None = None
    """At which frame of its clip each canvas begins, as random numbers go by a clip's frames; None
    is the first."""
    windows: Windows | None = None
    """Those that share the canvas, of which `text` has a row each; None is a canvas by itself."""
    own: tuple[DecodeConfig, ...] = ()
    """In place of `decoding`, how each clip is decoded; one program must do for all, see
    `shared`."""
    decoder: encodec.Decoder | None = None
    """Makes the program end in samples."""
    rescorer: Rescorer | None = None
    rescorer_texts: Any = None
    editing: EditConfig | None = None
    """How what is not given is decoded; None is AudioCraft's law of continuation."""
    on_step: Callable[[int, int], None] | None = None

    @property
    def replays(self) -> bool:
        """Whether the second half of the clips says the first half's tokens under other texts."""
        return self.editing is not None and self.editing.replay is not None

    @property
    def is_ring(self) -> bool:
        """Whether the clips' ends lead to their beginnings."""
        return self.editing is not None and self.editing.ring

    @property
    def num_frames(self) -> int:
        return self.canvas.codes_BKT.shape[-1]

    @property
    def num_given(self) -> int:
        """Frames at the start that are given, in all codebooks of all clips."""
        given_T = self.canvas.given_BKT.all((0, 1))
        return int(np.logical_and.accumulate(given_T).sum())

    @property
    def decode(self) -> DecodeConfig | None:
        """How what is not made one step after another is decoded."""
        how = decode_of(self.decoding)
        return how if isinstance(how, DecodeConfig) else None


def segment_frames(config: RunConfig, spec: CodecSpec) -> int:
    """Frames of a clip in training."""
    return round(config.data.segment_seconds * spec.frame_rate)


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
    texts: Sequence[Description],
    *,
    decoder: encodec.Decoder | encodec.Codec | None = None,
    execution: Execution = Execution(),
    **asked,
) -> Generated:
    """Generates the tokens of one clip a text and, with a `decoder`, its audio.

    Args:
      loaded: the model.
      texts: descriptions; an empty one is generated without text. Those of a part of a longer
        clip are `prompts.within` it.
      decoder: turns the tokens into audio, in JAX as part of the program, or in PyTorch.
      execution: how to run on the hardware.
      asked: what else is asked for, as of `make_batch`.

    Raises:
      UserError: the decoding, what is given, the rescorer or the hardware does not fit the model.
    """
    batch = make_batch(loaded, texts, **asked)
    if batch.is_ring:
        check_ring(loaded, batch.num_frames, decoder, execution)
    if isinstance(decoder, encodec.Decoder):
        batch = dataclasses.replace(batch, decoder=decoder)
    generated = run(loaded, batch, execution)
    if isinstance(decoder, encodec.Codec):
        return generated._replace(wav_BCN=audio.decode_audio(decoder, generated.codes_BKT))
    return generated


def make_batch(
    loaded: Loaded,
    texts: Sequence[Description],
    *,
    num_frames: int,
    decoding: SamplingConfig | Sequence[DecodeConfig],
    seed: int | Sequence[int],
    first_sample: int | Sequence[int] = 0,
    given: Canvas | None = None,
    text_pad_len: TextPadLen = None,
    rescorer: Rescorer | None = None,
    editing: EditConfig | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Batch:
    """What is asked of a model, checked.

    Args:
      loaded, texts: see `generate`.
      num_frames: frames of a clip, the given ones included.
      decoding: schedule and sampling, of the model's kind; of a MAGNeT also a list, one a clip, of
        which all are `shared` alike.
      seed, first_sample: clip i depends on (seed, first_sample + i) and its text alone. Lists have
        one a clip, which then depends on (seed[i], first_sample[i]).
      given: tokens that the clips have already, such as `canvas.beginning_with(prompt_BKP, T)`; a
        model that is not MAGNeT goes on from a beginning alone.
      text_pad_len: see `tokenize_texts`.
      rescorer: a second model that takes part in scoring spans, of MAGNeT.
      editing: how the rest of a clip is decoded of which much is given; by default as AudioCraft
        goes on from a prompt.
      on_step: called with (steps done, steps in all) while the program runs; one function object,
        one program.
    """
    model, count = loaded.config.model, len(texts)
    own = () if isinstance(decoding, SamplingConfig) else tuple(decoding)
    decoding = own[0] if own else decoding
    if own and (len(own) != count or len({shared(one) for one in own}) > 1 or editing is not None):
        raise ValueError("clips of one program need settings that are shared alike, one a clip")
    seed = (
        arguments.check(Seed, seed, "seed")
        if isinstance(seed, int) or not hasattr(seed, "__len__")
        else np.array([arguments.check(Seed, one, "seed") for one in seed], np.int32)
    )
    if not isinstance(decoding, SAMPLING_CONFIGS[model.kind]):
        raise UserError(f"{type(decoding).__name__} cannot steer a model of kind {model.kind}")
    if given is None:
        given = canvas.blank(count, model.num_codebooks, num_frames)
    canvas.check(given, count, num_frames, model)
    if rescorer is not None:
        if not model.parallel:
            raise UserError(
                f"a model of kind {model.kind} has no spans to score: leave out rescorer"
            )
        if RescoreConfig(weight=rescorer.weight).weight == 0:
            rescorer = None
    replays = editing is not None and editing.replay is not None
    if replays and (model.autoregressive or rescorer is not None):
        raise UserError(NO_REPLAY)
    samples_B = np.asarray(first_sample)
    if not samples_B.ndim:
        samples_B = first_sample + np.arange(count) % (count // 2 if replays else count)
    if editing is not None and editing.ring:
        texts = _around(loaded, texts, num_frames, rescored=rescorer is not None)
    return Batch(
        text=tokenize_texts(loaded, texts, text_pad_len),
        sample_B=samples_B,
        seed=seed,
        canvas=canvas.resized(given, num_frames),
        decoding=decoding,
        own=own,
        rescorer=rescorer,
        rescorer_texts=rescorer and rescorer.tokenize(texts, text_pad_len),
        editing=editing,
        on_step=on_step,
    )


NO_REPLAY = "replay is for a MAGNeT on one device, without a rescorer"


def shared(decode: DecodeConfig) -> tuple:
    """What clips must have in common to be made by one program; temperature and guidance, say, are
    each clip's own."""
    choice = choose.choice_of(decode.greedy, decode.top_k, decode.top_p)[0]
    numbers = {"temperature": 1.0, "anneal_temperature": True, "top_p": 1.0, "top_k": 0,
               "max_guidance": 1.0, "min_guidance": 1.0}  # fmt: skip
    same = dataclasses.replace(decode, **numbers)
    return dataclasses.astuple(same), choice, schedules.guided_steps(decode, True)


def check_ring(loaded: Loaded, num_frames: int, decoder: Any, execution: Execution) -> None:
    """Raises `UserError` where clips of so many frames cannot be rings."""
    kind, rate = loaded.config.model.kind, loaded.codec.frame_rate
    if not loaded.config.model.parallel:
        raise UserError(
            f"a model of kind {kind} goes on from a beginning, which is all that it hears, and "
            "makes no loops: take a MAGNeT"
        )
    most = segment_frames(loaded.config, loaded.codec)
    if num_frames > most:
        raise UserError(
            f"a loop of {num_frames / rate:g} s is longer than the {most / rate:g} s that the "
            "model hears at once: ask for fewer bars, or a faster tempo"
        )
    if execution.mesh.frames > 1:
        raise UserError("a loop has all of its frames on one device: leave out mesh.frames")
    if execution.kernels.local == "splash":
        raise UserError("attention kernel splash goes around no loop: leave out kernels.local")
    if decoder is not None:
        raise ValueError("a ring's audio is made of its tokens by edit.closing.audio")


def _around(
    loaded: Loaded, texts: Sequence[Description], num_frames: int, *, rescored: bool
) -> list[Description]:
    """The texts of rings, of which those over time come round again."""
    if any(not isinstance(text, str) and text.start for text in texts):
        raise UserError("a Prompt's start is of a part of a clip; a loop's texts begin at 0")
    seconds = num_frames / loaded.codec.frame_rate
    around = [prompts.within(text, 0, seconds, seconds) for text in texts]
    if rescored and any(map(prompts.changes, around)):
        raise UserError(
            "a rescorer hears a loop from another place at each step, and does not know when its "
            "texts change: leave out the rescorer, or give each loop one text or a blend"
        )
    return around


def _clips(count: int, num_frames: int, loaded: Loaded) -> str:
    """What a program is for, in words."""
    seconds = num_frames / loaded.codec.frame_rate
    return f"{count} clip{'s' * (count > 1)} of {seconds:.3g} s"


# --- the program's inputs ------------------------------------------------------------------------


def make_program(
    loaded: Loaded,
    batch: Batch,
    execution: Execution,
    *,
    platform: str,
    mesh: Mesh | None,
) -> tuple[Inputs, Sampler]:
    """What a batch takes, and the program for it."""
    model, num_frames, decode = model_for(loaded.config.model, batch)
    if batch.num_given >= num_frames and (model.autoregressive or num_frames < batch.num_frames):
        raise UserError(f"the prompt leaves nothing to generate of {num_frames} whole-span frames")
    beginning, beginning_sampling = None, None
    if model.autoregressive:
        check_continues(model, batch)
        beginning, beginning_sampling = _beginning(loaded, batch, num_frames, platform)
    whole = beginning is not None and beginning.whole  # then nothing is decoded in spans
    if not whole and len(decode.steps) != model.num_codebooks:
        raise UserError(
            f"decode.steps has {len(decode.steps)} numbers, the model {model.num_codebooks} "
            "codebooks: give one number a codebook"
        )
    if batch.rescorer is not None:
        check_rescored(batch.decoding, whole=whole)
    steps_BK = _steps_of_each(model, batch, decode, num_frames)
    decode = dataclasses.replace(decode, steps=tuple(map(int, steps_BK.max(0))))
    shards = mesh.shape if mesh else dict.fromkeys(placement.AXES, 1)
    num_decoded = bucket = usual = num_frames
    given = canvas.resized(batch.canvas, num_frames)
    if not whole:
        num_decoded = decoded_frames(model, decode, num_frames)[1]
        usual = decoded_frames(model, decode, segment_frames(loaded.config, loaded.codec))[1]
        grid = 1 if decode.span_arrangement == "stride1" else model.span_length
        bucket = frame_bucket(num_decoded, usual, math.lcm(shards["frames"], grid))
        if batch.editing is not None and grid > 1 and not batch.is_ring and batch.windows is None:
            given = canvas.completed(given, num_decoded, grid, model.mask_id)
            batch = dataclasses.replace(batch, canvas=given)
    if batch.windows is not None:
        num_decoded = bucket = usual = num_frames  # whole windows
    # A bucket that is full by chance shares its program with shorter clips.
    exact = bucket == num_decoded == usual
    sampler = _make_sampler(
        loaded, batch, execution, model=model, decode=decode, beginning=beginning,
        audio_frames=num_frames if exact else None, num_frames=bucket, platform=platform, mesh=mesh,
    )  # fmt: skip
    text = batch.text
    if not text.any and mesh is None and sampler.skips_null_text:
        text = jax.tree.map(lambda x: x[:0], text)
    count = len(batch.sample_B)
    idle = -count % shards["data"]

    def fill(x):  # the last clip again, where devices would be idle
        last = x[-max(len(x) // count, 1) :]  # of windows, all its rows
        return np.concatenate([x, *[last] * idle])

    given = jax.tree.map(fill, canvas.resized(given, bucket))
    if batch.is_ring:  # which has nothing behind its end
        given.given_BKT[..., num_frames:] = True
    if batch.own and mesh is not None:
        raise ValueError("clips of a mesh have one decoding")
    schedule, limit = () if whole else _schedule(batch, decode, sampler), _limit(decode)
    if batch.own:
        limit = np.stack([_limit(one) for one in batch.own])
    inputs = Inputs(
        lm=loaded.params["lm"],
        t5=loaded.t5_params,
        codec=batch.decoder and batch.decoder.params,
        text=jax.tree.map(fill, text) if mesh is not None else text,
        canvas=given,
        keys_B=choose.sample_keys(
            fill(np.broadcast_to(batch.seed, count)), jnp.asarray(fill(batch.sample_B))
        ),
        origin_B=fill(np.zeros(count, np.int32) if batch.origin_B is None else batch.origin_B),
        schedule=schedule,
        limit=limit,
        length=None if exact else np.int32(num_decoded),
        audio_length=None if exact else np.int32(num_frames),
        beginning=beginning_sampling,
    )
    return _with_more(inputs, batch, sampler, decode, steps_BK, fill), sampler


def _schedule(
    batch: Batch, decode: DecodeConfig, sampler: Sampler
) -> tuple[schedules.Schedule, ...]:
    first = sampler.rules.first_codebook
    if batch.own:
        return schedules.of_clips([schedules.make_schedule(one, first) for one in batch.own])
    return schedules.make_schedule(decode, first)


def _limit(decode: DecodeConfig) -> np.float32:
    return np.float32(choose.choice_of(decode.greedy, decode.top_k, decode.top_p)[1])


def _with_more(
    inputs: Inputs,
    batch: Batch,
    sampler: Sampler,
    decode: DecodeConfig,
    steps_BK: np.ndarray,
    fill: Callable[[Any], Any],
) -> Inputs:
    """The inputs with those of edits and rescorers; `fill` repeats rows for idle devices."""
    if sampler.rules.extent is not None:
        inputs = inputs._replace(first_B=fill(canvas.extent(batch.canvas)[0]))
    if (own := schedules.own_steps(decode, steps_BK)) is not None:
        inputs = inputs._replace(own_steps=jax.tree.map(fill, own))
    if batch.editing is not None and batch.editing.anneal == "rate":
        inputs = inputs._replace(min_guidance=np.float32(decode.min_guidance))
    if batch.replays:
        inputs = inputs._replace(
            replayed_BKT=inputs.canvas.codes_BKT, limit=np.float32(batch.editing.replay)
        )
    if batch.rescorer is not None:
        inputs = inputs._replace(
            rescorer=batch.rescorer.params,
            rescorer_texts=jax.tree.map(fill, batch.rescorer_texts),
            rescorer_weight=np.float32(batch.rescorer.weight),
        )
    return inputs


def model_for(model: ModelConfig, batch: Batch) -> tuple[ModelConfig, int, DecodeConfig]:
    """The model with the span length that is asked for, frames of a clip, and how it is decoded."""
    decode, num_frames = batch.decode, batch.num_frames
    if decode is None:
        return model, num_frames, DecodeConfig()
    if decode.span_length > num_frames:
        raise UserError(
            f"span_length {decode.span_length} is longer than the clip, which has {num_frames} "
            "frames: give fewer"
        )
    if batch.is_ring:  # whose length is what is asked for
        decode = dataclasses.replace(decode, whole_spans=False)
    if decode.span_length:
        model = dataclasses.replace(model, span_length=decode.span_length)
    # First of all, as a hybrid's beginning may be all that is left of a clip.
    num_frames = decoded_frames(model, decode, num_frames)[0]
    return model, num_frames, decode


def _steps_of_each(
    model: ModelConfig, batch: Batch, decode: DecodeConfig, num_frames: int
) -> np.ndarray:
    """Decoding steps [B, K] of the clips, fewer where less of them is free."""
    steps_BK = np.tile(decode.steps, (len(batch.sample_B), 1))
    if batch.editing is None or batch.editing.steps != "auto":
        return steps_BK
    span = 1 if decode.span_arrangement == "stride1" else model.span_length
    free_BK, total = canvas.free_units(canvas.resized(batch.canvas, num_frames), span)
    for steps_K, free_K in zip(steps_BK, free_BK.tolist()):
        # Rounded up, so that edits of about one size share a program.
        free_K = [min(frame_bucket(free, 0, 1), total) for free in free_K]
        steps_K[:] = schedules.steps_for(decode.steps, free_K, total)
    return steps_BK


def _make_sampler(
    loaded: Loaded,
    batch: Batch,
    execution: Execution,
    *,
    model: ModelConfig,
    decode: DecodeConfig,
    beginning: autoregressive.Beginning | None,
    audio_frames: int | None,
    num_frames: int,
    platform: str,
    mesh: Mesh | None,
) -> Sampler:
    """The program for a batch of clips, of which `num_frames` are computed."""
    shards = mesh.shape["frames"] if mesh else 1
    dtype = precision.compute_dtype(loaded.config, platform)
    savings = execution.savings
    guided = schedules.guided_steps(decode, batch.text.any)
    if guided == "all_but_last" and not savings.last_guidance:
        guided = "all"
    reach = model.num_layers * model.local_context or None
    windows = batch.windows
    whole = model.autoregressive or batch.is_ring or windows is not None
    if whole or not savings.last_window:
        reach = None
    heard = num_frames if windows is None else windows.size
    rules = Rules(
        mask_id=model.mask_id,
        spans=Spans(
            length=model.span_length,
            arrangement=decode.span_arrangement,
            score=decode.span_score,
            stretch=windows and windows.size,
        ),
        choice=choose.choice_of(decode.greedy, decode.top_k, decode.top_p)[0],
        guided=guided,
        reach=reach,
        order=decode.order,
        first_codebook=0 if model.autoregressive else canvas.given_below(batch.canvas),
        windows=windows,
        frames_axis="frames" if shards > 1 else None,
        on_step=batch.on_step,
    )
    if batch.editing is not None:
        rules = dataclasses.replace(
            rules,
            given_have_say=False,
            above_hidden=batch.editing.above == "hidden",
            # What replays goes the same way through both halves.
            order="halton" if batch.replays else rules.order,
        )
        size = canvas.extent(batch.canvas)[1]
        if size and rules.reach is not None and shards == 1:
            size = frame_bucket(size, 0, model.span_length)
            if size + 2 * rules.reach < num_frames:
                rules = dataclasses.replace(rules, extent=size)
    if batch.is_ring:
        rules = dataclasses.replace(rules, ring=_ring(loaded, model))
        heard = max(heard, rules.ring.window)
    kernels = choose_kernels(
        execution.kernels, platform, model, heard // shards, dtype, split=shards > 1
    )
    return Sampler(
        model=model,
        t5=loaded.t5_config,
        codec=batch.decoder and batch.decoder.config,
        rules=rules,
        kernels=kernels,
        savings=savings,
        dtype=dtype,
        audio_frames=audio_frames,
        platform=platform,
        mesh=mesh,
        beginning=beginning,
        read_rescorer=batch.rescorer and batch.rescorer.read,
    )


def _ring(loaded: Loaded, model: ModelConfig) -> Ring:
    """How a model hears a ring: around it where it attends to near frames, or in its window."""
    near = (model.context(False) is not None, model.context(True) is not None)
    return Ring(
        window=segment_frames(loaded.config, loaded.codec),
        around=(False, False) if model.autoregressive else near,
    )


def check_rescored(decoding: SamplingConfig, *, whole: bool = False) -> None:
    """Raises `UserError` where a rescorer would never be asked; `whole` as of `Beginning`."""
    if whole:
        raise UserError(
            "nothing is rescored of a clip that is made one step after another to its end: leave "
            "out the rescorer, or give a hybrid fewer prompt seconds"
        )
    decode = decode_of(decoding)
    if decode.order != "confidence":
        raise UserError(
            f"nothing is rescored where spans are kept in {decode.order} order: leave out the "
            "rescorer, or keep the order of confidence"
        )
    if max(decode.steps) == 1:
        raise UserError(
            "nothing is rescored where every codebook has one step: leave out the rescorer, or "
            "give more decoding steps"
        )


def check_continues(model: ModelConfig, batch: Batch) -> None:
    """Raises `UserError` where more is given than first frames to a model that begins with them."""
    if batch.editing is not None and model.parallel:
        return
    given_BKT = batch.canvas.given_BKT.copy()
    given_BKT[..., : batch.num_given] = False
    if given_BKT.any():
        raise UserError(
            f"a model of kind {model.kind} goes on from first frames, of all codebooks and as many "
            "of each clip: give nothing else, or take a MAGNeT"
        )


def _beginning(
    loaded: Loaded, batch: Batch, num_frames: int, platform: str
) -> tuple[autoregressive.Beginning, autoregressive.Sampling]:
    """How clips of a model that can be autoregressive begin."""
    decoding, num_given = batch.decoding, 0 if batch.is_ring else batch.num_given
    if isinstance(decoding, AutoregressiveConfig):
        how, first_frames = decoding, num_frames
    else:
        how = decoding.autoregressive
        wanted = decoding.prompt_seconds * loaded.codec.frame_rate
        # Of an edit all is made in parallel: what follows is known.
        wanted = 0 if batch.editing is not None else wanted
        first_frames = max(num_given, round(min(wanted, num_frames)))
    choice, limit = choose.choice_of(how.greedy, how.top_k, how.top_p)
    beginning = autoregressive.Beginning(
        num_given=num_given,
        num_frames=first_frames,
        whole=first_frames == num_frames,
        choice=choice,
        guided=batch.text.any and how.guidance != 1,
        apart=platform == "cpu",
    )
    numbers = (how.temperature, limit, how.guidance)
    return beginning, autoregressive.Sampling(*map(np.float32, numbers))


def run(loaded: Loaded, batch: Batch, execution: Execution) -> Generated:
    """What the model makes of a batch."""
    if batch.replays and execution.mesh != SamplingMeshConfig():
        raise UserError(NO_REPLAY)
    mesh = placement.sampling_mesh(execution.mesh)
    if mesh.size == 1:
        mesh = None  # a mesh of one would pin to it what lies elsewhere, such as a run's
    else:
        loaded = placement.prepare(loaded, execution)
        if batch.rescorer is not None:
            params = jax.device_put(batch.rescorer.params, NamedSharding(mesh, P()))
            batch = dataclasses.replace(batch, rescorer=batch.rescorer._replace(params=params))
    inputs, sampler = make_program(
        loaded, batch, execution, platform=jax.default_backend(), mesh=mesh
    )
    count, num_frames = len(batch.sample_B), sampler.audio_frames or int(inputs.audio_length)
    told = {"what": _clips(count, num_frames, loaded), "say": execution.say}
    if execution.between is not None and segments.in_segments(sampler):
        sampled = segments.run(inputs, sampler, execution.between, **told)
    else:
        sampled = programs.call(sampler_program, inputs, sampler=sampler, **told)
    codes_BKT = np.asarray(sampled.codes_BKT)[:count, :, :num_frames]
    if (codes_BKT >= sampler.model.codebook_size).any():  # see `choose.choose_token`
        raise UserError(
            f"the model{' or its rescorer' * (sampler.read_rescorer is not None)} computes NaN in "
            "place of probabilities, and no clip was made: its weights are damaged, or their "
            "training diverged"
        )
    hidden_PBT = np.asarray(sampled.hidden_PBT)[:, :count, :num_frames]
    wav_BCN = sampled.wav_BCN
    if wav_BCN is not None:
        hop = wav_BCN.shape[-1] // (sampler.audio_frames or sampled.codes_BKT.shape[-1])
        wav_BCN = audio.sound(np.asarray(wav_BCN)[:count, :, : num_frames * hop])
    return Generated(codes_BKT, hidden_PBT, wav_BCN)


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

"""The Python API, with the names, arguments and shapes that AudioCraft's users know.

    from magnet_jax import MAGNeT, audio_write
    model = MAGNeT.get_pretrained("exported")
    for i, wav_CN in enumerate(model.generate(["a slow waltz", "a fiddle tune"], seed=1)):
        audio_write(f"clip{i}", wav_CN, model.sample_rate, strategy="loudness")

What differs is said where it does: clips depend on a `seed`, and nothing is trimmed to whole spans.
"""

import contextlib
import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import jax
import numpy as np
import soxr
from tqdm import tqdm

from magnet_jax import programs, prompts
from magnet_jax.arguments import (
    Array,
    Between,
    Count,
    Index,
    Rate,
    Seconds,
    Seed,
    as_name,
    check_samples,
    checked,
)
from magnet_jax.checkpoints import pretrained
from magnet_jax.checkpoints.pretrained import Loaded
from magnet_jax.codec import decoding
from magnet_jax.codec.encodec import Codec, Decoder, check_codes
from magnet_jax.config import (
    KIND_NAMES,
    AutoregressiveConfig,
    ComputeDtype,
    Guidance,
    KernelConfig,
    LongConfig,
    Preset,
    PromptSeconds,
    RescoreConfig,
    SamplingMeshConfig,
    Steps,
    TopK,
    preset_steps,
    replaced,
    with_decode,
)
from magnet_jax.decode import canvas, long, placement, rescore, sampling, tokens_of_text
from magnet_jax.editing import Editing
from magnet_jax.errors import UserError
from magnet_jax.looping import Looping
from magnet_jax.prompts import Description, Descriptions

Name = Annotated[str | Path, as_name]
# As in AudioCraft, 0 switches the nucleus and the sampling off.
NucleusMass = Annotated[float, Between(0, 1)]
Temperature = Annotated[float, Between(0, 1e6)]


class _Report:
    """Passes on a running program's steps; one object a model, as programs are compiled for it."""

    def __init__(self):
        self.listen(None)

    def listen(self, listener: Callable[[int, int], None] | None) -> None:
        self._listener, self._heard = listener, set()
        self._before, self._programs, self._total = 0, 1, 0

    def go_on(self, count: int) -> None:
        """Counts on, as one program has run of a clip that takes so many more."""
        if self._listener is not None:
            jax.effects_barrier()
        self._before, self._programs, self._heard = self._before + self._total, count, set()

    def __call__(self, done, total) -> None:
        # Of several devices, each reports; and JAX may report steps out of order.
        done, self._total = int(done), int(total)
        if self._listener is not None and done not in self._heard:
            self._heard.add(done)
            self._listener(self._before + done, self._before + self._programs * self._total)


class Generator:
    """What MAGNeT and MusicGen share; make one with `get_pretrained`."""

    kind: ClassVar[str]
    longer: LongConfig = LongConfig()
    extend_stride: float | None = None

    def __init__(
        self,
        loaded: Loaded,
        decoder: Decoder | Codec,
        execution: placement.Execution = placement.Execution(),
    ):
        if loaded.config.model.kind != self.kind:
            raise UserError(
                f"this model is a {loaded.config.model.kind}: load it with "
                f"{KIND_NAMES[loaded.config.model.kind]}.get_pretrained"
            )
        self.loaded = placement.prepare(loaded, execution)
        self.decoder = decoder
        if isinstance(decoder, Decoder):
            self.decoder = placement.place(decoder, execution)
        self.execution = execution
        self.duration = loaded.config.data.segment_seconds
        self.generation = loaded.config.sampling
        self._callback: Callable[[int, int], None] | None = None
        self._report = _Report()

    @classmethod
    @checked
    def get_pretrained(
        cls,
        name: Name,
        *,
        weights: Literal["ema", "raw"] | None = None,
        step: Index | None = None,
        text_encoder: Name | None = None,
        codec: Name | None = None,
        compute_dtype: ComputeDtype = "auto",
        codec_backend: pretrained.CodecBackend = "jax",
        kernels: KernelConfig = KernelConfig(),
        mesh: SamplingMeshConfig = SamplingMeshConfig(),
    ) -> Self:
        """Loads a model.

        Args:
          name: folder of a training run, of an exported or imported model or of an AudioCraft
            checkpoint; or a hub id such as facebook/magnet-small-10secs.
          weights, step: of a run, see `pretrained.load`.
          text_encoder, codec: see `pretrained.load`.
          compute_dtype: precision of the matrix products; auto is bfloat16 on accelerators.
          codec_backend: decode audio in JAX, in one program with the tokens, or in PyTorch.
          kernels: how attention is computed; by default what suits platform and length.
          mesh: devices to use: for a batch's clips, for guidance, for the frames of a clip.

        Raises:
          UserError: no such model, one of another kind, or too few devices.
        """
        programs.keep_on_disk()
        loaded = pretrained.load(
            name,
            weights=weights,
            step=step,
            text_encoder=text_encoder and str(text_encoder),
            codec=codec and str(codec),
        )
        config = dataclasses.replace(loaded.config, compute_dtype=compute_dtype)
        decoder = pretrained.load_decoder(loaded, str(name), codec_backend)
        execution = placement.Execution(kernels=kernels, mesh=mesh, say=_say)
        return cls(loaded._replace(config=config), decoder, execution)

    @property
    def sample_rate(self) -> int:
        """Samples per second of what is generated."""
        return self.loaded.codec.sample_rate

    @property
    def frame_rate(self) -> float:
        """Token frames per second."""
        return self.loaded.codec.frame_rate

    @property
    def audio_channels(self) -> int:
        """Channels of what is generated."""
        return self.loaded.codec.channels

    @property
    def max_duration(self) -> float:
        """Seconds of the clips that the model was trained on."""
        return self.loaded.config.data.segment_seconds

    @checked
    def set_custom_progress_callback(
        self, progress_callback: Callable[[int, int], None] | None = None
    ) -> None:
        """Calls `progress_callback(steps done, steps in all)` where `progress` is asked for."""
        self._callback = progress_callback

    @checked
    def generate(
        self,
        descriptions: Descriptions,
        progress: bool = False,
        return_tokens: bool = False,
        *,
        seed: Seed = 0,
        text_pad_len: tokens_of_text.TextPadLen = None,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Generates a clip for each description.

        Args:
          descriptions: texts; a string by itself is one, None or "" a clip without text. Each may
            be more than one text: a list of (text, weight), a list of (seconds, text), or a
            `Prompt`, which says as well what a clip is not to sound like (docs/text.md).
          progress: show a bar, or call the callback.
          return_tokens: return the tokens as well, int32 [B, K, T].
          seed: clip i depends on (seed, i) and on its text, not on its neighbours.
          text_pad_len: see `tokens_of_text.tokenize_texts`; 'batch' is what AudioCraft does.

        Returns:
          audio, float32 [B, C, samples].
        """
        texts = [""] if descriptions is None else descriptions
        return self._generate(texts, None, progress, return_tokens, seed, text_pad_len)

    @checked
    def generate_unconditional(
        self,
        num_samples: Count,
        progress: bool = False,
        return_tokens: bool = False,
        *,
        seed: Seed = 0,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Generates clips without text; see `generate`."""
        return self._generate([""] * num_samples, None, progress, return_tokens, seed, None)

    @checked
    def generate_continuation(
        self,
        prompt: Array,
        prompt_sample_rate: Rate,
        descriptions: Descriptions = None,
        progress: bool = False,
        return_tokens: bool = False,
        *,
        seed: Seed = 0,
        text_pad_len: tokens_of_text.TextPadLen = None,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Goes on from audio; what is returned begins with it and is `duration` long.

        Args:
          prompt: float [B, C, samples], or [C, samples] for one; any channels.
          prompt_sample_rate: its samples per second.
          descriptions: texts, one a prompt; None is none.
          progress, return_tokens, seed, text_pad_len: see `generate`.

        Raises:
          UserError: a prompt of another shape, or as long as the clip.
        """
        wav_BCN = self._prompt(prompt, prompt_sample_rate)
        texts = [""] * len(wav_BCN) if descriptions is None else descriptions
        if len(texts) != len(wav_BCN):
            raise UserError(f"{len(wav_BCN)} prompts need as many descriptions, not {len(texts)}")
        codes = [self._encode(wav_CN, prompt_sample_rate) for wav_CN in wav_BCN]
        return self._generate(texts, np.stack(codes), progress, return_tokens, seed, text_pad_len)

    def _prompt(self, wav_BCN: np.ndarray, sample_rate: int) -> np.ndarray:
        """A prompt as float32 [B, C, samples], of any rate and channel count."""
        given = f"{wav_BCN.dtype} {list(wav_BCN.shape)}"
        wav_BCN = wav_BCN[None] if wav_BCN.ndim == 2 else wav_BCN
        if wav_BCN.ndim != 3 or not np.issubdtype(wav_BCN.dtype, np.floating) or not wav_BCN.size:
            raise UserError(
                f"prompt must be floating-point audio [B, C, samples] or [C, samples], not {given}"
            )
        with np.errstate(over="ignore"):  # becomes infinite, and is refused
            wav_BCN = wav_BCN.astype(np.float32, copy=False)
        check_samples(wav_BCN, "prompt")
        seconds = wav_BCN.shape[2] / sample_rate
        if seconds > self.duration:  # before it is brought to the codec's rate, which takes memory
            raise UserError(
                f"a prompt of {seconds:g} s leaves nothing to generate of {self.duration:g} s: ask "
                "for more seconds, or give a shorter prompt"
            )
        if round(seconds * self.sample_rate) < 1:
            raise UserError(
                f"prompt is shorter than a sample at {self.sample_rate} Hz: {wav_BCN.shape[2]} "
                f"samples of prompt_sample_rate {sample_rate}"
            )
        return wav_BCN

    def _encode(self, wav_CN: np.ndarray, sample_rate: int) -> np.ndarray:
        """Codes [K, P] of audio of any rate and channel count."""
        if len(wav_CN) != self.audio_channels:
            wav_CN = wav_CN.mean(0, keepdims=True).repeat(self.audio_channels, axis=0)
        if sample_rate != self.sample_rate:
            wav_CN = soxr.resample(wav_CN.T, sample_rate, self.sample_rate).T
        return self.encoder.encode(wav_CN[None])[0]

    @functools.cached_property
    def encoder(self) -> Codec:
        """The codec in PyTorch, which alone encodes."""
        if isinstance(self.decoder, Codec):
            return self.decoder
        return pretrained.load_decoder(self.loaded, "this model", "torch")

    def _generate(self, texts, prompt_BKP, progress, return_tokens, seed, text_pad_len):
        prompts.check_times(texts, self.duration)
        for message in self.notes(texts):
            warnings.warn(message, stacklevel=4)  # that of who called this package
        with self._listening(progress) as on_step:
            generated = self.clips(
                texts,
                num_frames=max(1, self.num_frames),
                seed=seed,
                prompt_BKP=prompt_BKP,
                text_pad_len=text_pad_len,
                on_step=on_step,
            )
        return (generated.wav_BCN, generated.codes_BKT) if return_tokens else generated.wav_BCN

    def _listening(self, progress: bool) -> contextlib.AbstractContextManager:
        return _listening(self._report, progress, self._callback)

    @property
    def num_frames(self) -> int:
        """Token frames of a clip; 0 of one that is shorter than a frame."""
        return round(self.duration * self.frame_rate)

    def notes(self, texts: list[Description]) -> list[str]:
        """A line for each text that is cut."""
        return tokens_of_text.notes_on_cut_texts(self.loaded, texts)

    def clips(
        self,
        texts: list[Description],
        *,
        num_frames: int,
        prompt_BKP: np.ndarray | None = None,
        **keywords,
    ) -> sampling.Generated:
        """Makes a clip a text as the settings say; for `keywords` see `sampling.make_batch`."""
        if num_frames > sampling.segment_frames(self.loaded.config, self.loaded.codec):
            # All tokens are there before one becomes a sample.
            *_, last = self.parts(texts, num_frames=num_frames, prompt_BKP=prompt_BKP, **keywords)
            wav_BCN = decoding.decode_audio(self.decoder, last.codes_BKT)
            return sampling.Generated(last.codes_BKT, None, wav_BCN)
        asked = self._asked(num_frames, prompt_BKP) | keywords
        return sampling.generate(
            self.loaded, texts, decoder=self.decoder, execution=self.execution, **asked
        )

    def parts(
        self,
        texts: list[Description],
        *,
        num_frames: int,
        prompt_BKP: np.ndarray | None = None,
        **keywords,
    ) -> Iterator[long.Part]:
        """`clips` that are longer than a window: what there is of their tokens after each call.

        Frames that are made stay as they are; the last of what is yielded is whole clips.
        """
        asked = self._asked(num_frames, prompt_BKP) | keywords
        batch = sampling.make_batch(self.loaded, texts, **asked)
        for part in long.windows(
            self.loaded, batch, self.longer, self.extend_stride, self.execution
        ):
            yield part
            self._report.go_on(part.total - part.done)

    def _asked(self, num_frames: int, prompt_BKP: np.ndarray | None) -> dict[str, Any]:
        given = None if prompt_BKP is None else canvas.beginning_with(prompt_BKP, num_frames)
        return {"num_frames": num_frames, "given": given, "decoding": self.generation}

    @checked
    def generate_audio(self, gen_tokens: Array) -> np.ndarray:
        """Audio, float32 [B, C, samples], of tokens [B, K, T]."""
        return decoding.decode_audio(self.decoder, self._tokens(gen_tokens, "gen_tokens"))

    def _tokens(self, tokens: np.ndarray, name: str) -> np.ndarray:
        """Tokens [B, K, T] of the model's codec as int32; `UserError`, which calls them `name`."""
        if tokens.dtype.kind not in "iu":
            raise UserError(f"{name} must be whole numbers, not {tokens.dtype}")
        try:
            return check_codes(tokens, self.decoder.spec).astype(np.int32)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None


class MAGNeT(Looping, Generator):
    """Text to audio in a fixed number of parallel steps."""

    kind = "magnet"
    rescorer: sampling.Rescorer | None = None
    rescoring_model: Loaded | None = None

    @checked
    def set_generation_params(
        self,
        use_sampling: bool | None = None,
        top_k: TopK | None = None,
        top_p: NucleusMass | None = None,
        temperature: Temperature | None = None,
        max_cfg_coef: Guidance | None = None,
        min_cfg_coef: Guidance | None = None,
        decoding_steps: Steps | None = None,
        span_arrangement: Literal["nonoverlap", "stride1"] | None = None,
        *,
        span_scoring: Literal["max", "prod"] | None = None,
        anneal_temp: bool | None = None,
        span_len: Annotated[int, Between(1, 30_000)] | None = None,
        whole_spans: bool | None = None,
        preset: Preset | None = None,
        duration: Seconds | None = None,
    ) -> None:
        """Sets how clips are generated; what is not given gets the model's own default.

        The defaults come with the model: of an AudioCraft checkpoint those that its authors give
        for its kind and length, of a run or an export what its config says.

        Args:
          use_sampling: False takes the most probable token.
          top_k: sample among the k most probable tokens.
          top_p: nucleus mass; if given and not 0, it goes before `top_k` as in AudioCraft.
          temperature: at a codebook's first step.
          max_cfg_coef, min_cfg_coef: guidance where all and where nothing is masked.
          decoding_steps: steps of each codebook.
          span_arrangement: spans on a grid, or of any neighbouring frames.
          span_scoring: a span is as sure as its surest token, or as all of them.
          anneal_temp: bring the temperature down to 0 over a codebook's steps.
          span_len: frames in a span; by default as the model was trained.
          whole_spans: trim the clip to whole spans, as AudioCraft does.
          preset: names decoding steps, from 'paper' to 'draft'; see docs/performance.md.
          duration: seconds of a clip; the default is what the model was trained on. Longer clips
            are made in windows of that length, see `set_long_params`.
        """
        default = self.loaded.config.decode
        if preset is not None:
            if decoding_steps is not None:
                raise UserError("give preset or decoding_steps, not both")
            decoding_steps = preset_steps(preset, len(default.steps))
        if decoding_steps is not None and len(decoding_steps) != len(default.steps):
            raise UserError(
                f"decoding_steps needs one number a codebook, {len(default.steps)}, not "
                f"{list(decoding_steps)}"
            )
        if temperature == 0:  # near to AudioCraft, whose MAGNeT then samples at 0.01
            use_sampling, temperature = False, None
        if top_p == 0:
            top_p = 1.0
        elif top_p is not None:
            top_k = 0
        decode = replaced(
            default,
            greedy=None if use_sampling is None else not use_sampling,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            max_guidance=max_cfg_coef,
            min_guidance=min_cfg_coef,
            steps=decoding_steps,
            span_arrangement=span_arrangement,
            span_score=span_scoring,
            anneal_temperature=anneal_temp,
            span_length=span_len,
            whole_spans=whole_spans,
        )
        self.generation = with_decode(self.generation, decode)
        self.duration = self.max_duration if duration is None else duration

    @checked
    def set_rescorer(
        self,
        rescorer: Any,
        weight: float | None = None,
        *,
        guidance: float | None = None,
    ) -> None:
        """Lets a second model take part in choosing which spans are kept (docs/rescoring.md).

        Args:
          rescorer: a model's folder or hub id, a `MusicGen` or `MAGNeT` that is loaded, or any
            functions (`sampling.Rescorer`); None for none.
          weight: the rescorer's share of the scores, from 0 (as without it, bit for bit) to 1 (the
            rescorer alone).
          guidance: coefficient of the rescorer's guidance; 1, the default, is none.

        Raises:
          UserError: no such model, or one whose tokens are not this model's.
        """
        if rescorer is None and (weight, guidance) != (None, None):
            raise UserError("weight and guidance need a rescorer: None takes it away, give a model")
        if not isinstance(rescorer, str | Path | Generator | sampling.Rescorer | None):
            raise UserError(
                "rescorer must be a folder, a hub id, a MusicGen or MAGNeT that is loaded, a "
                f"sampling.Rescorer or None, not {rescorer!r}"
            )
        if isinstance(rescorer, str | Path):
            rescorer = as_name(rescorer, "rescorer")
        settings = replaced(RescoreConfig(), weight=weight, guidance=guidance)
        model = None
        if rescorer is not None and not isinstance(rescorer, sampling.Rescorer):
            own = isinstance(rescorer, Generator)
            model = rescorer.loaded if own else rescore.load(rescorer)
            rescorer = rescore.from_model(
                model,
                self.loaded,
                guidance=settings.guidance,
                weight=settings.weight,
                execution=self.execution,
                name="that was given" if own else str(rescorer),
            )
        elif guidance is not None:
            raise UserError("guidance belongs to a model as rescorer; leave it out")
        elif rescorer is not None and weight is not None:
            rescorer = rescorer._replace(weight=settings.weight)
        self.rescorer = rescorer
        self.rescoring_model = model

    def notes(self, texts: list[Description]) -> list[str]:
        notes = super().notes(texts)
        if self.rescoring_model is not None:
            cut = tokens_of_text.notes_on_cut_texts(self.rescoring_model, texts)
            notes += [f"rescorer: {note}" for note in cut]
        return notes

    def _asked(self, *given) -> dict[str, Any]:
        return super()._asked(*given) | {"rescorer": self.rescorer}

    @checked
    def set_long_params(
        self,
        mode: Literal["sliding", "anchors", "joint"] | None = None,
        extend_stride: float | None = None,
        *,
        lead: Annotated[float, Between(0, 0.7)] | None = None,
        anneal: Literal["count", "rate"] | None = None,
        steps: Literal["all", "auto"] | None = None,
    ) -> None:
        """Sets how clips are made that are longer than `max_duration`, the model's window.

        What is not given gets its default; docs/long.md compares the modes.

        Args:
          mode, lead, anneal, steps: see `LongConfig`.
          extend_stride: seconds by which windows lie apart, see `long.window_stride`.
        """
        how = replaced(LongConfig(), mode=mode, lead=lead, anneal=anneal, steps=steps)
        if how.mode == "joint" and self.kind == "hybrid":
            raise UserError("mode joint: a hybrid has windows one after another; take another mode")
        long.window_stride(self.loaded, extend_stride, "extend_stride", how)  # checks it
        self.longer, self.extend_stride = how, extend_stride


class HybridMAGNeT(MAGNeT):
    """Text to audio: the first seconds one step after another, the rest in parallel.

    `set_generation_params` is about the rest, `set_prompt_params` about the first seconds; audio to
    go on from counts as a part of these.
    """

    kind = "hybrid"

    @checked
    def set_prompt_params(
        self,
        seconds: PromptSeconds | None = None,
        use_sampling: bool | None = None,
        top_k: TopK | None = None,
        top_p: NucleusMass | None = None,
        temperature: Temperature | None = None,
        cfg_coef: Guidance | None = None,
    ) -> None:
        """Sets how clips begin; what is not given gets the model's own default.

        Args:
          seconds: of a clip, generated one step after another; 0 is none, its length or more all.
          use_sampling, top_k, top_p, temperature, cfg_coef: see `MusicGen.set_generation_params`.
        """
        default = self.loaded.config.sampling
        self.generation = dataclasses.replace(
            self.generation,
            prompt_seconds=default.prompt_seconds if seconds is None else seconds,
            autoregressive=_autoregressive(
                default.autoregressive, use_sampling, top_k, top_p, temperature, cfg_coef
            ),
        )


class MusicGen(Editing, Generator):
    """Text to audio one step after another; AudioGen's checkpoints as well."""

    kind = "musicgen"

    @checked
    def set_generation_params(
        self,
        use_sampling: bool | None = None,
        top_k: TopK | None = None,
        top_p: NucleusMass | None = None,
        temperature: Temperature | None = None,
        duration: Seconds | None = None,
        cfg_coef: Guidance | None = None,
        *,
        extend_stride: float | None = None,
    ) -> None:
        """Sets how clips are generated; what is not given gets the model's own default.

        Args:
          use_sampling: False takes the most probable token.
          top_k: sample among the k most probable tokens (250); 0 uses `top_p`.
          top_p: nucleus mass; if given and not 0, it goes before `top_k` as in AudioCraft.
          temperature: of the sampling.
          duration: seconds of a clip; the default is what the model was trained on. Longer clips
            are generated in windows that overlap.
          cfg_coef: guidance coefficient.
          extend_stride: seconds by which such windows lie apart; 0.6 of a window by default.
        """
        self.generation = _autoregressive(
            self.loaded.config.sampling, use_sampling, top_k, top_p, temperature, cfg_coef
        )
        self.duration = self.max_duration if duration is None else duration
        if extend_stride is not None:
            long.window_stride(self.loaded, extend_stride, "extend_stride")  # checks it
        self.extend_stride = extend_stride


def of_kind(
    loaded: Loaded, decoder: Decoder | Codec, execution: placement.Execution
) -> MAGNeT | MusicGen:
    """The model as what it is: a MAGNeT, a HybridMAGNeT or a MusicGen."""
    kinds = {cls.kind: cls for cls in (MAGNeT, HybridMAGNeT, MusicGen)}
    return kinds[loaded.config.model.kind](loaded, decoder, execution)


def _say(line: str) -> None:
    print(f"magnet_jax: {line}", file=sys.stderr, flush=True)


def _autoregressive(
    default: AutoregressiveConfig, use_sampling, top_k, top_p, temperature, cfg_coef
) -> AutoregressiveConfig:
    """AudioCraft's arguments of MusicGen as settings; what is None is the default's."""
    if top_p:
        top_k = 0
    if temperature == 0:  # AudioCraft's way to say so
        use_sampling, temperature = False, None
    return replaced(
        default,
        greedy=None if use_sampling is None else not use_sampling,
        top_k=top_k,
        top_p=top_p or None,
        temperature=temperature,
        guidance=cfg_coef,
    )


@contextlib.contextmanager
def _listening(
    report: _Report, progress: bool, callback: Callable[[int, int], None] | None
) -> Iterator[_Report | None]:
    """Shows a program's progress meanwhile: in a bar, or through `callback`."""
    if not progress:
        yield None
        return
    bar = None if callback else tqdm(unit="step")

    def advance(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    report.listen(callback or advance)
    try:
        yield report
        jax.effects_barrier()
    finally:
        report.listen(None)
        if bar is not None:
            bar.close()

"""Editing with MAGNeT: what is asked for is made anew, and every other sample stays as it was.

    model = MAGNeT.get_pretrained("demo")
    edit = model.generate_inpainting("song.wav", regions=[(2, 4.5)], descriptions="a harp solo")
    edit.write("edited.wav")

A clip that the model made, and whose tokens are kept (`edit.kept`), is spliced to the sample. The
samples of any other file are its own, and edits are faded into them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from magnet_jax import prompts
from magnet_jax.arguments import (
    Array,
    Between,
    Count,
    Rate,
    Seconds,
    Seed,
    as_array,
    as_name,
    check_samples,
    checked,
)
from magnet_jax.checkpoints import pretrained
from magnet_jax.codec import decoding, encodec
from magnet_jax.config import DecodeConfig, EditConfig, Share, decode_of, replaced
from magnet_jax.decode import likelihood, rescore, sampling
from magnet_jax.decode.canvas import Canvas, extents
from magnet_jax.edit import free, kept, paste, splice
from magnet_jax.errors import UserError
from magnet_jax.io import exact
from magnet_jax.io.exact import Source
from magnet_jax.prompts import Description, Descriptions

GROUPS = 4  # in which a clip's tokens are hidden to be judged
NOISE = 1.0  # of the choice of spans that a variation makes anew, in nats

_SUBTYPES = {
    np.dtype(np.int16): "PCM_16",
    np.dtype(np.int32): "PCM_32",
    np.dtype(np.float32): "FLOAT",
    np.dtype(np.float64): "DOUBLE",
}


def _as_audio(value: Any, name: str) -> Path | np.ndarray:
    """A path, or samples [B, C, N] of any number."""
    if isinstance(value, str | Path):
        return Path(as_name(value, name))
    array = as_array(value, name)
    given = f"{array.dtype} {list(array.shape)}"
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or not array.size or array.dtype not in _SUBTYPES:
        raise UserError(
            f"{name} must be a file, or samples [B, C, N] or [C, N], float32, float64, int16 or "
            f"int32, not {given}"
        )
    check_samples(array, name)
    return array


Audio = Annotated[np.ndarray | str | Path, _as_audio]


class Clip(NamedTuple):
    """A clip to be edited."""

    source: Source
    codes_KT: np.ndarray
    own: bool  # the samples are what the codec makes of the tokens
    text: Description


class Edit(NamedTuple):
    """Edited clips."""

    wav_BCN: np.ndarray  # in the numbers, at the rate and of the channels of what was edited
    tokens_BKT: np.ndarray  # int32
    changed: list[list[tuple[int, int]]]  # of each clip samples [first, end); all others are as
    sample_rate: int  # they were
    clips: list[Clip]  # what was edited
    before: int = 0  # samples that come before the first one of what was edited

    def as_float(self, clip: int = 0) -> np.ndarray:
        """A clip [C, N] in [-1, 1)."""
        source = self.clips[clip].source
        samples_NC = _as_held(self.wav_BCN[clip].T, source)
        return source._replace(samples_NC=samples_NC).as_float().T

    def write(self, path: str | Path, clip: int = 0) -> None:
        """Writes a clip as the file that was edited is written, its other bytes untouched."""
        source = self.clips[clip].source
        samples_NC = _as_held(self.wav_BCN[clip].T, source)
        exact.write(Path(path), source, samples_NC, before=self.before)


class Drafts(NamedTuple):
    """Clips made in few steps, to pick from."""

    wav_BCN: np.ndarray
    tokens_BKT: np.ndarray  # of whole spans, of which the last may end after the clip
    texts: list[Description]
    seed: int


class Editing:
    """What a MAGNeT does to audio that is there. A part of `MAGNeT`, whose attributes it uses."""

    editing: EditConfig = EditConfig()

    @checked
    def set_edit_params(
        self,
        edge: Literal["outside", "inside"] | None = None,
        fade: Annotated[float, Between(0, 10)] | None = None,
        side: Literal["fade", "keep"] | None = None,
        context: Annotated[float, Between(0, 1e6, above=True)] | None = None,
        *,
        above: Literal["hidden", "shown"] | None = None,
        anneal: Literal["rate", "count"] | None = None,
        steps: Literal["auto", "all"] | None = None,
    ) -> None:
        """Sets how clips are edited; what is not given gets its default.

        Args:
          edge, fade, side, context: of the audio, see `EditConfig`.
          above, anneal, steps: of the decoding, likewise.
        """
        self.editing = replaced(
            EditConfig(), edge=edge, fade=fade, side=side, context=context,
            above=above, anneal=anneal, steps=steps,
        )  # fmt: skip

    @checked
    def generate_inpainting(
        self,
        audio: Audio,
        audio_sample_rate: Rate | None = None,
        regions: Any = None,
        descriptions: Descriptions = None,
        progress: bool = False,
        *,
        codebooks: tuple[int, ...] | None = None,
        mask: Array | None = None,
        tokens: Array | None = None,
        seed: Seed = 0,
    ) -> Edit:
        """Makes regions of clips anew, given the rest.

        Args:
          audio: a file; or samples [B, C, N], or [C, N] for one clip, floats or integers.
          audio_sample_rate: samples per second of an array.
          regions: (begin, end) in seconds, several of them for all clips or a list of them for
            each; an end of None is the clip's.
          descriptions: texts, one a clip, see `generate`; None is the text that is kept with a
            clip, if any, and so is a `Prompt`'s text of None.
          progress: show a bar, or call the callback.
          codebooks: made anew, with those above them; None is all.
          mask: in place of regions, bool [T] or [K, T], True where a token is made anew.
          tokens: of clips that were generated, [B, K, T]; of a file those beside it are found.
          seed: clip i depends on (seed, i).

        Raises:
          UserError: a region outside the clip or too short, nothing that is free, a codec or a
            model that cannot be edited with.
        """
        clips = self._clips_of(audio, audio_sample_rate, tokens)
        if (mask is None) == (regions is None):
            raise UserError("give regions, such as [(2, 4.5)], or a mask, and not both")
        if mask is not None and codebooks is not None:
            raise UserError("codebooks are of regions: give a mask [K, T] that says them, or none")
        if mask is not None:
            frees = [free.mask(mask, clip.codes_KT.shape) for clip in clips]
            return self._edited(clips, frees, None, descriptions, seed, progress)
        seconds = _regions_of(regions, len(clips))
        shape = clips[0].codes_KT.shape
        frames = [[self._frames_of(region, clips[0]) for region in one] for one in seconds]
        frees = [free.regions(ranges, shape, codebooks) for ranges in frames]
        return self._edited(clips, frees, seconds, descriptions, seed, progress)

    @checked
    def generate_extension(
        self,
        audio: Audio,
        audio_sample_rate: Rate | None = None,
        descriptions: Descriptions = None,
        progress: bool = False,
        *,
        before: Annotated[float, Between(0, 3600)] = 0.0,
        after: Annotated[float, Between(0, 3600)] = 0.0,
        tokens: Array | None = None,
        seed: Seed = 0,
    ) -> Edit:
        """Makes clips longer, at their beginning, at their end or both.

        Args:
          audio, audio_sample_rate, descriptions, progress, tokens, seed: see
            `generate_inpainting`.
          before, after: seconds to be added.
        """
        clips = self._clips_of(audio, audio_sample_rate, tokens)
        if not before and not after:
            raise UserError("give seconds to add: before, after or both")
        rate, source = self.frame_rate, clips[0].source
        old = clips[0].codes_KT.shape[-1]
        more = round(before * rate), round(after * rate)
        if max(more) < 1:
            raise UserError(f"before and after are shorter than a frame, {1 / rate:g} s")
        lead = round(more[0] * source.sample_rate / rate)
        count = len(source.samples_NC)
        # A clip may end within its last frame.
        total = lead + count
        if more[1]:
            total = lead + round((old + more[1]) * source.sample_rate / rate)
        clips = [clip._replace(text=prompts.later(clip.text, more[0] / rate)) for clip in clips]
        codes_BKT = np.stack([clip.codes_KT for clip in clips])
        codes_BKT = np.pad(codes_BKT, ((0, 0), (0, 0), more))
        made_BKT = self._drawn_out(
            codes_BKT, more, self._texts(clips, descriptions, sum(more)), seed, progress
        )
        ends = [(0.0, lead / source.sample_rate)] * (lead > 0)
        ends += [((lead + count) / source.sample_rate, total / source.sample_rate)] * (more[1] > 0)
        edits = []
        for clip, made_KT in zip(clips, made_BKT):
            edits.append(self._rendered_longer(clip, made_KT, more, ends, lead, total))
        return self._edit(clips, made_BKT, edits, before=lead)

    @checked
    def generate_between(
        self,
        prefix: Audio,
        suffix: Audio,
        seconds: Seconds,
        audio_sample_rate: Rate | None = None,
        descriptions: Descriptions = None,
        progress: bool = False,
        *,
        seed: Seed = 0,
    ) -> Edit:
        """Joins clips by music of some seconds that goes on from one and leads to the other.

        Args:
          prefix, suffix: two files or arrays of one rate, with as many channels and clips.
          seconds: between both; up to a frame more, so that the second begins with a frame.
          audio_sample_rate, descriptions, progress, seed: see `generate_inpainting`.
        """
        firsts, seconds_ = (self._clips_of(x, audio_sample_rate, None) for x in (prefix, suffix))
        if len(firsts) != len(seconds_):
            raise UserError(
                f"prefix and suffix must have as many clips, not {len(firsts)} and {len(seconds_)}"
            )
        joined, rate = [], self.frame_rate
        hole = max(1, round(seconds * rate))
        for one, other in zip(firsts, seconds_):
            a, b = one.source, other.source
            if (a.sample_rate, a.subtype, a.samples_NC.shape[1]) != (
                b.sample_rate, b.subtype, b.samples_NC.shape[1],
            ):  # fmt: skip
                raise UserError(
                    f"{a.path} and {b.path}: must have the same rate, channels and kind of samples"
                )
            start = one.codes_KT.shape[-1] + hole
            zeros = np.zeros((round(start * a.sample_rate / rate), a.samples_NC.shape[1]))
            samples_NC = np.concatenate([zeros.astype(a.samples_NC.dtype), b.samples_NC])
            samples_NC[: len(a.samples_NC)] = a.samples_NC
            middle = np.zeros((len(one.codes_KT), hole), np.int32)
            codes_KT = np.concatenate([one.codes_KT, middle, other.codes_KT], axis=-1)
            joined.append(Clip(a._replace(samples_NC=samples_NC), codes_KT, False, one.text))
        first = firsts[0].codes_KT.shape[-1]
        free_KT = free.regions([(first, first + hole)], joined[0].codes_KT.shape)
        begin = len(firsts[0].source.samples_NC) / firsts[0].source.sample_rate
        regions = [[(begin, (first + hole) / rate)]] * len(joined)
        edit = self._edited(joined, [free_KT] * len(joined), regions, descriptions, seed, progress)
        # It is written as the first clip, drawn out.
        return edit._replace(clips=[one._replace(own=False) for one in firsts])

    @checked
    def generate_restyle(
        self,
        audio: Audio,
        audio_sample_rate: Rate | None = None,
        descriptions: Descriptions = None,
        progress: bool = False,
        *,
        strength: Share = 0.5,
        how: Literal["spans", "replay"] = "spans",
        tokens: Array | None = None,
        original: Descriptions = None,
        seed: Seed = 0,
    ) -> Edit:
        """Gives clips another style, that of their new texts.

        Args:
          audio, audio_sample_rate, descriptions, progress, tokens, seed: see
            `generate_inpainting`.
          strength: from 0, which changes nothing, to 1.
          how: 'spans' keeps the lower codebooks, or every few spans of the first (`free.restyled`).
            'replay' says the clip once more under the new text with the chance that would have
            made it under the original one (`choose.replay`), of which a share of `strength` is
            drawn anew.
          original: for 'replay', texts that the clips have now; None as for `descriptions`.
        """
        if original is not None and how != "replay":
            raise UserError("original is for how='replay': leave it out")
        clips = self._clips_of(audio, audio_sample_rate, tokens)
        shape = clips[0].codes_KT.shape
        if how == "replay":
            frees = [np.ones(shape, bool)] * len(clips)
            originals = self._texts(clips, original)
            editing = dataclasses.replace(self.editing, replay=strength, anneal="count")
            return self._edited(
                clips, frees, None, descriptions, seed, progress, editing=editing,
                originals=originals,
            )  # fmt: skip
        rng = np.random.default_rng(seed)
        frees = [free.restyled(strength, shape, self._span, int(rng.integers(8))) for _ in clips]
        return self._edited(clips, frees, None, descriptions, seed, progress)

    @checked
    def generate_variations(
        self,
        audio: Audio,
        audio_sample_rate: Rate | None = None,
        n: Count = 4,
        descriptions: Descriptions = None,
        progress: bool = False,
        *,
        variation: Share = 0.3,
        tokens: Array | None = None,
        seed: Seed = 0,
    ) -> Edit:
        """Makes `n` siblings of a clip: its least likely spans anew, each time others.

        Args:
          audio: a file or one clip; audio_sample_rate, descriptions, progress, tokens, seed: see
            `generate_inpainting`.
          n: how many.
          variation: share of the spans that are made anew, from 0, the clip itself, to 1.
        """
        clips = self._clips_of(audio, audio_sample_rate, tokens)
        if len(clips) != 1:
            raise UserError(f"variations are of one clip, not of {len(clips)}")
        texts = self._texts(clips, descriptions)
        log_KT = self._confidence(clips[0].codes_KT[None], texts)[0]
        rng, units = np.random.default_rng(seed), -(-log_KT.shape[1] // self._span)
        frees = [
            free.worst(log_KT, variation, self._span, NOISE * rng.gumbel(size=(len(log_KT), units)))
            for _ in range(n)
        ]
        return self._edited(clips * n, frees, None, texts * n, seed, progress)

    @checked
    def confidence(self, tokens: Array, descriptions: Descriptions = None) -> np.ndarray:
        """How likely the model holds each token [B, K, T], float32, in nats; 0 is certain.

        Every fourth span of a codebook is hidden at a time and read given the others, unguided.
        """
        codes_BKT = self._checked_tokens(tokens)
        texts = [""] * len(codes_BKT) if descriptions is None else list(descriptions)
        prompts.check_times(texts, codes_BKT.shape[-1] / self.frame_rate)
        if len(texts) != len(codes_BKT):
            raise UserError(f"{len(codes_BKT)} clips need as many descriptions, not {len(texts)}")
        return self._confidence(codes_BKT, texts)

    @checked
    def repair(
        self,
        audio: Audio,
        audio_sample_rate: Rate | None = None,
        descriptions: Descriptions = None,
        progress: bool = False,
        *,
        worst: Share = 0.1,
        rounds: Count = 1,
        tokens: Array | None = None,
        seed: Seed = 0,
    ) -> Edit:
        """Makes the least likely spans of clips anew, and keeps what makes a clip likelier.

        Args:
          audio, audio_sample_rate, descriptions, progress, tokens, seed: see
            `generate_inpainting`.
          worst: share of the spans that are made anew.
          rounds: how often; a clip that does not become likelier stays as it is.
        """
        clips = self._clips_of(audio, audio_sample_rate, tokens)
        texts = self._texts(clips, descriptions)
        codes_BKT = np.stack([clip.codes_KT for clip in clips])
        log_BKT = self._confidence(codes_BKT, texts)
        for number in range(rounds if worst else 0):
            free_BKT = np.stack([free.worst(log_KT, worst, self._span) for log_KT in log_BKT])
            new_BKT = self._redo(codes_BKT, free_BKT, texts, _later(seed, number), progress)
            new_log_BKT = self._confidence(new_BKT, texts)
            better_B = new_log_BKT.mean((1, 2)) > log_BKT.mean((1, 2))
            codes_BKT = np.where(better_B[:, None, None], new_BKT, codes_BKT)
            log_BKT = np.where(better_B[:, None, None], new_log_BKT, log_BKT)
        return self._rendered(clips, codes_BKT, None)

    @checked
    def draft(
        self, descriptions: Descriptions, n: Count = 8, progress: bool = False, *, seed: Seed = 0
    ) -> Drafts:
        """Makes `n` clips of each description in half the time or less, to pick from.

        Codebooks above the first get a step each. `refine` gives a draft all its steps.
        """
        if self.loaded.config.model.autoregressive:
            raise UserError("drafts are made by a MAGNeT: a hybrid goes on from whole frames alone")
        if self.num_frames > self._window:
            raise UserError(
                f"drafts are of clips up to {self.max_duration:g} seconds, not {self.duration:g}: "
                "set a shorter duration"
            )
        texts = [""] if descriptions is None else descriptions
        prompts.check_times(texts, self.duration)
        texts = [text for text in texts for _ in range(n)]
        steps = self._decode.steps
        few = dataclasses.replace(self._decode, steps=(steps[0], *(1 for _ in steps[1:])))
        made = self._generated(
            texts, None, few, seed, progress, num_frames=self._whole_frames, decoder=self.decoder
        )
        return Drafts(self._cut(made.wav_BCN), made.codes_BKT, texts, seed)

    @checked
    def refine(self, drafts: Any, picks: tuple[int, ...], progress: bool = False):
        """The drafts that were picked, with all steps: what `generate` would have made of them.

        Args:
          drafts: from `draft`.
          picks: numbers of drafts, from 0.
          progress: see `generate`.

        Returns:
          audio, float32 [B, C, samples], and tokens [B, K, T].
        """
        if not isinstance(drafts, Drafts):
            raise UserError("drafts must come from draft()")
        if not picks or not all(0 <= pick < len(drafts.texts) for pick in picks):
            raise UserError(f"picks must be some of 0 to {len(drafts.texts) - 1}, not {picks}")
        wavs, codes = [], []
        for pick in picks:
            codes_1KT = drafts.tokens_BKT[pick][None]
            given_1KT = np.zeros(codes_1KT.shape, bool)
            given_1KT[:, 0] = True
            made = self._generated(
                [drafts.texts[pick]], Canvas(codes_1KT, given_1KT), self.generation, drafts.seed,
                progress, num_frames=codes_1KT.shape[-1], decoder=self.decoder, first_sample=pick,
            )  # fmt: skip
            wavs.append(self._cut(made.wav_BCN))
            codes.append(made.codes_BKT[..., : self.num_frames])
        return np.concatenate(wavs), np.concatenate(codes)

    # --- clips ------------------------------------------------------------------------------------

    def _clips_of(self, audio: Any, sample_rate: int | None, tokens: Any) -> list[Clip]:
        """What is to be edited."""
        self._splicer  # noqa: B018 (a codec that cannot be spliced is said before anything is made)
        if isinstance(audio, Path):
            if sample_rate is not None:
                raise UserError("audio_sample_rate is of arrays; a file has its own")
            source, text = exact.read(audio), ""
            try:
                found = kept.find(audio, self.loaded.codec) if tokens is None else None
            except ValueError as error:
                raise UserError(str(error)) from None
            if found is not None:
                text = found.text
                # The samples of a loop are more than its tokens, which do not say where it closes.
                tokens = None if found.settings.get("loop") else found.codes_KT[None]
            sources = [source]
        else:
            if sample_rate is None:
                raise UserError("give audio_sample_rate with samples")
            sources, text = [_source_of(samples_CN, sample_rate) for samples_CN in audio], ""
        codes = [None] * len(sources) if tokens is None else self._checked_tokens(tokens)
        if len(codes) != len(sources):
            raise UserError(f"{len(sources)} clips need as many rows of tokens, not {len(codes)}")
        clips = []
        for source, codes_KT in zip(sources, codes):
            own = codes_KT is not None
            if own:
                lengths = codes_KT.shape[1] / self.frame_rate, len(source.samples_NC)
                if abs(lengths[0] - lengths[1] / source.sample_rate) * self.frame_rate >= 1:
                    raise UserError(
                        f"tokens of {lengths[0]:g} s are not those of {source.path}, of "
                        f"{lengths[1] / source.sample_rate:g} s"
                    )
            else:
                wav_CN = source.as_float().T.astype(np.float32)
                codes_KT = self._encode(wav_CN, source.sample_rate)
            clips.append(Clip(source, np.asarray(codes_KT, np.int32), own, text))
        return clips

    def _checked_tokens(self, tokens: np.ndarray) -> np.ndarray:
        return self._tokens(tokens[None] if tokens.ndim == 2 else tokens, "tokens")

    def _texts(
        self, clips: list[Clip], descriptions: Sequence[Description] | None, more: int = 0
    ) -> list[Description]:
        """The texts of clips that become so many frames longer."""
        texts = [clip.text for clip in clips] if descriptions is None else list(descriptions)
        if len(texts) == 1:
            texts *= len(clips)
        if len(texts) != len(clips):
            raise UserError(f"{len(clips)} clips need as many descriptions, not {len(texts)}")
        texts = [prompts.completed(text, clip.text) for text, clip in zip(texts, clips)]
        if descriptions is not None:
            seconds = (clips[0].codes_KT.shape[-1] + more) / self.frame_rate
            prompts.check_times(texts, seconds)
        return texts

    def _within(self, texts: list[Description], first: int, num_frames: int) -> list[Description]:
        """What steers so many frames of each clip, from `first` on."""
        begin, end = first / self.frame_rate, (first + num_frames) / self.frame_rate
        return [prompts.within(text, begin, end) for text in texts]

    @functools.cached_property
    def _splicer(self) -> encodec.Decoder:
        """The codec's decoder in JAX, which alone splices."""
        decoder = self.decoder
        if not isinstance(decoder, encodec.Decoder):
            decoder = pretrained.load_decoder(self.loaded, "this model", "jax")
        try:
            splice.reach_of(decoder.config)
        except ValueError as error:
            raise UserError(f"codec {decoder.spec.source}: {error}") from None
        return decoder

    def _frames_of(self, region: tuple[float, float | None], clip: Clip) -> tuple[int, int]:
        return paste.frames_of(
            region,
            frame_rate=self.frame_rate,
            num_frames=clip.codes_KT.shape[-1],
            edge=self.editing.edge,
            reach=splice.reach_of(self._splicer.config),
            least=self._span,
        )

    # --- tokens -----------------------------------------------------------------------------------

    @property
    def _span(self) -> int:
        return self._decode.span_length or self.loaded.config.model.span_length

    @property
    def _window(self) -> int:
        return sampling.segment_frames(self.loaded.config, self.loaded.codec)

    @property
    def _whole_frames(self) -> int:
        """Frames that are computed for a clip, the last span of which may be cut."""
        model = dataclasses.replace(self.loaded.config.model, span_length=self._span)
        return sampling.decoded_frames(model, self._decode, self.num_frames)[1]

    def _cut(self, wav_BCN: np.ndarray) -> np.ndarray:
        """Audio of `_whole_frames` as long as a clip."""
        return wav_BCN[..., : round(self.num_frames * self.sample_rate / self.frame_rate)]

    @property
    def _decode(self) -> DecodeConfig:
        return decode_of(self.generation)

    def _generated(
        self, texts, given, generation, seed, progress, *, num_frames, **more
    ) -> sampling.Generated:
        with self._listening(progress) as on_step:
            return sampling.generate(
                self.loaded, texts, num_frames=num_frames, decoding=generation, seed=seed,
                given=given, rescorer=self.rescorer, execution=self.execution, on_step=on_step,
                **more,
            )  # fmt: skip

    def _redo(self, codes_BKT, free_BKT, texts, seed, progress, **how) -> np.ndarray:
        """The tokens, of which those that are free are made anew.

        Where they do not fit into what the model hears at once, a part after another is, each given
        what was made before it and what is still to be made behind it.
        """
        num_frames = codes_BKT.shape[-1]
        window = min(self._window, num_frames)
        if (extents(free_BKT.any(1))[1] <= window).all():
            return self._redo_within(codes_BKT, free_BKT, texts, seed, progress, **how)
        stride = window - self._context
        for number, start in enumerate(range(0, num_frames, stride)):
            part_BKT = free_BKT.copy()
            part_BKT[..., :start] = part_BKT[..., start + stride :] = False
            codes_BKT = self._redo_within(
                codes_BKT, part_BKT, texts, _later(seed, number), progress, **how
            )
        return codes_BKT

    @property
    def _context(self) -> int:
        """Frames that are heard where a window goes on from another."""
        # With more than three quarters of it, each would add next to nothing.
        return min(round(self.editing.context * self.frame_rate), self._window * 3 // 4)

    def _redo_within(
        self, codes_BKT, free_BKT, texts, seed, progress, *, editing=None, originals=None
    ) -> np.ndarray:
        """`_redo` of what fits into a window of the model, in whose middle it lies."""
        if not free_BKT.any():
            return codes_BKT
        num_frames = codes_BKT.shape[-1]
        window = min(self._window, num_frames)
        first_B, size_B = extents(free_BKT.any(1))
        firsts = np.clip((2 * first_B + size_B - window) // 2, 0, num_frames - window)

        def cut(x_BKT: np.ndarray) -> np.ndarray:
            return np.stack([x[:, first : first + window] for x, first in zip(x_BKT, firsts)])

        def heard(texts: list[Description]) -> list[Description]:
            pairs = zip(texts, firsts, strict=True)
            return [self._within([text], int(first), window)[0] for text, first in pairs]

        canvas, texts = Canvas(cut(codes_BKT), ~cut(free_BKT)), heard(texts)
        if originals is not None:
            texts = [*heard(originals), *texts]
            canvas = Canvas(*(np.concatenate([x, x]) for x in canvas))
        made_BKT = self._generated(
            texts, canvas, self.generation, seed, progress, num_frames=window,
            editing=editing or self.editing,
        ).codes_BKT[-len(codes_BKT) :]  # fmt: skip
        codes_BKT = codes_BKT.copy()
        for codes_KT, made_KT, first in zip(codes_BKT, made_BKT, firsts):
            codes_KT[:, first : first + made_KT.shape[-1]] = made_KT
        return codes_BKT

    def _drawn_out(self, codes_BKT, more, texts, seed, progress) -> np.ndarray:
        """Tokens of which those at both ends are still to be made, a window after another."""
        total = codes_BKT.shape[-1]
        window, context = self._window, self._context
        begin, end, number = more[0], total - more[1], 0
        while begin > 0 or end < total:
            if end < total:
                last = min(total, end - min(context, end - begin) + window)
                first, new = max(begin, last - window), (end, last)
                end = last
            else:
                first = max(0, begin + min(context, end - begin) - window)
                last, new = min(end, first + window), (first, begin)
                begin = first
            part_BKT = codes_BKT[..., first:last]
            free_BKT = np.zeros(part_BKT.shape, bool)
            free_BKT[..., new[0] - first : new[1] - first] = True
            codes_BKT[..., first:last] = self._redo(
                part_BKT, free_BKT, self._within(texts, first, last - first),
                _later(seed, number), progress,
            )  # fmt: skip
            number += 1
        return codes_BKT

    @functools.cached_property
    def _reader(self) -> sampling.Rescorer:
        """The model itself, to judge tokens."""
        return rescore.from_model(self.loaded, self.loaded, execution=self.execution)

    def _confidence(self, codes_BKT: np.ndarray, texts: list[Description]) -> np.ndarray:
        model, window = self.loaded.config.model, self._window
        # What predicts one step after another has read all that comes before without a mask.
        groups = 1 if model.autoregressive else GROUPS
        num_frames = codes_BKT.shape[-1]
        log_BKT = np.zeros(codes_BKT.shape, np.float32)
        for start in range(0, num_frames, window):
            first = max(0, min(start, num_frames - window))
            part_BKT = codes_BKT[..., first : first + window]
            hidden_G1T = likelihood.interleaved(part_BKT.shape[-1], self._span, groups)
            log_BKT[..., first : first + window] = likelihood.log_probabilities(
                self._reader, self._within(texts, first, part_BKT.shape[-1]), part_BKT, hidden_G1T,
                mask_id=model.mask_id,
            )  # fmt: skip
        return log_BKT

    # --- audio ------------------------------------------------------------------------------------

    def _edited(
        self, clips, frees, seconds, descriptions, seed, progress, *, editing=None, originals=None
    ) -> Edit:
        """Clips of which what is free is made anew; `seconds` are the regions, None all of it."""
        texts = self._texts(clips, descriptions)
        codes_BKT = np.stack([clip.codes_KT for clip in clips])
        free_BKT = np.stack(frees)
        codes_BKT = self._redo(
            codes_BKT, free_BKT, texts, seed, progress, editing=editing, originals=originals
        )
        return self._rendered(clips, codes_BKT, seconds)

    def _rendered(self, clips: list[Clip], codes_BKT: np.ndarray, seconds: Any) -> Edit:
        """The sound of clips with other tokens."""
        edits = []
        for i, (clip, codes_KT) in enumerate(zip(clips, codes_BKT)):
            differs_T = (clip.codes_KT != codes_KT).any(0)
            ranges = _ranges(differs_T)
            pieces = splice.spliced(self._splicer, clip.codes_KT, codes_KT, ranges)
            regions = seconds and seconds[i]
            if not regions:
                regions = [(a / self.frame_rate, b / self.frame_rate) for a, b in ranges]
            edits.append(self._pasted(clip, pieces, regions))
        return self._edit(clips, codes_BKT, edits)

    def _pasted(self, clip: Clip, pieces, regions, **longer) -> paste.Pasted:
        source = clip.source
        if not pieces:
            return paste.Pasted(source.samples_NC, [])
        decoded_CN = decoding.decode_audio(self._splicer, clip.codes_KT[None])[0]
        try:
            if clip.own:
                return paste.own(source, decoded_CN, pieces, **longer)
            total = len(source.samples_NC) / source.sample_rate
            regions = [(a, total if b is None else b) for a, b in regions]
            return paste.pasted(
                source, decoded_CN, pieces, regions, codec_rate=self.sample_rate,
                edge=self.editing.edge, fade=self.editing.fade, side=self.editing.side, **longer,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(str(error)) from None

    def _rendered_longer(self, clip, made_KT, more, ends, lead, total) -> paste.Pasted:
        """A clip that was drawn out at one end after the other."""
        num_frames = made_KT.shape[1]
        old = num_frames - more[0] - more[1]
        longer_KT = made_KT[:, more[0] :]
        pieces = []
        if more[1]:
            new = old, longer_KT.shape[1]
            pieces += splice.spliced(self._splicer, clip.codes_KT, longer_KT, [new])
        if more[0]:
            later = more[0] * self._splicer.config.hop
            pieces = [p._replace(first_sample=p.first_sample + later) for p in pieces]
            pieces = splice.spliced(self._splicer, longer_KT, made_KT, [(0, more[0])]) + pieces
        return self._pasted(clip, pieces, ends, before=lead, total=total)

    def _edit(self, clips, codes_BKT, edits: list[paste.Pasted], before: int = 0) -> Edit:
        wavs = [_as_given(edit.samples_NC, clip.source).T for clip, edit in zip(clips, edits)]
        changed = [edit.changed for edit in edits]
        return Edit(np.stack(wavs), codes_BKT, changed, clips[0].source.sample_rate, clips, before)


def _later(seed: int, number: int) -> int:
    """The seed of what is made after `number` other parts."""
    return (seed + number) % 2**31


def _source_of(samples_CN: np.ndarray, sample_rate: int) -> Source:
    """Samples as those of a file."""
    held_NC = samples_CN.T
    if samples_CN.dtype == np.int16:
        held_NC = held_NC.astype(np.int32) << 16
    return Source(Path("audio"), held_NC, sample_rate, _SUBTYPES[samples_CN.dtype])


def _as_given(samples_NC: np.ndarray, source: Source) -> np.ndarray:
    """A file's samples as people read them: int16, int32, float32 or float64."""
    return (samples_NC >> 16).astype(np.int16) if source.subtype == "PCM_16" else samples_NC


def _as_held(samples_NC: np.ndarray, source: Source) -> np.ndarray:
    return samples_NC.astype(np.int32) << 16 if source.subtype == "PCM_16" else samples_NC


def _regions_of(regions: Any, count: int) -> list[list[tuple[float, float | None]]]:
    """Regions of each clip, from those of all, or from a list for each."""

    def seconds(one: Any) -> list[tuple[float, float | None]]:
        return [(float(a), None if b is None else float(b)) for a, b in one]

    try:
        each = [seconds(regions)] * count
    except (TypeError, ValueError):
        try:
            each = [seconds(one) for one in regions]
        except (TypeError, ValueError):
            raise UserError(
                "regions must be (begin, end) in seconds, such as [(2, 4.5), (7, None)], or a list "
                "of them for each clip"
            ) from None
    if len(each) != count or not all(each):
        raise UserError(f"{count} clips need as many lists of regions, none of them empty")
    return each


def _ranges(differs_T: np.ndarray) -> list[tuple[int, int]]:
    """Where neighbouring frames differ: [first, end)."""
    edges = np.flatnonzero(np.diff(np.r_[False, differs_T, False]))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]

"""Editing: what is asked for is made anew, and every other sample stays as it was.

    model = MAGNeT.get_pretrained("demo")
    edit = model.generate_inpainting("song.wav", regions=[(2, 4.5)], descriptions="a harp solo")
    edit.write("edited.wav")

A clip that the model made, and whose tokens are kept (`edit.kept`), is spliced to the sample. The
samples of any other file are its own, and edits are faded into them.
"""

import dataclasses
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
    checked,
)
from magnet_jax.config import EditConfig, Share, replaced
from magnet_jax.decode.canvas import Canvas
from magnet_jax.edit import free
from magnet_jax.edit import regions as places
from magnet_jax.edit.clip import Audio, Clip, Edit
from magnet_jax.edit.retouch import Retouching, later
from magnet_jax.errors import UserError
from magnet_jax.prompts import Description, Descriptions

NOISE = 1.0  # of the choice of spans that a variation makes anew, in nats


class Drafts(NamedTuple):
    """Clips made in few steps, to pick from."""

    wav_BCN: np.ndarray
    tokens_BKT: np.ndarray  # of whole spans, of which the last may end after the clip
    texts: list[Description]
    seed: int


class Editing(Retouching):
    """What a model does to audio that is there: of a MAGNeT all, of a MusicGen to go on from it."""

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
            each; an end of None is the clip's. Those that touch are one, and none change nothing.
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
        self.check_parallel("generate_inpainting")
        clips = self._clips_of(audio, audio_sample_rate, tokens)
        if (mask is None) == (regions is None):
            raise UserError("give regions, such as [(2, 4.5)], or a mask, and not both")
        if mask is not None and codebooks is not None:
            raise UserError("codebooks are of regions: give a mask [K, T] that says them, or none")
        if mask is not None:
            frees = [free.mask(mask, clip.codes_KT.shape) for clip in clips]
            return self._edited(clips, frees, None, descriptions, seed, progress)
        each = [self._frames_of(clips[0], one) for one in places.of_each(regions, len(clips))]
        frees = [free.regions(frames, clips[0].codes_KT.shape, codebooks) for _, frames in each]
        seconds = [found for found, _ in each]
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
        """Makes clips longer, at their beginning, at their end or both; a MusicGen at their end.

        Args:
          audio, audio_sample_rate, descriptions, progress, tokens, seed: see
            `generate_inpainting`.
          before, after: seconds to be added, to the nearest frame.
        """
        clips = self._clips_of(audio, audio_sample_rate, tokens)
        if not before and not after:
            raise UserError("give seconds to add: before, after or both")
        if before:
            self.check_parallel("before")
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
        self.check_parallel("generate_between")
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
        where = [[(begin, (first + hole) / rate)]] * len(joined)
        edit = self._edited(joined, [free_KT] * len(joined), where, descriptions, seed, progress)
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
        self.check_parallel("generate_restyle")
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
        self.check_parallel("generate_variations")
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
        self.check_parallel("confidence")
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
        self.check_parallel("repair")
        clips = self._clips_of(audio, audio_sample_rate, tokens)
        texts = self._texts(clips, descriptions)
        codes_BKT = np.stack([clip.codes_KT for clip in clips])
        log_BKT = self._confidence(codes_BKT, texts)
        for number in range(rounds if worst else 0):
            free_BKT = np.stack([free.worst(log_KT, worst, self._span) for log_KT in log_BKT])
            own_seed = later(seed, number * codes_BKT.shape[-1])  # (windows count on from it)
            new_BKT = self._redo(codes_BKT, free_BKT, texts, own_seed, progress)
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

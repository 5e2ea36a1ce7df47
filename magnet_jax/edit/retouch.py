"""What all edits of a model share: the clips, their new tokens, and the sound of these."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magnet_jax import prompts
from magnet_jax.checkpoints import pretrained
from magnet_jax.codec import decoding, encodec
from magnet_jax.config import DecodeConfig, EditConfig, decode_of
from magnet_jax.decode import likelihood, rescore, sampling
from magnet_jax.decode.canvas import Canvas, extents
from magnet_jax.edit import kept, paste, regions, splice
from magnet_jax.edit.clip import Clip, Edit, as_given, source_of
from magnet_jax.errors import UserError
from magnet_jax.io import exact
from magnet_jax.prompts import Description

GROUPS = 4  # in which a clip's tokens are hidden to be judged


def later(seed: int, number: int) -> int:
    """The seed of what is made after `number` other parts."""
    return (seed + number) % 2**31


class Retouching:
    """A part of a model of `api.py`, whose attributes it uses."""

    editing: EditConfig = EditConfig()

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
            sources, text = [source_of(samples_CN, sample_rate) for samples_CN in audio], ""
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
                if round(len(source.samples_NC) * self.sample_rate / source.sample_rate) < 1:
                    raise UserError(
                        f"{source.path}: is shorter than a sample at {self.sample_rate} Hz, and "
                        "has nothing to be edited"
                    )
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

    def _frames_of(
        self, clip: Clip, asked: Sequence[regions.Region]
    ) -> tuple[list[tuple[float, float]], list[tuple[int, int]]]:
        """Regions of a clip in seconds, none beside another, and the frames to be made anew."""
        seconds = len(clip.source.samples_NC) / clip.source.sample_rate
        found = regions.joined(asked, seconds)
        frames = [
            regions.frames_of(
                region,
                seconds=seconds,
                frame_rate=self.frame_rate,
                num_frames=clip.codes_KT.shape[-1],
                edge=self.editing.edge,
                reach=splice.reach_of(self._splicer.config),
                least=self._span,
            )
            for region in found
        ]
        return found, frames

    @property
    def is_parallel(self) -> bool:
        """Whether the model can make what lies between other tokens, or before them."""
        return self.loaded.config.model.parallel

    def check_parallel(self, what: str) -> None:
        """Raises `UserError` for a model that goes on from a beginning alone."""
        if not self.is_parallel:
            raise UserError(
                f"{what}: a model of kind {self.kind} makes what comes behind a clip alone "
                "(generate_extension, after); take a MAGNeT"
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
                given=given, rescorer=getattr(self, "rescorer", None), execution=self.execution,
                on_step=on_step,
                **more,
            )  # fmt: skip

    def _redo(self, codes_BKT, free_BKT, texts, seed, progress, **how) -> np.ndarray:
        """The tokens, of which those that are free are made anew.

        Where they do not fit into what the model hears at once, a part after another is, each given
        what was made before it and what is still to be made behind it.
        """
        num_frames = codes_BKT.shape[-1]
        window = min(self._window, num_frames)
        fits_B11 = (extents(free_BKT.any(1))[1] <= window)[:, None, None]
        codes_BKT = self._redo_within(codes_BKT, free_BKT & fits_B11, texts, seed, progress, **how)
        free_BKT = free_BKT & ~fits_B11
        stride = self._window - self._context
        for number, start in enumerate(range(0, num_frames, stride)):
            part_BKT = free_BKT.copy()
            part_BKT[..., :start] = part_BKT[..., start + stride :] = False
            codes_BKT = self._redo_within(
                codes_BKT, part_BKT, texts, later(seed, number), progress, **how
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
        editing = (editing or self.editing) if self.is_parallel else None
        made_BKT = self._generated(
            texts, canvas, self.generation, seed, progress, num_frames=window, editing=editing
        ).codes_BKT[-len(codes_BKT) :]
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
                later(seed, number), progress,
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
        edits, sounds = [], {}  # several may be variations of one clip
        for i, (clip, codes_KT) in enumerate(zip(clips, codes_BKT)):
            ranges = regions.where((clip.codes_KT != codes_KT).any(0))
            pieces = splice.spliced(self._splicer, clip.codes_KT, codes_KT, ranges)
            asked = seconds and seconds[i]
            if not asked:
                asked = [(a / self.frame_rate, b / self.frame_rate) for a, b in ranges]
            if pieces and id(clip) not in sounds:
                sounds[id(clip)] = self._sound_of(clip)
            edits.append(self._pasted(clip, pieces, asked, sounds.get(id(clip))))
        return self._edit(clips, codes_BKT, edits)

    def _sound_of(self, clip: Clip) -> np.ndarray:
        return decoding.decode_audio(self._splicer, clip.codes_KT[None])[0]

    def _pasted(self, clip: Clip, pieces, asked, decoded_CN, **longer) -> paste.Pasted:
        """A clip with pieces put into it, where `decoded_CN` is what its own tokens sound like."""
        if not pieces:
            return paste.Pasted(clip.source.samples_NC, [])
        try:
            if clip.own:
                return paste.own(clip.source, decoded_CN, pieces, **longer)
            return paste.pasted(
                clip.source, decoded_CN, pieces, asked, codec_rate=self.sample_rate,
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
        return self._pasted(clip, pieces, ends, self._sound_of(clip), before=lead, total=total)

    def _edit(self, clips, codes_BKT, edits: list[paste.Pasted], before: int = 0) -> Edit:
        wavs = [as_given(edit.samples_NC, clip.source).T for clip, edit in zip(clips, edits)]
        changed = [edit.changed for edit in edits]
        return Edit(np.stack(wavs), codes_BKT, changed, clips[0].source.sample_rate, clips, before)

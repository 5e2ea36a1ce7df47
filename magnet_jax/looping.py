"""Loops with MAGNeT: clips whose end leads to their beginning, as long as their bars to the sample.

model = MAGNeT.get_pretrained("demo")
loops = model.generate_loop("a lively jig on the violin", bpm=128, bars=4, seed=1)
loops.write("jig.wav")
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from magnet_jax import prompts
from magnet_jax.arguments import Between, Count, Rate, Seconds, Seed, checked
from magnet_jax.config import EditConfig
from magnet_jax.decode import canvas, sampling
from magnet_jax.decode.tokens_of_text import TextPadLen
from magnet_jax.edit import bars as lengths
from magnet_jax.edit import closing
from magnet_jax.edit.bars import Bars
from magnet_jax.edit.clip import Audio
from magnet_jax.editing import Editing
from magnet_jax.errors import UserError
from magnet_jax.io import audio as files
from magnet_jax.io import chunks, exact
from magnet_jax.io.files import replacing_file
from magnet_jax.prompts import Description, Descriptions

LOUDNESS = -14.0  # LUFS, AudioCraft's
LEAST_NEW = 0.25  # share of a loop that a start leaves to be made
Bpm = Annotated[float, Between(20, 400)]
BeatsPerBar = Annotated[Count, Between(1, 16)]


class Loops(NamedTuple):
    """Clips that can be played again and again."""

    wav_BCN: np.ndarray  # float32, at the level that the model gives
    tokens_BKT: np.ndarray  # int32, rings
    sample_rate: int
    length: Bars
    texts: list[Description]

    def write(self, path: str | Path, clip: int = 0, lufs: float | None = LOUDNESS) -> None:
        """Writes a loop as WAV or FLAC of 16 bits, with what music programs read of loops.

        Args:
          path: its name must end in .wav or .flac; other formats add silence to what they code.
          clip: which.
          lufs: loudness, reached by one gain that leaves peaks at -1 dB at most; None is none.

        Raises:
          UserError: another kind of file, or one that cannot be written.
        """
        wav_CN = self.wav_BCN[clip]
        if lufs is not None:
            wav_CN, _ = closing.levelled(wav_CN, self.sample_rate, lufs)
        info = {"title": prompts.in_words(self.texts[clip]), "software": "magnet_jax"}
        content = encoded(Path(path), wav_CN, self.sample_rate, self.length, info)
        with replacing_file(Path(path)) as temporary:
            temporary.write_bytes(content)


class Looping(Editing):
    """What a MAGNeT does to make loops. A part of `MAGNeT`, whose attributes it uses."""

    @checked
    def generate_loop(
        self,
        descriptions: Descriptions = None,
        progress: bool = False,
        *,
        bpm: Bpm | None = None,
        bars: Count | None = None,
        seconds: Seconds | None = None,
        beats_per_bar: BeatsPerBar = 4,
        start: Audio | None = None,
        start_sample_rate: Rate | None = None,
        start_seconds: Seconds | None = None,
        seed: Seed = 0,
        text_pad_len: TextPadLen = None,
    ) -> Loops:
        """Generates a loop for each description, of a length that is exact to the sample.

        The tempo is that of the length: it is not said to the model, which may play another one.

        Args:
          descriptions: texts; a string by itself is one, None or "" a loop without text. Texts
            over time come round again.
          progress: show a bar, or call the callback.
          bpm: quarters a minute.
          bars: how many; as many of 8, 4, 2 or 1 as the model hears at once by default.
          seconds: the length, in place of bpm and bars; by default that of the model's clips.
          beats_per_bar: quarters a bar.
          start: what the loops begin with: a file, or samples [B, C, N] or [C, N], one for all
            or one a loop. It is heard as its tokens sound, and not as it was.
          start_sample_rate: samples per second of an array.
          start_seconds: how much of it; by default half of the loop, or all that there is.
          seed: loop i depends on (seed, i), its text and start, not on its neighbours.
          text_pad_len: see `tokens_of_text.tokenize_texts`.

        Raises:
          UserError: a length that is none, or longer than the model hears at once; a start that
            leaves less than a quarter of the loop; a codec that norms over the whole clip.
        """
        length = lengths.of(bpm, bars, seconds, beats_per_bar=beats_per_bar, most=self.max_duration)
        texts = [""] if descriptions is None else descriptions
        start_BKP = None
        if start is not None:
            start_BKP = self.start_of(length, start, start_sample_rate, start_seconds)
            if len(texts) == 1:
                texts = texts * len(start_BKP)
        elif (start_sample_rate, start_seconds) != (None, None):
            raise UserError("start_sample_rate and start_seconds need a start")
        with self._listening(progress) as on_step:
            return self.loops(
                texts, length, seed=seed, start_BKP=start_BKP, text_pad_len=text_pad_len,
                on_step=on_step,
            )  # fmt: skip

    def loops(
        self,
        texts: list[Description],
        length: Bars,
        *,
        seed: int,
        start_BKP: np.ndarray | None = None,
        on_step: Callable[[int, int], None] | None = None,
        **keywords: Any,
    ) -> Loops:
        """Makes a loop a text as the settings say; `keywords` are those of `sampling.generate`."""
        splicer = self._splicer  # a codec that is refused is, before anything is made
        num_frames = length.frames(self.frame_rate)
        if num_frames < self._span:
            raise UserError(
                f"a loop of {length.words} is shorter than {self._span} frames of "
                f"{1 / self.frame_rate:g} s: ask for more bars, or a slower tempo"
            )
        prompts.check_times(texts, num_frames / self.frame_rate)
        model, given = self.loaded.config.model, None
        if start_BKP is not None:
            if len(start_BKP) not in (1, len(texts)):
                raise UserError(f"{len(texts)} loops need one start or as many, not "
                                f"{len(start_BKP)}")  # fmt: skip
            shape = (len(texts), model.num_codebooks, start_BKP.shape[-1])
            given = canvas.beginning_with(np.broadcast_to(start_BKP, shape), num_frames)
        codes_BKT = sampling.generate(
            self.loaded,
            texts,
            num_frames=num_frames,
            decoding=self.generation,
            seed=seed,
            given=given,
            rescorer=self.rescorer,
            editing=EditConfig(ring=True),
            execution=self.execution,
            on_step=on_step,
            **keywords,
        ).codes_BKT
        wav_BCN = closing.audio(splicer, codes_BKT)
        wav_BCN = closing.resampled(wav_BCN, length.samples(self.sample_rate))
        return Loops(wav_BCN, codes_BKT, self.sample_rate, length, list(texts))

    def start_of(
        self,
        length: Bars,
        audio: Path | np.ndarray,
        sample_rate: int | None = None,
        seconds: float | None = None,
    ) -> np.ndarray:
        """Tokens [B, K, P] of what loops are to begin with; see `generate_loop`."""
        if isinstance(audio, Path) == (sample_rate is not None):
            raise UserError(
                "start_sample_rate is of arrays, which need it; a file has its own: "
                + ("leave it out" if isinstance(audio, Path) else "give it")
            )
        clips = self._clips_of(audio, sample_rate, None)
        codes_BKT = np.stack([clip.codes_KT for clip in clips])
        num_frames, there = length.frames(self.frame_rate), codes_BKT.shape[-1]
        if seconds is None:
            return codes_BKT[..., : num_frames // 2]
        wanted = round(seconds * self.frame_rate)
        if not 1 <= wanted <= there:
            raise UserError(
                f"start_seconds {seconds:g} must lie between a frame, {1 / self.frame_rate:g} s, "
                f"and the {there / self.frame_rate:g} s of the start"
            )
        if wanted > (1 - LEAST_NEW) * num_frames:
            raise UserError(
                f"start_seconds {seconds:g} leaves less than a quarter of {length.words} to be "
                "made: give fewer, or ask for a longer loop"
            )
        return codes_BKT[..., :wanted]


def encoded(
    path: Path, wav_CN: np.ndarray, sample_rate: int, length: Bars | None, info: dict[str, str]
) -> bytes:
    """A sound file of 16 bits, of a loop with what music programs read of loops.

    Args:
      path: what errors call it; the suffix says which kind it is.
      wav_CN: float32 [channels, samples], written as it is.
      sample_rate: samples per second.
      length: of a loop; None of any other clip, whose WAV says nothing more.
      info: some of 'title', 'software' and 'comment'.

    Raises:
      UserError: another suffix than .wav or .flac, or samples that are none.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("wav", "flac"):
        raise UserError(
            f"{path}: a loop is written as .wav or .flac, as other formats add silence to it"
        )
    content = bytes(files.encoded(path, wav_CN, sample_rate, **files.ENCODINGS[kind]))
    info = {name: text for name, text in info.items() if text}
    if kind == "flac":
        tags = {{"title": "TITLE", "software": "ENCODER", "comment": "DESCRIPTION"}[name]: text
                for name, text in info.items()}  # fmt: skip
        if length is not None and length.bpm is not None:
            tags["BPM"] = f"{length.bpm:g}"
        return exact.with_flac_tags(content, tags)
    if length is None:
        return content
    names = {"title": "INAM", "software": "ISFT", "comment": "ICMT"}
    return chunks.with_chunks(
        content,
        chunks.of_loop(
            wav_CN.shape[-1],
            sample_rate,
            length.starts(sample_rate),
            bpm=length.bpm,
            beats=length.beats or 0,
            beats_per_bar=length.beats_per_bar,
            info={names[name]: text for name, text in info.items()},
        ),
    )

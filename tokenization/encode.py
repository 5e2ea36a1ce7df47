"""Tracks of any length to tokens: windows of many tracks in a batch, the same as track by track.

What the encoder's convolutions make of a frame depends on a few frames to each side
(`receptive_field`), so a window that overlaps its neighbours by those gives the frames between
exactly. The LSTM behind them depends on all that came before: its state goes along from window to
window. Each row of a batch is another track, and when one ends the next takes its row. Of stereo
whose sides a mono codec encodes, a row has two lanes.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np

from magnet_jax.codec.encodec import Codec, exactly, join_sides
from magnet_jax.codec.receptive_field import token_frames
from magnet_jax.errors import UserError
from magnet_jax.io.torch_env import import_torch

MOST_SHORT = 64  # tracks shorter than a window that wait for others of their length


class Source(NamedTuple):
    """A track to encode: anything that names it, and its audio in blocks [C, n] (float32)."""

    key: Any
    blocks: Iterable[np.ndarray]


class Encoded(NamedTuple):
    """What became of a track."""

    key: Any
    codes_KT: np.ndarray | None
    """int16; None where reading failed, or there was nothing to read."""
    samples: int
    """Of the audio, without the zeros that fill up the last frame."""
    error: Exception | None


def encode(
    codec: Codec,
    sources: Iterable[Source],
    *,
    window_frames: int,
    batch_size: int,
    rejected: type[Exception],
    precision: Literal["float32", "bfloat16"] = "float32",
    sides: int = 1,
) -> Iterator[Encoded]:
    """Encodes each track as a whole, its last frame filled up with zeros, in the sources' order.

    The result is a function of the sources and settings alone. Memory goes with `batch_size` times
    `window_frames` and with the tokens, not with the length of the audio. While a batch is encoded
    the next windows are read, and the first ones of the tracks that come next.

    Args:
      codec: with weight norm, as `receptive_field.convolutions` wants it.
      sources: tracks; `num_open` are read at once.
      window_frames: frames a window, overlap included.
      batch_size: tracks at once.
      rejected: what reading a source may raise to have that track, and only that, left out.
      precision: of the convolutions.
      sides: a track has so many times the codec's channels; each side is encoded by itself, and
        their codebooks alternate, see `CodecSpec.interleaved`.

    Raises:
      UserError: a codec that norms over the whole clip, or windows that are nearly all overlap.
    """
    encoder = _Encoder(codec, window_frames, precision, sides)
    with ThreadPoolExecutor(num_open(batch_size), "reader") as readers:
        batcher = _Batcher(encoder, sources, readers, batch_size, rejected)
        while batcher.step():
            yield from batcher.ready()


def num_open(batch_size: int) -> int:
    """How many tracks `encode` reads at once."""
    return 2 * batch_size


def encode_pieces(
    codec: Codec,
    sources: Iterable[Source],
    cut: Callable[[int], list[tuple[int, int]]],
    *,
    rejected: type[Exception],
    sides: int = 1,
) -> Iterator[Encoded]:
    """As `encode`, each piece of a track by itself: for codecs that norm over what they are given.

    `cut` takes frames, and gives the first and the end of each piece. A whole track is in memory.
    """
    for source in sources:
        try:
            held = list(source.blocks)
        except rejected as error:
            yield Encoded(source.key, None, 0, error)
            continue
        samples = sum(block_CN.shape[1] for block_CN in held)
        if not samples:
            yield Encoded(source.key, None, 0, None)
            continue
        frames = -(-samples // codec.hop)
        wav_CN = np.pad(np.concatenate(held, axis=1), ((0, 0), (0, frames * codec.hop - samples)))
        pieces = [wav_CN[:, i * codec.hop : j * codec.hop] for i, j in cut(frames)]
        shape = (sides, codec.spec.channels, -1)
        codes = [join_sides(codec.encode(part_CN.reshape(shape)), sides)[0] for part_CN in pieces]
        yield Encoded(source.key, np.concatenate(codes, axis=1), samples, None)


class _Window(NamedTuple):
    wav_CN: np.ndarray
    skip: int  # frames before the first new one
    new: int  # frames that no window before gave
    is_first: bool
    is_last: bool


class _Lane:
    """What is encoded as one stream: the LSTM's state, the tokens so far."""

    def __init__(self):
        self.state: Any = None  # of the LSTM
        self.tail_FT: Any = None  # what the last convolution still needs of the LSTM's frames
        self.codes: list[np.ndarray] = []
        self.tonal: list[np.ndarray] = []  # the first codebook of a codec that has it apart


class _Track:
    """A track on its way: the samples at hand, and a lane for each side."""

    def __init__(self, source: Source, encoder: "_Encoder", rejected: type[Exception]):
        self.key, self._blocks, self._encoder, self._rejected = (
            source.key, iter(source.blocks), encoder, rejected,
        )  # fmt: skip
        self.reading: Future | None = None
        self.samples = 0
        self.whole_frames: int | None = None  # known when all is read
        self.error: Exception | None = None
        self.encoded_whole = False
        self.lanes = [_Lane() for _ in range(encoder.sides)]
        self._held: list[np.ndarray] = []
        self._first = 0  # frame of the first sample held
        self._frames = 0  # given by windows
        self._wanted = 0  # frames up to which the next window reaches

    @property
    def done(self) -> bool:
        return self.encoded_whole or self.error is not None or self.whole_frames == 0

    @property
    def is_short(self) -> bool:
        return self.whole_frames is not None and self.whole_frames < self._encoder.window

    def read(self) -> None:
        """Reads what the next window wants; errors of the kind that rejects are kept."""
        encoder, hop = self._encoder, self._encoder.hop
        if self.done or self.whole_frames is not None:
            return
        self._wanted += encoder.step
        try:
            wanted = max(self._wanted + encoder.right, encoder.window) * hop
            while self.samples < wanted:
                block_CN = next(self._blocks, None)
                if block_CN is None:
                    break
                self._held.append(block_CN)
                self.samples += block_CN.shape[1]
            else:
                return
        except self._rejected as error:
            self.error, self._held = error, []
            return
        self.whole_frames = -(-self.samples // hop)
        if self.samples == 0:
            return
        missing = self.whole_frames * hop - self.samples
        self._held.append(np.zeros((self._held[0].shape[0], missing), np.float32))

    def all_held(self) -> np.ndarray:
        return np.concatenate(self._held, axis=1)

    def next_window(self) -> _Window:
        """The window that begins with the next frames; drops samples that no other needs."""
        encoder, hop = self._encoder, self._encoder.hop
        start = max(self._frames - encoder.left, 0)
        whole = self.whole_frames
        if whole is not None:  # the end of the track is the end of its window
            start = min(start, whole - encoder.window)
        is_last = whole is not None and whole - self._frames <= encoder.step
        new = whole - self._frames if is_last else encoder.step
        held_CN = self.all_held()
        from_ = (start - self._first) * hop
        wav_CN = held_CN[:, from_ : from_ + encoder.window * hop]
        window = _Window(wav_CN, self._frames - start, new, self._frames == 0, is_last)
        self._frames += new
        # The last window may begin a whole window before the end.
        keep = max(start, self._first)
        self._held, self._first = [held_CN[:, (keep - self._first) * hop :]], keep
        return window

    def end(self) -> None:
        """All tokens are there, and no sample is needed any more."""
        self.encoded_whole, self._held = True, []

    def encoded(self) -> Encoded:
        if self.error or not self.lanes[0].codes:
            return Encoded(self.key, None, self.samples, self.error)
        codes_SKT = np.stack([np.concatenate(lane.codes, axis=1) for lane in self.lanes])
        for codes_KT, lane in zip(codes_SKT, self.lanes):
            if lane.tonal:
                codes_KT[0] = np.concatenate(lane.tonal)
        return Encoded(self.key, join_sides(codes_SKT, len(codes_SKT))[0], self.samples, None)


class _Batcher:
    """Which tracks are encoded together. A track goes this way:

    sources -> begun, its first window is being read -> a row, window after window -> ready
                                                     -> short, until some are of its length -> ready
    """

    def __init__(
        self,
        encoder: "_Encoder",
        sources: Iterable[Source],
        readers: ThreadPoolExecutor,
        batch_size: int,
        rejected: type[Exception],
    ):
        self._encoder, self._sources, self._readers = encoder, iter(sources), readers
        self._batch_size, self._rejected = batch_size, rejected
        self._unfinished: deque[_Track] = deque()  # in the order of the sources
        self._begun: deque[_Track] = deque()
        self._rows: list[_Track | None] = [None] * batch_size
        self._short: dict[int, list[_Track]] = {}  # by frames: all of a batch are of one length

    def ready(self) -> Iterator[Encoded]:
        """What has become of the first tracks, as far as it is known."""
        while self._unfinished and self._unfinished[0].done:
            yield self._unfinished.popleft().encoded()

    def step(self) -> bool:
        """Takes a track out of a row or encodes a batch; False when all are encoded."""
        for row, track in enumerate(self._rows):
            track = track or self._next_track()
            if track is None:
                continue
            track.reading.result()
            if track.done or track.is_short:
                self._rows[row] = None
                if not track.done:
                    self._collect(track)
                return True
            self._rows[row] = track
        if tracks := [track for track in self._rows if track is not None]:
            windows = [track.next_window() for track in tracks]
            for track in tracks:
                track.reading = self._readers.submit(track.read)
            self._encoder.encode_windows(tracks, windows)
            return True
        if self._short:
            self._encoder.encode_whole(self._short.pop(min(self._short)))
            return True
        return False

    def _next_track(self) -> _Track | None:
        while len(self._begun) <= self._batch_size:
            source = next(self._sources, None)
            if source is None:
                break
            track = _Track(source, self._encoder, self._rejected)
            track.reading = self._readers.submit(track.read)
            self._unfinished.append(track)
            self._begun.append(track)
        return self._begun.popleft() if self._begun else None

    def _collect(self, track: _Track) -> None:
        """Of a track without a window of its own: encodes it when enough are of its length."""
        group = self._short.setdefault(track.whole_frames, [])
        group.append(track)
        if len(group) == self._batch_size:
            self._encoder.encode_whole(self._short.pop(track.whole_frames))
        elif sum(map(len, self._short.values())) > MOST_SHORT:
            most = max(self._short, key=lambda frames: len(self._short[frames]))
            self._encoder.encode_whole(self._short.pop(most))


class _Encoder:
    """The encoder in three parts: convolutions, LSTM, then the last convolution and codebooks."""

    def __init__(self, codec: Codec, window_frames: int, precision: str, sides: int):
        from transformers.models.encodec.modeling_encodec import EncodecLSTM

        self._torch = import_torch()
        self._codec, self._precision = codec, precision
        self.hop, self.window, self.sides = codec.hop, window_frames, sides
        self.left, self.right = token_frames(codec)
        self.step = window_frames - self.left - self.right
        layers = list(codec.encoder.layers)
        (place,) = [i for i, layer in enumerate(layers) if isinstance(layer, EncodecLSTM)]
        self._front = self._torch.nn.Sequential(*layers[:place])
        self._back = self._torch.nn.Sequential(*layers[place:])
        self._lstm, (self._activation, last) = layers[place].lstm, layers[place + 1 :]
        self._last = last.conv
        total = self._last.kernel_size[0] - 1
        # Frames that the last convolution needs of those after, and before.
        self._after = 0 if codec.config.use_causal_conv else total // 2
        self._before = total - self._after
        if self.step <= max(self._before, self._after):
            raise UserError(
                f"--window-seconds: windows of {window_frames} frames overlap by "
                f"{self.left + self.right}: too short; give more"
            )

    def encode_whole(self, tracks: list[_Track]) -> None:
        """Tracks of one length, all at once."""
        with self._torch.inference_mode(), exactly(self._torch):
            wav_BCN = self._by_lane([track.all_held() for track in tracks])
            codes_BKT = self._codec.codes(self._back(self._features(wav_BCN)))
        lanes = [lane for track in tracks for lane in track.lanes]
        for lane, codes_KT in zip(lanes, codes_BKT, strict=True):
            lane.codes = [codes_KT]
        if self._codec.tonal:
            for lane, codes_T in zip(lanes, self._codec.tonal_codes(wav_BCN), strict=True):
                lane.tonal = [codes_T]
        for track in tracks:
            track.end()

    def encode_windows(self, tracks: list[_Track], windows: list[_Window]) -> None:
        """A window of each track; what cannot be known yet comes with the next."""
        torch = self._torch
        wav_BCN = self._by_lane([window.wav_CN for window in windows])
        lanes = [lane for track in tracks for lane in track.lanes]
        ending = [track for track, window in zip(tracks, windows, strict=True) if window.is_last]
        windows = [window for window in windows for _ in range(self.sides)]
        with torch.inference_mode(), exactly(torch):
            x_BFT = self._features(wav_BCN)
            new_BFT = x_BFT.new_zeros(*x_BFT.shape[:2], self.step)
            for row, window in enumerate(windows):
                new_BFT[row, :, : window.new] = x_BFT[row, :, window.skip :][:, : window.new]
            y_BFT = self._recurrent(lanes, windows, new_BFT)
            codes_BKT = self._codec.codes(self._last(self._padded(lanes, windows, y_BFT)))
        if self._codec.tonal:
            for lane, window, codes_T in zip(lanes, windows, self._codec.tonal_codes(wav_BCN)):
                lane.tonal.append(codes_T[window.skip :][: window.new])
        for lane, window, codes_KT in zip(lanes, windows, codes_BKT):
            # Column j is frame j - after, counted from the window's first new one.
            first = self._after if window.is_first else 0
            end = window.new + (self._after if window.is_last else 0)
            lane.codes.append(codes_KT[:, first:end])
        for track in ending:
            track.end()

    def _by_lane(self, wavs: list[np.ndarray]) -> np.ndarray:
        """Audio of tracks, all of one length, as the codec takes it."""
        return np.stack(wavs).reshape(-1, self._codec.spec.channels, wavs[0].shape[1])

    def _features(self, wav_BCN: np.ndarray) -> Any:
        torch, device = self._torch, self._codec.device
        wav = torch.from_numpy(np.ascontiguousarray(wav_BCN)).to(device)
        enabled = self._precision == "bfloat16"
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled):
            return self._front(wav).float()

    def _recurrent(self, lanes: list[_Lane], windows: list[_Window], x_BFT: Any) -> Any:
        torch = self._torch
        layers, width = self._lstm.num_layers, self._lstm.hidden_size
        zeros = x_BFT.new_zeros(layers, width)
        states = [lane.state or (zeros, zeros) for lane in lanes]
        state = tuple(torch.stack([s[i] for s in states], dim=1) for i in range(2))
        x_TBF = x_BFT.permute(2, 0, 1).contiguous()
        y_TBF, (hidden, cell) = self._lstm(x_TBF, state)
        for row, lane in enumerate(lanes):
            lane.state = None if windows[row].is_last else (hidden[:, row], cell[:, row])
        return self._activation((y_TBF + x_TBF).permute(1, 2, 0))

    def _padded(self, lanes: list[_Lane], windows: list[_Window], y_BFT: Any) -> Any:
        """The last convolution's input: frames kept of the window before, new ones, and ends."""
        before, after = self._before, self._after
        width = before + after
        x_BFT = y_BFT.new_zeros(*y_BFT.shape[:2], width + self.step + after)
        x_BFT[..., width : width + self.step] = y_BFT
        for row, (lane, window) in enumerate(zip(lanes, windows)):
            x_FT, end = x_BFT[row], width + window.new
            if lane.tail_FT is not None:
                x_FT[:, :width] = lane.tail_FT
            if window.is_last:
                x_FT[:, end:] = 0
                x_FT[:, end : end + after] = self._beyond(x_FT[:, :end].flip(1), after).flip(1)
            if window.is_first:
                x_FT[:, after:width] = self._beyond(x_FT[:, width:end], before)
            lane.tail_FT = None if window.is_last else x_FT[:, end - width : end].clone()
        return x_BFT

    def _beyond(self, x_FT: Any, count: int) -> Any:
        """So many frames before the first, as the codec pads."""
        mode = self._codec.config.pad_mode
        if mode == "constant" or count == 0:
            return x_FT.new_zeros(x_FT.shape[0], count)
        if mode == "replicate":
            return x_FT[:, :1].expand(-1, count)
        return x_FT[:, 1 : count + 1].flip(1)

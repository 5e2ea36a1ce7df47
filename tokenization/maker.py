"""Makes one shard: decoders read its tracks, the codec encodes them, records are written."""

import functools
import json
import math
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from magnet_jax.codec.encodec import load_codec
from magnet_jax.config import CodecSpec
from magnet_jax.data import records
from tokenization import encode as encoding
from tokenization import mixing
from tokenization.intake import decoder as decoding
from tokenization.intake.audio import CLIPPED, Facts, Intake, RejectedError
from tokenization.place import place_at
from tokenization.settings import Job, spec_of
from tokenization.track import Reject, Track, rejected
from tokenization.units import Done, Unit


@dataclass
class _Tally:
    """What has been found out about a unit's tracks so far."""

    rejects: list[Reject] = field(default_factory=list)
    seconds: float = 0.0
    clipped: int = 0


class _Reading:
    """A track in blocks [C, n], for the encoder; after them `facts` are known."""

    def __init__(self, track: Track, part: Future, intake: Intake, idle: "queue.SimpleQueue[Any]"):
        self.track = track
        self.facts: Facts | None = None
        self._part, self._intake, self._idle = part, intake, idle

    def __iter__(self) -> Iterator[np.ndarray]:
        part = self._part.result()
        decoder = self._idle.get()
        try:
            stream = decoding.open_audio(part, self._intake, decoder)
            yield from stream
            self.facts = stream.facts
        finally:
            self._idle.put(decoder)


class Maker:
    """Makes shards: a codec, and the processes that decode for it; to be used as a context."""

    def __init__(self, job: Job, device: str):
        self._job = job
        self._place = place_at(job.out)
        self._codec = load_codec(job.codec, device, job.num_codebooks)
        self._spec = spec_of(job, self._codec.spec)
        records.features(self._spec.num_codebooks)  # loads TFDS, before decoders wait for it
        count = encoding.num_open(job.batch_size)
        self._decoders = [decoding.Decoder(job.decode_timeout) for _ in range(count)]
        self._unpacker = decoding.Unpacker(job.decode_timeout)

    def __enter__(self) -> "Maker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._unpacker.close()
        for decoder in self._decoders:
            decoder.close()

    def __call__(self, unit: Unit, progress: Callable[[int, float], None]) -> Done:
        """Makes a unit, and notes that it is done; `progress` gets files and seconds of audio."""
        tally = _Tally()
        examples = self._examples(unit.tracks, tally, progress)
        shard = self._place.write_shard(unit.records_name, self._spec.num_codebooks, examples)
        shard = replace(shard, path=Path(unit.records_name))
        done = Done(shard=shard, **vars(tally))
        values = asdict(done)
        del values["shard"]["path"]
        self._place.write(unit.note_name, json.dumps(values) + "\n")
        return done

    def _examples(
        self, tracks: Sequence[Track], tally: _Tally, progress: Callable[[int, float], None]
    ) -> Iterator[dict[str, Any]]:
        """The records of the tracks that are fit, in order; what is found out goes to `tally`."""
        for one in self._encoded(tracks):
            track, facts = one.key.track, one.key.facts
            if one.error:
                tally.rejects.append(rejected(track, one.error))
                progress(1, 0.0)
                continue
            if facts.both is None:
                yield from records_of(self._job, self._spec, track, one.codes_KT, one.samples)
                tally.seconds += facts.seconds
                tally.clipped += facts.clipped > CLIPPED
            else:
                track = mixing.with_offset(track, facts.both[0])
                for example in records_of(self._job, self._spec, track, one.codes_KT, one.samples):
                    start, seconds = example["start"], example["duration"]
                    if mixing.is_heard(facts.both, (start, start + seconds)):
                        tally.seconds += seconds
                        yield example
            progress(1, one.samples / self._spec.sample_rate)

    def _encoded(self, tracks: Sequence[Track]) -> Iterator[encoding.Encoded]:
        """Each track's tokens [K, T], or why not, in order; the keys are of `_Reading`."""
        job, codec, spec = self._job, self._codec, self._spec
        intake = job.intake(spec.sample_rate, spec.channels)
        idle: queue.SimpleQueue[decoding.Decoder] = queue.SimpleQueue()
        for decoder in self._decoders:
            idle.put(decoder)
        # They are begun in the order of the tracks, which is that of their rows.
        readings = (
            _Reading(track, self._unpacker.submit(track.part), intake, idle) for track in tracks
        )
        sources = (encoding.Source(reading, reading) for reading in readings)
        if codec.config.norms_over_clip:
            pieces = functools.partial(cut, max_frames=_record_frames(job, spec))
            return encoding.encode_pieces(
                codec, sources, pieces, rejected=RejectedError, sides=spec.sides
            )
        return encoding.encode(
            codec,
            sources,
            window_frames=math.ceil(job.window_seconds * spec.frame_rate),
            batch_size=job.batch_size,
            rejected=RejectedError,
            precision=job.precision,
            sides=spec.sides,
        )


def cut(frames: int, max_frames: int) -> list[tuple[int, int]]:
    """Where records of a track begin and end: at most `max_frames` long, as equal as possible."""
    length = math.ceil(frames / math.ceil(frames / max_frames))
    return [(i, min(i + length, frames)) for i in range(0, frames, length)]


def _record_frames(job: Job, spec: CodecSpec) -> int:
    return int(job.max_record_seconds * spec.frame_rate)


def records_of(
    job: Job, spec: CodecSpec, track: Track, codes_KT: np.ndarray, samples: int
) -> Iterator[dict[str, Any]]:
    """The records of a track."""
    hop = round(spec.sample_rate / spec.frame_rate)
    for first, end in cut(codes_KT.shape[1], _record_frames(job, spec)):
        yield {
            "codes": codes_KT[:, first:end],
            "caption": track.caption,
            "info": track.info,
            "track_id": track.track_id,
            "source_path": track.path,
            "start": track.start + first * hop / spec.sample_rate,
            "duration": (min(end * hop, samples) - first * hop) / spec.sample_rate,
        }

"""The data set on disk: written by tokenization, read by training.

A data set is one folder that TFDS opens by itself, `tfds.builder_from_directory(DIR)`:

    tokens-train.array_record-00000-of-00003 ...   the records
    features.json, metadata.json                   their types; the codec and the files' sizes
    dataset_info.json                              written last: its presence means 'complete'

A record is at most two minutes of one track (see `features`).
"""

from __future__ import annotations  # types of TFDS, which is slow to load

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from magnet_jax import config
from magnet_jax.config import CodecSpec
from magnet_jax.errors import UserError
from magnet_jax.io.files import sync, temporary

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

FORMAT = "magnet_jax tokens 1"
SPLITS = ("train", "validation")
COMPLETE = "dataset_info.json"  # the file that is written last

_NAME = "tokens"
_VERSION = "1.0.0"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A written record file: where it is and what it holds; without records there is no file."""

    path: Path
    """May be below the folder of the data set."""
    num_examples: int
    num_bytes: int
    """Of the serialized records."""
    file_bytes: int
    sha256: str = ""
    """Of the serialized records; '' of an earlier release's."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What a data set holds."""

    records: dict[str, int]
    """By split."""
    files: dict[str, int]
    """Bytes of each record file."""
    about: dict[str, Any]
    """What `finalise` was given for people: of tokenization.job hours, audio_files, rejected."""


def features(num_codebooks: int) -> tfds.features.FeaturesDict:
    """The types of a record's fields.

    codes int16 [K, T]; caption: the description; info: JSON object of the other metadata; track_id:
    path of the track without suffix, or its name in a table; source_path: path of its file below
    the source's folder; start, duration: seconds into that file, and of the record.
    """
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "codes": tfds.features.Tensor(
                shape=(num_codebooks, None), dtype=np.int16, encoding="bytes"
            ),
            "caption": tfds.features.Text(),
            "info": tfds.features.Text(),
            "track_id": tfds.features.Text(),
            "source_path": tfds.features.Text(),
            "start": np.float32,
            "duration": np.float32,
        }
    )


def decode_example(example: Mapping[str, Any]) -> dict[str, Any]:
    """What `open_split` yields, in Python's own types.

    Returns codes_KT (int16 [K, T]), caption (str), info (dict), track_id and source_path (str),
    start and duration (float, seconds).
    """
    return {
        "codes_KT": np.asarray(example["codes"]),
        "caption": example["caption"].decode(),
        "info": json.loads(example["info"].decode()),
        "track_id": example["track_id"].decode(),
        "source_path": example["source_path"].decode(),
        "start": float(example["start"]),
        "duration": float(example["duration"]),
    }


def all_captions(caption: str, info: dict[str, Any]) -> list[str]:
    """A record's caption, and the others that its metadata may hold under 'captions'."""
    others = info.get("captions")
    others = others if isinstance(others, list) else []
    return [caption, *(text for text in others if isinstance(text, str) and text.strip())]


def read_codec_spec(directory: str | Path) -> CodecSpec:
    """The codec whose tokens a data set holds.

    Raises `UserError` if the folder is missing, unfinished or no data set of ours.
    """
    return config.from_dict(
        CodecSpec, _read_metadata(directory)["codec"], f"{directory}/metadata.json: codec"
    )


def open_split(directory: str | Path, split: str) -> Any:
    """Random access to one split: `len`, `[i]` (see `decode_example`); it can be pickled.

    A small data set may have no 'validation' split, see `has_split`. Raises `UserError` for an
    absent split, and for missing or cut-off record files.
    """
    directory = Path(directory)
    metadata = _read_metadata(directory)
    for name, size in metadata["files"].items():
        path = directory / name
        if not path.exists() or path.stat().st_size != size:
            state = "cut off" if path.exists() else "missing"
            raise UserError(f"{path}: record file is {state}; copy the data set again")
    builder = _builder(directory)
    if split not in builder.info.splits:
        raise UserError(
            f"{directory}: no {split} split (it has {', '.join(builder.info.splits)}); a small "
            f"folder may give none: tokenize with a larger --validation-percent"
        )
    return builder.as_data_source(split)


def has_split(directory: str | Path, split: str) -> bool:
    """Whether a data set has any record in that split; raises as `read_codec_spec` does."""
    _read_metadata(directory)
    return split in _builder(Path(directory)).info.splits


def read_totals(directory: str | Path) -> Totals:
    """What a data set holds, without reading its records; raises as `read_codec_spec` does."""
    metadata = _read_metadata(directory)
    splits = _builder(Path(directory)).info.splits
    return Totals(
        records={name: info.num_examples for name, info in splits.items()},
        files=metadata["files"],
        about=metadata["about"],
    )


def digest(directory: str | Path) -> str:
    """Tells one data set from another: a hash of its metadata, with that of every file's records
    (of its name and size alone, where an earlier release wrote it)."""
    _read_metadata(directory)
    return hashlib.sha256((Path(directory) / "metadata.json").read_bytes()).hexdigest()


def is_complete(directory: Path) -> bool:
    """Whether tokenization of a folder came to its end."""
    return (directory / COMPLETE).exists()


def write_shard(path: Path, num_codebooks: int, examples: Iterable[Mapping[str, Any]]) -> Shard:
    """Writes one record file and returns what it holds.

    The file appears under `path` only when it is whole, checked and on disk; no example gives no
    file. The bytes are a function of the examples alone. Raises `OSError` if it cannot be written.
    """
    types = features(num_codebooks)
    with temporary(path) as writing:
        return _write_shard(path, writing, types, examples)


def _write_shard(
    path: Path,
    writing: Path,
    types: tfds.features.FeaturesDict,
    examples: Iterable[Mapping[str, Any]],
) -> Shard:
    from tensorflow_datasets.proto import tf_example_pb2

    writer, count, num_bytes, content = None, 0, 0, hashlib.sha256()
    try:
        for example in examples:
            if writer is None:
                with _written():
                    writer = ArrayRecordWriter(str(writing), "group_size:1,zstd:1")
            # (TFDS leaves the order of the fields to chance, which differs between processes)
            record = tf_example_pb2.Example.FromString(types.serialize_example(example))
            record = record.SerializeToString(deterministic=True)
            with _written():
                writer.write(record)
            count += 1
            num_bytes += len(record)
            content.update(record)
    except BaseException:
        if writer is not None:
            with contextlib.suppress(RuntimeError):  # (it says again what went wrong)
                writer.close()
        raise
    if count == 0:
        return Shard(path=path, num_examples=0, num_bytes=0, file_bytes=0)
    with _written():
        writer.close()
    sync(writing)
    reader = ArrayRecordReader(str(writing))
    whole = reader.ok() and reader.num_records() == count
    reader.close()
    if not whole:
        raise OSError(f"{writing}: cannot be read back as written; is the disk full?")
    file_bytes = writing.stat().st_size
    writing.replace(path)
    sync(path.parent)
    return Shard(
        path=path,
        num_examples=count,
        num_bytes=num_bytes,
        file_bytes=file_bytes,
        sha256=content.hexdigest(),
    )


@contextlib.contextmanager
def _written() -> Iterator[None]:
    """Makes `OSError` of what ArrayRecord's writer raises of a full disk and the like."""
    try:
        yield
    except RuntimeError as error:
        # ("write() failed: No space left on device; writing ...; at byte ...")
        raise OSError(str(error).partition(";")[0]) from None


def final_names(shards: Mapping[str, Sequence[Shard]]) -> list[tuple[Shard, str]]:
    """The shards that have records, split by split, with the names their files get in the end."""
    names = []
    for split, all_shards in shards.items():
        kept = [shard for shard in all_shards if shard.num_examples > 0]
        for index, shard in enumerate(kept):
            names.append((shard, f"{_NAME}-{split}.array_record-{index:05d}-of-{len(kept):05d}"))
    return names


def finalise(
    directory: Path,
    shards: Mapping[str, Sequence[Shard]],
    spec: CodecSpec,
    about: Mapping[str, Any],
) -> None:
    """Moves the shards of each split to their final names, then writes the metadata.

    Shards without records are left out, and so are splits without shards: readers never meet an
    empty file. `about` is kept in the metadata, for people. Can be killed anywhere and called again
    with the same arguments, also while another process is at it.
    """
    for shard, name in final_names(shards):
        final = directory / name
        try:
            (directory / shard.path).replace(final)
        except FileNotFoundError:
            if not final.exists():
                raise
    sync(directory)
    with temporary(directory / "metadata", Path.mkdir) as folder:
        for path in write_metadata(folder, shards, spec, about):
            sync(path)
            path.replace(directory / path.name)
    sync(directory)


def write_metadata(
    folder: Path,
    shards: Mapping[str, Sequence[Shard]],
    spec: CodecSpec,
    about: Mapping[str, Any],
) -> list[Path]:
    """Writes all files of a data set but the records, as for `finalise`, to an empty folder.

    Returns their paths in the order in which they may be published: the one that means 'complete'
    is the last.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    infos = []
    for split, all_shards in shards.items():
        kept = [shard for shard in all_shards if shard.num_examples > 0]
        if not kept:
            continue
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[shard.num_examples for shard in kept],
                num_bytes=sum(shard.num_bytes for shard in kept),
                filename_template=tfds.core.ShardedFileTemplate(
                    data_dir=folder,
                    dataset_name=_NAME,
                    split=split,
                    filetype_suffix="array_record",
                ),
            )
        )
    info = tfds.core.DatasetInfo(
        builder=DatasetIdentity(
            name=_NAME,
            version=tfds.core.Version(_VERSION),
            data_dir=os.fspath(folder),
            module_name="",
        ),
        description="EnCodec tokens of a folder of music, with its captions.",
        features=features(spec.num_codebooks),
        metadata=tfds.core.MetadataDict(
            format=FORMAT,
            codec=asdict(spec),
            files={name: shard.file_bytes for shard, name in final_names(shards)},
            sha256={name: shard.sha256 for shard, name in final_names(shards)},
            about=dict(about),
        ),
    )
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict(infos))
    info.write_to_directory(folder)
    return sorted(folder.iterdir(), key=lambda path: (path.name == COMPLETE, path.name))


def remove_temporaries(folder: Path) -> None:
    """Removes what killed writers left in a folder; what goes meanwhile is a slow one's."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _builder(directory: Path) -> tfds.core.DatasetBuilder:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:  # what TFDS raises depends on the damage
        raise UserError(
            f"data set {directory}: its {COMPLETE} or features.json is damaged "
            f"({type(error).__name__}); copy the data set again"
        ) from None


def _read_metadata(directory: str | Path) -> dict[str, Any]:
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"data set {directory}: no such folder")
    if not is_complete(directory):
        if (directory / "job.json").exists():
            raise UserError(
                f"data set {directory}: unfinished; run the same tokenization command again"
            )
        raise UserError(f"data set {directory}: not a folder that tokenization.job wrote")
    try:
        metadata = json.loads((directory / "metadata.json").read_text())
    except (OSError, ValueError):
        metadata = None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise UserError(
            f"data set {directory}: its metadata.json is missing or not of '{FORMAT}'; "
            f"tokenize again"
        )
    return metadata

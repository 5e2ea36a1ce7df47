import json
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from magnet_jax.config import CodecSpec
from magnet_jax.data import records
from magnet_jax.errors import UserError
from magnet_jax.io import files

SPEC = CodecSpec(
    source="embedded",
    sha256="ab" * 32,
    sample_rate=16000,
    channels=1,
    frame_rate=50.0,
    num_codebooks=3,
    codebook_size=1024,
)


def example(i, frames=7):
    return {
        "codes": np.random.default_rng(i).integers(0, 1024, (3, frames)).astype(np.int16),
        "caption": f"Märchen {i}",
        "info": json.dumps({"bpm": i, "keywords": ["a", "b"]}),
        "track_id": f"album/{i}",
        "source_path": f"album/{i}.flac",
        "start": 1.5,
        "duration": frames / 50,
    }


def write(folder, counts):
    """A data set whose shards hold these numbers of records: {'train': [2, 0], ...}."""
    (folder / "units").mkdir(parents=True)
    shards, i = {}, 0
    for split, numbers in counts.items():
        shards[split] = []
        for index, number in enumerate(numbers):
            path = folder / "units" / f"{split}-{index}"
            examples = [example(i + j, 5 + j) for j in range(number)]
            shards[split].append(records.write_shard(path, 3, examples))
            i += number
    records.finalise(folder, shards, SPEC, {"hours": 1.0})
    return shards


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    many = (example(i, 3000) for i in range(60))
    # (the limit has the effect of a full disk, with another number)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large$"):
            records.write_shard(tmp_path / "a", 3, many)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())

    def broken():
        yield example(0)
        raise RuntimeError("not of the writer")

    with pytest.raises(RuntimeError, match="not of the writer"):
        records.write_shard(tmp_path / "a", 3, broken())
    assert not list(tmp_path.iterdir())


def test_temporaries_may_go_by_themselves(tmp_path, monkeypatch):
    left = tmp_path / ".a.tmp"
    left.touch()
    monkeypatch.setattr(Path, "glob", lambda *how: [tmp_path / ".renamed.tmp", left])
    records.remove_temporaries(tmp_path)
    assert not left.exists()


def test_what_is_written_is_read(tmp_path):
    write(tmp_path, {"train": [2, 3], "validation": [1]})
    assert records.read_codec_spec(tmp_path) == SPEC
    source = pickle.loads(pickle.dumps(records.open_split(tmp_path, "train")))
    assert len(source) == 5 and len(records.open_split(str(tmp_path), "validation")) == 1
    got = records.decode_example(source[3])
    want = example(3, 6)
    np.testing.assert_array_equal(got["codes_KT"], want["codes"])
    assert got["codes_KT"].dtype == np.int16
    assert got["caption"] == "Märchen 3" and got["info"] == {"bpm": 3, "keywords": ["a", "b"]}
    assert got["track_id"] == "album/3" and got["source_path"] == "album/3.flac"
    assert got["start"] == 1.5 and got["duration"] == pytest.approx(0.12)


def test_tfds_opens_it_by_itself(tmp_path):
    write(tmp_path, {"train": [2], "validation": [1]})
    builder = tfds.builder_from_directory(tmp_path)
    assert builder.info.splits["train"].num_examples == 2
    assert builder.info.metadata["codec"]["sha256"] == SPEC.sha256
    ids = [e["track_id"] for e in builder.as_data_source("train")]
    assert ids == [b"album/0", b"album/1"]


def test_empty_shards_and_splits_leave_no_files(tmp_path):
    write(tmp_path, {"train": [0, 2, 0, 1], "validation": [0]})
    assert sorted(p.name for p in tmp_path.glob("tokens-*")) == [
        "tokens-train.array_record-00000-of-00002",
        "tokens-train.array_record-00001-of-00002",
    ]
    assert [e["track_id"] for e in records.open_split(tmp_path, "train")] == [
        b"album/0",
        b"album/1",
        b"album/2",
    ]
    assert not records.has_split(tmp_path, "validation") and records.has_split(tmp_path, "train")
    with pytest.raises(UserError, match="no validation split .it has train."):
        records.open_split(tmp_path, "validation")


def test_a_broken_shard_never_gets_its_name(tmp_path):
    def examples():
        yield example(0)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        records.write_shard(tmp_path / "shard", 3, examples())
    assert not (tmp_path / "shard").exists()
    done = records.write_shard(tmp_path / "shard", 3, [example(0)])
    assert done.num_examples == 1 and (tmp_path / "shard").stat().st_size == done.file_bytes
    records.write_shard(tmp_path / "again", 3, [example(0)])
    assert (tmp_path / "again").read_bytes() == (tmp_path / "shard").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "shard"]


def test_data_sets_of_other_captions_have_other_digests(tmp_path):
    digests = []
    for name, caption in (("one", "an organ"), ("same", "an organ"), ("other", "an oboe.")):
        records_of = [example(0) | {"caption": caption}]
        (tmp_path / name).mkdir()
        shard = records.write_shard(tmp_path / name / "shard", 3, records_of)
        records.finalise(tmp_path / name, {"train": [shard]}, SPEC, {})
        digests.append(records.digest(tmp_path / name))
    assert digests[0] == digests[1] != digests[2]
    sizes = [records.read_totals(tmp_path / name).files for name in ("one", "other")]
    assert sizes[0] == sizes[1]


def test_two_writers_of_one_file_leave_it_whole(tmp_path):
    path = tmp_path / "file"
    with files.replacing_file(path) as first, files.replacing_file(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_fields_are_written_in_a_fixed_order(tmp_path):
    # the order of a protobuf map is random, and anew in each process
    records.write_shard(tmp_path / "shard", 3, [example(i) for i in range(3)])
    reader = ArrayRecordReader(str(tmp_path / "shard"))
    names = sorted(records.features(3))
    for record in reader.read_all():
        places = [record.index(b"\n" + bytes([len(name)]) + name.encode()) for name in names]
        assert places == sorted(places)


def test_finalise_can_be_repeated(tmp_path):
    shards = write(tmp_path, {"train": [2, 1]})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    (tmp_path / ".metadata.tmp").mkdir()  # what a kill may have left
    (tmp_path / ".metadata.tmp" / "features.json").write_text("half of it")
    records.finalise(tmp_path, shards, SPEC, {"hours": 1.0})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    records.remove_temporaries(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_two_may_finalise_at_once(tmp_path, monkeypatch):
    """The second one comes and goes while the first one writes the metadata."""
    shards = write(tmp_path, {"train": [2, 1]})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    write_metadata = records.write_metadata

    def slow(*args):
        found = write_metadata(*args)
        monkeypatch.setattr(records, "write_metadata", write_metadata)
        records.finalise(tmp_path, shards, SPEC, {"hours": 1.0})
        return found

    monkeypatch.setattr(records, "write_metadata", slow)
    records.finalise(tmp_path, shards, SPEC, {"hours": 1.0})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    assert not list(tmp_path.glob(".*"))


def test_unfit_folders_give_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        records.read_codec_spec(tmp_path / "nothing")
    with pytest.raises(UserError, match="not a folder that tokenization.job wrote"):
        records.read_codec_spec(tmp_path)
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(UserError, match="unfinished; run the same"):
        records.open_split(tmp_path, "train")
    data = tmp_path / "data"
    write(data, {"train": [2]})
    metadata = (data / "metadata.json").read_text()
    for bad in ("{", "[]", '{"format": "other"}'):
        (data / "metadata.json").write_text(bad)
        with pytest.raises(UserError, match="metadata.json is missing or not of"):
            records.read_codec_spec(data)
    (data / "metadata.json").write_text(metadata.replace('"channels"', '"chanels"'))
    with pytest.raises(UserError, match="unknown settings: chanels"):
        records.read_codec_spec(data)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_damaged_descriptions_give_one_line(tmp_path, name):
    write(tmp_path, {"train": [2]})
    (tmp_path / name).write_text("{")
    for read in (records.open_split, records.has_split):
        with pytest.raises(UserError, match="features.json is damaged") as caught:
            read(tmp_path, "train")
        assert "\n" not in str(caught.value)


def test_damaged_record_files_are_found_before_reading(tmp_path):
    write(tmp_path, {"train": [2]})
    (path,) = tmp_path.glob("tokens-*")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="record file is cut off"):
        records.open_split(tmp_path, "train")
    path.unlink()
    with pytest.raises(UserError, match="record file is missing"):
        records.open_split(tmp_path, "train")

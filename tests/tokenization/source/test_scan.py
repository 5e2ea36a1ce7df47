"""Every kind of source: a data set made of it, and its fingerprint."""

import io
import itertools
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from sounds import album
from sources import (
    KINDS,
    NAMES,
    a_manifest,
    a_parquet,
    caption_of,
    flac,
    wav_of,
)

from magnet_jax.config import DataConfig
from magnet_jax.convert import t5_files
from magnet_jax.data import pipeline
from magnet_jax.errors import UserError
from tokenization.job import run
from tokenization.settings import Job
from tokenization.source.scan import scan
from tokenization.source.settings import Columns, Source


@pytest.fixture(scope="module")
def tokenizer():
    return t5_files.load("embedded")[2]


@pytest.mark.parametrize("make", KINDS)
def test_a_data_set_of_each_kind_of_source(tmp_path, make, one_codec, tokenizer):
    (tmp_path / "in").mkdir()
    source = make(tmp_path / "in")
    manifest = scan(source)
    assert not manifest.rejects
    assert [track.caption for track in manifest.tracks] == [caption_of(name) for name in NAMES]
    assert len({track.track_id for track in manifest.tracks}) == 3
    job = Job(**vars(source), out=tmp_path / "out", validation_percent=0)
    assert "3 records (3 train" in run(job)
    written = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")
    assert [example["caption"].decode() for example in written] == list(map(caption_of, NAMES))
    for name, example in zip(NAMES, written):
        expected = one_codec.encode(wav_of(name).T[None])[0]
        # (as integers of 16 bit, which is what FLAC keeps)
        assert np.mean(example["codes"] == expected) > 0.9
    # training reads it
    batches = pipeline.make_train_iterator(
        DataConfig(path=str(tmp_path / "out"), batch_size=3, merge_text_p=0, word_dropout=0),
        frames=40, num_codebooks=4, tokenizer=tokenizer, max_tokens=32, seed=0,
    )  # fmt: skip
    for batch in itertools.islice(batches, 2):
        ids = [i[mask] for i, mask in zip(batch["text_ids_BS"], batch["text_mask_BS"])]
        texts = [tokenizer.decode(one, skip_special_tokens=True) for one in ids]
        assert set(texts) <= set(map(caption_of, NAMES)) and batch["codes_BKT"].shape == (3, 4, 40)
        assert batch["valid_BT"].all()
    # another folder, another time: the same
    shutil.copytree(tmp_path / "in", tmp_path / "elsewhere" / "in")
    moved = make(tmp_path / "elsewhere" / "again") if make is a_manifest else None
    if moved is None:
        here = os.path.relpath(source.audio, tmp_path)
        moved = Source(**vars(source) | {"audio": tmp_path / "elsewhere" / here})
    assert scan(moved).fingerprint == manifest.fingerprint


def changes(path):
    """The file with another first or last byte of audio, or another caption, each by itself."""
    content = path.read_bytes()
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
        for other in ({"audio": {"bytes": flac("a")[:-1]}}, {"text": "x"}):
            file = io.BytesIO()
            pq.write_table(pa.Table.from_pylist([rows[0] | other, *rows[1:]]), file)
            yield file.getvalue()
    for name in NAMES:
        if (at := content.find(flac(name))) >= 0:
            for changed in (at, at + len(flac(name)) - 1):
                yield content[:changed] + bytes([content[changed] ^ 1]) + content[changed + 1 :]
        if (caption := caption_of(name).encode()) in content:
            yield content.replace(caption, caption.upper())


@pytest.mark.parametrize("make", KINDS)
def test_a_change_of_audio_or_caption_changes_the_fingerprint(tmp_path, make):
    source = make(tmp_path)
    before = scan(source).fingerprint
    count = 0
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for changed in changes(path):
            path.write_bytes(changed)
            assert scan(source).fingerprint != before, path
            count += 1
        path.write_bytes(content)
        assert scan(source).fingerprint == before, path
    assert count == (9 + 4 if make is a_parquet else 9)


def test_the_column_of_audio_is_part_of_the_fingerprint(tmp_path):
    table = pa.table({"wet": [flac("a")], "dry": [flac("b")], "text": ["a"]})
    pq.write_table(table, tmp_path / "t.parquet")
    prints = {
        scan(Source(audio=tmp_path / "t.parquet", columns=Columns(path=path))).fingerprint
        for path in (None, "wet", "dry")
    }
    assert len(prints) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": "musiccaps"}, "--recipe: for tables; .* is a folder of audio"),
        (
            {"columns": Columns(path="x", start="y")},
            "--columns.path, --columns.start: for tables; .* is a folder of audio",
        ),
    ],
)
def test_options_about_tables_are_refused_elsewhere(tmp_path, given, message):
    album(tmp_path, 1)
    with pytest.raises(UserError, match=message):
        scan(Source(audio=tmp_path, **given))

"""One source of each kind, with the tracks a, b and c."""

import csv
import gzip
import io
import json
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from sounds import RATE, put, tone

from tokenization.source.settings import Columns, Source

NAMES = ("a", "b", "c")


def wav_of(name):
    return tone(1.2, frequency=300 + 100 * NAMES.index(name))


def caption_of(name):
    return f"a tone called {name}"


def flac(name):
    file = io.BytesIO()
    soundfile.write(file, wav_of(name), RATE, format="FLAC")
    return file.getvalue()


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def add_to_tar(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


# --- one source of each kind, with the tracks a, b, c -------------------------------------------


def a_folder(folder):
    for name in NAMES:
        put(folder / "music" / f"{name}.flac", wav_of(name), caption=None)
        (folder / "music" / f"{name}.txt").write_text(f"\ufeff{caption_of(name)}\n")
    return Source(audio=folder / "music")


def a_manifest(folder):
    """As AudioCraft writes it: absolute paths, in a folder of its own."""
    split = folder / "egs" / "train"
    split.mkdir(parents=True)
    lines = []
    for name in NAMES:
        path = put(folder / "music" / f"{name}.flac", wav_of(name), caption=caption_of(name))
        meta = {"path": str(path), "duration": 1.2, "sample_rate": RATE, "amplitude": None,
                "weight": None, "info_path": None}  # fmt: skip
        lines.append(json.dumps(meta) + "\n")
    (split / "data.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    return Source(audio=split, root=folder / "music")


def a_csv(folder):
    for name in NAMES:
        put(folder / "clips" / f"{name}.flac", wav_of(name), caption=None)
    rows = [{"clip": name, "words": caption_of(name), "bpm": 90} for name in NAMES]
    table = write_csv(folder / "table.csv", rows)
    return Source(audio=table, columns=Columns(path="clips/{clip}.flac", caption=("words",)))


def a_parquet(folder):
    """As the `datasets` library shards it."""
    audio = [{"bytes": flac(name), "path": f"{name}.flac"} for name in NAMES]
    captions = [caption_of(name) for name in NAMES]
    table = pa.table({"audio": audio, "text": captions, "bpm": [90, None, 91]})
    pq.write_table(table[:2], folder / "train-00000-of-00002.parquet", row_group_size=1)
    pq.write_table(table[2:], folder / "train-00001-of-00002.parquet")
    return Source(audio=folder)


def a_webdataset(folder):
    with tarfile.open(folder / "shard-0.tar", "w") as tar:
        add_to_tar(tar, "x/a.flac", flac("a"))
        add_to_tar(tar, "x/a.json", json.dumps({"caption": caption_of("a"), "bpm": 90}).encode())
        add_to_tar(tar, "x/a.txt", b"the .json counts")
        add_to_tar(tar, "x/b.txt", caption_of("b").encode())
        add_to_tar(tar, "x/b.flac", flac("b"))
    with tarfile.open(folder / "shard-1.tar", "w") as tar:
        add_to_tar(tar, "c.flac", flac("c"))
        add_to_tar(tar, "c.txt", caption_of("c").encode())
    return Source(audio=folder)


def a_saved_data_set(folder):
    save_data_set(folder / "saved", NAMES, list(map(caption_of, NAMES)))
    return Source(audio=folder / "saved")


def save_data_set(folder, names, captions):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    sound = pa.array([{"bytes": flac(name)} for name in names], kind)
    saved = datasets.Dataset(pa.table({"sound": sound, "caption": captions}))
    saved.cast_column("sound", datasets.Audio(decode=False)).save_to_disk(folder)


KINDS = [a_folder, a_manifest, a_csv, a_parquet, a_webdataset, a_saved_data_set]


def write_metadata(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        return write_csv(path, rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

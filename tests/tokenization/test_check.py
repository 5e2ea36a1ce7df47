"""The table of a source."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sounds import RATE, cut_file, put, put_with_ffmpeg, tone

from magnet_jax.errors import UserError
from tokenization.check import Check, run

pytestmark = pytest.mark.usefixtures("inline_decoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    put(folder / "a.wav", tone(2.0), caption="three words here")
    put(folder / "b.flac", tone(4.0, 44100, 2), 44100, caption="one")
    put_with_ffmpeg(folder / "c.m4a", tone(3.0, 48000), 48000, "aac", caption="two words")
    loud = np.tile(np.sign(tone(0.01, frequency=300)), (300, 1)) + 0.01 * tone(3)
    put(folder / "d.wav", loud, subtype="FLOAT", caption="a square wave")
    put(folder / "e.wav", 1e-4 * tone(2.1))
    cut_file(put(folder / "f.wav", tone(2.2)))
    put(folder / "g.wav", tone(0.4))
    put(folder / "h.wav", tone(2.3), caption=None)
    shutil.copy(folder / "a.wav", folder / "i.wav")
    (folder / "i.txt").write_text("a copy")
    (folder / "notes.txt").write_text("nobody's")
    return folder


def cells(table):
    lines = table.splitlines()[1:]
    found = (re.match("  (\\w+(?: \\w+)*)  +(.*)", line) for line in lines)
    return dict(match.groups() for match in found if match)


def test_the_table(folder, tmp_path):
    settings = Check(audio=folder, json=tmp_path / "a.json", picture=tmp_path / "a.png")
    table = run(settings)
    assert "\n  f.wav: cut off (" in table and "--max-reject-ratio 0.56" in table
    found = cells(table)
    assert found["files"] == "9: 4 fit, 5 rejected"
    assert found["length"].startswith("0.00334 h; a track 2.0 / 3.0 / 4.0 s")
    assert found["sample rates"] == "16000 Hz x 2, 44100 Hz x 1, 48000 Hz x 1"
    assert found["channels"] == "1 x 3, 2 x 1"
    assert found["formats"] == "WAV 16 bit x 1, FLAC x 1, aac in mov x 1, WAV float x 1"
    assert found["captions"] == "1 / 2.5 / 3 words (least / median / most)"
    assert found["no caption"] == "1"
    assert found["silent"].startswith("1 ") and found["clipped"].startswith("1 ")
    assert found["truncated"] == "1" and found["duplicates"] == "1"
    assert sorted(found["rejected"].split(", ")) == [
        "cut off x 1", "duplicate x 1", "no caption x 1", "silent x 1", "too short x 1",
    ]  # fmt: skip
    assert found["other files"] == "1 other files: 1 .txt"
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["hours"] == pytest.approx(12 / 3600, abs=1e-4)
    assert {reject["path"]: reject["reason"] for reject in content["rejects"]} == {
        "e.wav": "silent",
        "f.wav": "cut off",
        "g.wav": "too short",
        "h.wav": "no caption",
        "i.wav": "duplicate",
    }
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_the_table_of_headers_only(folder, tmp_path):
    found = cells(run(Check(audio=folder, fast=True, workers=1, picture=tmp_path / "a.svg")))
    assert found["files"] == "9: 5 fit, 4 rejected"  # silence takes reading
    assert found["length"].startswith("0.00392 h; a track 2.0 / 3.0 / 4.0 s")
    assert found["level"] == found["silent"] == found["clipped"] == "not read (--fast)"
    assert found["truncated"] == "1 by their headers"
    assert (tmp_path / "a.svg").stat().st_size > 0


def test_what_would_be_rejected_follows_the_settings_of_the_job(folder, tmp_path):
    put(tmp_path / "audio" / "three.wav", tone(2.6, RATE, 3))
    for name in ("b.flac", "d.wav"):
        shutil.copy(folder / name, tmp_path / "audio" / name)
        shutil.copy(folder / name.replace(name[1:], ".json"), tmp_path / "audio")

    def rejected(**how):
        run(Check(audio=tmp_path / "audio", json=tmp_path / "a.json", **how))
        found = json.loads((tmp_path / "a.json").read_text())["rejects"]
        return {reject["path"]: reject["reason"] for reject in found}

    assert rejected() == {}
    assert rejected(max_clipped=0.1) == {"d.wav": "clipped"}
    for fast in (False, True):
        how = {"max_track_seconds": 3.5, "min_seconds": 2.7, "fast": fast}
        assert rejected(**how) == {"b.flac": "too long", "three.wav": "too short"}
        assert rejected(channels=4, fast=fast) == {
            "b.flac": "too few channels",
            "three.wav": "too few channels",
        }


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"channels": 0}, "--channels must"),
        ({"workers": 0}, "--workers must"),
        ({"json": "no/such/a.json"}, "--json no/such/a.json: no such folder"),
        ({"picture": "a.txt"}, "--picture a.txt: the name must end in .png or .pdf or .svg"),
        ({"json": "folder.json"}, "--json folder.json: is a folder; name a file"),
    ],
)
def test_bad_settings_are_told_before_anything_is_read(
    folder, tmp_path, monkeypatch, change, match
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    change = {k: Path(v) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(UserError, match=match):
        run(Check(audio=folder, **change))


def test_the_command(folder):
    command = [sys.executable, "-m", "tokenization.check", str(folder), "--fast", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0 and done.stdout.startswith(f"{folder}\n  files ")
    assert "9: 5 fit" in done.stdout and "reading" in done.stderr
    command[3] = "nowhere"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 2
    assert done.stderr == "error: audio nowhere: no such file or folder\n"

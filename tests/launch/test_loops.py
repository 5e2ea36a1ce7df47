"""launch.sample --loop: files by their tempo, and what does not go together."""

import json

import pytest
import soundfile
import tiny

from launch import sample
from magnet_jax.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.finished_run(tmp_path_factory)


def made(run, out, *more):
    return sample.sample(sample.parse(["--checkpoint", str(run), "--out", str(out), *more]))


LOOP = ("--loop", "--bpm", "400", "--bars", "1")  # 0.6 s


def test_loops_are_named_by_their_tempo(run, tmp_path):
    prompts = ("--prompt", "A tune!", "--prompt", "A tune!", "--unconditional", "1")
    paths = made(run, tmp_path, *LOOP, *prompts)
    assert [path.name for path in paths] == [
        "a-tune_400bpm_1bar.wav", "a-tune_400bpm_1bar_2.wav", "loop_400bpm_1bar.wav",
    ]  # fmt: skip
    with soundfile.SoundFile(paths[0]) as file:
        assert file.frames == 9600 and "Tempo     : 400" in file.extra_info
    about = json.loads(paths[1].with_suffix(".json").read_text())
    assert about["loop"]["bpm"] == 400 and about["loop"]["samples"] == 9600
    assert about["seconds"] == 0.6 and about["sample"] == 1
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in made(run, tmp_path, *LOOP, *prompts)] == before
    with pytest.raises(UserError, match="other settings"):
        made(run, tmp_path, *LOOP, "--prompt", "A tune!", "--decode.temperature", "2")
    # Another seed has a name of its own; a loop begins with another.
    start = ("--start", str(paths[0]), "--start-seconds", "0.2", "--seed", "3", "--format", "flac")
    (other,) = made(run, tmp_path, *LOOP, "--prompt", "A tune!", *start)
    assert other.name == "a-tune_400bpm_1bar_seed3.flac"
    assert soundfile.info(other).frames == 9600
    assert json.loads(other.with_suffix(".json").read_text())["loop"]["start_seconds"] == 0.2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--bpm", "120"], "--bpm"),
        (["--start", "x.wav"], "--start"),
        ([*LOOP, "--start-seconds", "1"], "--start-seconds"),
        ([*LOOP, "--start", "nowhere.wav"], "nowhere.wav"),
        ([*LOOP, "--seconds", "1"], "not both"),
        (["--loop", "--bars", "2"], "bpm"),
        (["--loop", "--bpm", "60"], "longer than"),
    ],
)
def test_what_does_not_go_together(run, tmp_path, options, named):
    with pytest.raises(UserError, match=named):
        made(run, tmp_path, "--prompt", "x", *options)
    assert not list(tmp_path.iterdir())

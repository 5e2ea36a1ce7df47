"""The commands: what they write, that they repeat, and one line for every mistake."""

import dataclasses
import errno
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
from refusals import refused
from sounds import loudness_embedder, put, tone

from launch import demo, export, sample
from launch import train as launch_train
from launch.evaluate import __main__ as evaluate
from launch.evaluate import stages
from launch.make import random_checkpoint
from magnet_jax import cli, errors
from magnet_jax.config import DecodeConfig, RunConfig
from magnet_jax.convert import t5_files
from magnet_jax.decode import sampling
from magnet_jax.errors import UserError
from magnet_jax.io import audio
from magnet_jax.train import loop


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.finished_run(tmp_path_factory)


def sample_args(run, out, *more):
    return sample.parse(["--checkpoint", str(run), "--out", str(out), *more])


def test_samples_are_written_with_every_setting(run, tmp_path):
    args = sample_args(run, tmp_path, "--prompt", "A tune!", "--prompt", "drums", "--seed", "3")
    paths = sample.sample(args)
    assert [path.name for path in paths] == ["000-a-tune-seed3.wav", "001-drums-seed3.wav"]
    samples, rate = soundfile.read(paths[0])
    assert rate == 16000 and len(samples) == 0.6 * rate
    settings = json.loads(paths[0].with_suffix(".json").read_text())
    assert settings["prompt"] == "A tune!" and settings["seed"] == 3 and settings["step"] == 2
    assert settings["decode"]["steps"] == [2, 1, 1, 1]  # the run's own
    assert settings["reached_lufs"] == pytest.approx(-14, abs=1.0)


def test_a_clip_is_the_same_alone_in_a_batch_and_again(run, tmp_path):
    prompts = ["--prompt", "one", "--prompt", "two", "--prompt", "three"]
    one = sample.sample(sample_args(run, tmp_path / "a", *prompts, "--batch-size", "2"))
    other = sample.sample(sample_args(run, tmp_path / "b", *prompts[:2]))
    again = sample.sample(sample_args(run, tmp_path / "c", *prompts, "--batch-size", "2"))
    assert one[0].read_bytes() == other[0].read_bytes() == again[0].read_bytes()
    assert one[2].read_bytes() == again[2].read_bytes()
    assert one[0].read_bytes() != one[1].read_bytes()


def test_unconditional_length_and_loudness(run, tmp_path):
    more = ("--unconditional", "1", "--seconds", "0.5", "--lufs", "off")
    (path,) = sample.sample(sample_args(run, tmp_path, *more))
    assert path.name == "000-unconditional-seed0.wav"
    assert soundfile.info(path).frames == 8000
    assert json.loads(path.with_suffix(".json").read_text())["reached_lufs"] is None


def test_audio_that_sampling_did_not_make_is_left_alone(run, tmp_path, monkeypatch):
    args = sample_args(run, tmp_path, "--prompt", "one", "--prompt", "two")
    wav, beside = tmp_path / "001-two-seed0.wav", tmp_path / "001-two-seed0.json"
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "generate", lambda *_, **__: pytest.fail("was sampled first"))
        for path, content in (
            (wav, b"mine"),
            (beside, b"mine"),
            (beside, b"[]"),
            (beside, b'{"description": "mine"}'),
        ):
            path.write_bytes(content)
            with pytest.raises(UserError, match=f"{path}: is there, and launch.sample did not"):
                sample.sample(args)
            assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == content
            path.unlink()
    made = sample.sample(args)
    content = made[0].read_bytes()
    # again, and after a kill between the two names
    made[0].unlink()
    assert sample.sample(args) == made and made[0].read_bytes() == content
    made[1].write_bytes(b"louder")
    with pytest.raises(UserError, match=f"{made[1]}: was changed since"):
        sample.sample(args)
    assert made[1].read_bytes() == b"louder"


def test_a_full_disk_while_sampling_names_the_file_and_leaves_nothing_half(
    run, tmp_path, monkeypatch
):
    args = sample_args(run, tmp_path, "--prompt", "one", "--prompt", "two")

    def full(path, *how, **more):
        if tmp_path not in path.parents:  # of JAX's cache
            return whole(path, *how, **more)
        path.open("wb").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    for writer in ("write_bytes", "write_text"):
        whole = getattr(Path, writer)
        with monkeypatch.context() as patch:
            patch.setattr(Path, writer, full)
            with pytest.raises(UserError, match="000-one-seed0.*No space left.*make room"):
                sample.sample(args)
        assert not list(tmp_path.iterdir())


def test_commands_that_make_a_folder_leave_other_files_alone(tmp_path):
    thesis = tmp_path / "taken" / "thesis.txt"
    put(tmp_path / "taken" / "x.wav", tone(0.1), caption=None)
    thesis.write_text("precious")
    there = sorted(tmp_path.rglob("*"))
    for out in (thesis.parent, thesis):
        with pytest.raises(UserError, match=f"--out {out}: is there already; name a new folder"):
            random_checkpoint.make(random_checkpoint.Args(out=out))
    for change in ({"seconds": 0}, {"seed": -1}, {"seed": 2**31}):
        with pytest.raises(UserError, match=f"--{next(iter(change))} must"):
            random_checkpoint.make(random_checkpoint.Args(out=tmp_path / "new", **change))
    with pytest.raises(UserError, match="--out .*taken: holds other files .thesis.txt."):
        demo.demo(demo.Args(out=thesis.parent))
    assert sorted(tmp_path.rglob("*")) == there and thesis.read_text() == "precious"


def test_a_checkpoint_is_scored_beside_its_baselines(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "load", lambda name, weights: loudness_embedder("toy"))
    real, out, tokens = tmp_path / "real", tmp_path / "out", run.parent / "tokens"
    captions = {"a": "a slow piano", "b": "a fast violin", "c": "a piano"}
    for i, (name, caption) in enumerate(captions.items()):
        put(real / f"{name}.wav", tone(1.5, frequency=220 * (i + 1)), caption=caption)

    def evaluated(*words):
        cache = ["--cache", str(tmp_path / "cache"), "--resamples", "5"]
        evaluate.main([*map(str, words), "--out", str(out), *cache])
        return json.loads((out / "receipt.json").read_text())

    words = [
        "--checkpoint", run, "--prompts", real, "--reference", real,
        "--sample-options=--batch-size 2", "--seed", "3",
    ]  # fmt: skip
    (out / "generated").mkdir(parents=True)
    (out / "generated" / "b.wav").write_bytes(b"mine")
    with pytest.raises(UserError, match="generated/b.wav: is there, and launch.sample did not"):
        evaluated(*words)
    (out / "generated" / "b.wav").unlink()
    receipt = evaluated(*words, "--baselines", "--data", tokens)
    rows = receipt["scores"]
    assert set(rows) == {
        "generated", "shuffled captions", "unigram tokens", "codec round trip", "reference",
    }  # fmt: skip
    assert sorted(p.name for p in (out / "generated").iterdir()) == [
        f"{name}.wav" for name in captions
    ]
    fad = {name: row["toy"]["fad"]["value"] for name, row in rows.items()}
    assert 0 < fad["codec round trip"] < fad["unigram tokens"]
    # Nothing but what it is held against changes, so as sets of clips the two are the same.
    same = (rows["generated"]["toy"], rows["shuffled captions"]["toy"])
    assert same[0]["fad"] == same[1]["fad"] and same[0]["kl"] != same[1]["kl"]
    assert receipt["model"]["seed"] == 3 and receipt["model"]["checkpoint"] == str(run)
    # Real clips are heard as long as the model's.
    assert receipt["sets"]["codec round trip"]["seconds"] == pytest.approx([0.6, 0.6], abs=0.01)
    assert receipt["sets"]["unigram tokens"]["seconds"] == pytest.approx([0.6, 0.6])
    listed = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert {line["id"]: line["caption"] for line in listed} == captions
    # Again, nothing is made anew, and the scores are the same.
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.wav")}
    assert evaluated(*words)["scores"]["generated"] == rows["generated"]
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.wav")}
    with pytest.raises(UserError, match="other settings .seed."):
        evaluated(*words[:-1], "4")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "\udcff"], "not valid UTF-8"),
        ([], "nothing to do"),
        (["--prompt", "x", "--seconds", "0"], "--seconds must be a positive number"),
        (["--prompt", "x", "--seconds", "nan"], "--seconds must be a positive number"),
        (["--prompt", "x", "--seed", str(2**31)], "--seed must lie"),
        (["--prompt", "x", "--lufs", "20"], "--lufs must lie"),
        (["--prompt", "x", "--batch-size", "0"], "--batch-size must be"),
        (["--prompt", "x", "--decode.steps", "2", "2"], "one number a codebook"),
        (["--prompt", "x", "--step", "1"], "no checkpoint of step 1"),
        (["--prompt", "x", "--decode.top-p", "1.5"], "--decode.top-p must lie"),
        (["--prompt", "x", "--promt", "y"], "unknown setting --promt: did you mean --prompt"),
        (["--prompt", "x", "--seed", "a"], "--seed must .* whole number, not 'a'"),
        (["--prompt", "x", "--seed", "-1"], "--seed must lie"),
        (["--prompt", "x", "--seed", "1.5"], "--seed"),
        (["--prompt", "x", "--seconds", "inf"], "--seconds must be a positive number"),
        (["--prompt", "x", "--seconds", "two"], "--seconds"),
        (["--prompt", "x", "--step", "-1"], "--step must lie"),
        (["--prompt", "x", "--batch-size", "1000000"], "--batch-size must be .* 1024, not 1000000"),
        (["--unconditional", "1000000000"], "--unconditional must lie"),
        (["--unconditional", "-1"], "--unconditional must lie"),
        (["--prompt", "x", "--prompt-seconds", "nan"], "--prompt-seconds must be"),
        (["--prompt", "x", "--decode.steps", "1", "1", "1", "1.5"], "--decode.steps"),
        (["--prompt", "x", "--decode.steps", *["1000000"] * 4], "--decode.steps must be"),
        (["--prompt", "x", "--decode.span-length", "1000000"], "--decode.span-length must lie"),
        (["--prompt", "x", "--decode.span-length", "9999"], "span_length 9999 is longer than"),
        (["--prompt", "x", "--decode.temperature", "nan"], "--decode.temperature must lie"),
        (["--prompt", "x", "--decode.max-guidance", "inf"], "--decode.max-guidance must lie"),
        (["--prompt", "x", "--decode.top-k", "-1"], "--decode.top-k must lie"),
        (["--prompt", "x", "--rescorer-weight", "nan"], "--rescorer-weight must be a number"),
    ],
)
def test_mistakes_in_sampling_are_named_and_nothing_is_written(run, tmp_path, more, message):
    with refused(more, message):
        sample.sample(sample_args(run, tmp_path, *more))
    assert not list(tmp_path.iterdir())


def test_a_model_of_fewer_codebooks_than_the_data_samples(tmp_path):
    tiny.write_noise(tmp_path / "tokens", {"train": 8})
    config = tiny.run_config(tmp_path / "tokens", tmp_path / "run", steps=1)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_codebooks=2),
        decode=DecodeConfig(steps=(1, 1)),
        sample_every=1,
        sample_prompts=("two of four",),
    )
    with pytest.MonkeyPatch.context() as patch:
        tiny.use_one_device(patch)
        loop.train(config)
    assert (tmp_path / "run" / "samples" / "step_0000001" / "00.wav").exists()
    args = sample_args(tmp_path / "run", tmp_path / "wavs", "--prompt", "x")
    (path,) = sample.sample(args)
    settings = json.loads(path.with_suffix(".json").read_text())
    assert settings["codec"]["num_codebooks"] == 2


def test_a_command_ends_in_one_line_and_a_status(tmp_path):
    command = [sys.executable, "-m", "launch.train", "--data", "nowhere"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: data set nowhere")
    assert "Traceback" not in done.stderr


def test_help_shows_what_is_often_needed_and_all_of_it_where_asked(capsys):
    shown = {}
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            launch_train.main([word])
        shown[word] = capsys.readouterr().out
        assert "None" not in shown[word]
    names = set(cli.setting_names(RunConfig))
    assert all(re.search(f"{name}[ ,]", shown["--help-all"]) for name in names)
    left_out = {name for name in names if not re.search(f"{name}[ ,]", shown["--help"])}
    assert {"--kernels.full", "--model.mlp-bias", "--optimizer.d0"} <= left_out
    assert not {"--data", "--out", "--batch-size", "--mesh.fsdp", "--decode.steps"} & left_out
    assert launch_train.parse(["--kernels.full", "dense"]).kernels.full == "dense"


def test_help_is_as_wide_as_the_terminal(capsys, monkeypatch):
    for columns in ("70", "100"):
        monkeypatch.setenv("COLUMNS", columns)
        with pytest.raises(SystemExit):
            launch_train.main(["--help"])
        lines = capsys.readouterr().out.splitlines()
        assert max(len(line) for line in lines if "python -m" not in line) == int(columns)


def test_unknown_configs_and_settings_are_named():
    with pytest.raises(UserError, match="there are demo, music_.*27 ablations"):
        launch_train.main(["--config", "nothing"])
    with pytest.raises(UserError, match="did you mean music_medium_30s?"):
        launch_train.main(["--config", "music_medum_30s"])
    with pytest.raises(UserError, match="did you mean --text.no-finetune?"):
        launch_train.main(["--text.no-fintune"])
    with pytest.raises(UserError, match="--preset must .*did you mean draft?"):
        sample.parse(["--checkpoint", "demo", "--out", "x", "--preset", "drafty"])
    with pytest.raises(UserError, match="unknown word stray"):
        launch_train.main(["stray"])
    with pytest.raises(UserError, match="--seed: a value is missing"):
        launch_train.main(["--seed"])
    with pytest.raises(UserError, match="did you mean --optimizer.peak-lr"):
        launch_train.main(["--optimizer.peek-lr", "1"])


def test_a_missing_option_is_named_without_its_help():
    for words, message in (
        (["--out", "x"], "--checkpoint: must be given; see python -m launch.export --help"),
        ([], "--checkpoint, --out: must be given; see python -m launch.export --help"),
    ):
        with pytest.raises(UserError) as error:
            cli.parse(export.Args, words, prog="python -m launch.export")
        assert str(error.value) == message
    with pytest.raises(UserError, match="^--lufs must .* or be 'off', not 'loud'$"):
        sample.parse(["--checkpoint", "demo", "--out", "x", "--lufs", "loud"])


@pytest.mark.parametrize("name", ["music_small_10s", "music_medium_30s"])
def test_tokens_that_a_config_cannot_take_are_refused_at_once(tmp_path, monkeypatch, name):
    """As those of the shipped codec: before a text encoder is fetched, or anything written."""

    def fetch(source):
        raise AssertionError(f"{source} was fetched")

    tiny.write_noise(tmp_path / "tokens", {"train": 8})
    monkeypatch.setattr(t5_files, "load", fetch)
    words = ["--config", name, "--data", str(tmp_path / "tokens")]
    with pytest.raises(UserError, match="tokens holds 4 codebooks of .* the model wants 4 of 2048"):
        launch_train.main([*words, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_errors_are_one_line(capsys):
    with pytest.raises(SystemExit) as exit_, errors.reported():
        raise UserError("two\nlines")
    assert exit_.value.code == 2
    with pytest.raises(SystemExit) as exit_, errors.reported():
        raise errors.PassingError("of today")
    assert exit_.value.code == 75
    assert capsys.readouterr().err == "error: two lines\nerror: of today\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_takes_no_more_is_one_line(capsys, number):
    """A write through an open file does not say which file it was."""
    with pytest.raises(SystemExit) as exit_, errors.reported():
        raise OSError(number, os.strerror(number))
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"error: {os.strerror(number)}\n"


def test_stderr_is_there_after_an_error_with_a_cause(capfd):
    """Whoever calls a command from Python, and catches its end, sees later errors as well."""
    with pytest.raises(SystemExit), errors.reported():
        raise UserError("first") from OSError("of a library")
    os.write(2, b"and what comes later\n")
    assert capfd.readouterr().err == "error: first\nand what comes later\n"


def test_loggers_are_silent_for_a_while_alone(caplog):
    logger = logging.getLogger("some_library")
    logger.setLevel(logging.INFO)
    outer, inner = errors.silenced("some_library"), errors.silenced("some_library")
    outer.__enter__()
    inner.__enter__()  # (of another thread, say, which ends later)
    outer.__exit__(None, None, None)
    logger.error("raised as well")
    assert caplog.messages == [] and logger.level == logging.CRITICAL
    inner.__exit__(None, None, None)
    logger.error("shown")
    assert caplog.messages == ["shown"] and logger.level == logging.INFO


def test_loudness_is_reached_and_peaks_stay_within_full_scale():
    rng = np.random.default_rng(0)
    wav_CN = (0.01 * rng.standard_normal((1, 16000))).astype(np.float32)
    out_CN, loudness = audio.normalize_loudness(wav_CN, 16000, -14.0)
    assert loudness == pytest.approx(-14, abs=0.2)
    quiet_CN = np.abs(out_CN) < audio.KNEE  # these were scaled and nothing else
    gains = out_CN[quiet_CN] / wav_CN[quiet_CN]
    np.testing.assert_allclose(gains, gains[0], rtol=1e-3)
    assert quiet_CN.mean() > 0.99
    wav_CN[0, 8000] = 0.5
    out_CN, loudness = audio.normalize_loudness(wav_CN, 16000, -14.0)
    assert -15.5 < loudness < -14
    assert 0.99 < np.abs(out_CN).max() <= 1
    silence = np.zeros((1, 16000), np.float32)
    out_CN, loudness = audio.normalize_loudness(silence, 16000, -14.0)
    assert loudness is None and not out_CN.any()
    assert audio.normalize_loudness(wav_CN[:, :100], 16000, -14.0)[1] is None


def test_audio_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(UserError, match="NaN"):
        audio.write_wav(tmp_path / "x.wav", np.full((1, 8), np.nan, np.float32), 16000)
    assert not list(tmp_path.iterdir())

"""Training a small EnCodec: exact resuming, the codec it writes, the comparison with others."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from safetensors.numpy import load_file, save_file
from sounds import RATE, put, tone

from launch.codec import compare, training
from launch.codec.train import main as train_command
from launch.codec.training import Clips, Training, balance, learning_rate, train
from magnet_jax.codec.encodec import load_codec
from magnet_jax.config import ASSETS
from magnet_jax.errors import UserError
from magnet_jax.evaluation.scores import find_audio
from magnet_jax.io.torch_env import import_torch

torch = import_torch()


@pytest.fixture
def settings(tmp_path):
    for i in range(3):
        put(tmp_path / "train" / f"{i}.flac", tone(1 + 0.3 * i, frequency=200 + 150 * i))
    put(tmp_path / "valid" / "0.wav", tone(1.2, frequency=320))
    return Training(
        audio=tmp_path / "train", valid=tmp_path / "valid", out=tmp_path / "run",
        init_from="embedded", steps=3, batch_size=2, segment_seconds=0.25, warmup_steps=2,
        validate_every=1, save_every=1, threads=1,
    )  # fmt: skip


def test_a_resumed_run_ends_with_the_same_bits(settings, capsys):
    whole = list(train(settings))
    assert [values["step"] for values in whole] == [0, 1, 2, 3]
    parts = replace(settings, out=settings.out.with_name("parts"))
    run = train(parts)
    for _ in range(3):
        next(run)
    run.close()  # after step 2 was measured, before it was saved
    again = list(train(parts))
    assert [values["step"] for values in again] == [2, 3]
    lines = (parts.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]  # none is there twice
    for values in (whole[3], again[1]):
        del values["seconds_per_step"]
    assert whole[3] == again[1]
    for name in ("model.safetensors", "config.json"):
        assert (settings.out / "codec" / name).read_bytes() == (
            parts.out / "codec" / name
        ).read_bytes()
    with pytest.raises(UserError, match=r"begun with other settings: seed \(was 0"):
        next(train(replace(parts, seed=1)))
    put(settings.audio / "more.flac", tone(1.0))
    assert [values["step"] for values in train(replace(parts, steps=4))] == [4]
    assert "changed since the run was begun" in capsys.readouterr().out


def test_a_codec_of_more_codebooks_gives_one_that_says_what_it_has(settings, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(ASSETS / "codec" / "model.safetensors")
    for name in [name for name in tensors if name.startswith("quantizer.layers.")]:
        quantizer, layers, number, rest = name.split(".", 3)
        tensors[f"{quantizer}.{layers}.{int(number) + 4}.{rest}"] = tensors[name].copy()
    save_file(tensors, source / "model.safetensors")
    config = json.loads((ASSETS / "codec" / "config.json").read_text())
    config["target_bandwidths"] = [2.0, 4.0]
    (source / "config.json").write_text(json.dumps(config))
    assert load_codec(str(source)).spec.num_codebooks == 8
    list(train(replace(settings, init_from=str(source), steps=1)))
    assert load_codec(str(settings.out / "codec")).spec.num_codebooks == 4
    written = json.loads((settings.out / "codec" / "config.json").read_text())
    assert written == config | {"target_bandwidths": [2.0]}


def test_the_recipes_codec_is_the_nearer_one_on_other_renders():
    """Of the clips that ship, which neither was trained on."""
    names = sorted((ASSETS / "clips").glob("*.flac"))[::5]
    clips = [soxr.resample(soundfile.read(path)[0], 32000, 16000) for path in names]
    distances = []
    for source in ("embedded", str(ASSETS / "demo" / "codec")):
        codec = load_codec(source)
        made = [codec.decode(codec.encode(np.float32(wav)[None, None])) for wav in clips]
        spectral = [
            training.spectral_loss(*(torch.from_numpy(np.float32(x)[None]) for x in pair))
            for pair in zip((m[0, 0, : len(wav)] for m, wav in zip(made, clips)), clips)
        ]
        distances.append(np.mean([float(x) for x in spectral]))
    assert distances[1] < 0.97 * distances[0]


def test_what_is_written_is_the_codec_in_training(settings):
    settings = replace(settings, steps=1)
    list(train(settings))
    run = training.Run(settings)
    run.restore(torch.load(settings.out / "checkpoint.pt", weights_only=True))
    ours = training.build_codec(run.config).eval()
    ours.load_state_dict(run.averaged)
    loaded = load_codec(str(settings.out / "codec"))
    before = load_codec("embedded")
    assert loaded.spec.sha256 != before.spec.sha256
    assert replace(loaded.spec, sha256="", source="") == replace(before.spec, sha256="", source="")
    wav = tone(0.8)[None].transpose(0, 2, 1)
    with torch.inference_mode():
        codes = ours["quantizer"].encode(ours["encoder"](torch.from_numpy(wav)), sample_rate=1)
        made = ours["decoder"](ours["quantizer"].decode(codes)).numpy()
    np.testing.assert_array_equal(loaded.encode(wav), codes.transpose(0, 1).numpy())
    np.testing.assert_allclose(loaded.decode(loaded.encode(wav)), made, atol=2e-5)


def test_training_from_nothing_learns(settings, capsys):
    words = ["--audio", settings.audio, "--valid", settings.valid, "--out", settings.out]
    words += ["--steps", 12, "--threads", 1, "--batch-size", 2, "--segment-seconds", 0.25]
    words += ["--learning-rate", 2e-3, "--average", 0.5, "--validate-every", 12]
    words += ["--warmup-steps", 2]
    train_command([str(word) for word in words])
    lines = (settings.out / "metrics.jsonl").read_text().splitlines()
    first, last = map(json.loads, lines)
    assert last["valid_spectral"] < 0.9 * first["valid_spectral"]
    assert load_codec(str(settings.out / "codec")).spec.num_codebooks == 4
    assert "step 12: " in capsys.readouterr().out


def test_gradients_get_the_shares_of_their_weights():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.normal(size=(3, 1, 50))) for _ in range(2))
    weights = {"a": 1.0, "b": 3.0}
    total, norms = balance({"a": 100 * a, "b": 1e-3 * b}, weights, {})
    expected = a / a.flatten(1).norm(dim=1).mean() / 4 + 3 * b / b.flatten(1).norm(dim=1).mean() / 4
    torch.testing.assert_close(total, expected)
    # what grows tenfold is measured against the mean of before and now
    later, _ = balance({"a": 1000 * a, "b": 1e-3 * b}, weights, norms)
    part = a / a.flatten(1).norm(dim=1).mean() / 4
    torch.testing.assert_close(later - total, (10 / 5.5 - 1) * part, rtol=2e-3, atol=1e-5)


def test_hardly_used_entries_are_revived_and_stay():
    codec = training.build_codec(training.fresh_settings())
    codebook = codec["quantizer"].vq.layers[0]._codebook
    codebook.inited.fill_(1)
    codebook.embed.copy_(torch.randn(1024, 64))
    codebook.cluster_size.fill_(0.2)
    codebook.cluster_size[:40] = 0.001
    codebook.embed_avg.copy_(codebook.embed * codebook.cluster_size[:, None])
    before = codebook.embed.clone()
    vectors = torch.randn(12, 64) + 5
    training.revive(codebook, vectors)
    changed = torch.nonzero((codebook.embed != before).any(1)).flatten()
    assert len(changed) == 12 and int(changed.max()) < 40
    assert {tuple(v) for v in codebook.embed[changed].tolist()} == {
        tuple(v) for v in vectors.tolist()
    }
    codebook.train()
    codebook(torch.randn(1, 9, 64))
    torch.testing.assert_close(codebook.embed[changed].mean(), vectors.mean(), rtol=0.02, atol=0)
    codebook.cluster_size.fill_(0.2)
    kept = codebook.embed.clone()
    training.revive(codebook, vectors)
    assert torch.equal(codebook.embed, kept)


def test_the_spectral_loss_is_of_what_is_heard():
    wav = torch.from_numpy(tone(0.5)[None, :, 0])
    assert float(training.spectral_loss(wav, wav)) == 0
    near, far = (training.spectral_loss(wav + e * torch.randn_like(wav), wav)
                 for e in (1e-3, 1e-1))  # fmt: skip
    assert 0 < float(near) < float(far)
    silence = torch.zeros(1, 4000, requires_grad=True)
    training.spectral_loss(silence, torch.zeros(1, 4000)).backward()
    assert torch.isfinite(silence.grad).all()


def test_segments_come_from_everywhere_in_the_clips(settings):
    clips = Clips("--audio", settings.audio, RATE, 0.25)
    assert clips.frames == [16000, 20800, 25600]
    found = clips.draw(np.random.default_rng(0), 200, 4000)
    assert found.shape == (200, 4000) and found.dtype == np.float32
    whole = [soundfile.read(path, dtype="float32")[0] for path in clips.paths]
    counts = [sum(any(np.array_equal(wav[i : i + 4000], segment)
                      for i in np.flatnonzero(wav[:-3999] == segment[0])) for segment in found)
              for wav in whole]  # fmt: skip
    assert sum(counts) == 200 and min(counts) > 30


def test_the_learning_rate_rises_stays_and_falls(settings):
    s = replace(settings, steps=1000, warmup_steps=100, decay_from=0.5, learning_rate=1.0)
    assert learning_rate(s, 0) == 0.01 and learning_rate(s, 99) == learning_rate(s, 500) == 1
    assert learning_rate(s, 750) == pytest.approx(0.505) and learning_rate(s, 1000) == 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": "nowhere"}, "--audio .*nowhere: no such folder"),
        ({"init_from": "nowhere"}, "--init-from nowhere: no config.json"),
        ({"segment_seconds": 0.1}, "--segment-seconds must lie between"),
        ({"steps": 0}, "--steps must"),
        ({"learning_rate": math.nan}, "--learning-rate must"),
        ({"learning_rate": 0.0}, "--learning-rate must"),
        ({"seed": -1}, "--seed must lie"),
        ({"seed": 2**31}, "--seed must lie"),
        ({"gain_db": math.inf}, "--gain-db must lie"),
        ({"time_weight": math.inf}, "--time-weight must lie"),
        ({"time_weight": 0.0, "spectral_weight": 0.0}, "--spectral-weight are both 0"),
        ({"segment_seconds": 9.0}, "no .flac or .wav of 9 s or more"),
    ],
)
def test_mistakes_are_named(settings, tmp_path, change, message):
    if "audio" in change:
        change = {"audio": tmp_path / change["audio"]}
    with pytest.raises(UserError, match=message):
        next(train(replace(settings, **change)))
    assert not settings.out.exists()


def test_a_codec_is_not_trained_among_other_files(settings):
    (settings.out / "codec").mkdir(parents=True)
    (settings.out / "codec" / "model.safetensors").write_text("precious")
    with pytest.raises(UserError, match="--out .*run: holds other files .codec."):
        next(train(settings))
    assert [path.name for path in settings.out.rglob("*")] == ["codec", "model.safetensors"]


def test_audio_of_another_rate_is_refused(settings):
    put(settings.audio / "other.wav", tone(1.0, 8000), 8000)
    with pytest.raises(UserError, match="other.wav has 1 channels at 8000 Hz, not 1 at 16000 Hz"):
        next(train(settings))


def test_distances_rank_what_is_worse():
    wav = tone(1.0)[:, 0]
    rng = np.random.default_rng(0)
    noisy = [wav + e * rng.normal(size=len(wav)) for e in (0, 1e-3, 1e-2, 1e-1)]
    distances = [compare.spectral_distance(made, wav) for made in noisy]
    assert distances[0] == 0 and distances == sorted(distances)
    assert compare.snr_db(wav * 1.1, wav) == pytest.approx(20, abs=1e-3)
    # the same for a bin at the floor as for one below it
    assert compare.spectral_distance(wav * 2, wav) == pytest.approx(
        compare.spectral_distance(wav * 200, wav * 100), rel=1e-3
    )


def test_opus_is_measured_in_place():
    wav = tone(1.5)[:, 0]
    made, kbps = zip(*(compare.through_opus(wav, RATE, asked) for asked in (6, 32)))
    assert all(len(m) == len(wav) for m in made) and 3 < kbps[0] < 12 < kbps[1] < 50
    ratios = [compare.snr_db(m, wav) for m in made]
    assert ratios[1] > 12 and ratios[1] > ratios[0]


@pytest.mark.parametrize("rate", [8_000, 32_000, 44_100])
def test_opus_takes_any_rate(rate):
    wav = tone(1.5, rate)[:, 0]
    made, kbps = compare.through_opus(wav, rate, 32)
    assert len(made) == len(wav) and 12 < kbps < 50 and compare.snr_db(made, wav) > 12


def test_the_table_has_a_row_for_each_version(settings, tmp_path, capsys):
    out = tmp_path / "compared"
    compare.main(["--audio", str(settings.audio), "--out", str(out), "--clips", "2",
                         "--seconds", "1", "--opus-kbps", "8"])  # fmt: skip
    rows = json.loads((out / "comparison.json").read_text())
    assert [row["version"] for row in rows] == [
        "original, 16 bit", "embedded", "Opus, 8 kbit/s asked",
    ]  # fmt: skip
    assert rows[0]["spectral_distance"] < 0.01 < rows[1]["spectral_distance"] < 3
    assert rows[1]["minus_first_95"] == [0, 0] and rows[0]["minus_first_95"][1] < 0
    assert rows[1]["kbps"] == 2 and rows[1]["clips"] == 2
    assert all(math.isfinite(row["snr_db"]) for row in rows)
    assert "| embedded | 2 |" in capsys.readouterr().out
    # each version is a folder that launch.evaluate takes, of clips that --audio has by these names
    for version in ("original", "embedded", "opus-8"):
        assert find_audio(out / version).keys() < find_audio(settings.audio).keys()
    assert len(list(out.glob("*/*.wav"))) == 6
    put(settings.audio / "album" / "0.flac", tone(1.0, frequency=700))
    put(settings.audio / "0.WAV", tone(1.0, frequency=900))
    compare.main(["--audio", str(settings.audio), "--out", str(out), "--clips", "9",
                         "--seconds", "1", "--opus-kbps", "8"])  # fmt: skip
    made = {str(path.relative_to(out)): soundfile.read(path)[0] for path in out.rglob("*.wav")}
    names = ["0.WAV", "0.flac", "1", "2", "album/0"]
    assert made.keys() >= {f"original/{name}.wav" for name in names}
    first, *others = (made[f"original/{name}.wav"] for name in ("0.flac", "0.WAV", "album/0"))
    assert all(np.abs(first - other[: len(first)]).max() > 0.1 for other in others)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--audio .*: no audio in it .*.flac"):
        compare.compare(compare.Comparison(audio=tmp_path / "empty"))
    for twice in ({"codecs": ("embedded", "embedded")}, {"opus_kbps": (8.0, 8.0)}):
        with pytest.raises(UserError, match="--(codecs|opus-kbps): name each once"):
            compare.compare(compare.Comparison(audio=settings.audio, **twice))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "--seed must lie"),
        ({"seed": 2**31}, "--seed must lie"),
        *[({"opus_kbps": (6.0, kbps)}, "--opus-kbps must .* lie between 0.5 and 256")
          for kbps in (0.0, -1.0, 0.1, 257.0, math.nan, math.inf)],
        ({"opus_kbps": (6.0, 6.0000001)}, "--opus-kbps: name each once"),
        ({"clips": 0}, "--clips must"),
        ({"seconds": math.nan}, "--seconds must lie"),
        ({"out": "taken"}, "--out .*taken: holds other files"),
        ({"out": "taken/thesis.txt"}, "--out .*thesis.txt: is a file"),
    ],
)  # fmt: skip
def test_comparisons_are_refused_before_anything_is_encoded(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(compare, "load_codec", None)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    if "out" in change:
        change = {"out": tmp_path / change["out"]}
    with pytest.raises(UserError, match=message):
        compare.compare(compare.Comparison(audio=tmp_path, **change))


def test_versions_have_folders_of_their_own():
    codecs = ("embedded", "runs/codec/codec", "/runs/codec/codec/", "original", "../..")
    settings = compare.Comparison(audio=Path(), codecs=codecs, opus_kbps=(6, 6.5))
    assert compare._folders(settings) == [
        "original", "embedded", "runs-codec-codec", "runs-codec-codec-2", "original-2", "codec",
        "opus-6", "opus-6.5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "found"), [("spectral_loss", "spectral loss is nan"), ("_update", "is not finite")]
)
def test_a_step_that_is_not_finite_is_named_and_leaves_what_is_saved(
    settings, monkeypatch, name, found
):
    settings = replace(settings, validate_every=3)
    right, calls = getattr(training, name), []

    def wrong(*args):
        calls.append(1)
        if len(calls) != 2:
            return right(*args)
        if name == "spectral_loss":
            return right(*args) * np.nan
        right(*args)
        with torch.no_grad():
            args[0].param_groups[0]["params"][0][0] = np.nan
        return None

    monkeypatch.setattr(training, "measure", lambda *_: {})
    monkeypatch.setattr(training, name, wrong)
    with pytest.raises(UserError, match=f"{settings.out}: training diverged at step 2: .*{found}"):
        list(train(settings))
    checkpoint = settings.out / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)
    assert state["step"] == 1 and not (settings.out / "codec").exists()

    part = next(iter(state["averaged"]))
    state["averaged"][part] *= np.nan
    torch.save(state, checkpoint)
    with pytest.raises(UserError, match=f"checkpoint.pt: averaged: the tensor {part} holds NaN"):
        list(train(settings))

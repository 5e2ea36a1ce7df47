"""The evaluation as a command: its receipt, its baselines and its errors."""

import dataclasses
import json
import shutil
import types

import numpy as np
import pytest
import soundfile
import tiny
from refusals import refused
from sounds import loudness_embedder, pitch_embedder, plucked, put, tone

from launch import sample
from launch.evaluate import __main__ as command
from launch.evaluate import baselines, clips, settings, stages
from magnet_jax import cli
from magnet_jax.codec import encodec as codec_module
from magnet_jax.errors import UserError
from magnet_jax.evaluation import embedders, transcriber, tunes
from magnet_jax.evaluation.embedders import Embedded, Embedder

CAPTIONS = {"a": "a slow piano", "b": "a fast violin", "c": "a choir", "d": "a piano"}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Four captioned clips of different notes; at two rates, one of them stereo."""
    folder = tmp_path_factory.mktemp("real")
    for i, (name, caption) in enumerate(CAPTIONS.items()):
        wav = tone(1.5, rate=22050 if i else 16000, channels=1 + i % 2, frequency=220 * (i + 1))
        put(folder / f"{name}.wav", wav, rate=22050 if i else 16000, caption=caption)
    return folder


def evaluated(out, *words):
    """The receipt of the command with these words."""
    more = ["--out", str(out), "--cache", str(out / "cache"), "--resamples", "5"]
    command.main([*map(str, words), *more])
    return json.loads((out / "receipt.json").read_text())


def test_a_folder_against_itself(real, tmp_path, capsys):
    receipt = evaluated(tmp_path, "--generated", real, "--reference", real, "--lufs", "-14")
    found = receipt["scores"]["generated"]["musicnn"]
    assert found["fad"]["value"] == pytest.approx(0, abs=1e-8) and found["fad"]["clips"] == 4
    assert found["kl"]["value"] == pytest.approx(0, abs=1e-3) and found["kl"]["clips"] == 4
    assert found["tag_auc"]["low"] <= found["tag_auc"]["value"] <= found["tag_auc"]["high"]
    itself = receipt["scores"]["reference"]["musicnn"]
    assert itself["tag_auc"] == found["tag_auc"] and itself["tag_top5"] == found["tag_top5"]
    assert itself["fad"]["value"] > 1 and itself["fad"]["clips"] == 2
    assert itself["kl"]["value"] > 0.01
    assert receipt["embedders"]["musicnn"]["sha256"] == embedders.load("musicnn").sha256
    assert receipt["settings"] == {"lufs": -14, "seconds": None, "resamples": 5, "seed": 0}
    assert receipt["sets"]["reference"]["sample_rates"] == [16000, 22050]
    assert receipt["sets"]["reference"]["sha256"] == receipt["sets"]["generated"]["sha256"]
    shown = capsys.readouterr().out
    assert "FAD" in shown and "tag AUC" in shown and "generated" in shown and "e-" not in shown


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(stages, "load", lambda name, weights: loudness_embedder(name))


@pytest.fixture
def probed(tmp_path, monkeypatch):
    """Two clips of each of three instruments, and an embedder that tells them apart by pitch."""
    monkeypatch.setattr(stages, "load", lambda name, weights: pitch_embedder())
    for name, frequency in {"piano": 220, "violin": 440, "choir": 660}.items():
        for shift in (-5, 5):
            path = tmp_path / "probe" / f"{name}{shift}.wav"
            put(path, tone(1.5, frequency=frequency + shift))
            path.with_suffix(".json").write_text(json.dumps({"instrument": name}))
    return tmp_path / "probe"


def test_a_probe_is_fitted_to_other_clips(real, probed, tmp_path):
    put(probed / "unknown.wav", tone(1.0))
    words = ("--generated", real, "--reference", real, "--probe", probed)
    receipt = evaluated(tmp_path / "out", *words)
    # (the fourth clip, called a piano, is the highest of all)
    assert receipt["scores"]["generated"]["toy"]["probe"]["value"] == 0.75
    assert receipt["scores"]["reference"]["toy"]["probe"]["clips"] == 4
    assert receipt["probe"]["labels"] == ["choir", "piano", "violin"]
    assert receipt["sets"]["probe"]["clips"] == 6
    shutil.copy(real / "a.wav", probed / "piano.wav")
    (probed / "piano.json").write_text(json.dumps({"instrument": "piano"}))
    with pytest.raises(UserError, match="1 of its clips are in --reference as well"):
        evaluated(tmp_path / "out", *words)


def test_labels_are_in_objects_alone(probed):
    (path, *_) = probed.glob("*.json")
    captions = [path.stem]
    for content, message in (
        ("[" * 10**5, "not valid JSON"),
        ('{"instrument": "a", "instrument": "b"}', "'instrument' is there twice"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=f"{path.name}: .*{message}") as error:
            clips.labelled(probed, "instrument", {}, captions)
        assert len(str(error.value).splitlines()) == 1


def test_a_probe_whose_labels_no_caption_names_is_refused(real, probed, tmp_path, monkeypatch):
    """Whether the captions are beside the clips or listed, and before anything is sampled."""
    monkeypatch.setattr(stages, "make_sampler", lambda args, listed: None)
    for path in probed.glob("*.json"):
        label = json.loads(path.read_text())["instrument"]
        path.write_text(json.dumps({"instrument": f"electric {label}"}))
    (tmp_path / "list.txt").write_text("a waltz on the piano\n")
    for words in (
        ["--generated", real],
        ["--checkpoint", "run", "--seconds", "1", "--prompts", tmp_path / "list.txt"],
    ):
        with pytest.raises(UserError, match="no caption names a label .* such as 'electric choir'"):
            evaluated(tmp_path / "out", *words, "--reference", real, "--probe", probed)


def test_too_few_rows_for_a_probe_are_said_before_sampling(real, probed, tmp_path, monkeypatch):
    """One clip of each label, and an embedder that makes one row of each."""

    def embed(wav_N):
        return Embedded(np.array([[wav_N.std()]]), None)

    embedder = Embedder("toy", 16000, embed, "", "hash", "all")
    monkeypatch.setattr(stages, "load", lambda name, weights: embedder)
    monkeypatch.setattr(
        stages, "make_sampler", lambda args, listed: sample.Args(checkpoint="run", out=args.out)
    )
    monkeypatch.setattr(stages, "generate", lambda *args: pytest.fail("sampled"))
    for path in probed.glob("*-5.*"):
        path.unlink()
    with pytest.raises(UserError, match=r"--probe .*/probe: 3 rows of 3 labels .*: add clips"):
        evaluated(
            tmp_path / "out", "--checkpoint", "run", "--prompts", real, "--probe", probed,
            "--seconds", "1.5",
        )  # fmt: skip


def test_a_second_probe_knows_how_a_codec_sounds(real, probed, tmp_path, monkeypatch):
    """Of a stand-in that adds 100 Hz to every tone: the borders move by half of that."""

    def encode(wav_BCN):
        (pitch_P1, _) = pitch_embedder().embed(wav_BCN[0, 0])
        return tone(1.5, frequency=float(pitch_P1.mean()) + 100).reshape(1, 1, -1)

    spec = types.SimpleNamespace(sample_rate=16_000, channels=1, sha256="of the stand-in")
    codec = types.SimpleNamespace(spec=spec, encode=encode, decode=lambda codes: codes)
    monkeypatch.setattr("magnet_jax.codec.encodec.load_codec", lambda source: codec)
    for name, frequency in {"a piano": 220, "piano music": 355, "a choir": 640}.items():
        put(tmp_path / "made" / f"{frequency}.wav", tone(1.5, frequency=frequency), caption=name)
    receipt = evaluated(
        tmp_path / "out", "--generated", tmp_path / "made", "--reference", real,
        "--probe", probed, "--probe-codec", "a codec",
    )  # fmt: skip
    found = receipt["scores"]["generated"]["toy"]
    assert found["probe"]["value"] == pytest.approx(2 / 3)  # 355 Hz is nearer to a violin's 440 ...
    assert found["probe_codec"]["value"] == 1  # ... but to the 270 of pianos in both versions, too
    assert receipt["probe"]["codec"] == "of the stand-in"
    # Evaluations of another length share the folder, and each finds its own again.
    folder = tmp_path / "out" / "probe-round-trip"
    (first,) = folder.glob("*/")
    times = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert len(times) == 6
    for seconds in (["--seconds", "1"], []):
        evaluated(
            tmp_path / "other", "--generated", tmp_path / "made", "--reference", real, "--probe",
            probed, "--probe-codec", "a codec", "--probe-round-trip", folder, *seconds,
        )  # fmt: skip
    assert len(list(folder.glob("*/"))) == 2
    assert times == {path: path.stat().st_mtime_ns for path in first.iterdir()}


def test_notes_are_scored_beside_ruins_of_the_reference(tmp_path, quick, capsys):
    """Of four short tunes; what is generated is one note again and again."""
    for i, pitches in enumerate([(0, 3, 7, 5), (2, 0, 3, 2), (7, 5, 3, 0), (3, 5, 7, 8)]):
        caption = "a slow tune in C minor" if i else "a tune in B flat major"
        path = put(
            tmp_path / "real" / f"{i}.wav", plucked([60 + p for p in pitches]), caption=caption
        )
        about = json.loads(path.with_suffix(".json").read_text()) | {"keywords": ["fast"]}
        path.with_suffix(".json").write_text(json.dumps(about))
        lines = [f"{0.4 * j}\t{0.4 * j + 0.4}\t{60 + p}\n" for j, p in enumerate(pitches)]
        path.with_suffix(".notes").write_text("".join(lines))
        put(tmp_path / "made" / f"{i}.wav", plucked([60] * 4), caption=None)
    words = ("--generated", tmp_path / "made", "--reference", tmp_path / "real", "--notes")
    receipt = evaluated(tmp_path / "out", *words)
    found = {name: row["notes"] for name, row in receipt["scores"].items()}
    assert found.keys() == {"generated", "reference", *tunes.RUINS}
    distances = {name: row["distance"]["value"] for name, row in found.items()}
    assert distances["generated"] > distances["reference"] and distances["drone"] > 0
    assert found["reference"]["written_f1"]["value"] > 0.5 > found["drone"]["written_f1"]["value"]
    assert found["reference"]["speed"]["value"] == pytest.approx(1)
    assert found["generated"]["entropy"]["value"] < 1 < found["reference"]["entropy"]["value"]
    assert receipt["transcriber"] == transcriber.load().sha256
    shown = capsys.readouterr().out
    assert "one block looped" in shown and "tune distance" in shown
    # Nothing to hold them against: the notes alone are scored.
    receipt = evaluated(tmp_path / "alone", "--generated", tmp_path / "real", "--notes")
    (row,) = receipt["scores"].values()
    assert row["notes"]["in_key"]["value"] > 0.8 and "distance" not in row["notes"]


def test_clips_in_subfolders_are_evaluated(real, tmp_path, quick):
    nested = tmp_path / "real"
    for name in "abcd":
        folder = nested / ("one" if name in "ab" else "two")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(real / f"{name}.wav", folder)
        shutil.copy(real / f"{name}.json", folder)
    for generated in (real, nested):
        receipt = evaluated(
            tmp_path / generated.name, "--generated", generated, "--reference", nested
        )
        assert receipt["clips_with_reference"] == receipt["clips_with_captions"] == 4
        assert receipt["sets"]["reference"]["path"] == str(nested)
    listed = tmp_path / "list.csv"
    listed.write_text("id,caption\n" + "".join(f"{n},{c}\n" for n, c in CAPTIONS.items()))
    receipt = evaluated(
        tmp_path / "listed", "--generated", nested, "--reference", nested, "--prompts", listed
    )
    assert receipt["clips_with_reference"] == 4
    assert receipt["scores"]["generated"]["musicnn"]["kl"]["value"] == pytest.approx(0, abs=1e-3)


def test_a_baseline_that_was_made_of_something_else_is_not_taken(tmp_path):
    out, notes = tmp_path / "codec", tmp_path / "settings"
    baselines.begin(out, notes, ["a", "b"], {"seed": 0})  # and was killed before the first clip
    made = baselines.begin(out, notes, ["a", "b"], {"seed": 1})
    assert made == {"a": out / "a.wav", "b": out / "b.wav"}
    put(made["a"], tone(0.1))
    assert baselines.begin(out, notes, ["a", "b"], {"seed": 1}) == made
    with pytest.raises(UserError, match=r"codec: begun with other .*seed \(was 1, now 2\)"):
        baselines.begin(out, notes, ["a", "b"], {"seed": 2})
    with pytest.raises(UserError, match="codec: is there, and no evaluation made it"):
        baselines.begin(out, tmp_path / "elsewhere", ["a"], {"seed": 1})


def stand_in_codec(num_codebooks=4):
    """A codec that plays silence, and the list of what it was given to play, [K, T] each."""
    played = []

    def decode(codes_BKT):
        played.extend(codes_BKT)
        return np.zeros((1, 1, 100), np.float32)

    spec = dataclasses.replace(codec_module.read_spec("embedded"), num_codebooks=num_codebooks)
    return types.SimpleNamespace(spec=spec, decode=decode), played


def write_codes(folder, spec, splits):
    """A data set of these codes [K, T]."""
    examples = {
        split: [
            {
                "codes": np.array(codes_KT, np.int16), "caption": "noise", "info": "{}",
                "track_id": f"{split}{i}", "source_path": f"{split}{i}.wav", "start": 0.0,
                "duration": len(codes_KT[0]) / spec.frame_rate,
            }
            for i, codes_KT in enumerate(codes)
        ]
        for split, codes in splits.items()
    }  # fmt: skip
    tiny.write_data_set(folder, examples, spec)


def draw(codec, data, out, num_frames=50):
    written = {"a": out / "a.wav"}
    baselines.unigram_tokens(codec, data, written, num_frames=num_frames, seed=0)


def test_unigram_tokens_are_as_frequent_as_in_the_data(tmp_path):
    codec, played = stand_in_codec()
    rng = np.random.default_rng(0)
    train = [rng.integers(0, 1024, (4, 50)) ** 2 // 1024 for _ in range(3)]
    write_codes(tmp_path / "tokens", codec.spec, {"train": train, "valid": [train[0]]})
    counts_KV = baselines.token_counts(tmp_path / "tokens", 1024)
    for k, counts_V in enumerate(counts_KV):
        every = np.concatenate([codes_KT[k] for codes_KT in train])
        np.testing.assert_array_equal(counts_V, np.bincount(every, minlength=1024))
    # 3 of 4 tokens are the first of two; a codebook of one token gives no other
    few = np.array([[7, 7, 7, 9], [0] * 4, [1023] * 4, [5] * 4])
    write_codes(tmp_path / "few", codec.spec, {"train": [few]})
    draw(codec, tmp_path / "few", tmp_path / "out", num_frames=4000)
    (codes_KT,) = played
    assert set(codes_KT[0]) == {7, 9} and (codes_KT[0] == 7).mean() == pytest.approx(0.75, abs=0.04)
    assert [set(row_T) for row_T in codes_KT[1:]] == [{0}, {1023}, {5}]


def test_a_model_may_have_fewer_codebooks_than_the_data_of_its_baseline(
    real, tmp_path, monkeypatch
):
    """And what does not fit is said before anything is sampled."""
    codec, played = stand_in_codec(num_codebooks=2)
    whole = dataclasses.replace(codec.spec, num_codebooks=4)
    codes_KT = np.array([[1] * 9, [2] * 9, [3] * 9, [4] * 9])
    write_codes(tmp_path / "data", whole, {"train": [codes_KT]})
    draw(codec, tmp_path / "data", tmp_path / "drawn")
    assert [set(row_T) for row_T in played[0]] == [{1}, {2}]

    write_codes(tmp_path / "one", dataclasses.replace(whole, num_codebooks=1), {"train": [[[1]]]})
    monkeypatch.setattr("magnet_jax.checkpoints.pretrained.load", lambda *args, **how: None)
    monkeypatch.setattr("magnet_jax.checkpoints.pretrained.load_decoder", lambda *args: codec)
    monkeypatch.setattr(stages, "load", lambda name, weights: pitch_embedder())
    monkeypatch.setattr(
        stages, "make_sampler", lambda args, _: sample.Args(checkpoint="run", out=args.out)
    )
    monkeypatch.setattr(stages, "generate", lambda *args: pytest.fail("sampled"))
    words = ("--checkpoint", "run", "--prompts", real, "--reference", real, "--baselines",
             "--seconds", "1.5")  # fmt: skip
    with pytest.raises(UserError, match="one: its codec has num_codebooks 1, but 2 is wanted"):
        evaluated(tmp_path / "out", *words, "--data", tmp_path / "one")
    with pytest.raises(UserError, match="give two prompts at least"):
        evaluated(tmp_path / "out", *words, "--data", tmp_path / "data", "--limit", "1")


def test_real_clips_are_heard_as_long_as_generated_ones(real, tmp_path):
    """By default; a folder's clips are heard whole."""

    def heard(**asked):
        args = settings.Args(out=tmp_path / "out", prompts=real, **asked)
        return settings.checked(args).listening.seconds

    assert heard(checkpoint="demo") == 10
    assert heard(checkpoint="demo", seconds=3.0) == 3
    assert heard(generated=real) is None


def test_the_receipt_says_what_was_asked(tmp_path):
    args = settings.Args(
        out=tmp_path,
        generated=tmp_path / "my clips",
        embedders=("musicnn", "clap"),
        weights=settings.Weights(clap="mine"),
        lufs=-14.5,
        sample_options="--preset draft",
        baselines=True,
    )
    words = settings.words_of(args)
    assert cli.parse(settings.Args, words, prog="x") == args
    assert not {"--seed", "--probe-field"} & set(words)


def test_what_no_evaluation_wrote_is_left_alone(real, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name, content in (("receipt.json", "{}"), ("prompts.jsonl", "mine")):
        (out / name).write_text(content)
        with pytest.raises(UserError, match=f"out/{name}: .*name another --out"):
            settings.checked(settings.Args(out=out, checkpoint="demo", prompts=real))
        assert (out / name).read_text() == content
        (out / name).unlink()
    listed = out / "prompts.jsonl"
    listed.write_text('{"id": "a", "caption": "x"}')
    (out / "settings").mkdir()
    settings.checked(settings.Args(out=out, checkpoint="demo", prompts=real, limit=1))
    with pytest.raises(UserError, match="prompts.jsonl: would be replaced"):
        settings.checked(settings.Args(out=out, checkpoint="demo", prompts=listed, limit=1))


def test_what_is_missing_of_a_list_is_said(real, tmp_path, capsys, quick):
    names = sorted(path.stem for path in real.glob("*.wav"))
    for name in names[:2]:
        put(tmp_path / "made" / f"{name}.wav", tone(1.5))
    put(tmp_path / "made" / "new.wav", tone(1.5))
    listed = tmp_path / "list.csv"
    listed.write_text("id,caption\n" + "".join(f"{name},a piano\n" for name in (*names, "new")))
    evaluated(tmp_path / "out", "--generated", tmp_path / "made", "--reference", real,
              "--prompts", listed, "--picture", tmp_path / "seen.png")  # fmt: skip
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert f"has 3 of the {len(names) + 1} clips that --prompts lists, and not {names[2]}" in shown
    assert "note: 2 of the 3 clips have a reference clip of their name" in shown


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--unconditional 1", "leave out --unconditional: the clips are those of --prompts"),
        ("--prompt more", "leave out --prompt:"),
        ("--out elsewhere --seed 3", "leave out --out, --seed:"),
        ("--checkpoint other", "leave out --checkpoint:"),
        ("--lufs -20", "leave out --lufs:"),
        ("--seconds 5", "leave out --seconds:"),
        ("--prompts list.txt", "unknown setting --prompts"),
        ("--codec 'a b", "--sample-options: cannot be read as options"),
        ("--batch-size 2", None),
    ],
)
def test_sample_options_leave_alone_what_the_evaluation_decides(
    options, message, real, tmp_path, monkeypatch
):
    """And say so before anything is heard."""
    model = types.SimpleNamespace(kind="magnet")
    monkeypatch.setattr(
        "magnet_jax.checkpoints.pretrained.read_defaults",
        lambda source: (model, sample.DecodeConfig()),
    )

    class Heard(Exception):
        pass

    def hear(name, weights):
        raise Heard

    monkeypatch.setattr(stages, "load", hear)
    with pytest.raises(UserError if message else Heard, match=message):
        evaluated(
            tmp_path / "out", "--checkpoint", "demo", "--prompts", real,
            f"--sample-options={options}",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --generated FOLDER, or --checkpoint MODEL"),
        (["--checkpoint", "x"], "give --prompts FILE"),
        (["--generated", "REAL", "--baselines"], "--baselines needs --checkpoint"),
        (["--generated", "REAL", "--data", "x"], "--data is for --baselines"),
        (["--generated", "REAL", "--lufs", "3"], "--lufs must lie"),
        (["--generated", "REAL", "--seconds", "0"], "--seconds must be a positive"),
        (["--generated", "REAL", "--limit", "3"], "goes with --prompts"),
        (["--generated", "REAL", "--picture", "a.gif"], "--picture a.gif: the name must end in"),
        (["--generated", "REAL", "--embedders", "clap", "clap"], "name each once"),
        (["--generated", "REAL", "--embedders", "vgish"], "--embedders"),
        (["--generated", "nowhere"], "nowhere: no such folder"),
        (["--generated", "EMPTY"], "no audio in it"),
        (["--generated", "BARE"], "no captions beside its clips; give --prompts FILE"),
        (["--generated", "TWICE"], "a.wav has the same id|a.flac has the same id"),
        (["--generated", "BROKEN", "--reference", "REAL"], "broken.wav: cannot be read"),
        (["--generated", "REAL", "--probe", "REAL"], "clips of two labels at least, under 'instr"),
        (["--generated", "REAL", "--probe-codec", "embedded"], "goes with --probe FOLDER"),
        (["--generated", "REAL", "--probe-field", "key"], "--probe-field goes with --probe"),
        (["--generated", "REAL", "--weights.clap", "x"], "--weights.clap goes with --embedders"),
        (["--generated", "REAL", "--sample-options", "x"], "--sample-options is for clips"),
        (["--generated", "REAL", "--prompts", "LIST"], "none of its clips is called"),
    ],
)
def test_mistakes_are_one_line(words, message, real, tmp_path, quick):
    places = {"REAL": real, "LIST": tmp_path / "list.txt"}
    places["LIST"].write_text("a waltz\n")
    for name in ("EMPTY", "TWICE", "BROKEN"):
        places[name] = tmp_path / name.lower()
        places[name].mkdir()
    for suffix in ("wav", "flac"):
        soundfile.write(tmp_path / "twice" / f"a.{suffix}", tone(1.0), 16000)
    places["BARE"] = put(tmp_path / "bare" / "a.wav", tone(1.0), caption=None).parent
    (tmp_path / "broken" / "broken.wav").write_bytes(b"RIFF")
    words = [str(places.get(word, word)) for word in words]
    with refused(words, message):
        evaluated(tmp_path / "out", *words)
    assert not (tmp_path / "out" / "receipt.json").exists()

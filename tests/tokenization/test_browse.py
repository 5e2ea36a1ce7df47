import dataclasses
import json
import shutil

import matplotlib.image
import numpy as np
import pytest
import soundfile
import tiny
from constants import SHIPPED_GOLDEN
from matplotlib.figure import Figure
from refusals import refused

from magnet_jax.codec.encodec import load_codec
from magnet_jax.config import ASSETS
from magnet_jax.convert.audiocraft import CODEC_FILE
from magnet_jax.data import records
from magnet_jax.errors import UserError
from tokenization import browse, job, maker
from tokenization.browse import main

CLIPS = ("00_oneills1850", "01_monteverdi", "02_bach")  # the second falls to validation


@pytest.fixture(scope="module")
def codec():
    return load_codec("embedded")


@pytest.fixture(scope="module", autouse=True)
def one_codec(codec):
    """Loads the embedded codec once for this file."""
    load = browse.load_codec
    with pytest.MonkeyPatch.context() as patch:
        for module in (maker, browse):
            patch.setattr(
                module,
                "load_codec",
                lambda source, *args, **kw: (
                    codec if source == "embedded" else load(source, *args, **kw)
                ),
            )
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    (folder / "audio").mkdir()
    for name in CLIPS:
        wav, rate = soundfile.read(ASSETS / "clips" / f"{name}.flac")
        soundfile.write(folder / "audio" / f"{name}.flac", wav[: 2 * rate], rate)
        shutil.copy(ASSETS / "clips" / f"{name}.json", folder / "audio")
    job.run(job.Job(audio=folder / "audio", out=folder / "tokens", validation_percent=15.0))
    return folder / "tokens"


def write_like_first(folder, dataset, spec=None, **changes):
    """A data set of the other's first record, some of its fields changed."""
    record = records.decode_example(records.open_split(dataset, "train")[0])
    record |= {"codes": record.pop("codes_KT"), "info": json.dumps(record["info"])} | changes
    tiny.write_data_set(folder, {"train": [record]}, spec or records.read_codec_spec(dataset))
    return folder


def with_codec(folder, dataset, **changes):
    """A data set said to be of another codec."""
    spec = dataclasses.replace(records.read_codec_spec(dataset), **changes)
    return write_like_first(folder, dataset, spec)


def test_the_list_and_the_totals(dataset, capsys):
    main([str(dataset)])
    text = capsys.readouterr().out
    assert "records  3: 2 train, 1 validation" in text
    assert "hours 0.001667, audio files 3, rejected 0" in text  # 6 s
    assert "codec    embedded (1d9b35ce3a9c), 16000 Hz, 1 channel, 4 codebooks of 1024" in text
    lines = text.split("caption\n")[1].splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["0", "train", CLIPS[0]],
        ["1", "train", CLIPS[2]],
        ["0", "validation", CLIPS[1]],
    ]
    assert lines[0].split()[3:5] == ["0.00", "2.00"]
    assert "An Irish dance tune" in lines[0] and lines[2].endswith("...")


def listed(capsys, *words):
    main(list(map(str, words)))
    text = capsys.readouterr().out
    table = text.split("caption\n")[1] if "caption\n" in text else ""
    return [tuple(line.split()[:2]) for line in table.splitlines() if line[0] == " "], text


def test_choosing_records(dataset, capsys):
    first, second, third = ("0", "train"), ("1", "train"), ("0", "validation")
    assert listed(capsys, dataset, "--split", "validation")[0] == [third]
    assert listed(capsys, dataset, "--grep", "BACH")[0] == [second]
    found, text = listed(capsys, dataset, "--limit", 2)
    assert found == [first, second] and "more records follow: --limit 0 lists all" in text
    found, text = listed(capsys, dataset, "--grep", "played", "--limit", "1")
    assert found == [first] and "more records match" in text
    found, text = listed(capsys, dataset, "--limit", 0)
    assert found == [first, second, third] and "more records" not in text
    found, text = listed(capsys, dataset, "--grep", "bagpipe")
    assert found == [] and "no such records" in text


def test_the_list_as_json(dataset, tmp_path):
    path = tmp_path / "new" / "list.json"
    main([str(dataset), "--split", "train", "--json", str(path)])
    values = json.loads(path.read_text())
    assert values["codec"] == dataclasses.asdict(records.read_codec_spec(dataset))
    assert values["totals"]["records"] == {"train": 2, "validation": 1}
    sidecar = json.loads((ASSETS / "clips" / f"{CLIPS[2]}.json").read_text())
    line = values["records"][1]
    assert line["caption"] == sidecar.pop("description") and line["info"] == sidecar
    assert (line["track_id"], line["duration"], line["frames"]) == (CLIPS[2], 2.0, 100)


def test_a_record_becomes_sound_and_picture(dataset, codec, tmp_path, capsys):
    out, path = tmp_path / "out", tmp_path / "record.json"
    main([str(dataset), "--record", "0", "--split", "validation", "--out", str(out)])
    main([str(dataset), "--record", "1", "--out", str(out), "--json", str(path)])
    assert sorted(p.name for p in out.iterdir()) == [
        "train_1.png", "train_1.wav", "validation_0.png", "validation_0.wav",
    ]  # fmt: skip
    assert str(out / "train_1.wav") in capsys.readouterr().out
    wav, rate = soundfile.read(out / "train_1.wav")
    record = records.decode_example(records.open_split(dataset, "train")[1])
    expected = codec.decode(record["codes_KT"][None])[0, 0].clip(-1, 1)
    assert rate == 16000 and len(wav) == round(record["duration"] * rate)
    np.testing.assert_allclose(wav, expected[: len(wav)], atol=1e-4)
    values = json.loads(path.read_text())["record"]
    np.testing.assert_array_equal(values["codes"], record["codes_KT"])
    pictures = [matplotlib.image.imread(out / f"{n}.png") for n in ("train_1", "validation_0")]
    assert pictures[0].shape == pictures[1].shape and (pictures[0] != pictures[1]).any()


def test_the_last_frame_may_be_longer_than_the_record(dataset, tmp_path):
    codes_KT = np.arange(12, dtype=np.int16).reshape(4, 3)
    changes = {
        "codes": codes_KT,
        "duration": 0.045,
        "caption": "at $5 or $6 {",
        "track_id": "x" * 300,
    }
    short = write_like_first(tmp_path / "short", dataset, **changes)
    main([str(short), "--record", "0", "--out", str(tmp_path)])
    assert soundfile.info(tmp_path / "train_0.wav").frames == 720


def test_a_kill_leaves_the_earlier_files_whole(dataset, tmp_path, monkeypatch):
    def killed(figure, path, **how):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    words = [str(dataset), "--record", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(Figure, "savefig", killed)
    with pytest.raises(KeyboardInterrupt):
        main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["train_0.wav"]
    (tmp_path / "train_0.png").write_bytes(b"whole")
    with pytest.raises(KeyboardInterrupt):
        main(words)
    assert (tmp_path / "train_0.png").read_bytes() == b"whole"


def test_tokens_of_another_codec_are_refused(dataset, tmp_path):
    other = with_codec(tmp_path / "other", dataset, sha256="0" * 64)
    decode = ["--record", "0", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="its tokens come from codec embedded .000000000000."):
        main([str(other), *decode])
    golden = str(SHIPPED_GOLDEN / "encodec_tiny" / CODEC_FILE)
    with pytest.raises(UserError, match=f"come from codec embedded .*but {golden}"):
        main([str(dataset), *decode, "--codec", golden])
    assert not (tmp_path / "out").exists()


def test_a_codec_that_moved_is_named(dataset, tmp_path):
    moved = with_codec(tmp_path / "moved", dataset, source="/gone/codec")
    decode = ["--record", "0", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="/gone/codec: no such .*; --codec says where it lies now"):
        main([str(moved), *decode])
    main([str(moved), *decode, "--codec", "embedded"])
    assert (tmp_path / "out" / "train_0.wav").exists()


def test_tokens_out_of_range_are_one_line(dataset, tmp_path):
    bad = write_like_first(tmp_path / "bad", dataset, codes=np.full((4, 5), 1024, np.int16))
    with pytest.raises(UserError, match=r"record 0 of train: .*must lie in \[0, 1024\)"):
        main([str(bad), "--record", "0", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "words,complaint",
    [
        (["{}/nowhere"], "no such folder"),
        (["{}/.."], "not a folder that tokenization.job wrote"),
        (["{}", "--split", "test"], "validation"),
        (["{}", "--limit", "-1"], "--limit must not be negative"),
        (["{}", "--record", "2", "--out", "x"], "records 0 to 1 of train"),
        (["{}", "--record", "-1", "--out", "x"], "records 0 to 1 of train"),
        (["{}", "--record", "0"], "go together"),
        (["{}", "--out", "x"], "go together"),
        (["{}", "--codec", "embedded"], "--codec decodes a record"),
        (["{}", "--grep", "a", "--record", "0", "--out", "x"], "give one of them"),
        (["{}", "--json", "list.txt"], "must end in .json"),
        ([], "must be given"),
    ],
)
def test_bad_input_is_one_line(dataset, words, complaint):
    words = [word.format(dataset) for word in words]
    with refused(words, complaint):
        main(words)


def test_a_split_that_is_absent(dataset, tmp_path):
    only = with_codec(tmp_path / "only", dataset)
    with pytest.raises(UserError, match="no validation split"):
        main([str(only), "--split", "validation"])

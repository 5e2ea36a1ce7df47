"""Editing sound files by command: what they hold afterwards, and a line for every mistake."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import soundfile
import tiny
from sounds import put, tone

from launch import edit, sample
from magnet_jax import Prompt, cli, prompts
from magnet_jax.checkpoints import pretrained
from magnet_jax.edit import kept
from magnet_jax.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def tiny_model():
    """What any name of a model stands for."""
    loaded = tiny.loaded_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "load", lambda *_, **__: loaded)
        yield loaded


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, tiny_model):
    """A clip of launch.sample, and what lies beside it."""
    out = tmp_path_factory.mktemp("wavs")
    (path,) = sample.sample(
        sample.Args(
            checkpoint="tiny", out=out, prompt=("a jig",), seconds=1.2,
            decode=tiny_model.config.decode,
        )
    )  # fmt: skip
    return path


@pytest.fixture
def clip(sampled, tmp_path):
    for path in sampled.parent.glob(f"{sampled.stem}.*"):
        shutil.copy(path, tmp_path / path.name.replace(sampled.stem, "clip"))
    return tmp_path / "clip.wav"


def do(command, clip, out, *more):
    words = [command, "--checkpoint", "tiny", "--audio", str(clip), "--out", str(out), *more]
    edit.main(edit.parse(words))
    return json.loads(out.with_suffix(".json").read_text())


def samples(path):
    return soundfile.read(path, dtype="int32")[0]


def test_a_sampled_clip_keeps_its_tokens(tiny_model, clip):
    spec = tiny_model.codec
    found = kept.find(clip, spec)
    assert found.path == clip.with_name("clip.tokens.npz")
    assert found.codes_KT.shape == (4, 60) and found.text == "a jig" and found.seed == 0


def test_a_region_of_a_sampled_clip(clip, tmp_path, capsys):
    out, picture = tmp_path / "new" / "out.wav", tmp_path / "out.png"
    more = ("--region", "0.4:0.6", "--region", "1.1:", "--picture", str(picture))
    about = do("inpaint", clip, out, *more)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    before_N, after_N = samples(clip), samples(out)
    outside_N = np.ones(len(before_N), bool)
    assert len(about["changed"]) == 2 and about["sample_rate"] == 16_000
    for first, end in about["changed"]:
        outside_N[first:end] = False
        assert (after_N != before_N)[first:end].any()
    np.testing.assert_array_equal(after_N[outside_N], before_N[outside_N])
    assert outside_N[: round(0.2 * 16_000)].all()
    assert about["edit"] == "inpaint" and about["region"] == ["0.4:0.6", "1.1:"]
    assert len(about["audio_sha256"]) == len(about["sha256"]) == 64
    said = capsys.readouterr().out
    assert f"{out}: changed " in said and "1.200 s" in said
    # It keeps its own tokens, and is made again to the byte.
    found, content = kept.find(out), out.read_bytes()
    old_KT = kept.find(clip).codes_KT
    assert found.text == "a jig" and (found.codes_KT != old_KT).any()
    np.testing.assert_array_equal(found.codes_KT[:, :20], old_KT[:, :20])
    do("inpaint", clip, out, *more)
    assert out.read_bytes() == content
    with pytest.raises(UserError, match="was made with other settings .seed.; name another --out"):
        do("inpaint", clip, out, *more, "--seed", "1")
    again = do("inpaint", out, tmp_path / "again.wav", "--region", "0:0.1")
    assert again["changed"][0][0] == 0


def test_the_other_edits(clip, tmp_path):
    upload = put(tmp_path / "upload.wav", tone(1.0, 22_050, 2), 22_050, subtype="PCM_24")
    longer = do("extend", clip, tmp_path / "longer.wav", "--before", "0.2", "--after", "0.3")
    assert soundfile.info(tmp_path / "longer.wav").frames == round(1.7 * 16_000)
    (start, first), (last, end) = longer["changed"]
    assert start == 0 and end == round(1.7 * 16_000)
    lead = round(0.2 * 16_000)
    np.testing.assert_array_equal(
        samples(tmp_path / "longer.wav")[first:last], samples(clip)[first - lead : last - lead]
    )
    do("vary", clip, tmp_path / "v.wav", "--count", "2", "--variation", "0.5")
    assert (samples(tmp_path / "v.wav") != samples(tmp_path / "v-2.wav")).any()
    do("repair", clip, tmp_path / "same.wav", "--worst", "0")
    assert (tmp_path / "same.wav").read_bytes() == clip.read_bytes()
    how = ("--how", "replay", "--original", "a jig", "--strength", "0.5")
    do("restyle", clip, tmp_path / "style.wav", "--prompt", "a dirge", *how)
    assert kept.find(tmp_path / "style.wav").text == "a dirge"
    joined = do("between", upload, tmp_path / "j.wav", "--then", str(upload), "--seconds", "1")
    assert "then_sha256" in joined and joined["then_sha256"] == joined["audio_sha256"]
    before, after = samples(upload), samples(tmp_path / "j.wav")
    ((first, end),) = joined["changed"]
    assert len(after) == round(2.0 * 22_050) + len(before)
    np.testing.assert_array_equal(after[:first], before[:first])
    np.testing.assert_array_equal(after[end:], before[end - len(after) :])
    assert soundfile.info(tmp_path / "j.wav").subtype == "PCM_24"
    assert not (tmp_path / "j.tokens.npz").exists()


def test_richer_texts_are_written_down_and_found_again(tmp_path, tiny_model):
    """The JSON holds what makes the clip again; an edit begins with what is kept beside it."""
    steering = ("--blend", "0.25", "a harp", "--at", "0.6", "a drum", "--text-fade", "0.5")
    words = ("--checkpoint", "tiny", "--out", str(tmp_path / "wavs"), "--seconds", "1.2")
    words = (*words, "--prompt", "a jig", *steering, "--negative-prompt", "a flute")
    args = cli.parse(sample.Args, [*words, "--unconditional", "1"], prog="sample")
    args = dataclasses.replace(args, decode=tiny_model.config.decode)
    (path, plain) = sample.sample(args)
    assert path.name == "000-a-jig-a-harp-a-drum-seed0.wav"
    blend = [("a jig", 0.75), ("a harp", 0.25)]
    wanted = Prompt([(0, blend), (0.6, "a drum")], negative="a flute", fade=0.5)
    about = json.loads(path.with_suffix(".json").read_text())
    assert Prompt(**about["prompt"]) == kept.find(path).text == wanted
    unnamed = json.loads(plain.with_suffix(".json").read_text())["prompt"]
    assert Prompt(**unnamed) == Prompt("", negative="a flute")
    content = path.read_bytes()
    sample.sample(args)
    assert path.read_bytes() == content
    with pytest.raises(UserError, match="was made with other settings .prompt."):
        sample.is_made(path, path.with_suffix(".json"), about | {"prompt": "a jig"})

    out = tmp_path / "new.wav"
    about = do("inpaint", path, out, "--region", "0.4:0.6", "--negative-prompt", "a bell")
    assert about["prompt"] == prompts.as_json(Prompt(None, negative="a bell"))
    assert "steering" not in about
    assert kept.find(out).text == dataclasses.replace(wanted, negative="a bell")
    out = tmp_path / "longer.wav"
    do("extend", path, out, "--before", "0.2")
    assert kept.find(out).text == prompts.later(wanted, 0.2)
    assert samples(tmp_path / "new.wav").shape == samples(path).shape


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt", "a", "--at", "8", "b", "--at", "3", "c"), "must begin at 0 and rise"),
        (("--prompt", "a", "--at", "0", "b"), "--at 0 is what --prompt says"),
        (("--at", "3", "b"), "--blend and --at need --prompt"),
        (("--blend", "0.5", "b"), "--blend and --at need --prompt"),
        (("--prompt", "a", "--blend", "1.2", "b"), "--blend: shares must not"),
        (("--prompt", "a", "--blend", "-0.2", "b"), "--blend: shares must not"),
        (("--prompt", "a", "--text-fade", "3"), "--text-fade needs --at"),
        (("--prompt", "a", "--at", "3", "b", "--text-fade", "-3"), "--text-fade must lie"),
        (("--prompt", "a", "--at", "b"), "--at"),
        (("--prompt", "a", "--at", "x", "b"), "--at"),
        (("--prompt", "a", "--at", "nan", "b"), "--at"),
        (
            ("--prompt", "a", "--seconds", "1.2", "--at", "1.2", "b"),
            "begins at 1.2 s, and the clip",
        ),
    ],
)
def test_a_line_for_texts_that_do_not_fit(clip, tmp_path, words, message):
    out = tmp_path / "new"
    with pytest.raises(UserError, match=message) as error:
        sample.sample(
            cli.parse(sample.Args, ["--checkpoint", "x", "--out", str(out), *words], prog="sample")
        )
    assert "\n" not in str(error.value) and not out.exists()
    if "--seconds" not in words:
        with pytest.raises(UserError, match=message):
            do("repair", clip, tmp_path / "new.wav", *words)
        assert not (tmp_path / "new.wav").exists()


def test_masks_of_files(clip, tmp_path):
    wav = np.zeros(round(1.2 * 16_000), np.float32)
    wav[8000:9600] = 0.5
    put(tmp_path / "mask.wav", wav, caption=None)
    np.save(tmp_path / "mask.npy", np.arange(60) // 5 == 5)
    changed = [
        do("inpaint", clip, tmp_path / f"{kind}.wav", "--mask", str(tmp_path / f"mask.{kind}"))
        for kind in ("wav", "npy")
    ]
    assert changed[0]["changed"] == changed[1]["changed"] != []


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("inpaint", (), "nothing to do: give --region BEGIN:END, or --mask"),
        ("inpaint", ("--region", "1"), "--region 1: must be BEGIN:END"),
        ("inpaint", ("--region", "a:b"), "--region a:b: must be BEGIN:END"),
        ("inpaint", ("--region", "0:nan"), "--region 0:nan: must be BEGIN:END"),
        ("inpaint", ("--region", "0:1", "--fade", "-1"), "--fade must lie"),
        ("inpaint", ("--region", "0:1", "--picture", "x.bmp"), "--picture x.bmp: the name must"),
        ("inpaint", ("--region", "0:1", "--mask", "none.npy"), "--region .* and not both"),
        ("inpaint", ("--mask", "none.npy"), "--mask none.npy: cannot be read"),
        ("extend", (), "nothing to do: give --before SECONDS or --after"),
        ("restyle", (), "give --prompt TEXT"),
        ("between", ("--then", "none.wav", "--seconds", "1"), "--then none.wav: cannot be read"),
        ("repair", ("--worst", "2"), "--worst must lie"),
        ("repair", ("--out", "{clip}"), "--out .*: is the file that is edited, or has its name"),
        ("repair", ("--out", "{folder}/clip.flac"), "is the file that is edited, or has its name"),
        ("vary", ("--audio", "{clip}", "--out", "{folder}/x.mp3"), "cannot hold PCM_16"),
        ("repair", ("--audio", "{folder}/none.wav"), "none.wav: cannot be read"),
        ("repair", ("--out", "{folder}/mine.wav"), "is there, and launch.edit did not make it"),
    ],
)
def test_a_line_for_what_is_wrong(clip, tmp_path, command, more, message, monkeypatch):
    """Said before a model is loaded; and nothing is written."""
    put(tmp_path / "mine.wav", tone(0.1), caption=None)
    monkeypatch.setattr(edit, "open_model", lambda args: pytest.fail("a model was loaded"))
    there = {path: path.read_bytes() for path in tmp_path.iterdir()}
    more = [word.format(clip=clip, folder=tmp_path) for word in more]
    words = {"--checkpoint": "none", "--audio": str(clip), "--out": str(tmp_path / "out.wav")}
    given = [word for pair in words.items() if pair[0] not in more for word in pair]
    with pytest.raises(UserError, match=message) as error:
        edit.main(edit.parse([command, *given, *more]))
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == there


def test_siblings_do_not_take_the_name_of_what_is_edited(clip, monkeypatch):
    monkeypatch.setattr(edit, "open_model", lambda args: pytest.fail("a model was loaded"))
    two = clip.rename(clip.with_name("clip-2.wav"))
    with pytest.raises(UserError, match="clip-2.wav: is the file that is edited"):
        do("vary", two, clip.with_name("clip.wav"))


def test_what_lies_beside_a_new_file_is_not_replaced(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(edit, "open_model", lambda args: pytest.fail("a model was loaded"))
    out = tmp_path / "out.wav"
    for beside, content in (("out.json", b'{"description": "mine"}'), ("out.tokens.npz", b"mine")):
        path = tmp_path / beside
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path}: is there"):
            do("repair", clip, out)
        assert path.read_bytes() == content and not out.exists()
        path.unlink()


def test_a_region_beyond_the_clip_and_a_model_that_cannot(clip, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="region 1:2: the clip is 1.2 s long"):
        do("inpaint", clip, tmp_path / "out.wav", "--region", "1:2")
    from magnet_jax import api

    monkeypatch.setattr(api, "of_kind", lambda *_: object.__new__(api.MusicGen))
    with pytest.raises(UserError, match="a model of kind musicgen goes on from a beginning alone"):
        do("inpaint", clip, tmp_path / "out.wav", "--region", "0:1")
    assert not (tmp_path / "out.wav").exists() and not (tmp_path / "out.json").exists()

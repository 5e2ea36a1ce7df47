"""Tokens beside a clip are found by what its file holds."""

import dataclasses
import json

import numpy as np
import pytest

from magnet_jax.config import CodecSpec
from magnet_jax.edit import kept
from magnet_jax.errors import UserError

SPEC = CodecSpec(
    source="here", sha256="ab" * 32, sample_rate=16_000, channels=1, frame_rate=50.0,
    num_codebooks=4, codebook_size=1024,
)  # fmt: skip
CODES_KT = np.random.default_rng(0).integers(0, 1024, (4, 30))


def save(path, content=b"a sound", **how):
    path.write_bytes(content)
    return kept.save(path, CODES_KT, SPEC, text="a waltz", seed=3, settings={"steps": [20]}, **how)


def test_what_is_kept_comes_back(tmp_path):
    path = save(tmp_path / "clip.wav")
    assert path == tmp_path / "clip.tokens.npz"
    found = kept.find(tmp_path / "clip.wav", SPEC)
    np.testing.assert_array_equal(found.codes_KT, CODES_KT)
    assert found.codes_KT.dtype == np.int32
    assert found[2:] == (SPEC.sha256, 16_000, "a waltz", 3, {"steps": [20]})
    with np.load(path, allow_pickle=False) as file:
        assert file["codes_KT"].dtype == np.uint16
        assert json.loads(str(file["about"]))["codec"] == dataclasses.asdict(SPEC)


@pytest.mark.parametrize("renamed", ["clip.wav", "clip.tokens.npz", "both"])
def test_files_may_be_renamed_within_a_folder(tmp_path, renamed):
    save(tmp_path / "other.wav", b"another")
    path = save(tmp_path / "clip.wav")
    audio = tmp_path / "clip.wav"
    if renamed != "clip.tokens.npz":
        audio = audio.rename(tmp_path / "my song.wav")
    if renamed != "clip.wav":
        path.rename(tmp_path / "x.tokens.npz")
    assert kept.find(audio, SPEC) is not None
    np.testing.assert_array_equal(kept.find(audio).codes_KT, CODES_KT)


def test_nothing_is_kept_of_another_sound(tmp_path):
    save(tmp_path / "clip.wav")
    (tmp_path / "clip.wav").write_bytes(b"a sound, edited")
    assert kept.find(tmp_path / "clip.wav", SPEC) is None
    with pytest.raises(UserError, match=r"none\.wav: cannot be read"):
        kept.find(tmp_path / "none.wav")


@pytest.mark.parametrize("change", [{"sha256": "cd" * 32}, {"num_codebooks": 8}])
def test_tokens_of_another_codec_are_refused(tmp_path, change):
    save(tmp_path / "clip.wav")
    with pytest.raises(ValueError, match=r"clip\.tokens\.npz: holds 4 codebooks of codec abab"):
        kept.find(tmp_path / "clip.wav", dataclasses.replace(SPEC, **change))


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "pickle", "none"])
def test_damaged_tokens_are_named(tmp_path, damage):
    path = save(tmp_path / "clip.wav")
    content = path.read_bytes()
    if damage == "pickle":
        np.savez(path, codes_KT=np.array([{}], object), about=np.array([{}], object))
    elif damage == "none":
        np.savez(path, other=np.zeros(3))
    else:
        path.write_bytes({"cut": content[:200], "empty": b"", "noise": b"\1" * 500}[damage])
    with pytest.raises(UserError, match=r"clip\.tokens\.npz: is damaged"):
        kept.find(tmp_path / "clip.wav")
    # It is no matter to the clips beside it.
    (tmp_path / "upload.wav").write_bytes(b"another")
    assert kept.find(tmp_path / "upload.wav", SPEC) is None
    save(tmp_path / "other.wav", b"a third")
    assert kept.find(tmp_path / "other.wav", SPEC) is not None


def test_codes_that_are_none_are_not_kept(tmp_path):
    (tmp_path / "clip.wav").write_bytes(b"a sound")
    with pytest.raises(ValueError, match="codes must lie in"):
        kept.save(tmp_path / "clip.wav", CODES_KT + 1024, SPEC)
    assert not list(tmp_path.glob("*.npz"))

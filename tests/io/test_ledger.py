"""Settings that work was begun with are kept, and others are refused by name."""

import json

import pytest

from magnet_jax.errors import UserError
from magnet_jax.io import files, ledger

SETTINGS = {"seed": 1, "decode": {"steps": (20, 10), "rate": 0.5}, "codec": None}


def test_the_same_settings_go_on(tmp_path):
    path = tmp_path / "run" / "run.json"
    assert ledger.claim(path, SETTINGS)
    before = path.read_bytes()
    assert json.loads(before)["decode"] == {"steps": [20, 10], "rate": 0.5}
    assert not ledger.claim(path, SETTINGS)
    assert not ledger.claim(path, SETTINGS | {"seed": 2}, free=["seed"])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 2}, "seed (was 1, now 2)"),
        ({"codec": "a" * 50}, f'codec (was null, now "{"a" * 36}...)'),
        ({"new": [1]}, "new (was not given, now [1])"),
        ({"decode": {"steps": [20], "rate": 0.5}}, "decode.steps (was [20, 10], now [20])"),
        ({"decode": {"steps": [20, 10]}}, "decode.rate (was 0.5, now not given)"),
        ({"decode": {}, "seed": 0, "x": 1}, "seed (was 1, now 0), x (was not given, now 1), "),
        ({"decode": {}, "seed": 0, "x": 1}, " and 1 more; "),
    ],
)
def test_other_settings_are_named_with_both_values(tmp_path, change, told):
    path = tmp_path / "run.json"
    ledger.claim(path, SETTINGS)
    with pytest.raises(UserError) as caught:
        ledger.claim(path, SETTINGS | change)
    text = str(caught.value)
    assert text.startswith(f"--out {tmp_path}: begun with other settings: ")
    assert text.endswith("; use the same, or name another --out")
    assert told in text


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "[" * 10**5, '{"seed": "\\ud8'])
def test_a_damaged_note_is_one_line(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"^--out {tmp_path}: its run.json is damaged; name anoth"):
        ledger.claim(path, SETTINGS)


def test_a_kill_leaves_no_half_note(tmp_path, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "sync", killed)
    with pytest.raises(KeyboardInterrupt):
        ledger.claim(tmp_path / "run.json", SETTINGS)
    assert not (tmp_path / "run.json").exists()
    monkeypatch.undo()
    assert ledger.claim(tmp_path / "run.json", SETTINGS)


def test_a_folder_that_cannot_be_written_or_read(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/run.json: cannot be "):
        ledger.claim(tmp_path / "file" / "run.json", SETTINGS)
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be read"):
        ledger.claim(tmp_path, SETTINGS)

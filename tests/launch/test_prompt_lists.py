"""Lists of prompts, as people have them."""

import csv
import json

import pytest
from sounds import put, tone

from launch.evaluate import prompts
from magnet_jax.errors import UserError


def table(path, *rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_musiccaps(tmp_path):
    row = {
        "ytid": "-0Gj8-vB1q4", "start_s": "30", "end_s": "40", "aspect_list": "['low quality']",
        "caption": "The low quality recording features a ballad.",
    }  # fmt: skip
    (prompt,) = prompts.read(table(tmp_path / "musiccaps.csv", row))
    assert prompt.id == "-0Gj8-vB1q4" and prompt.text == row["caption"]
    assert "[-0Gj8-vB1q4]-[30-40]" in prompt.names


def test_audiocaps_has_several_captions_a_clip(tmp_path):
    rows = [
        {"audiocap_id": i, "youtube_id": "XJba7pTbpD0", "start_time": 30, "caption": f"text {i}"}
        for i in (97151, 97152)
    ]
    found = prompts.read(table(tmp_path / "audiocaps.csv", *rows))
    assert [prompt.id for prompt in found] == ["97151", "97152"]
    assert all({"XJba7pTbpD0", "YXJba7pTbpD0"} <= set(prompt.names) for prompt in found)
    assert len(prompts.read(tmp_path / "audiocaps.csv", limit=1)) == 1


def test_plain_lists(tmp_path):
    (tmp_path / "list.txt").write_text("a waltz\n\na march\n")
    found = prompts.read(tmp_path / "list.txt")
    assert [prompt[:2] for prompt in found] == [("00000", "a waltz"), ("00001", "a march")]
    lines = [{"id": "x", "caption": "a waltz"}, {"path": "clips/y.wav", "prompt": "a march"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = prompts.read(tmp_path / "list.jsonl")
    assert [prompt[:2] for prompt in found] == [("x", "a waltz"), ("y", "a march")]
    for name in "ab":
        put(tmp_path / "real" / f"{name}.wav", tone(0.1), caption=f"a piano, {name}")
    (tmp_path / "real" / "README.txt").write_text("about the clips")
    found = prompts.read(tmp_path / "real")
    assert [prompt[:2] for prompt in found] == [("a", "a piano, a"), ("b", "a piano, b")]
    folder = tmp_path / "several"  # as launch.recipe writes them
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps({"description": ["", "a waltz", "a dance"]}))
    assert [prompt[:2] for prompt in prompts.read(folder)] == [("a", "a waltz")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,caption\nx,one\nx,two\n", "x is there twice"),
        ("a.csv", "title,caption\nx,one\n", "line 2: nothing under id, .*it has title, caption"),
        ("a.csv", "id,caption\nx,\n", "line 2: nothing under .*caption"),
        ("a.csv", "id,caption\nx,slow, sad\n", "line 2: .* a caption with commas .*double quotes"),
        ("a.csv", "id,caption\n,slow, sad\n", "line 2: 2 columns, but more cells"),
        ("a.csv", "id,caption\n,slow,\n", "line 2: nothing under id, .*it has id, caption"),
        ("a.tsv", "id\tcaption\nx\ta\tb\n", "a.tsv, line 2: .* caption with tabs"),
        ("a.csv", "id,caption\n", "no prompt in it"),
        ("a.csv", "id,caption\n../x,one\n", "cannot be the name of a file"),
        ("a.csv", f"id,caption\n{'x' * 251},one\n", "cannot be the name of a file"),
        ("a.jsonl", "{\n", "line 1: not valid JSON"),
        ("a.jsonl", "[1]\n", "line 1: expected a JSON object"),
        ("a.doc", "", "must be a folder, or end in .csv"),
        ("a.csv", 'id,caption\nx,"slow\n', "a.csv, line 2: a quote that nothing closes"),
        ("a.csv", "id,caption,caption\nx,a,b\n", "a.csv: 2 columns are called 'caption'"),
        ("a.csv", "", "a.csv: is empty; its first line should name the columns"),
        ("a.tsv", "id\tcaption\nx\tcaf\xe9\n", "a.tsv: is not UTF-8"),
        ("a.jsonl", '{"id": 1, "id": 2}\n', "line 1: not valid JSON .'id' is there twice"),
        ("a.txt", "\n", "no prompt in it"),
        ("a.txt", "caf\xe9\n", "a.txt: is not UTF-8"),
    ],
)
def test_lists_that_are_none(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        prompts.read(tmp_path / name)


def test_tables_are_read_as_for_tokenization(tmp_path):
    """Long cells, quotes that are text, lists as text, every suffix of audio, other systems."""
    long = "o" * 200_000
    rows = [
        ("a.m4a", long),
        ("clips/b.WAV", '"slow'),
        ("clips\\c.opus", 'the 12" mix'),
        ("v1.0", "['one', 'two']"),
    ]
    lines = ["file_name\ttext", *map("\t".join, rows)]
    (tmp_path / "a.tsv").write_text("\n".join(lines), encoding="utf-16")
    wanted = [("a", long), ("b", '"slow'), ("c", 'the 12" mix'), ("v1.0", "one")]
    assert [prompt[:2] for prompt in prompts.read(tmp_path / "a.tsv")] == wanted
    objects = [json.dumps({"file_name": name, "text": f"\u2028{text}"}, ensure_ascii=False)
               for name, text in rows[:3]]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n".join(objects))
    assert [prompt[:2] for prompt in prompts.read(tmp_path / "a.jsonl")] == wanted[:3]
    (tmp_path / "a.txt").write_bytes("\ufeffa\x85 waltz\r\n\r\na march".encode())
    assert [prompt.text for prompt in prompts.read(tmp_path / "a.txt")] == [
        "a\x85 waltz",
        "a march",
    ]


def test_a_folder_of_prompts_with_metadata(tmp_path):
    (tmp_path / "a.TXT").write_text("\ufeffbeside it")
    (tmp_path / "._a.json").write_bytes(b"\0\5")
    names = ("a.wav", "sub/b.flac")
    table(tmp_path / "metadata.csv", *({"file_name": name, "text": "listed"} for name in names))
    found = prompts.read(tmp_path)
    assert [prompt[:2] for prompt in found] == [("a", "beside it"), ("b", "listed")]
    assert prompts.sidecar(tmp_path / "a.wav") == "beside it"


def test_sidecars_are_utf8(tmp_path):
    (tmp_path / "a.txt").write_text("caf\xe9", encoding="latin-1")
    with pytest.raises(UserError, match="a.txt: is not UTF-8"):
        prompts.read(tmp_path)

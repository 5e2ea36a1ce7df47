"""Tables that are text: every row is there, or is named."""

import csv
import gzip
import io
import json

import pytest

from magnet_jax.errors import UserError
from tokenization.intake.audio import RejectedError
from tokenization.source.rows import read_rows


def rows_of(path, content):
    """Of each row its cells, or why it has none."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    names, rows = read_rows(path)
    return [
        (line, row.detail if isinstance(row, RejectedError) else tuple(map(row.get, names)))
        for line, row in rows
    ]


def test_what_csv_writes_is_read_back(tmp_path):
    """Separators, quotes and line breaks in cells, in each way of quoting."""
    texts = ["plain", 'a "quote"', '"', "", "a, b", "a\tb", "two\nlines", 'two\n"lines", b', " x "]
    rows = [(f"{i}.wav", text, text) for i, text in enumerate(texts)]
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
            for end in ("\n", "\r\n"):
                file = io.StringIO()
                writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end)
                writer.writerows([("path", "caption", "again"), *rows])
                found = rows_of(tmp_path / f"t.{suffix}", "\ufeff" + file.getvalue())
                assert [cells for _, cells in found] == rows, (suffix, quoting, end)


@pytest.mark.parametrize(
    ("first", "is_text"),
    [
        ('"a slow song', False),
        ('"a ""slow"" song', False),
        (' "slow', False),
        ('"', False),
        ('"a slow 12" song', True),
        ('"slow" and "sad', True),
    ],
)
@pytest.mark.parametrize("later", ["fast", '"fast"', 'a 12" remix', '"fast', 'fast"', '"a, b"'])
def test_a_quote_that_nothing_closes_takes_no_other_row_along(tmp_path, first, is_text, later):
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        lines = ["path,caption", f"a.wav,{first}", f"b.wav,{later}", "c.wav,third"]
        content = "\n".join(line.replace(",", delimiter, 1) for line in lines)
        found = rows_of(tmp_path / f"t.{suffix}", content)
        assert [line for line, _ in found] == [2, 3, 4]
        assert found[2] == (4, ("c.wav", "third"))
        if is_text or suffix == "tsv":
            assert found[0][1] == ("a.wav", first)
        else:
            assert "a quote that nothing closes" in found[0][1]


def test_quotes_within_text_are_text(tmp_path):
    content = 'path\tcaption\na.wav\t"hello" she said\nb.wav\tthe 12" mix\nc.wav\t"all of it"\n'
    found = rows_of(tmp_path / "t.tsv", content)
    captions = ['"hello" she said', 'the 12" mix', "all of it"]
    assert [cells[1] for _, cells in found] == captions
    found = rows_of(tmp_path / "t.csv", content.replace("\t", ","))
    assert [cells[1] for _, cells in found] == captions
    # a space after the separator is no part of a cell in quotes
    assert rows_of(tmp_path / "t.csv", 'a, "b, c" \nx, "y, z" \n') == [(2, ("x", "y, z"))]


def test_cells_may_be_long_and_blank_lines_are_none(tmp_path):
    long = "o" * 300_000
    content = f'path,caption\n\na.wav,{long}\n,\nb.wav,"{long}\n{long}"\n'
    found = rows_of(tmp_path / "t.csv", content)
    assert found == [(3, ("a.wav", long)), (5, ("b.wav", f"{long}\n{long}"))]
    assert csv.field_size_limit() < len(long)  # other code's csv is as it was


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_columns_of_one_name_are_refused(tmp_path, suffix):
    if suffix == "jsonl":
        found = rows_of(tmp_path / "t.jsonl", '{"a": 1, "a": 2}\n{"a": 3}\n')
        assert found == [(1, "not valid JSON ('a' is there twice)"), (2, (3,))]
        return
    content = "path,text,text\na.wav,one,two\n".replace(",", "\t" if suffix == "tsv" else ",")
    with pytest.raises(UserError, match=f"t.{suffix}: 2 columns are called 'text'"):
        rows_of(tmp_path / f"t.{suffix}", content)


def test_columns_without_a_name(tmp_path):
    """Trailing ones are a spreadsheet's; what lies there is cut off a caption."""
    found = rows_of(tmp_path / "t.csv", " path , caption,,\na.wav,slow, sad,\nb.wav,fast,,\n")
    assert found[0][0] == 2 and "2 columns, but more cells" in found[0][1]
    assert found[1:] == [(3, ("b.wav", "fast"))]


def test_encodings(tmp_path):
    text = "path\tcaption\r\nä.wav\tcafé\r\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert rows_of(tmp_path / "t.tsv", text.encode(encoding)) == [(2, ("ä.wav", "café"))]
    half = "caf\udce9"  # is found where it matters
    assert rows_of(tmp_path / "t.csv", b"path,caption\na.wav,caf\xe9\n") == [(2, ("a.wav", half))]
    with pytest.raises(UserError, match="t.csv: is no text; save it as UTF-8"):
        rows_of(tmp_path / "t.csv", text.encode("utf-16-le"))
    with pytest.raises(UserError, match="t.csv: is not utf-16"):
        rows_of(tmp_path / "t.csv", text.encode("utf-16") + b"x")
    with pytest.raises(UserError, match="t.csv: is empty; its first line should name"):
        rows_of(tmp_path / "t.csv", "\n\n")
    with pytest.raises(UserError, match="t.csv, line 1: names of columns are not UTF-8"):
        rows_of(tmp_path / "t.csv", b"path,caf\xe9\na.wav,x\n")
    with pytest.raises(UserError, match="t.csv, line 1: a quote that nothing closes"):
        rows_of(tmp_path / "t.csv", '"path,caption\n')


def test_json_lines(tmp_path):
    lines = ['\ufeff{"a": "\u2028"}', "", '{"b": NaN, "a": 1}', "[1]", '{"a": ', "[" * 10**5]
    content = "\n".join(lines)
    for suffix, data in (
        ("jsonl", content.encode()),
        ("jsonl.gz", gzip.compress(content.encode())),
    ):
        found = rows_of(tmp_path / f"t.{suffix}", data)
        assert found[0] == (1, ("\u2028", None)) and found[1][0] == 3
        assert [line for line, _ in found] == [1, 3, 4, 5, 6]
        assert found[2][1] == "expected a JSON object"
        assert all("not valid JSON" in detail for _, detail in found[3:])
    cut = gzip.compress(json.dumps({"a": 1}).encode() + b"\n")[:-6]
    with pytest.raises(UserError, match="t.jsonl.gz: damaged after line 1"):
        rows_of(tmp_path / "t.jsonl.gz", cut)

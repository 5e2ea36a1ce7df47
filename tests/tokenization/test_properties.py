"""What holds for any input: cuts, splits, paths, captions, and where another file begins."""

import io
import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from magnet_jax.io import formats
from tokenization.intake.audio import RejectedError
from tokenization.maker import cut
from tokenization.source import captions
from tokenization.source.paths import Root, is_below
from tokenization.source.settings import Columns
from tokenization.units import split_of


@given(frames=st.integers(1, 10_000), most=st.integers(1, 3000))
def test_cuts_are_even(frames, most):
    pieces = cut(frames, most)
    assert pieces[0][0] == 0 and pieces[-1][1] == frames
    assert all(end == first for (_, end), (first, _) in pairwise(pieces))
    lengths = [end - first for first, end in pieces]
    assert min(lengths) >= 1 and max(lengths) <= most and len(set(lengths[:-1])) <= 1
    assert len(pieces) <= -(-frames // most)


@given(name=st.text(), percents=st.lists(st.floats(0, 100), min_size=2))
def test_what_is_for_validation_stays_so_where_more_is(name, percents):
    splits = [split_of(name, percent) for percent in sorted(percents)]
    assert splits == sorted(splits) and split_of(name, 0) == "train"


PIECES = st.sampled_from(
    ["..", ".", "a", "out", "/", "~", "", "\0", "\udcff", "é", " ", "\\", "x" * 300]
)


@given(pieces=st.lists(PIECES | st.text(max_size=5), min_size=1, max_size=8))
def test_no_path_leads_out_of_a_folder(pieces, tmp_path_factory):
    base = tmp_path_factory.getbasetemp() / "paths"
    if not base.exists():
        (base / "music" / "a").mkdir(parents=True)
        (base / "music" / "out").symlink_to(base)
        (base / "music" / "loop").symlink_to("loop")
    root = Root(base / "music")
    try:
        found = root.resolve("/".join(pieces))
    except RejectedError as error:
        assert error.reason in ("outside the folder", "bad name")
    else:
        assert is_below(found, root.real) and not found.startswith(f"{root.real}/out/")


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("description"), inner),
)


@given(content=st.binary() | st.text().map(str.encode) | JSON.map(lambda v: json.dumps(v).encode()))
def test_any_file_beside_a_track_is_a_caption_or_a_reject(content):
    for read in (captions.read_json, captions.read_text):
        try:
            found, fields = read(content, "a", Columns())
        except RejectedError as error:
            assert error.reason == "no caption" and "\n" not in error.detail
        else:
            assert found and all(text.strip() for text in found)
            assert isinstance(json.loads(fields), dict)


BEGINNINGS = [
    b"fLaC\0\0\0\x22", b"RIFF1234WAVE", b"FORM1234AIFF", b"caff\0\x01\0\0",
    b"OggS\0\x02" + bytes(8), b"\0\0\0 ftypM4A ", b"\xff\xfb\x90\0" + bytes(16) + b"Xing\0\0\0\x0f",
]  # fmt: skip
ALMOST = [b"RIFF", b"RIFF1234", b"OggS\0\0", b"fLaCfLaC", b"ID3", b"RIFFORM", b"ftyp", b"wvpk"]


@given(st.lists(st.sampled_from([*BEGINNINGS, *ALMOST]) | st.binary(max_size=40), max_size=12))
def test_another_file_is_found_where_it_begins(parts):
    data = b"".join(parts)
    starts = [
        match.start()
        for word, pattern in formats._BEGINNINGS.items()
        for match in pattern.finditer(data)
        if word != b"ID3"
    ]
    assert formats._next_file(io.BytesIO(data), 0, len(data)) == min(starts, default=None)

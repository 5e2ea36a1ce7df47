"""Files with other samples in places: all other samples, and all else in them, as they were."""

import io
import shutil
import struct
import subprocess

import numpy as np
import pytest
import soundfile
from sounds import tone

from magnet_jax.errors import UserError
from magnet_jax.io import audio, exact, formats

SUBTYPES = ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")
RATE = 16_000


def put(path, subtype="PCM_16", channels=2, rate=RATE, seconds=0.5, **how):
    """Noise in all bits."""
    how = {"format": "AIFF"} | how if path.suffix == ".aif" else how
    wav_NC = np.random.default_rng(0).normal(size=(round(seconds * rate), channels)) / 4
    soundfile.write(path, wav_NC.clip(-1, 0.999), rate, subtype, **how)
    return path


def changed(source, first, end):
    samples_NC = source.samples_NC.copy()
    samples_NC[first:end] = samples_NC[first:end][::-1]
    return samples_NC


def raw(path):
    """Samples as another reader has them: integers as they are, floats bit for bit."""
    with soundfile.SoundFile(path) as file:
        dtype = {"FLOAT": "float32", "DOUBLE": "float64"}.get(file.subtype, "int32")
        return file.read(dtype=dtype, always_2d=True)


def chunks(path):
    """Names and contents of a RIFF file's chunks, in order."""
    content, at, found = path.read_bytes(), 12, []
    order = ">" if content[:4] in (b"RIFX", b"FORM") else "<"
    size = struct.unpack(f"{order}I", content[4:8])[0]
    assert size in (len(content) - 8, 2**32 - 1)
    while at < len(content):
        name, size = struct.unpack_from(f"{order}4sI", content, at)
        size = min(size, len(content) - at - 8) if size == 2**32 - 1 else size
        assert at + 8 + size <= len(content)
        found.append((name, content[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    return found


# --- samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize("subtype", [*SUBTYPES, "PCM_S8"])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.wav", {}),
        ("a.wav", {"format": "WAVEX"}),
        ("a.wav", {"format": "RF64"}),
        ("a.wav", {"endian": "BIG"}),
        ("a.aiff", {}),
        ("a.aif", {"endian": "LITTLE"}),
        ("a.flac", {}),
        ("a.w64", {}),
        ("a.caf", {}),
        ("a.au", {}),
    ],
)
def test_other_samples_stay(tmp_path, name, how, subtype):
    kind = how.get("format", {"aif": "AIFF"}.get(name[2:], name[2:].upper()))
    if not soundfile.check_format(kind, subtype, how.get("endian")):
        return
    try:
        path = put(tmp_path / name, subtype, **how)
    except soundfile.LibsndfileError:
        return  # (no big-endian floats in some)
    source = exact.read(path)
    assert (source.subtype, source.sample_rate, source.lossy) == (subtype, RATE, False)
    np.testing.assert_array_equal(source.samples_NC, raw(path))
    new_NC = changed(source, 100, 300)
    exact.write(tmp_path / f"b{path.suffix}", source, new_NC)
    found_NC = raw(tmp_path / f"b{path.suffix}")
    np.testing.assert_array_equal(found_NC, new_NC)
    assert (found_NC[100:300] != source.samples_NC[100:300]).any()
    with soundfile.SoundFile(path) as old, soundfile.SoundFile(tmp_path / f"b{path.suffix}") as new:
        assert (old.format, old.subtype, old.endian) == (new.format, new.subtype, new.endian)
    if path.suffix in (".wav", ".aiff", ".aif"):
        before, after = path.read_bytes(), (tmp_path / f"b{path.suffix}").read_bytes()
        assert len(before) == len(after)
        width = (
            np.dtype(source.samples_NC.dtype).itemsize
            if not source.step
            else exact.BITS[subtype] // 8
        )
        differ = np.flatnonzero(np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8))
        differ = differ[differ > len(before) - source.samples_NC.size * width - 200]
        assert np.ptp(differ) < 200 * 2 * width

    exact.write(path, source, source.samples_NC)  # nothing changed, in place
    if path.suffix in (".wav", ".aiff", ".aif"):
        assert path.read_bytes() == before
    np.testing.assert_array_equal(raw(path), source.samples_NC)


@pytest.mark.parametrize(("channels", "rate"), [(1, 8000), (2, 96_000), (6, 44_100)])
def test_any_rate_and_channels(tmp_path, channels, rate):
    source = exact.read(put(tmp_path / "a.wav", channels=channels, rate=rate))
    assert source.samples_NC.shape == (rate // 2, channels) and source.sample_rate == rate
    for name in ("b.wav", "b.flac", "b.aiff"):
        exact.write(tmp_path / name, source, changed(source, 5, 50))
        np.testing.assert_array_equal(raw(tmp_path / name), changed(source, 5, 50))
        assert soundfile.info(tmp_path / name).samplerate == rate


@pytest.mark.parametrize("subtype", [*SUBTYPES, "PCM_S8"])
def test_floats_become_the_numbers_that_libsndfile_writes(subtype):
    """To the last bit, at ties and beyond full scale too."""
    rng = np.random.default_rng(0)
    steps = np.arange(-300, 300) / 2**16
    wav_N = np.concatenate([rng.normal(size=20_000), steps, [1, -1, 1.5, 0.9999999]])
    wav_CN = wav_N[None].astype(np.float32)
    kind = "AIFF" if subtype == "PCM_S8" else "WAV"
    content = audio.encoded("x", wav_CN, RATE, format=kind, subtype=subtype)
    dtype = {"FLOAT": "float32", "DOUBLE": "float64"}.get(subtype, "int32")
    expected_NC, _ = soundfile.read(io.BytesIO(content), dtype=dtype, always_2d=True)
    found_NC = exact.as_written(wav_CN.T.clip(-1, 1), subtype)
    np.testing.assert_array_equal(found_NC, expected_NC)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32"])
def test_the_nearest_number(subtype):
    wav_NC = np.random.default_rng(0).uniform(-1.1, 1.1, (5000, 1))
    found_NC = exact.as_written(wav_NC, subtype, nearest=True) / 2.0**31
    step = 2.0 ** (1 - exact.BITS[subtype])
    inside = np.abs(wav_NC) < 1 - step
    assert np.abs(found_NC - wav_NC)[inside].max() <= step / 2 + 2**-32
    assert found_NC.max() == 1 - step and found_NC.min() == -1


# --- kinds of files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subtype", "name", "match"),
    [
        ("FLOAT", "b.flac", "must end in .wav or .aiff"),
        ("PCM_32", "b.flac", "must end in .wav or .aiff"),
        ("PCM_16", "b.mp3", "must end in .wav or .flac or .aiff"),
        ("PCM_16", "b", "must end in"),
    ],
)
def test_a_name_that_cannot_hold_the_samples_is_refused(tmp_path, subtype, name, match):
    source = exact.read(put(tmp_path / "a.wav", subtype))
    with pytest.raises(UserError, match=match):
        exact.write(tmp_path / name, source, source.samples_NC)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("kind", ["FLAC", "WAV", "AIFF"])
def test_a_name_that_lies(tmp_path, kind):
    """The file is read as what it is, and what is written can be read."""
    for name in ("a.wav", "a.flac", "a.aiff"):
        path = put(tmp_path / name, format=kind)
        source = exact.read(path)
        exact.write(tmp_path / f"b{path.suffix}", source, changed(source, 5, 50))
        np.testing.assert_array_equal(raw(tmp_path / f"b{path.suffix}"), changed(source, 5, 50))


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24"])
def test_from_one_kind_to_another(tmp_path, subtype):
    source = exact.read(put(tmp_path / "a.wav", subtype))
    for name in ("b.flac", "b.aif", "b.wav"):
        exact.write(tmp_path / name, source, source.samples_NC)
        np.testing.assert_array_equal(raw(tmp_path / name), source.samples_NC)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.mp3", {"format": "MP3", "subtype": "MPEG_LAYER_III"}),
        ("a.ogg", {"format": "OGG", "subtype": "VORBIS"}),
        ("a.wav", {"format": "WAV", "subtype": "ULAW"}),
    ],
)
def test_lossy_files_are_what_they_decode_to(tmp_path, name, how):
    soundfile.write(tmp_path / name, tone(1.0, channels=2), RATE, **how)
    source = exact.read(tmp_path / name)
    assert source.lossy and source.subtype == "PCM_24"
    wav_CN, _ = formats.read_whole(str(tmp_path / name))
    np.testing.assert_allclose(source.as_float().T, wav_CN, atol=2**-23)
    for good in ("b.wav", "b.flac"):
        exact.write(tmp_path / good, source, source.samples_NC)
        np.testing.assert_array_equal(raw(tmp_path / good), source.samples_NC)
    for bad in ("b.mp3", "b.ogg", "b.aiff"):
        with pytest.raises(UserError, match="decoded .* must end in .wav or .flac"):
            exact.write(tmp_path / bad, source, source.samples_NC)


def test_a_file_that_changed_meanwhile_is_left_alone(tmp_path):
    path = put(tmp_path / "a.wav")
    source = exact.read(path)
    put(path, channels=1)
    content = path.read_bytes()
    with pytest.raises(UserError, match=r"a\.wav: was changed since"):
        exact.write(path, source, changed(source, 1, 9))
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("sample", [np.nan, -np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path, sample):
    soundfile.write(tmp_path / "a.wav", np.r_[np.zeros(99), sample], RATE, "FLOAT")
    with pytest.raises(UserError, match="a.wav: holds NaN or infinite samples"):
        exact.read(tmp_path / "a.wav")


def test_floats_beyond_full_scale_stay(tmp_path):
    wav_NC = 7 * np.random.default_rng(0).normal(size=(4000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wav_NC, RATE, "FLOAT")
    source = exact.read(tmp_path / "a.wav")
    exact.write(tmp_path / "b.wav", source, changed(source, 9, 70))
    np.testing.assert_array_equal(raw(tmp_path / "b.wav"), changed(source, 9, 70))
    assert np.abs(source.as_float()).max() > 20


def test_what_is_no_sound_or_cut_off_is_refused(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF" + bytes(50))
    path = put(tmp_path / "b.wav")
    path.write_bytes(path.read_bytes()[:9000])
    for name in ("a.wav", "b.wav", "none.wav"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read"):
            exact.read(tmp_path / name)


# --- what files hold beside samples ---------------------------------------------------------------


def with_chunks(path, subtype="PCM_16", order="<"):
    """A WAV with chunks before and behind its samples, one of an odd size."""
    put(path, subtype, channels=1, endian="BIG" if order == ">" else "FILE")
    head = path.read_bytes()

    def chunk(name, data):
        return struct.pack(f"{order}4sI", name, len(data)) + data + b"\0" * (len(data) % 2)

    bext = bytearray(602)
    struct.pack_into("<Q", bext, 338, 5000)
    point = struct.pack(f"{order}II4sIII", 1, 300, b"data", 0, 0, 300)
    loop = struct.pack(f"{order}6I", 0, 0, 1000, 2000, 0, 0)
    before = chunk(b"odd ", b"12345")
    if order == "<":  # libsndfile forgets the order of bytes at one, and at cue
        before = chunk(b"bext", bytes(bext)) + before
    after = b"".join(
        chunk(*pair)
        for pair in (
            *[(b"cue ", struct.pack(f"{order}I", 1) + point)] * (order == "<"),
            (b"smpl", struct.pack(f"{order}9I", 0, 0, 0, 60, 0, 0, 0, 1, 0) + loop),
            (b"acid", bytes(range(24))),
            (b"LIST", b"INFOINAM\x04\0\0\0name"),
            (b"MD5 ", bytes(16)),
            (b"what", b"ever"),
        )
    )
    content = head[:12] + before + head[12:] + after
    path.write_bytes(content[:4] + struct.pack(f"{order}I", len(content) - 8) + content[8:])
    return path


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_chunks_of_a_wav_stay(tmp_path, subtype, order):
    path = with_chunks(tmp_path / "a.wav", subtype, order)
    source = exact.read(path)
    new_NC = changed(source, 10, 400)
    new_NC[200] = 0.999 if subtype == "FLOAT" else 2**31 - 2**16
    exact.write(tmp_path / "b.wav", source, new_NC)
    before, after = chunks(path), dict(chunks(tmp_path / "b.wav"))
    assert [name for name, _ in before if name != b"MD5 "] == list(after)
    for name, data in before:
        if name == b"PEAK":
            assert struct.unpack(f"{order}fI", after[name][8:]) == (np.float32(0.999), 200)
        elif name not in (b"data", b"MD5 "):
            assert after[name] == data
    np.testing.assert_array_equal(raw(tmp_path / "b.wav"), new_NC)
    exact.write(path, source, source.samples_NC)
    assert chunks(path) == before  # with the check sum, which is still true


@pytest.mark.parametrize("order", ["<", ">"])
def test_places_follow_what_comes_before(tmp_path, order):
    path = with_chunks(tmp_path / "a.wav", "FLOAT", order)
    source = exact.read(path)
    new_NC = np.concatenate(
        [np.zeros((777, 1), np.float32), source.samples_NC, np.ones((3, 1), np.float32)]
    )
    exact.write(tmp_path / "b.wav", source, new_NC, before=777)
    np.testing.assert_array_equal(raw(tmp_path / "b.wav"), new_NC)
    before, after = dict(chunks(path)), dict(chunks(tmp_path / "b.wav"))
    assert set(before) - set(after) == {b"acid", b"MD5 "}
    assert struct.unpack(f"{order}6I", after[b"smpl"][36:])[2:4] == (1777, 2777)
    if order == "<":
        assert struct.unpack("<7I", after[b"cue "])[2::4] == (1077, 1077)
        assert struct.unpack_from("<Q", after[b"bext"], 338)[0] == 5000 - 777
    assert struct.unpack(f"{order}I", after[b"fact"])[0] == len(new_NC)
    for name in (b"LIST", b"what", b"odd ", b"fmt "):
        assert after[name] == before[name]


@pytest.mark.parametrize("kind", [b"RF64", b"BW64"])
def test_a_longer_rf64(tmp_path, kind):
    path = put(tmp_path / "a.wav", format="RF64")
    path.write_bytes(kind + path.read_bytes()[4:])
    source = exact.read(path)
    assert not source.lossy
    new_NC = np.concatenate([source.samples_NC, source.samples_NC])
    exact.write(tmp_path / "b.wav", source, new_NC)
    np.testing.assert_array_equal(exact.read(tmp_path / "b.wav").samples_NC, new_NC)
    size = (tmp_path / "b.wav").stat().st_size
    sizes = struct.unpack("<3Q", dict(chunks(tmp_path / "b.wav"))[b"ds64"][:24])
    assert sizes == (size - 8, 4 * len(new_NC), len(new_NC))


def test_a_longer_aiff_with_marks(tmp_path):
    path = put(tmp_path / "a.aiff", channels=1)
    marks = struct.pack(">HHIB3sHIB4sx", 2, 1, 100, 3, b"one", 2, 200, 4, b"next")
    content = path.read_bytes() + b"MARK" + struct.pack(">I", len(marks)) + marks
    path.write_bytes(content[:4] + struct.pack(">I", len(content) - 8) + content[8:])
    source = exact.read(path)
    new_NC = np.concatenate([source.samples_NC[:50], source.samples_NC])
    exact.write(tmp_path / "b.aiff", source, new_NC, before=50)
    np.testing.assert_array_equal(raw(tmp_path / "b.aiff"), new_NC)
    found = dict(chunks(tmp_path / "b.aiff"))[b"MARK"]
    expected = struct.pack(">HHIB3sHIB4sx", 2, 1, 150, 3, b"one", 2, 250, 4, b"next")
    assert found == expected


@pytest.mark.skipif(not shutil.which("sox"), reason="sox reads files by itself")
def test_another_program_reads_them(tmp_path):
    source = exact.read(with_chunks(tmp_path / "a.wav"))
    new_NC = np.concatenate([changed(source, 10, 400), source.samples_NC])
    exact.write(tmp_path / "b.wav", source, new_NC)
    words = ["sox", "-D", tmp_path / "b.wav", "-t", "s32", "-"]
    heard = subprocess.run(words, capture_output=True, check=True)
    np.testing.assert_array_equal(np.frombuffer(heard.stdout, "<i4"), new_NC[:, 0])
    assert not heard.stderr


def test_tags_and_pictures_of_a_flac_stay(tmp_path):
    path = put(tmp_path / "a.flac")
    blocks, sound = exact._flac_blocks(path.read_bytes())
    tags = struct.pack("<I", 2) + b"me" + struct.pack("<II", 1, 7) + b"TITLE=x"
    picture = struct.pack(">II9sI5I4s", 3, 9, b"image/png", 0, 1, 1, 24, 0, 4, b"\x89PNG")
    more = [blocks[0], (4, tags), (6, picture), (2, b"abcd")]
    heads = [bytes([k | 128 * (k == 2)]) + len(d).to_bytes(3) + d for k, d in more]
    path.write_bytes(b"fLaC" + b"".join(heads) + sound)
    source = exact.read(path)
    exact.write(path, source, changed(source, 10, 400))
    np.testing.assert_array_equal(raw(path), changed(source, 10, 400))
    assert exact._flac_blocks(path.read_bytes())[0][-3:] == more[1:]
    with soundfile.SoundFile(path) as file:
        assert file.title == "x"

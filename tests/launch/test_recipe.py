"""The data recipe: tunes that are the same, draws, rendering that may be killed."""

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from launch.recipe import clips as clips_of
from launch.recipe import cook
from launch.recipe import tunes as scores
from launch.recipe.clips import INSTRUMENTS, SELECTIONS
from launch.recipe.cook import Recipe
from launch.recipe.tunes import Collection, Note, Tune
from magnet_jax.errors import UserError

SOUNDFONT = Recipe(out=Path()).soundfont

needs_fluidsynth = pytest.mark.skipif(
    shutil.which("fluidsynth") is None or not SOUNDFONT.is_file(),
    reason="needs FluidSynth and its sound font: apt install fluidsynth fluid-soundfont-gm",
)


def music21():
    return pytest.importorskip("music21", reason='needs music21: pip install -e ".[recipe]"')


def needs_midi():
    pytest.importorskip("pretty_midi", reason='needs pretty_midi: pip install -e ".[recipe]"')


def tune(number, *, voices=1, notes=96, title=None, steps=None, start=64, length=0.5, **fields):
    rng = np.random.default_rng(number)
    steps = rng.integers(-4, 5, notes) if steps is None else steps
    # (a random walk within an octave)
    pitches = start + np.abs((np.cumsum(steps) + 12) % 24 - 12) - 6
    parts = [
        [
            Note(length * i, length, int(pitch) - 5 * voice, 1.0 if i % 8 == 0 else 0.25)
            for i, pitch in enumerate(pitches)
        ]
        for voice in range(voices)
    ]
    fields = {
        "composer": None,
        "genre": "folk",
        "form": "reel",
        "tonic": 2,
        "minor": False,
    } | fields
    return Tune(
        id=f"made/{number}", title=title or f"number {number}", time_signature="4/4", beat=1.0,
        bars=[4.0 * bar for bar in range(int(length * notes / 4))], parts=parts, **fields,
    )  # fmt: skip


def tunes(count=60):
    return [tune(i, voices=1 + 3 * (i % 2)) for i in range(count)]


def drawn(count, part="all", split="train", seed=0, music=None):
    music = clips_of.Repertoire(music or tunes())
    return [clips_of.draw_clip(music, SELECTIONS[part], split, i, seed, 20.0) for i in range(count)]


def shifted(one, semitones, stretch=1.0, keep=None, **changes):
    parts = [
        [n._replace(pitch=n.pitch + semitones, start=n.start * stretch) for n in part[:keep]]
        for part in one.parts
    ]
    return replace(one, parts=parts, **changes)


def test_the_same_tune_is_found_in_any_key_and_rhythm():
    one, other = tune(1), tune(2)
    same = shifted(one, 5, 2.0, id="elsewhere/1", title="another name")
    part = shifted(one, -3, keep=40, id="elsewhere/2", title="a part of it")
    assert scores.group([one, other, same, part]) == ["elsewhere/1", "made/2", *["elsewhere/1"] * 2]


def test_titles_and_works_join_tunes():
    a = tune(1, title="The Enchanted Valley -- Reel")
    b = tune(2, title="Enchanted Valley, The")
    c, d = (replace(tune(i), id=f"haydn/opus1/movement{i}", composer="Haydn") for i in (3, 4))
    e, f = tune(5, title="A Jig"), tune(6, title="The Jig")
    assert scores.group([a, b, c, d, e, f]) == [
        "made/1", "made/1", "haydn/opus1/movement3", "haydn/opus1/movement3", "made/5", "made/6",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "reserved"),
    [
        ("X:1\nT:Reel\nZ:Transcribed by someone\nK:D\nABc", None),
        ("%% GNU General Public License", "License"),
        ("!!!YEM: Rights to all derivative electronic formats reserved.", "Rights"),
        ("!!!YEM: Rights to all derivative\n!!!YEM: works are kept", "Rights"),
        ("%% This electronic edition is the property of its maker", "electronic edition"),
        ("<words>Refer to the licensing agreement</words>", "licensing"),
        ("<words>Printed by permission</words>", "permission"),
        ("<rights>Copyright ©</rights>", "Copyright"),
        ("<words>PDF © 2004 Margaret Greentree</words>", None),
        ("<p>PDF ©2004 Margaret Greentree</p>\n<p>used by permission</p>", None),
        ("<words>UT ORPHEUS EDlZ!ONI 2003</words>", "EDl"),
    ],
)
def test_what_a_file_says_about_rights(tmp_path, text, reserved):
    path = tmp_path / "tune.abc"
    path.write_text(text)
    found = scores.rights_reserved(path)
    assert found is None if reserved is None else found.startswith(reserved)


def test_splits_have_their_shares_and_stay():
    splits = [clips_of.split_of(f"tune {i}", 5, 10) for i in range(4000)]
    assert 130 < splits.count("valid") < 270 and 320 < splits.count("test") < 480
    smaller = [clips_of.split_of(f"tune {i}", 5, 5) for i in range(4000)]
    assert all(b == "test" for a, b in zip(smaller, splits) if a == "test")


def test_draws_hang_on_seed_and_number_alone():
    one, again, other = (drawn(4, seed=seed)[3] for seed in (0, 0, 1))
    assert one == again != other
    settings = Recipe(out=Path(), hours=0.3, valid_percent=20, test_percent=20)
    groups = [t.id for t in tunes()]
    few, _ = cook.plan(tunes(), groups, settings)
    many, members = cook.plan(tunes(), groups, replace(settings, hours=0.6))
    assert {c.name for c in few} < {c.name for c in many}
    assert sum(c.seconds for c in many) / 3600 == pytest.approx(0.6, abs=0.02)
    assert not members["train"] & members["test"] and not members["train"] & members["valid"]
    for clip in many:
        assert clip.tune in members[clip.split]


def test_a_clip_is_what_its_captions_say():
    count = 3 * len(INSTRUMENTS)
    clips = drawn(count)
    for i in range(0, count, len(INSTRUMENTS)):
        assert len({c.instrument.name for c in clips[i : i + len(INSTRUMENTS)]}) == len(INSTRUMENTS)
    for clip in clips:
        instrument, about = clip.instrument, clip.about
        notes = [note for part in clip.parts for note in part]
        assert all(instrument.low <= pitch <= instrument.high for _, _, pitch, _ in notes)
        assert max(start for start, *_ in notes) < clip.seconds <= 20
        captions = about["description"]
        assert len(set(captions)) == 3
        words = (*instrument.names, instrument.name)
        assert all(any(word in text.lower() for word in words) for text in captions)
        low, high = clips_of.SPEEDS[about["speed"]]
        starts = sorted(start for start, *_ in clip.parts[0])
        assert 0.9 * low < 1 / np.median(np.diff(starts)) < 1.1 * high
        # all voices move by the same interval, which is what the key moves by
        original = next(t for t in tunes() if t.id == clip.tune)
        pitches = {note.pitch % 12 for part in original.parts for note in part}
        keys = clips_of._MINOR_KEYS if original.minor else clips_of._MAJOR_KEYS
        shift = keys.index(about["key"].rpartition(" ")[0]) - original.tonic
        assert {p % 12 for _, _, p, _ in notes} <= {(p + shift) % 12 for p in pitches}
        assert (len(clip.parts) > 1) <= (instrument.several_voices > 0)


def test_solos_are_melodies_in_all_keys_and_every_caption_says_which():
    clips = drawn(168, "solo", music=[tune(i) for i in range(30)])
    for clip in clips:
        (notes,), about = clip.parts, clip.about
        assert all(a[0] < b[0] for a, b in itertools.pairwise(notes))
        for text in about["description"]:
            assert f" in {about['key']}" in text
            assert re.search(rf"\b{about['speed']}\b", text.lower())
            assert any(name in text.lower() for name in clip.instrument.names)
    played = {clip.instrument.name for clip in clips}
    assert played == {"piano", "guitar", "violin", "cello", "harp", "flute", "synth"}
    assert len({clip.about["key"] for clip in clips}) == 12


def test_solos_need_melodies_and_keep_the_splits_of_the_whole():
    settings = Recipe(out=Path(), hours=0.3, valid_percent=20, test_percent=20)
    groups = [t.id for t in tunes()]
    _, members = cook.plan(tunes(), groups, settings)
    clips, solo = cook.plan(tunes(), groups, replace(settings, part="solo"))
    assert all(solo[split] < members[split] for split in clips_of.SPLITS)
    assert all(len(clip.parts) == 1 for clip in clips)
    chords = [tune(i, voices=2) for i in range(30)]
    with pytest.raises(UserError, match="of 30 tunes none fell to train"):
        cook.plan(chords, [t.id for t in chords], replace(settings, part="solo"))


def test_articles_are_right_in_every_caption():
    words = {
        "form": {c.form for c in scores.COLLECTIONS} | {*scores._FORMS, "piece"},
        "genre": {c.genre for c in scores.COLLECTIONS},
        "mood": {mood for moods in clips_of._MOODS.values() for mood in moods},
        "speed": set(clips_of.SPEEDS),
        "instrument": {name for instrument in INSTRUMENTS for name in instrument.names},
        "played": {instrument.played for instrument in INSTRUMENTS},
        "key": {"A major"},
    }
    for selection in SELECTIONS.values():
        for template in {*selection.melody_captions, *selection.voices_captions}:
            # (words that neither begin the text nor follow an article do not matter)
            slots = re.findall(r"(?:^|\ba )\{(\w+)\}", template)
            few = {slot: found if slot in slots else {min(found)} for slot, found in words.items()}
            for chosen in itertools.product(*few.values()):
                text = clips_of._filled(template, **dict(zip(few, chosen)))
                assert text[0].isupper() and "{" not in text
                assert not re.search(r"\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiouAEIOU]", text), text
    air = clips_of._filled("a {form} for {instrument}", form="Irish tune", instrument="organ")
    assert air == "An Irish tune for organ"


def test_no_tune_that_suits_is_an_error():
    wide = tune(1)
    wide = replace(wide, parts=[[n._replace(pitch=20 + 90 * (i % 2)) for i, n in
                                 enumerate(wide.parts[0])]])  # fmt: skip
    with pytest.raises(UserError, match="no tune of the train split suits the"):
        drawn(1, music=[wide])


# A tone of 12 s, whose pitch hangs on the MIDI file; fails after `limit` of them.
STAND_IN = """#!{python} -IS
import array, math, sys, wave, zlib
if {limit} is not None:
    with open({count!r}, "a+") as file:
        file.write("x"); file.seek(0)
        if len(file.read()) > {limit}:
            sys.exit("fluidsynth: error: out of strings")
words = sys.argv
rate = int(words[words.index("-r") + 1])
with open(words[-1], "rb") as file:
    step = (200 + zlib.crc32(file.read()) % 800) * math.tau / rate
cycle = [round(2**14 * math.sin(step * i)) for i in range(rate)]
with wave.open(words[words.index("-F") + 1], "wb") as file:
    file.setnchannels(1); file.setsampwidth(2); file.setframerate(rate)
    file.writeframes(array.array("h", cycle * 12).tobytes())
"""


@pytest.fixture
def kitchen(tmp_path, monkeypatch):
    """Settings for a small data set of made-up tunes, with sines for instruments."""
    needs_midi()
    collection = Collection(files="made.abc", source="made up", form="reel", genre="folk")
    monkeypatch.setattr(scores, "COLLECTIONS", (collection,))
    monkeypatch.setattr(scores, "corpus_folder", lambda: tmp_path)
    monkeypatch.setattr(scores, "corpus_files", lambda corpus: {"made.abc": collection})
    monkeypatch.setattr(cook, "version", lambda name: "1")
    (tmp_path / "kept").mkdir()
    kept = {"version": scores.VERSION, "skipped": ["made#9: no music"]}
    kept["tunes"] = [vars(t) for t in tunes()]
    (tmp_path / "kept" / "made.abc.json").write_text(json.dumps(kept))
    (tmp_path / "font.sf2").write_bytes(b"no font")

    def settings(out, limit=None):
        program = tmp_path / f"synth_{limit}"
        count = str(tmp_path / "count")
        program.write_text(STAND_IN.format(python=sys.executable, limit=limit, count=count))
        program.chmod(0o755)
        return Recipe(
            out=tmp_path / out, hours=0.01, max_seconds=12, valid_percent=20, test_percent=20,
            workers=1, synthesizer=str(program), soundfont=tmp_path / "font.sf2",
            scores=tmp_path / "kept",
        )  # fmt: skip

    return settings


def content(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }  # fmt: skip


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(kitchen):
    with pytest.raises(UserError, match="synth_2: failed .fluidsynth: error: out of strings"):
        cook.cook(kitchen("one", limit=2))
    half = content(kitchen("one").out)
    assert sum(name.endswith(".flac") for name in half) == 2 and "README.md" not in half
    # what a kill may leave behind
    (kitchen("one").out / "train" / ".000009.flac.tmp").write_bytes(b"half")
    cook.cook(kitchen("one"))
    summary = cook.cook(kitchen("two"))
    assert content(kitchen("one").out) == content(kitchen("two").out)

    found = content(kitchen("two").out)
    audio = [name for name in found if name.endswith(".flac")]
    assert f"{len(audio)} clips" in summary and {n.split("/")[0] for n in audio} == set(
        clips_of.SPLITS
    )
    for name in audio:
        wav, rate = soundfile.read(kitchen("two").out / name)
        assert rate == 16_000 and wav.ndim == 1 and 6 <= len(wav) / rate <= 12
        assert 0.06 < np.sqrt(np.mean(wav**2)) < 0.15 and np.abs(wav).max() < 1
        about = json.loads(found[name.replace(".flac", ".json")])
        assert len(about["description"]) == 3 and "bpm" in about and "artist" not in about
        notes = np.loadtxt(kitchen("two").out / name.replace(".flac", ".notes"))
        assert (notes[:, 0] < notes[:, 1]).all() and notes.max(0)[1] <= len(wav) / rate
    card = found["README.md"].decode()
    assert "| train |" in card and "1 tunes because" in card
    assert "MIT" not in card and "font.sf2 is under whatever licence" in card


def test_a_synthesizer_that_hangs_or_stops_short_is_named(kitchen, tmp_path, monkeypatch):
    settings, program = kitchen("one"), tmp_path / "hung"
    program.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    program.chmod(0o755)
    monkeypatch.setattr(cook, "_RENDER_SECONDS", 0.5)
    with pytest.raises(UserError, match="--synthesizer .*hung: did not end within 0.5 s"):
        cook.cook(replace(settings, synthesizer=str(program)))
    monkeypatch.undo()


def test_the_card_has_the_command_that_makes_the_clips():
    plain = Recipe(out=Path("a"))
    assert cook._command(plain) == "python -m launch.recipe --hours 20 --seed 0"
    other = replace(plain, hours=0.5, test_percent=7.5, soundfont=Path("my font.sf2"))
    assert cook._command(other) == (
        "python -m launch.recipe --hours 0.5 --seed 0 --test-percent 7.5 --soundfont 'my font.sf2'"
    )


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_a_run_that_is_killed(how):
    words = (
        "import time; from magnet_jax import errors; from launch.recipe import cook; "
        "errors.stop_when_terminated(); cook._each(time.sleep, [(1,), (300,)], 2, 'nap')"
    )
    if how == signal.SIGTERM:  # (which lets workers finish what they are at)
        words = words.replace("300", "2")
    run = subprocess.Popen([sys.executable, "-c", words], stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")

    def workers():
        lines = [Path(f"/proc/{pid}/cmdline") for pid in children.read_text().split()]
        return [line.parent for line in lines if b"spawn_main" in line.read_bytes()]

    try:
        wait_until(lambda: len(workers()) == 2)
        found = workers()
        run.send_signal(how)
        assert run.wait(60) == (143 if how == signal.SIGTERM else -9)
        assert ("stopped; the same command" in run.stderr.read()) == (how == signal.SIGTERM)
        wait_until(lambda: not any(map(runs, found)))
    finally:
        run.kill()


def runs(process):
    """Whether it does; what nobody asks for its exit status stays, as a zombie."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_more_hours_add_clips_and_other_settings_are_refused(kitchen):
    cook.cook(kitchen("out"))
    before = content(kitchen("out").out)
    with pytest.raises(UserError, match=r"begun with other settings: seed \(was 0"):
        cook.cook(replace(kitchen("out"), seed=1))
    with pytest.raises(UserError, match=r"clips beyond --hours 0.004"):
        cook.cook(replace(kitchen("out"), hours=0.004))
    assert content(kitchen("out").out) == before
    cook.cook(replace(kitchen("out"), hours=0.015))
    after = content(kitchen("out").out)
    assert all(after[name] == data for name, data in before.items() if name != "README.md")
    assert len(after) > len(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hours": 0}, "--hours must lie"),
        ({"max_seconds": 5}, "--max-seconds must lie"),
        ({"test_percent": 90}, "--test-percent must lie"),
        ({"synthesizer": "no-such-synth"}, "--synthesizer no-such-synth: not found: apt install"),
        ({"soundfont": Path("no.sf2")}, "--soundfont no.sf2: no such file: apt install"),
    ],
)
def test_mistakes_are_named(kitchen, change, message):
    with pytest.raises(UserError, match=message):
        cook.cook(replace(kitchen("out"), **change))
    assert not kitchen("out").out.exists()


def test_a_folder_of_other_files_is_refused(kitchen):
    kitchen("out").out.mkdir()
    (kitchen("out").out / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"holds other files \(thesis.txt\)"):
        cook.cook(kitchen("out"))


def test_without_music21_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(scores.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'music21 is not installed: pip install -e "\.\[recipe\]"'):
        scores.corpus_folder()


def test_scores_of_the_corpus(tmp_path):
    music21()
    corpus = scores.corpus_folder()
    files = scores.corpus_files(corpus)
    names = ["bach/bwv66.6.mxl", "oneills1850/0626-0635.abc"]
    for name in names:
        scores.read_file(corpus, name, files[name], tmp_path)
    found, skipped = scores.load(tmp_path, names)
    assert not skipped and len(found) == 11
    chorale, lamentation = found[0], found[1]
    assert (chorale.form, chorale.tonic, chorale.minor) == ("chorale", 6, True)
    assert len(chorale.parts) == 4 and chorale.length == 36 and not chorale.is_melody
    assert chorale.parts[0][0].pitch == 73 and chorale.parts[3][0].pitch == 57
    assert "Lamentation" in lamentation.title and lamentation.is_melody
    assert (lamentation.tonic, lamentation.minor, lamentation.beat) == (7, True, 1.0)


def test_repeats_are_not_taken(tmp_path):
    music21()
    path = tmp_path / "made.abc"
    bars = "|:cdef gabc|defg abcd|1 C8:|2 G8|"
    path.write_text(f"X:1\nT:Made\nR:reel\nM:4/4\nL:1/8\nK:C\n{bars}\n")
    collection = Collection(files="made.abc", source="made up", form="tune", genre="folk")
    scores.read_file(tmp_path, "made.abc", collection, tmp_path / "kept")
    (found,), skipped = scores.load(tmp_path / "kept", ["made.abc"])
    assert not skipped and found.form == "reel"
    last = found.parts[0][-1]
    assert (last.start, last.pitch, found.length) == (8.0, 67, 12.0)


def test_ties_are_joined(tmp_path):
    music21()
    path = tmp_path / "made.abc"
    path.write_text("X:1\nT:Made\nM:4/4\nL:1/4\nK:C\n" + "cdef-|fgab-|b4-|b4|" + "cdef|" * 3 + "\n")
    collection = Collection(files="made.abc", source="made up", form="tune", genre="folk")
    scores.read_file(tmp_path, "made.abc", collection, tmp_path / "kept")
    (found,), _ = scores.load(tmp_path / "kept", ["made.abc"])
    lengths = [(note.start, note.length) for note in found.parts[0][:8]]
    assert lengths[2:] == [(2, 1), (3, 2), (5, 1), (6, 1), (7, 9), (16, 1)]


@needs_fluidsynth
def test_fluidsynth_plays_what_is_written(tmp_path):
    needs_midi()
    flute = next(i for i in INSTRUMENTS if i.name == "flute")
    clip = clips_of.Clip(
        split="train", number=0, tune="made/1", instrument=flute, level=0.1, seconds=3.0,
        parts=[[(0.0, 2.5, 69, 90)]], about={"description": ["An A"]},
    )  # fmt: skip
    made = []
    for name in ("one", "two"):
        cook.render(clip, Recipe(out=tmp_path / name))
        made.append((tmp_path / name / f"{clip.name}.flac").read_bytes())
    assert made[0] == made[1]
    wav, rate = soundfile.read(tmp_path / "one" / f"{clip.name}.flac")
    ((start, end, pitch),) = np.loadtxt(tmp_path / "one" / f"{clip.name}.notes", ndmin=2)
    assert 0 <= start < 0.011 and end == pytest.approx(2.5, abs=0.1) and pitch == 69
    spectrum = np.abs(np.fft.rfft(wav[: 2 * rate] * np.hanning(2 * rate)))
    assert spectrum.argmax() / 2 == pytest.approx(440, abs=5)

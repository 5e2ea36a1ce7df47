"""The ablations as a command: what they make, that they go on, their tables and their errors."""

import contextlib
import json
import types

import pytest
import tiny
from sounds import loudness_embedder, put, tone

from launch.ablate import __main__ as command
from launch.ablate import plan, report, studies, work
from launch.evaluate import stages
from magnet_jax import cli
from magnet_jax.codec import encodec
from magnet_jax.errors import UserError

SMALLEST = (
    "--model.width 16 --model.num-heads 2 --model.num-layers 1 --text.max-tokens 16 "
    "--init-codes random --model.num-codebooks 1 --decode.steps 2"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tokens, prompts and probe clips; and what listens to them."""
    folder = tmp_path_factory.mktemp("ablate")
    tiny.write_noise(folder / "tokens", {"train": 8, "validation": 8})
    for part, shift in (("test", 0), ("valid", 7)):
        for i, name in enumerate(("piano", "violin", "organ")):
            wav = tone(0.7, frequency=220 * (i + 1) + shift)
            path = put(folder / part / f"{i}.wav", wav, caption=f"a slow {name}" if i else name)
            fields = json.loads(path.with_suffix(".json").read_text()) | {"instrument": name}
            path.with_suffix(".json").write_text(json.dumps(fields))
    with pytest.MonkeyPatch.context() as patch:
        tiny.use_one_device(patch)
        patch.setattr(stages, "load", lambda name, weights: loudness_embedder("musicnn"))
        # (for the second probe alone, for which PyTorch would be loaded)
        same = types.SimpleNamespace(
            spec=encodec.read_spec("embedded"), encode=lambda wav: wav, decode=lambda codes: codes
        )
        patch.setattr(encodec, "load_codec", lambda source: same)
        yield folder


def common(place, study, *more):
    return [
        study, "--prompts", str(place / "test"), "--probe", str(place / "valid"), "--clips", "2",
        "--out", str(place / "out"), *map(str, more),
    ]  # fmt: skip


def trained(place, study, *more):
    return common(
        place, study, "--data", place / "tokens", "--text", "embedded", "--seconds", "0.6",
        "--train-steps", "2", f"--train-options={SMALLEST}", *more,
    )  # fmt: skip


def take_few(patch):
    """Leaves one row of `spans` and two of `guidance`."""
    patch.setattr(studies, "SPANS", (3,))
    patch.setattr(studies, "CONTEXTS", ("restricted context",))
    patch.setattr(studies, "PAPERS_SPANS", ())
    patch.setattr(studies, "GUIDANCES", ((10.0, 1.0), (20.0, 1.0)))


@pytest.fixture
def few(monkeypatch):
    take_few(monkeypatch)


@pytest.fixture(scope="module")
def spans(place):
    """The folder of a study of one row and seed, done."""
    with pytest.MonkeyPatch.context() as patch:
        take_few(patch)
        command.main(trained(place, "spans", "--seeds", "0"))
    return place / "out"


def planned(words):
    """The runs and the cells."""
    pieces = plan.plan(cli.parse(command.Command, words, prog="test"))[1]
    cells = [piece for piece in pieces if piece.end == "receipt.json"]
    return [piece for piece in pieces if piece not in cells], cells


def sampling_of(cell):
    """Options of launch.sample."""
    return cell.make.args[0].sample_options


def times(folder, *patterns):
    return {path: path.stat().st_mtime_ns for pattern in patterns for path in folder.rglob(pattern)}


def test_a_study_trains_generates_and_scores(spans):
    name = "magnet-span3-local-seed0"
    assert [path.name for path in (spans / "runs").iterdir() if path.is_dir()] == [name]
    found = json.loads((spans / "spans.json").read_text())
    assert [row["setting"] for row in found["rows"]] == ["span 3, restricted context"]
    receipt = json.loads((spans / "cells" / name / "receipt.json").read_text())
    assert receipt["model"]["checkpoint"] == str(spans / "runs" / name)
    assert receipt["model"]["seconds"] == 0.6 and receipt["model"]["step"] == 2
    scores = found["rows"][0]["scores"]["0"]
    assert scores["fad"] == receipt["scores"]["generated"]["musicnn"]["fad"]["value"]
    assert scores["validation"] == report.validation_loss(spans / "runs" / name)
    assert {
        "fad", "kl", "tag_auc", "tag_top5", "probe", "probe_codec", "validation",
    } == set(scores)  # fmt: skip
    config = json.loads((spans / "runs" / name / "config.json").read_text())
    assert config["model"]["span_length"] == 3 and config["model"]["width"] == 16
    assert config["optimizer"]["schedule_steps"] == config["steps"] == 2
    assert (spans / "spans.png").exists()
    assert "| span 3, restricted" in (spans / "spans.md").read_text()
    assert len(list((spans / "probe-round-trip").glob("*/*.wav"))) == 3


def test_what_is_done_is_not_done_again(place, spans, capsys, few):
    before = times(spans, "*.wav", "receipt.json", "metrics.jsonl")
    command.main(trained(place, "spans", "--seeds", "0"))
    assert before == times(spans, "*.wav", "receipt.json", "metrics.jsonl")
    shown = capsys.readouterr().out
    assert "training:" not in shown and "launch.evaluate" not in shown
    assert "| span 3, restricted context" in shown
    # A receipt that is gone is made again of the same clips, and is the same.
    path = spans / "cells" / "magnet-span3-local-seed0" / "receipt.json"
    receipt = path.read_text()
    path.unlink()
    wavs = times(spans, "*.wav")
    command.main(trained(place, "spans", "--seeds", "0"))
    assert path.read_text() == receipt and times(spans, "*.wav") == wavs
    # One more seed leaves the first as it is.
    before = times(spans, "*.wav", "receipt.json", "metrics.jsonl")
    command.main(trained(place, "spans", "--seeds", "0", "1"))
    after = times(spans, "*.wav", "receipt.json", "metrics.jsonl")
    assert before.items() <= after.items() and len(after) == 2 * len(before) - 3  # (the probe's)
    found = json.loads((spans / "spans.json").read_text())
    assert {len(row["scores"]) for row in found["rows"]} == {2}
    assert found["rows"][0]["sd"].keys() == found["rows"][0]["mean"].keys()


def test_other_settings_are_not_mixed_in(place, spans, few):
    words = trained(place, "spans", "--seeds", "0")
    with pytest.raises(UserError, match=r"local-seed0: begun with .*steps \(was 2, now 3\)"):
        command.main([*words, "--train-steps", "3"])
    with pytest.raises(UserError, match=r"cells/.*clips \(was 2, now 3\).*another --out"):
        command.main([*words, "--clips", "3"])
    captions = place / "test" / "0.json"
    text = captions.read_text()
    captions.write_text(text.replace('"piano"', '"a harp"', 1))
    with pytest.raises(UserError, match="other settings: captions"):
        command.main(words)
    captions.write_text(text)


def test_another_process_is_left_alone(place, spans, few):
    (run,), (cell,) = planned(trained(place, "spans", "--seeds", "2"))
    for piece in (run, cell):
        with work.held(spans, piece.folder, wait=False):
            assert not work.make(piece._replace(make=pytest.fail), spans, "", wait=False)
        assert not piece.folder.exists()
    _, (done,) = planned(trained(place, "spans", "--seeds", "0"))
    assert not work.make(done._replace(make=pytest.fail), spans, "", wait=False)


def test_what_others_are_at_is_waited_for_last(tmp_path, monkeypatch):
    """Two runs with a cell each; another process is at the first run, and ends once it is waited
    for."""
    made = []

    def piece(name, *needs):
        def make():
            made.append(name)
            (tmp_path / "x" / name).mkdir(parents=True)

        return work.Piece(name, tmp_path / "x" / name, "", {}, needs, make)

    first, second = piece("first"), piece("second")
    pieces = [first, piece("a", first), second, piece("b", second)]

    @contextlib.contextmanager
    def held(out, folder, wait):
        if folder == first.folder and wait and not first.is_made:
            first.make()
        yield wait or folder != first.folder

    monkeypatch.setattr(work, "held", held)
    work.make_all(pieces, tmp_path, lambda: None)
    assert made == ["second", "b", "first", "a"]


def test_a_study_of_a_given_model(place, spans, few):
    run = spans / "runs" / "magnet-span3-local-seed0"
    words = common(place, "guidance", "--checkpoint", run, "--seeds", "5")
    command.main(words)
    found = json.loads((spans / "guidance.json").read_text())
    assert [row["setting"] for row in found["rows"]] == ["10 to 1", "20 to 1"]
    assert not any("validation" in row["mean"] for row in found["rows"])
    cell = spans / "cells" / "given-steps2-guidance20to1-seed5"
    model = json.loads((cell / "receipt.json").read_text())["model"]
    assert (model["decode"]["max_guidance"], model["decode"]["min_guidance"]) == (20, 1)
    assert model["decode"]["steps"] == [2] and model["step"] == 2 and model["seed"] == 5
    before = times(spans, "*.wav", "receipt.json")
    command.main(words)
    assert before == times(spans, "*.wav", "receipt.json")
    claim = cell.with_name(f"{cell.name}.json")
    settings = json.loads(claim.read_text())
    settings["model"] |= {"step": 1, "parameters": "others"}
    claim.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="other settings: model.step .*model.parameters"):
        command.main(words)


def test_studies_share_what_they_have_in_common(place, tmp_path):
    """Planned alone, of models with all codebooks."""
    options = SMALLEST.replace("--model.num-codebooks 1 --decode.steps 2", "")
    more = (f"--train-options={options}", "--seeds", "0", "--out", tmp_path)
    cells = {
        study: planned(trained(place, study, *more, *its))
        for study, its in (
            ("spans", ()), ("rescoring", ("--rescorer-weight", "0.7")),
            ("hybrid", ("--prompt-seconds", "0", "0.2")),
        )
    }  # fmt: skip
    (magnet_run, hybrid_run), (magnet, rescored, whole) = cells["rescoring"]
    spans_runs, spans_cells = cells["spans"]
    # Labels may differ, and what is called to make it.
    assert magnet[1:4] == spans_cells[2][1:4] and magnet_run[1:4] == spans_runs[2][1:4]
    assert whole[1:4] == cells["hybrid"][1][-1][1:4]
    assert rescored.needs == (magnet_run, hybrid_run)
    assert hybrid_run.settings["model.kind"] == "hybrid"
    assert f"--rescorer-weight 0.7 --rescorer {hybrid_run.folder}" in sampling_of(rescored)
    assert [sampling_of(cell) for cell in cells["hybrid"][1]] == [
        f"--prompt-seconds {seconds} --batch-size 8" for seconds in ("0", "0.2", "600")
    ]
    assert [run.settings["model.local_context"] for run in spans_runs[:2]] == [5, 0]
    assert list(tmp_path.iterdir()) == []


# --- numbers, table, picture ----------------------------------------------------------------------


def put_receipt(out, setting, seed, **values):
    path = report.cell_folder(out, setting, seed) / "receipt.json"
    path.parent.mkdir(parents=True)
    rows = {"generated": values, "reference": {"fad": 9.0, "tag_auc": 0.9}}
    scores = {
        name: {"musicnn": {"clips": 2, **{key: {"value": v} for key, v in row.items()}}}
        for name, row in rows.items()
    }
    path.write_text(json.dumps({"scores": scores}))


def test_means_and_deviations(tmp_path):
    study = studies.spans()
    for seed, fad in enumerate((10.0, 14.0, 12.0)):
        put_receipt(tmp_path, study.settings[0], seed, fad=fad, tag_auc=0.5)
    put_receipt(tmp_path, study.settings[3], 1, fad=123.456)
    log = report.run_folder(tmp_path, study.settings[3].model, 1) / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"step": 1, "validation/loss": 7.5}\n{"step": 2, "validation/loss": 6.25}\n')
    found = report.gather(tmp_path, study, (0, 1, 2))
    rows = found["rows"]
    assert rows[0]["mean"] == {"fad": 12.0, "tag_auc": 0.5}
    assert rows[0]["sd"] == {"fad": 2.0, "tag_auc": 0.0}  # (of a sample: n - 1)
    assert rows[3]["mean"] == {"fad": 123.456, "validation": 6.25} and rows[3]["sd"] == {}
    assert rows[1]["scores"] == rows[1]["mean"] == {}
    lines = report.write(tmp_path, found).splitlines()
    assert lines[2].split("|")[1:-1] == [
        f" {name} " for name in (
            f"{'frames in a masked span':44}", "seeds", "FAD   ", "tag AUC", "validation loss",
            "paper's FAD",
        )
    ]  # fmt: skip
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:12]]
    assert cells[0] == ["span 1, restricted context", "3", "12 ± 2", "0.5 ± 0", "-", "2.13"]
    assert cells[1] == ["span 1, full context", "0", "-", "-", "-", "3.07"]
    assert cells[3] == ["span 3, full context", "1", "123", "-", "6.25", "0.82"]
    assert cells[6][0] == "span 3, restricted but in the first codebook"
    assert cells[7] == ["real audio", "3", "9 ± 0", "0.9 ± 0", "-", ""]
    assert json.loads((tmp_path / "spans.json").read_text()) == found
    assert (tmp_path / "spans.md").read_text().endswith("so that only the order compares.\n")
    receipt = report.cell_folder(tmp_path, study.settings[0], 0) / "receipt.json"
    receipt.write_text("{}")
    with pytest.raises(UserError, match="not a receipt of launch.evaluate; remove it"):
        report.gather(tmp_path, study, (0,))


def test_pictures_of_any_study(tmp_path, monkeypatch):
    """As far as they are there: nothing of the first, a row of others, all of the last."""
    drawn = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, *_, **__: drawn.append(self)
    )
    for count, study in (
        (0, studies.spans()),
        (1, studies.guidance((20, 10, 10, 10))),
        (1, studies.rescoring(0.5)),
        (2, studies.hybrid((0.0, 1.0), 5.0)),
        (9, studies.steps(4, (10.0, 1.0))),
    ):
        for row in {row.cell: row for row in study.settings[:count]}.values():
            for seed in (0, 1):
                put_receipt(tmp_path / study.name, row, seed, fad=10.0 + seed, kl=1.0, probe=0.5)
        found = report.gather(tmp_path / study.name, study, (0, 1))
        report.draw(tmp_path / f"{study.name}.png", found)
        shown = {
            axes.get_title().partition("\n")[0]: axes
            for axes in drawn[-1].axes
            if axes.get_visible()
        }
        papers = {f"{report.TITLES[name]} in the paper" for row in study.settings
                  for name in row.paper}  # fmt: skip
        assert shown.keys() == papers | ({"FAD", "KL", "probe"} if count else set())
        if count:
            means = [line for line in shown["FAD"].lines if line.get_linestyle() != "None"]
            dots = [line for line in shown["FAD"].lines if list(line.get_ydata()) == [10.0, 11.0]]
            assert len(dots) == count and all(10.5 in line.get_ydata() for line in means)


def test_what_is_made_alike_has_one_name():
    default = "given-steps20-10-10-10-guidance10to1"
    cells = [row.cell for row in studies.steps(4, (10.0, 1.0)).settings]
    assert cells.count(default) == 2 and len(set(cells)) == len(cells) - 1
    assert default in [row.cell for row in studies.guidance((20, 10, 10, 10)).settings]
    spans = {row.cell for row in studies.spans().settings}
    rescoring = [row.cell for row in studies.rescoring(0.5).settings]
    assert rescoring[0] in spans and not {*rescoring[1:]} & spans
    assert rescoring[2] == studies.hybrid((0.0, 1.0), 5.0).settings[-1].cell


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("study", "words", "message"),
    [
        ("spans", ["--seeds", "0", "0"], "--seeds: give one at least, and each once"),
        ("spans", ["--seeds", "-1"], "--seeds must .* lie between 0 and"),
        ("spans", ["--clips", "4"], "--clips 4: must lie between 2 and 3, the prompts in"),
        ("spans", ["--seconds", "0"], "--seconds must be a positive"),
        ("spans", ["--train-steps", "0"], "--train-steps must be a whole number from 1"),
        ("spans", ["--batch-size", "0"], "--batch-size must be a whole number from 1"),
        ("spans", ["--prompts", "nowhere"], "--prompts nowhere: no such folder; launch.recipe"),
        ("spans", ["--probe", "TEST"], "3 of its clips are in --reference as well"),
        ("spans", ["--probe", "off", "--probe-codec", "embedded"], "goes with --probe"),
        ("spans", ["--probe-codec", "nowhere"], "nowhere"),
        ("spans", ["--data", "nowhere"], "nowhere"),
        ("spans", ["--text", "nowhere"], "nowhere"),
        ("spans", ["--out", "FILE"], "is a file, and the studies need a folder"),
        ("spans", ["--out", "gs://bucket/x"], "needs a folder on disk"),
        ("spans", ["--train-options=--seed 3"], "--train-options: leave out --seed,"),
        ("spans", ["--train-options=--model.widht 3"], "did you mean --model.width"),
        ("spans", ["--train-options=--model.text-width 64"], "set --model.text-width 128"),
        ("spans", ["--checkpoint", "x"], "unknown setting --checkpoint"),
        ("rescoring", ["--rescorer-weight", "0"], "--rescorer-weight 0 is no rescorer"),
        ("rescoring", ["--rescorer-weight", "2"], "rescorer weight must lie between"),
        ("hybrid", ["--prompt-seconds", "0", "0.6"], "from 0 to below the clip's 0.6 s"),
        ("guidance", ["--checkpoint", "nowhere"], "nowhere: no such folder"),
        ("guidance", [], "--checkpoint"),
        ("other", [], "spans"),
    ],
)
def test_mistakes_are_one_line(study, words, message, place, tmp_path):
    (tmp_path / "file").touch()
    places = {"TEST": str(place / "test"), "FILE": str(tmp_path / "file")}
    start = common if study in ("guidance", "other") else trained
    seeds = () if study == "other" else ("--seeds", "0")
    asked = [
        *start(place, study, "--out", tmp_path / "out", *seeds),
        *(places.get(w, w) for w in words),
    ]
    with pytest.raises(UserError, match=message):
        command.main(asked)
    assert not (tmp_path / "out").exists()


def test_a_summary_that_no_study_wrote_is_left_alone(tmp_path):
    report.check_own(tmp_path, "spans")
    (tmp_path / "spans.md").write_text("mine")
    with pytest.raises(UserError, match="spans.md: was not made by launch.ablate"):
        report.check_own(tmp_path, "spans")
    (tmp_path / "spans.json").write_text('{"study": "spans"}')
    report.check_own(tmp_path, "spans")
    (tmp_path / "spans.json").write_text('{"study": "mine"}')
    with pytest.raises(UserError, match="spans.json: was not made by launch.ablate"):
        report.check_own(tmp_path, "spans")

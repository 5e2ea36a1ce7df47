"""The benchmark: its PyTorch peer does the reference's work, and its figures are what they say."""

import dataclasses
import json
import os
import shlex
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from constants import GOLDEN
from refusals import refused

from launch.benchmark import __main__ as command
from launch.benchmark import (
    decoding,
    editing,
    loading,
    loops,
    models,
    options,
    peaks,
    tokenizing,
    tradeoff,
    training,
)
from launch.benchmark import long as longer
from launch.benchmark.musicgen_peer import Peer as MusicgenPeer
from launch.benchmark.torch_peer import Peer, check_device, sample_top_p, torch
from launch.compile import flops
from magnet_jax import cli
from magnet_jax.checkpoints import pretrained
from magnet_jax.config import ASSETS, DecodeConfig, EditConfig, ModelConfig, TextConfig
from magnet_jax.convert import lm_rules, t5_files
from magnet_jax.convert.audiocraft import read_file
from magnet_jax.errors import UserError
from magnet_jax.evaluation import metrics
from magnet_jax.train.flops import training_flops

MAGNET = GOLDEN / "magnet_tiny"
CASES = json.loads((MAGNET / "generate.json").read_text())
SMALL = ModelConfig()
MEDIUM = ModelConfig(width=1536, num_heads=24, num_layers=48)

# --- the peer -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer():
    model = lm_rules.read_audiocraft(MAGNET).model
    return Peer(read_file(MAGNET / "state_dict.bin").tensors, model)


@pytest.mark.parametrize(
    "name", [n for n, case in CASES.items() if case["span_arrangement"] == "nonoverlap"]
)
def test_the_peer_generates_the_reference_tokens(peer, name):
    case = CASES[name]
    text, reference = np.load(MAGNET / "forward.npz"), np.load(MAGNET / "generate.npz")
    span, num_prompt = case["span_len"], case["prompt_frames"]
    decoding = DecodeConfig(
        steps=tuple(case["decoding_steps"]),
        temperature=case["temp"],
        anneal_temperature=case["anneal_temp"],
        max_guidance=case["max_cfg_coef"],
        min_guidance=case["min_cfg_coef"],
        span_score=case["span_scoring"],
        span_length=span,
        greedy=True,
    )
    codes_BKT = peer.generate(
        text["t5_hidden"],
        text["text_lengths"] * case["text"],
        num_frames=text["codes"].shape[-1] // span * span,
        decoding=decoding,
        prompt_BKP=reference["prompt_codes"][..., :num_prompt] if num_prompt else None,
    )
    np.testing.assert_array_equal(codes_BKT, reference[name])


def test_our_parameters_reach_the_peer_unchanged(peer):
    model, params, *_ = lm_rules.read_audiocraft(MAGNET)
    found = Peer(lm_rules.to_audiocraft(params, model), model).state
    for name, tensor in peer.state.items():
        assert torch.equal(tensor, found[name]), name


def test_transformers_generates_the_reference_tokens():
    """Of the longer text: those of the other attend to zeros in the reference, and not here."""
    folder = GOLDEN / "musicgen_tiny"
    model, params, *_ = lm_rules.read_audiocraft(folder)
    text = np.load(folder / "forward.npz")
    expected = np.load(folder / "generate.npz")["greedy"]
    states_BSE, lengths_B = text["t5_hidden"][:1], text["text_lengths"][:1]
    assert lengths_B == states_BSE.shape[1]
    found = MusicgenPeer(lm_rules.to_audiocraft(params, model), model).generate(
        states_BSE, lengths_B, num_frames=expected.shape[-1], guidance=3.0
    )
    np.testing.assert_array_equal(found, expected[:1])
    with pytest.raises(UserError, match="lacks this model's delays"):
        MusicgenPeer({}, dataclasses.replace(model, delays=(0,) * model.num_codebooks))


def test_the_peer_samples_from_the_nucleus():
    reference = np.load(GOLDEN / "top_p.npz")
    mass = next(float(n.removeprefix("probs_p")) for n in reference if n.startswith("probs_p"))
    probs = torch.tensor(reference["logits"]).softmax(-1)
    torch.manual_seed(0)
    token = sample_top_p(probs.repeat(200, 1, 1), mass).numpy()
    allowed = reference[f"probs_p{mass:g}"] > 0
    assert allowed[np.arange(len(allowed))[None], token].all()
    assert len(np.unique(token[:, 0])) > 1


def test_what_the_peer_lacks_is_named(peer):
    states, lengths = np.zeros((1, 4, 768), np.float32), np.array([4])
    with pytest.raises(UserError, match="spans that do not overlap"):
        peer.generate(
            states, lengths, num_frames=9, decoding=DecodeConfig(span_arrangement="stride1")
        )
    with pytest.raises(UserError, match="no whole number of spans"):
        peer.generate(states, lengths, num_frames=10, decoding=DecodeConfig())
    with pytest.raises(UserError, match="needs 4 numbers"):
        peer.generate(states, lengths, num_frames=9, decoding=DecodeConfig(steps=(1, 1)))
    with pytest.raises(UserError, match="PyTorch cannot use it"):
        check_device("abacus")
    with pytest.raises(UserError, match="lacks this model's first_context"):
        Peer({}, dataclasses.replace(peer.model, first_context=3))


# --- FLOPs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "frames", "steps", "reference", "floor"),
    [
        (SMALL, 498, (20, 10, 10, 10), 39.3, 31.9),
        (SMALL, 1500, (20, 10, 10, 10), 131.9, 101.5),
        (SMALL, 1500, (60, 10, 10, 10), 237.5, 198.4),
        (MEDIUM, 498, (20, 10, 10, 10), 170.3, 142.7),
        (MEDIUM, 1500, (60, 10, 10, 10), 992.7, 850.4),
    ],
)
def test_flops_of_the_published_models(model, frames, steps, reference, floor):
    found = flops.reference_flops(model, frames, 64, steps) / 1e12
    assert found == pytest.approx(reference, rel=2e-3)
    assert flops.floor_flops(model, frames, 64, steps) / 1e12 == pytest.approx(floor, rel=5e-3)


def test_flops_of_one_step_by_hand():
    model = ModelConfig(
        num_codebooks=1, codebook_size=7, width=4, num_heads=1, num_layers=1, mlp_ratio=2
    )
    # (projections 6 D^2, MLP 4 D^2, attention 2 T D and 2 S D) T, keys and values 2 S D^2, head
    row = 6 * (6 * 16 + 4 * 16 + 2 * 6 * 4 + 2 * 5 * 4) + 5 * 2 * 16 + 6 * 4 * 7
    assert flops.reference_flops(model, 6, 5, (1,)) == 2 * 2 * row
    without_text = 6 * (2 * 16 + 2 * 5 * 4) + 5 * 2 * 16
    assert flops.floor_flops(model, 6, 5, (1,)) == 2 * (2 * row - without_text)


def test_without_a_restricted_context_all_stages_cost_the_same():
    model = dataclasses.replace(SMALL, local_context=0)
    costs = [flops.floor_flops(model, 498, 64, steps) for steps in ((9, 2, 2, 2), (2, 2, 2, 9))]
    assert costs[0] == costs[1]
    assert costs[0] > flops.floor_flops(SMALL, 498, 64, (9, 2, 2, 2))


def test_a_first_context_costs_what_it_sees():
    for count in (training_flops, lambda *args: flops.floor_flops(*args, (1, 1, 1, 1))):
        costs = {
            first: count(dataclasses.replace(SMALL, first_context=first), 498, 64)
            for first in (0, SMALL.local_context, 25, 498)
        }
        assert costs[SMALL.local_context] < costs[25] < costs[498] == costs[0]
        # 2 T products a head size and layer, keys and values, of each key that is not seen.
        a_key = costs[25] - costs[SMALL.local_context]
        assert costs[498] - costs[25] == pytest.approx(a_key * (498 - 51) / 40, rel=1e-6)


def test_stages_cost_by_how_often_they_are_trained():
    first, even, others, three = (
        training_flops(SMALL, 498, 64, weights)
        for weights in ((1.0, 0.0, 0.0, 0.0), (), (0.0, 5.0, 0.0, 5.0), (3.0, 1.0, 0.0, 0.0))
    )
    assert first > even > others
    assert even == pytest.approx(first / 4 + 3 * others / 4)
    assert three == pytest.approx(3 * first / 4 + others / 4)


# --- the commands -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.finished_run(tmp_path_factory)


@pytest.fixture
def no_peaks(monkeypatch):
    """Large matrix products are slow where many processes share the machine."""
    monkeypatch.setattr(peaks, "SIZES", (64,))


def test_decoding_is_measured_against_the_peer_and_another_command(run, tmp_path, capsys, no_peaks):
    other = shlex.join([sys.executable, "-c", "print('a line'); print('{\"seconds\": 4.5}')"])
    json_file = tmp_path / "figures.json"
    command.main(
        ["decode", "--checkpoint", str(run), "--batch-sizes", "1", "2", "--repeats", "2", "--peer",
         "--peer-steps", "1", "--vs", other, "--json", str(json_file)]
    )  # fmt: skip
    shown = capsys.readouterr().out
    for part in ("2 programs for 2 shapes", "peer/ours", "cut from 2 1 1 1", "4.500 s", "codec"):
        assert part in shown
    found = json.loads(json_file.read_text())
    assert [row["batch_size"] for row in found["rows"]] == [1, 2]
    assert found["facts"]["steps"] == [1, 1, 1, 1] and found["vs_seconds"] == 4.5
    for row in found["rows"]:
        assert 0 < row["flops"] < row["peer_flops"] and row["speedup"] > 0
    assert len(found["parts"]["stages"]) == 4 and min(found["parts"]["stages"]) > 0


@pytest.fixture
def small(monkeypatch):
    """Makes the small model, its text encoder and its codec tiny."""
    sizes = {"width": 16, "num_layers": 2, "num_heads": 2}
    monkeypatch.setitem(models.random_checkpoint.SIZES, "small", sizes)
    monkeypatch.setitem(models.random_checkpoint.CODEC_SETTINGS, "num_filters", 4)
    text_encoder = dataclasses.replace(t5_files.PUBLISHED["t5-base"], num_layers=1)
    monkeypatch.setitem(t5_files.PUBLISHED, "t5-base", text_encoder)


def test_a_model_with_random_weights(small, capsys, no_peaks):
    command.main(
        ["decode", "--model", "small", "--seconds", "0.2", "--batch-sizes", "1", "--repeats", "1",
         "--decode.steps", "1", "1", "1", "1", "--no-parts"]
    )  # fmt: skip
    assert "random weights" in capsys.readouterr().out


def test_decoding_one_step_after_another_is_measured_against_transformers(small, tmp_path, capsys):
    file = tmp_path / "figures.json"
    command.main(
        ["autoregressive", "--model", "small", "--seconds", "0.2", "--repeats", "1", "--json",
         str(file)]
    )  # fmt: skip
    (row,) = json.loads(file.read_text())["rows"]
    assert row["equal"] > 0.9 and row["ratio"] > 0
    assert "same tokens" in capsys.readouterr().out


def test_rescoring_is_measured_against_the_rescorers_own_passes(small, tmp_path, capsys, no_peaks):
    # (the codec's seed is that of the model with random weights)
    models.random_checkpoint.make(
        models.random_checkpoint.Args(out=tmp_path / "second", kind="musicgen", seconds=1)
    )
    file = tmp_path / "figures.json"
    command.main(
        ["decode", "--model", "small", "--seconds", "0.2", "--batch-sizes", "1", "--repeats", "1",
         "--decode.steps", "1", "2", "2", "2", "--no-parts", "--rescorer", str(tmp_path / "second"),
         "--json", str(file)]
    )  # fmt: skip
    found = json.loads(file.read_text())["rescoring"]
    assert found["passes"] == 3
    assert found["alone"] > 0 and {"ratio", "extra"} <= found.keys()
    assert "the rescorer's 3 passes alone take" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either --checkpoint DIR or --model"),
        (["--checkpoint", "x", "--model", "small"], "either --checkpoint DIR or --model"),
        (["--model", "tremendous"], "--model"),
        (["--checkpoint", "nowhere"], "nowhere: no such folder"),
        (["--model", "small", "--batch-sizes", "1", "-2"], "--batch-sizes must be"),
        (["--model", "small", "--batch-sizes", "0"], "--batch-sizes must be"),
        (["--model", "small", "--decode.steps", "0"], "--decode.steps must be"),
        (["--model", "small", "--repeats", "0"], "--repeats must be"),
        (["--model", "small", "--seconds", "nan"], "--seconds must be a positive"),
        (["--model", "small", "--peer-steps", "1"], "needs --peer"),
        (["--model", "small", "--rescorer-guidance", "3"], "need --rescorer"),
        (["--model", "small", "--rescorer-weight", "0.7"], "need --rescorer"),
        (["--model", "small", "--rescorer", "x", "--rescorer-weight", "0"], "nothing to time"),
        (["--model", "small", "--json", "nowhere/x.json"], "no such folder nowhere"),
    ],
)
def test_mistakes_are_one_line(words, message):
    with refused(words, message):
        command.main(["decode", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loader", "--data", "x", "--batches", "0"], "--batches must be"),
        (["train", "--data", "x", "--steps", "0"], "--steps must be"),
        (["train", "--data", "x", "--json", "nowhere/x.json"], "no such folder nowhere"),
        (["tradeoff", "--model", "small", "--seconds", "nan"], "--seconds must be a positive"),
        (["tokenize", "--batch-size", "0"], "--batch-size must be"),
        (["tokenize", "--window-seconds", "nan"], "--window-seconds must lie"),
        (["tokenize", "--whole-minutes", "3"], "--whole-minutes goes with --whole"),
        (["tokenize", "--cores-per-worker", "1"], "--cores-per-worker goes with --workers"),
        (["tokenize", "--json", "nowhere/x.json"], "no such folder nowhere"),
    ],
)
def test_mistakes_are_said_before_anything_is_measured(words, message):
    with refused(words, message):
        command.main(words)


def test_options_that_do_not_fit_the_model(run, no_peaks):
    with pytest.raises(UserError, match="decode.steps has 2 numbers"):
        command.main(["decode", "--checkpoint", str(run), "--decode.steps", "1", "1"])
    with pytest.raises(UserError, match="shorter than one span"):
        command.main(["decode", "--checkpoint", str(run), "--seconds", "0.01"])
    with pytest.raises(UserError, match="--peer-device abacus"):
        command.main(["decode", "--checkpoint", str(run), "--peer", "--peer-device", "abacus"])


def test_the_tradeoff_of_a_hybrid(small, capsys):
    command.main(
        ["tradeoff", "--model", "small", "--seconds", "0.24", "--repeats", "1",
         "--prompt-seconds", "0.1", "9", "--first-steps", "--other-steps", "1"]
    )  # fmt: skip
    _, left_out, *lines = capsys.readouterr().out.splitlines()
    assert left_out == "left out, as longer than the clip: --prompt-seconds 9"
    assert [line.split()[:-2] for line in lines] == [
        ["prompt", "0.1"],
        ["prompt", "0.24"],
        ["other", "codebooks", "1"],
    ]


def test_the_tradeoff_of_a_magnet_that_rescores_itself(run, tmp_path):
    """Each point says what makes launch.sample do it."""
    command.main(
        ["tradeoff", "--checkpoint", str(run), "--repeats", "1", "--json", str(tmp_path / "x.json"),
         "--first-steps", "--other-steps", "--rescorer", str(run), "--rescorer-weight", "0.7"]
    )  # fmt: skip
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [(row["kind"], row["value"]) for row in rows] == [
        ("rescoring", "without"),
        ("rescoring", "with"),
    ]
    assert rows[0]["options"] == "--decode.steps 2 1 1 1"
    assert rows[1]["options"] == (
        f"--decode.steps 2 1 1 1 --rescorer {run} --rescorer-weight 0.7 --rescorer-guidance 1.0"
    )
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "small", "--repeats", "0"], "--repeats must"),
        (["--model", "small", "--first-steps", "0"], "--first-steps must"),
        (["--model", "small", "--prompt-seconds", "-1"], "--prompt-seconds must"),
        (["--model", "small", "--prompt-seconds", "1", "nan"], "--prompt-seconds must"),
        (["--model", "small", "--rescorer-weight", "0.7"], "need --rescorer"),
        (["--model", "small", "--rescorer", "x", "--rescorer-weight", "7"], "must lie between 0"),
    ],
)
def test_mistakes_about_the_tradeoff(words, message):
    with refused(words, message):
        command.main(["tradeoff", *words])


def test_what_the_tradeoff_knows_to_fail_is_said_before_anything_is_loaded(run, monkeypatch):
    monkeypatch.setattr(pretrained, "load", None)
    for words, message in (
        (["--first-steps", "--other-steps"], "nothing is to be varied: give --first-steps"),
        (["--prompt-seconds", "1"], "--prompt-seconds is for models of kind hybrid"),
    ):
        with pytest.raises(UserError, match=message):
            command.main(["tradeoff", "--checkpoint", str(run), *words])
    silent = dataclasses.replace(pretrained.read_settings(run).decode, steps=(1, 1, 1, 1))
    found = pretrained.read_defaults(run)[0], silent
    monkeypatch.setattr(pretrained, "read_defaults", lambda source: found)
    with pytest.raises(UserError, match="nothing is rescored where every codebook has one step"):
        command.main(["tradeoff", "--checkpoint", str(run), "--rescorer", str(run)])


def test_the_tradeoffs_points_are_kept_where_a_later_one_fails(run, tmp_path, monkeypatch):
    seconds = iter([0.5])
    monkeypatch.setattr(tradeoff, "latency_of", lambda *_: next(seconds))
    words = ["--first-steps", "1", "2", "--other-steps", "--json", str(tmp_path / "x.json")]
    with pytest.raises(StopIteration):
        command.main(["tradeoff", "--checkpoint", str(run), *words])
    (row,) = json.loads((tmp_path / "x.json").read_text())
    assert (row["kind"], row["value"], row["seconds"]) == ("first codebook", 1, 0.5)


def test_a_checkpoint_may_be_a_url():
    for name in ("decode", "autoregressive", "tradeoff"):
        words = [name, "--checkpoint", "gs://bucket/run"]
        assert cli.parse(command.Command, words, prog="x").checkpoint == "gs://bucket/run"


def test_the_other_command(monkeypatch):
    clock = iter([10.0, 12.5])
    with monkeypatch.context() as patch:
        patch.setattr(decoding.time, "perf_counter", lambda: next(clock))
        assert decoding.time_command("true") == 2.5
    assert decoding.time_command("""echo '{"seconds": 3, "x": 1}'; echo '[1]'; echo bye""") == 3.0
    with pytest.raises(UserError, match="failed with status 3: it broke"):
        decoding.time_command("echo it broke >&2; exit 3")
    with pytest.raises(UserError, match="must be a number above 0"):
        decoding.time_command("""echo '{"seconds": "many"}'""")


def test_peaks(no_peaks):
    assert peaks.jax_peak(jnp.dtype("float32")) > 0
    assert peaks.torch_peak("float32", "cpu") > 0


def test_the_loader_is_measured(run, capsys, monkeypatch):
    tiny.use_one_device(monkeypatch)
    monkeypatch.setattr(
        loading,
        "load_config",
        lambda name: tiny.run_config("", "", text=TextConfig(max_tokens=16)),
    )
    loading.measure(options.Loader(data=run.parent / "tokens", batches=3, steps=2))
    assert "ratio" in capsys.readouterr().out


def test_training_is_measured(run, capsys, monkeypatch, tmp_path):
    tiny.use_one_device(monkeypatch)
    text = TextConfig(max_tokens=16)
    monkeypatch.setattr(training, "load_config", lambda name: tiny.run_config("", "", text=text))
    monkeypatch.setattr(training, "jax_peak", lambda dtype: 1e9)
    file = tmp_path / "found.json"
    training.measure(options.Train(data=run.parent / "tokens", steps=2, json=file))
    found = json.loads(file.read_text())
    assert found["share_of_peak"] > 0
    assert set(found["compile_seconds"]) == {"2", "8"}
    assert "share" in capsys.readouterr().out


def test_tokenizing_is_measured(capsys, tmp_path, monkeypatch):
    file = tmp_path / "found.json"
    args = options.Tokenize(
        tracks=1, track_minutes=0.1, batch_size=1, window_seconds=2, json=file,
        whole=ASSETS / "clips", whole_minutes=0.1,
    )  # fmt: skip
    tokenizing.measure(args)
    found = json.loads(file.read_text())
    assert found["share"] > 0
    assert min(found["equal_tokens"]) > 0.99
    assert "share" in capsys.readouterr().out
    with pytest.raises(UserError, match="no audio in it"):
        tokenizing.measure(dataclasses.replace(args, whole=tmp_path))
    with pytest.raises(UserError, match="--cores-per-worker must"):
        tokenizing.measure(dataclasses.replace(args, workers=2, cores_per_worker=0))
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pytest.raises(UserError, match="--cores-per-worker: for Linux alone"):
        tokenizing.measure(dataclasses.replace(args, workers=2, cores_per_worker=1))


# --- editing --------------------------------------------------------------------------------------


def test_holes_are_whole_spans_at_both_places_of_each_clip():
    """Which is what decoding makes anew; and a hole never reaches over the middle of a window."""
    model = SimpleNamespace(
        frame_rate=50.0,
        loaded=SimpleNamespace(config=SimpleNamespace(model=ModelConfig(span_length=3))),
    )
    codes_BKT = np.zeros((4, 4, 500), np.int32)
    study = editing.Study(model, DecodeConfig(), [""] * 4, codes_BKT, ["a", "b"], 0)
    for seconds in (0.01, 0.5, 2, 4.9):
        hole_BT = study.holes(seconds)
        edges = [np.flatnonzero(np.diff(np.r_[0, row_T, 0])) for row_T in hole_BT.astype(int)]
        assert all(len(edge) == 2 and not (edge % 3).any() for edge in edges)
        assert abs(hole_BT[0].sum() - max(3, 50 * seconds)) <= 1.5
        assert (hole_BT[0] == hole_BT[1]).all() and not (hole_BT[0] & hole_BT[2]).any()
    with pytest.raises(UserError, match="--holes 6"):
        study.holes(6)


def test_each_way_of_editing_differs_from_the_default_in_one_setting():
    (usual, none), *others = editing.ways().values()
    assert usual == EditConfig() and not none and len(others) == 5
    for config, settings in others:
        differ = [name for name, value in vars(config).items() if value != getattr(usual, name)]
        assert len(differ) + len(settings) == 1
        dataclasses.replace(DecodeConfig(), **settings)


@pytest.mark.parametrize(
    ("given", "named"),
    [({"clips": 1}, "--clips"), ({"holes": ()}, "--holes"), ({"steps": (0,)}, "--steps")],
)
def test_what_cannot_be_edited_is_named_before_a_model_is_loaded(given, named):
    with pytest.raises(UserError, match=named):
        options.Editing(**given)


# --- clips longer than the window -----------------------------------------------------------------


def test_a_cut_is_heard_as_a_seam_and_music_that_goes_on_is_not():
    """A tone that changes its pitch at 1 s; and what is measured of its first and last second."""
    rate, time_N = 16_000, np.arange(48_000) / 16_000
    rng = np.random.default_rng(0)
    wav_N = np.where(time_N < 1, np.sin(880 * np.pi * time_N), np.sin(1760 * np.pi * time_N))
    wav_N = np.where(time_N < 1, wav_N, 0.5 * wav_N) + 0.01 * rng.normal(size=48_000)
    unlike_T = longer.unlike(wav_N, rate, 1 / 50)
    assert len(unlike_T) == 149 and unlike_T.argmax() == 49
    piece = longer.Piece(np.zeros((4, 150), int), [50], 0.0, 0.0)
    cut = longer.seams(wav_N, piece, rate, 50)
    assert cut["seams"] == 1 and cut["beyond"] == 1 and cut["sigmas"] > 4
    whole = longer.seams(wav_N, piece._replace(seams=[100, 120]), rate, 50)
    assert whole["seams"] == 2 and whole["beyond"] == 0
    drifted = longer.drift(wav_N, rate, rate, longer.tagger.load())
    assert drifted["level"] == pytest.approx(6, abs=0.1) and drifted["key"] < 0.1  # an octave
    assert drifted["tagger"] > 0.05
    fifth_N = np.sin(1320 * np.pi * time_N)
    assert 1 - metrics.cosine(longer.chroma(fifth_N, rate), longer.chroma(wav_N, rate)) > 0.9


def test_borders_of_windows_lie_where_they_are_put_together():
    model = SimpleNamespace(loaded=tiny.loaded_model(), generation=DecodeConfig())
    found = {way: longer.borders(model, how, 250) for way, how in longer.WAYS.items()}
    assert found["sliding"] == found["sliding, rate"] == [100, 160, 220]
    assert found["anchors"] == [100, 138, 199, 237] and found["joint"][:3] == [51, 102, 153]
    assert options.Long(ways=("joint",)).ways == ("joint",)
    with pytest.raises(UserError, match="--ways must be some of: sliding; "):
        options.Long(ways=("wavy",))


# --- loops ----------------------------------------------------------------------------------------


def test_a_seam_stands_out_where_a_clip_does_not_close():
    rate = 16_000
    time_N = np.arange(rate) / rate
    closed = np.sin(2 * np.pi * 220 * time_N) + 0.1 * np.sin(2 * np.pi * 3000 * time_N)
    cut = closed * np.linspace(1, 0, rate) ** 2  # loud, and then all but silent
    found = loops.heard(np.stack([closed, cut])[:, None].astype(np.float32), rate)
    assert found["within"].tolist() == [1, 0] and found["deviations"][1] > 5
    jump = np.roll(closed, 100).copy()
    jump[-1] += 0.5
    assert loops.step(closed) < 1.1 and loops.step(jump) > 5

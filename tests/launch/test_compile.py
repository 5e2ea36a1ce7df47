"""Compiling ahead of time: for the CPU always, for TPUs and GPUs where a compiler is installed."""

import dataclasses
import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from refusals import refused

from launch.compile import __main__ as launch_compile
from launch.compile import flops, hlo, report, search, targets
from launch.make.random_checkpoint import SIZES
from launch.train import load_config
from magnet_jax.config import ModelConfig
from magnet_jax.convert import t5_files
from magnet_jax.errors import UserError
from magnet_jax.model import t5, transformer
from magnet_jax.train import chips, plan, steps

TINY = {"width": 64, "num_layers": 3, "num_heads": 2}
STEPS = (3, 2, 2, 2)

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed: pip install "magnet-jax[aot-tpu]"',
)


def has_cuda_compiler() -> bool:
    try:
        return importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
    except ModuleNotFoundError:  # no plugin at all
        return False


needs_cuda = pytest.mark.skipif(
    not has_cuda_compiler(),
    reason='the CUDA plugin is not installed: pip install "magnet-jax[aot-gpu]"',
)


@pytest.fixture
def tiny(monkeypatch):
    """Makes the small model tiny, and its text encoder one layer."""
    monkeypatch.setitem(SIZES, "small", TINY)
    base = t5_files.PUBLISHED["t5-base"]
    text_encoder = dataclasses.replace(base, num_layers=1, d_ff=8, num_heads=1, vocab_size=10)
    monkeypatch.setitem(t5_files.PUBLISHED, "t5-base", text_encoder)
    return ModelConfig(**TINY)


def compile_decode(tmp_path, topology: str, *more: str, steps: tuple[int, ...] = STEPS) -> dict:
    file = tmp_path / "costs.json"
    sizes = [
        "--seconds",
        "1",
        "--text-tokens",
        "8",
        "--tokens-only",
        "--decode.steps",
        *map(str, steps),
    ]
    launch_compile.main(["decode", "--topology", topology, "--json", str(file), *sizes, *more])
    return json.loads(file.read_text())


def compile_full_size(tmp_path, topology: str, *more: str) -> dict:
    file = tmp_path / "costs.json"
    launch_compile.main(["decode", "--topology", topology, "--json", str(file), *more])
    return json.loads(file.read_text())


def check_flops(found: dict, model: ModelConfig, steps: tuple[int, ...] = STEPS) -> None:
    """Not below the least; above it by what blocks and halos of local attention cost."""
    assert found["frames"] == 51
    floor = flops.floor_flops(model, 51, 8, steps)
    assert found["floor_flops_a_clip"] == floor
    assert floor <= found["flops_a_clip"] < 1.5 * floor
    assert found["unknown_loops"] == []


def test_decoding_for_the_cpu(tiny, tmp_path, capsys):
    steps = (1, 1, 1, 1)  # several have a last one apart, and twice the program
    found = compile_decode(tmp_path, "cpu:1", steps=steps)
    check_flops(found, tiny, steps)
    assert found["dtype"] == "float32" and found["num_devices"] == 1
    key = jax.random.key(0)
    params = jax.eval_shape(lambda key: transformer.init_params(tiny, key), key)
    text_params = jax.eval_shape(lambda key: t5.init(t5_files.PUBLISHED["t5-base"], key), key)
    size = 4 * (transformer.count_params(params) + transformer.count_params(text_params))
    assert size <= found["argument_bytes"] < size + 2**16
    assert found["temp_bytes"] > 0 and found["cycles"] is None
    shown = capsys.readouterr().out
    assert "times the least" in shown and "no estimate for this hardware" in shown


def test_the_program_ends_in_samples(tiny, tmp_path):
    """As sampling has it, and without holding the whole clip in all channels."""
    found = compile_full_size(tmp_path, "cpu:1", "--seconds", "5", "--decode.steps", *"1111")
    samples = 5 * 32_000 * 4
    assert samples <= found["output_bytes"] < 1.1 * samples
    assert found["temp_bytes"] < 1.5 * 64 * samples  # all at once: 64 channels, more than once


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:2x2"], "unknown topology 'v9:2x2'; there are v5e:1x1"),
        (["--topology", "v5e:0x2"], "unknown topology"),
        (["--topology", "h100:0"], "unknown topology"),
        (["--topology", "cpu:1", "--decode.steps", "3", "2"], "one number a codebook: 4, not 2"),
        (
            ["--topology", "cpu:1", "--decode.steps", *"1111", "--preset", "draft"],
            "either --decode.steps",
        ),
        (["--topology", "cpu:1", "--batch-size", "0"], "--batch-size must be a whole number of"),
        (["--topology", "cpu:1", "--seconds", "nan"], "--seconds must lie between 1 and 600"),
        (["--topology", "cpu:1", "--mesh.frames", "2"], "needs 2 devices; there are 1"),
        (["--topology", "cpu:1", "--kernels.full", "cudnn"], "cudnn needs a GPU"),
        (["--topolgy", "cpu:1"], "did you mean --topology"),
        (["--topology", "cpu:1", "--without", "last_windo"], "--without must be"),
    ],
)
def test_mistakes_are_named(tiny, arguments, message):
    with refused(arguments, message):
        launch_compile.main(["decode", *arguments])


def test_a_misspelt_command_is_answered_with_the_nearest():
    for words, message in (
        (["decod", "--topology", "cpu:1"], "unknown command decod: did you mean decode?"),
        (["zzz"], "there are decode, train, plan"),
        ([], "give one of decode, train, plan"),
    ):
        with pytest.raises(UserError, match=message):
            launch_compile.main(words)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match=r"aot-tpu.*libtpu==0\.0\.52"):
        targets.load("v5e:2x2")

    def no_plugin(**keywords):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(targets.topologies, "get_topology_desc", no_plugin)
    with pytest.raises(UserError, match=r"aot-gpu.*jax-cuda13-pjrt==0\.10\.2"):
        targets.load("h100:8")


def test_chips_are_described():
    assert chips.CHIPS["v5e"].clock == 1.5e9
    for chip in chips.CHIPS.values():  # ridge points between 160 and 600 FLOPs a byte
        assert 160 < chip.peak_flops / chip.bandwidth < 600


# ------------------------------------------------------------------------- TPUs and GPUs


def on_first(target: targets.Target, *shape: int) -> jax.ShapeDtypeStruct:
    mesh = Mesh(np.asarray(target.devices[:1]), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "count"),
    [("v4:2x2x1", 8), ("v5e:2x2", 4), ("v5e:4x8", 32), ("v5p:2x2x1", 4), ("v6e:1x1", 1)],
)
def test_tpu_topologies(topology, count):
    target = targets.load(topology)
    assert (len(target.devices), target.platform) == (count, "tpu")
    peak = target.chip.device_flops
    # The clocks fit the cycles: a large product runs at most, and nearly, at the peak.
    square = on_first(target, 4096, 4096)
    found = hlo.costs(jax.jit(jnp.matmul).lower(square, square).compile())
    assert found.flops == 2 * 4096**3
    assert 0.65 < found.flops / (found.cycles / target.chip.clock) / peak < 1


@needs_libtpu
def test_an_impossible_topology_is_named():
    with pytest.raises(UserError, match="v5e:3x3: .*not divisible"):
        targets.load("v5e:3x3")


@needs_libtpu
def test_decoding_for_a_tpu(tiny, tmp_path, capsys):
    found = compile_decode(tmp_path, "v5e:2x2")
    check_flops(found, tiny)
    assert found["dtype"] == "bfloat16" and found["cycles"] > 0 and found["code_bytes"] > 0
    assert 0 < found["estimated_mfu"] < 1
    assert "of the peak" in capsys.readouterr().out


@needs_libtpu
def test_decoding_for_a_mesh_of_tpus(tiny, tmp_path):
    mesh = ("--mesh.data", "-1", "--mesh.frames", "2", "--batch-size", "2")
    found = compile_decode(tmp_path, "v5e:2x2", *mesh)
    assert found["num_devices"] == 4
    assert found["collective_runs"]["all-gather"] > 0
    assert found["flops_a_clip"] >= found["floor_flops_a_clip"]


@needs_libtpu
def test_10_s_of_the_small_model_for_a_tpu(tmp_path):
    """Within the budget, all of it: text encoder, decoding and codec."""
    found = compile_full_size(tmp_path, "v5e:2x2")
    assert found["flops_a_clip"] < 33e12 < 0.85 * found["reference_flops_a_clip"]
    assert found["temp_bytes"] < 64e6
    assert found["unknown_loops"] == []


@needs_libtpu
@pytest.mark.parametrize("full", ["slices", "splash"])
def test_30_s_of_the_small_model_for_a_tpu(tmp_path, full):
    """To tokens: the rows of zeros in the codec's LSTM alone are 0.2 TFLOP."""
    sizes = ("--seconds", "30", "--preset", "paper-30s", "--tokens-only", "--kernels.full", full)
    found = compile_full_size(tmp_path, "v5e:2x2", *sizes)
    assert found["square_arrays"] == []
    # (splash pads 1500 frames to 1536)
    assert found["flops_a_clip"] < {"slices": 200e12, "splash": 202e12}[full]
    assert bool(found["fused_attention"]) == (full == "splash")


@needs_cuda
def test_30_s_of_the_small_model_for_a_gpu(tmp_path):
    found = compile_full_size(tmp_path, "h100:1", "--seconds", "30", "--preset", "paper-30s")
    assert found["flops_a_clip"] < 200e12
    assert found["square_arrays"] == []
    assert any("__cudnn$fmha" in name for name in found["fused_attention"])


@needs_cuda
def test_decoding_for_a_gpu_uses_fused_attention(tiny, monkeypatch, tmp_path):
    sizes = {"width": 256, "num_layers": 2, "num_heads": 4}  # smaller products find no tiles
    monkeypatch.setitem(SIZES, "small", sizes)
    found = compile_decode(tmp_path, "h100:1")
    check_flops(found, ModelConfig(**sizes))
    assert any("__cudnn$fmha" in name for name in found["fused_attention"])
    assert len(targets.load("h100:4x8").devices) == 32


# ------------------------------------------------------------------------------- training


def test_a_training_step_for_the_cpu(tmp_path, capsys):
    file = tmp_path / "costs.json"
    launch_compile.main(
        ["train", "--topology", "cpu:1", "--config", "demo", "--clips-per-device", "4",
         "--json", str(file)]
    )  # fmt: skip
    found = json.loads(file.read_text())
    assert (found["parts"], found["clips_at_once"]) == (2, 4)
    assert [one["stage"] for one in found["programs"]] == [0, 1] and found["remat"] == "none"
    for one in found["programs"]:
        assert one["unknown_loops"] == []
        # It has the model's products, and those of the text encoder and local blocks.
        assert 1 < one["flops"] / found["model_flops"] < 1.6
        assert 0 <= one["argument_bytes"] - found["param_bytes"] < 1e5  # the batch
    shown = capsys.readouterr().out
    assert "in 2 parts of 4 clips" in shown and "stages above the first:" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh.data", "2", "--mesh.fsdp", "1"], "does not fit 1 devices"),
        (["--clips-per-device", "-1"], "--clips-per-device must be"),
        (["--stage", "4"], "--stage must lie between 0 and 3"),
        (["--config", "nothing"], "no such config"),
        (["--json", "/no/such/folder/x.json"], "no such folder"),
    ],
)
def test_mistakes_about_training_are_named(arguments, message):
    given = ["train", "--topology", "cpu:1", "--config", "demo", *arguments]
    with refused(arguments, message):
        launch_compile.main(given)


def test_what_is_left_open_is_ranked(monkeypatch, tmp_path, capsys):
    target = targets.Target(
        name="v5e:2x4", platform="tpu", devices=tuple(jax.devices()), chip=chips.CHIPS["v5e"]
    )
    monkeypatch.setattr(targets, "load", lambda name: target)
    monkeypatch.setattr(steps, "remats", lambda asked, platform: ("products", "full"))
    monkeypatch.setattr(search, "LEAST_COLUMNS", 32)  # of 128: nothing is split over eight
    compiled = []

    def costs(settings, stage, config, target):
        fsdp, parts = settings.mesh.shape["fsdp"], settings.num_parts
        compiled.append((settings.remat, fsdp, parts, stage))
        if (fsdp, stage) == (2, 1):
            return None  # the compiler finds no room
        peak = target.chip.device_bytes / (fsdp * parts if settings.remat == "products" else 2)
        seconds = 1 + stage + fsdp / 10 + (settings.remat == "full")
        memory = {"peak_bytes": peak, "argument_bytes": 0, "temp_bytes": 0, "code_bytes": 0}
        return memory | {"estimated_seconds": seconds}

    monkeypatch.setattr(search, "compiled", costs)
    file = tmp_path / "ranking.json"
    given = ["train", "--topology", "v5e:2x4", "--config", "demo", "--batch-size", "16"]
    launch_compile.main([*given, "--search", "--json", str(file)])
    rows = json.loads(file.read_text())["ranking"]
    found = [(row["remat"], row["mesh"]["fsdp"], row["parts"]) for row in rows]
    assert found == [("products", 1, 2), ("products", 4, 1), ("full", 1, 1), ("full", 4, 1)]
    assert rows[0]["step_seconds"] == pytest.approx(0.25 * 1.1 + 0.75 * 2.1)
    assert [one["stage"] for one in rows[0]["programs"]] == [0, 1]
    # The second stage is not compiled where the first has no room.
    assert ("products", 1, 1, 0) in compiled and ("products", 1, 1, 1) not in compiled
    shown = capsys.readouterr().out
    assert "--mesh.data 8, 2 parts, --remat products" in shown and "of the peak, 8.59 GB" in shown
    memory = {"peak_bytes": 1, "argument_bytes": 0, "temp_bytes": 0, "code_bytes": 0}
    monkeypatch.setattr(search, "compiled", lambda *_: memory | {"estimated_seconds": None})
    for topology, chip, message in (
        ("h100:8", "h100", "needs a TPU"),
        ("cpu:1", None, "a TPU"),
        ("v5p:2x2x2", "v5p", "cannot rank for v5p:2x2x2"),
    ):
        other = dataclasses.replace(target, name=topology, chip=chip and chips.CHIPS[chip])
        monkeypatch.setattr(targets, "load", lambda name, other=other: other)
        with pytest.raises(UserError, match=message):
            launch_compile.main([*given, "--search"])


def test_what_was_compiled_once_is_known(monkeypatch, tmp_path):
    texts, made = iter(["one", "one", "two", "three", "three"]), []

    def lower(*args):
        text = next(texts)
        return types.SimpleNamespace(as_text=lambda: text)

    def compiled_costs(lowered, target):
        made.append(lowered.as_text())
        if made[-1] == "three":
            raise UserError("v5e:2x2: RESOURCE_EXHAUSTED: it does not fit")
        return {"peak_bytes": len(made), "text": "long"}

    monkeypatch.setattr(plan, "lower", lower)
    monkeypatch.setattr(report, "compiled_costs", compiled_costs)
    monkeypatch.setattr(search.platformdirs, "user_cache_dir", lambda name: str(tmp_path))
    target = types.SimpleNamespace(name="v5e:2x2")
    found = [search.compiled(None, 0, load_config("demo"), target) for _ in range(5)]
    assert found == [{"peak_bytes": 1}, {"peak_bytes": 1}, {"peak_bytes": 2}, None, None]
    assert made == ["one", "two", "three"]


def test_a_run_is_planned(capsys):
    launch_compile.main(
        ["plan", "--topology", "cpu:1", "--config", "music_small_10s", "--batch-size", "2"]
    )
    shown = capsys.readouterr().out
    assert "420 M" in shown and "2 clips of 10 s, 500 frames" in shown
    with pytest.raises(UserError, match="--mfu"):
        launch_compile.main(["plan", "--topology", "cpu:1", "--mfu", "0"])


@needs_libtpu
def test_a_training_step_for_tpus_gathers_what_is_split(tmp_path):
    file = tmp_path / "costs.json"
    launch_compile.main(
        ["train", "--topology", "v5e:2x2", "--config", "demo", "--json", str(file),
         "--mesh.data", "1", "--mesh.fsdp", "4"]
    )  # fmt: skip
    found = json.loads(file.read_text())
    assert found["fits"] and found["step_seconds"] > 0 and 0 < found["mfu"] < 1
    first, above = found["programs"]
    for one in (first, above):
        assert one["collective_runs"]["all-gather"] > 0
        # Parameters come while something is computed.
        assert one["overlapping_collective_runs"] > one["async_collective_runs"] / 2 > 0
    average = 0.25 * first["estimated_seconds"] + 0.75 * above["estimated_seconds"]
    assert found["step_seconds"] == pytest.approx(average)

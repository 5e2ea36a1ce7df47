"""Arguments of the Python API: odd good values are taken, bad ones are one line that names them.

No model computes here: what is wrong is said before.
"""

import dataclasses
import random
import types
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import EMBEDDED_CODEC

from magnet_jax import HybridMAGNeT, MAGNeT, MusicGen, arguments, audio_write
from magnet_jax.arguments import Between, check, checked
from magnet_jax.codec.encodec import Codec
from magnet_jax.config import (
    AutoregressiveConfig,
    DecodeConfig,
    HybridConfig,
    KernelConfig,
    ModelConfig,
    RescoreConfig,
    RunConfig,
    SamplingMeshConfig,
)
from magnet_jax.decode import canvas, placement, sampling, tokens_of_text
from magnet_jax.errors import UserError
from magnet_jax.io.torch_env import import_torch

torch = import_torch()

# --- the mechanism ------------------------------------------------------------------------------

SHARE = Annotated[float, Between(0, 1)]


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, np.int64(3), 3),
        (int, np.array(3), 3),
        (int, torch.tensor(3), 3),
        (int, jnp.asarray(3), 3),
        (int | None, None, None),
        (float, 2, 2.0),
        (float, np.float32(2.5), 2.5),
        (float, np.float16(2.5), 2.5),
        (float, np.longdouble(2.5), 2.5),
        (float, jnp.asarray(2.5, jnp.bfloat16), 2.5),
        (float, torch.tensor(2.5, dtype=torch.bfloat16, requires_grad=True), 2.5),
        (SHARE, 1, 1.0),
        (bool, np.True_, True),
        (bool, torch.tensor(False), False),
        (Literal["a", "b"], np.str_("a"), "a"),
        (tuple[int, ...], [np.int8(1), 2], (1, 2)),
        (tuple[int, ...], np.arange(2), (0, 1)),
        (tuple[int, ...], torch.arange(2), (0, 1)),
        (tuple[int, ...], range(2), (0, 1)),
        (str | Path, Path("a"), Path("a")),
        (str, "long " * 100, "long " * 100),
        (str | Path, "a\udcff", "a\udcff"),  # a file name that is not UTF-8
    ],
)
def test_odd_values_that_are_good(hint, value, expected):
    found = check(hint, value, "x")
    assert found == expected and type(found) is type(expected)


NO_NUMBERS = [
    "3", "", b"3", "\ud800", True, np.True_, torch.tensor(True), [3], (3,), {}, 3j, object(),
    Decimal(3), float, np.zeros(2), np.array([3]), torch.ones(1), np.datetime64("2020-01-01"),
    np.array("3"), torch.ones((), device="meta"),
]  # fmt: skip
NOT_FINITE = [float("nan"), float("inf"), -float("inf"), np.float32("nan"), torch.tensor(np.inf)]
ENDLESS = [10**400, -(10**400)]
FRACTIONS = [1.5, 1.0, np.float64(2), torch.tensor(2.0)]


@pytest.mark.parametrize(
    "value", [None, *NO_NUMBERS, *NOT_FINITE, *ENDLESS], ids=lambda value: type(value).__name__
)
def test_what_is_no_number(value):
    for hint in (float, int, SHARE, int | Literal["a"]):
        if hint is int and isinstance(value, int) and type(value) is not bool:
            continue  # a whole number has no end of its own
        if hint == int | Literal["a"] and isinstance(value, int) and type(value) is not bool:
            continue
        with pytest.raises(UserError, match=r"^x must (be|lie) .*, not ") as error:
            check(hint, value, "x")
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 200


@pytest.mark.parametrize("value", FRACTIONS)
def test_fractions_are_not_whole(value):
    with pytest.raises(UserError, match="x must be a whole number"):
        check(int, value, "x")


@pytest.mark.parametrize("rate", [44_100, 44_100.0, np.float32(44_100), torch.tensor(44_100.0)])
def test_a_rate_is_whole_also_as_a_float(rate):
    found = arguments.as_rate(rate, "x")
    assert found == 44_100 and type(found) is int


def test_lengths_are_said_to_be_numbers():
    with pytest.raises(UserError, match="^x must be a positive number, and at most 600, not '3'$"):
        check(arguments.Seconds, "3", "x")


def test_limits_belong_to_the_range_or_do_not():
    for hint, good, bad in (
        (SHARE, (0, 1), (-1e-9, 1.0001)),
        (Annotated[float, Between(0, 1, above=True)], (1e-9, 1), (0, -0.0, 2)),
        (Annotated[int, Between(1, 3)], (1, 3), (0, 4)),
    ):
        for value in good:
            check(hint, value, "x")
        for value in bad:
            with pytest.raises(UserError, match="^x must "):
                check(hint, value, "x")


def test_functions_are_held_to_what_they_declare():
    @checked
    def add(a: int, b: SHARE | None = None, *, c: str = "") -> float:
        return a + (b or 0)

    assert add(np.int64(1), b=np.float32(0.5)) == 1.5
    for call, complaint in (
        (lambda: add(), "add: missing a required argument: 'a'"),
        (lambda: add(1, tempo=3), "add: got an unexpected keyword argument 'tempo'"),
        (lambda: add(1, 1, 1), "add: too many positional"),
        (lambda: add(1, a=1), "add: multiple values for argument 'a'"),
        (lambda: add("1"), "^a must be a whole number, not '1'"),
        (lambda: add(1, 2), "^b must lie between 0 and 1, not 2"),
        (lambda: add(1, c=3), "^c must be a text, not 3"),
        (lambda: add(1, c="\ud800"), "^c must be a text"),
    ):
        with pytest.raises(UserError, match=complaint):
            call()


class Nasty:
    def __repr__(self):
        raise RuntimeError

    def __array__(self, *_):
        raise RuntimeError("two\nlines")


def test_objects_with_code_of_their_own():
    with pytest.raises(UserError, match="^x must be a number, not a Nasty$"):
        check(float, Nasty(), "x")
    with pytest.raises(UserError, match=r"^x cannot be made a NumPy array \(two lines\)$"):
        arguments.as_array(Nasty(), "x")


def test_an_error_is_one_line_that_any_terminal_shows():
    assert str(UserError("no such folder: a\n b\r\nc \ud800")) == ("no such folder: a b c \\ud800")


# --- settings, which the commands have too ------------------------------------------------------


def test_settings_are_plain_numbers_whatever_they_came_as():
    """They are a part of compiled programs' names, and go into JSON."""
    config = DecodeConfig(
        steps=np.array([3, 2]), temperature=np.float32(2.5), top_k=torch.tensor(7), greedy=np.False_
    )
    assert config == DecodeConfig(steps=(3, 2), temperature=2.5, top_k=7)
    assert hash(config) == hash(DecodeConfig(steps=(3, 2), temperature=2.5, top_k=7))
    assert type(config.top_k) is int and type(config.steps[0]) is int


@pytest.mark.parametrize(
    ("make", "name", "values"),
    [
        (DecodeConfig, "steps", [(), [0], [1.5], ["3"], 3, "333", [10**6], [True], None]),
        (DecodeConfig, "temperature", [0, -1, 1e300]),
        (DecodeConfig, "top_p", [0, 1.5, -1]),
        (DecodeConfig, "top_k", [-1, 2**40, *FRACTIONS]),
        (DecodeConfig, "max_guidance", [1e300]),
        (DecodeConfig, "min_guidance", [-1e300]),
        (DecodeConfig, "span_length", [-1, 10**6, *FRACTIONS]),
        (DecodeConfig, "span_score", ["min", 3, ["max"]]),
        (AutoregressiveConfig, "temperature", [0, -1, 1e300, 1e-300]),
        (AutoregressiveConfig, "top_k", [-1, *FRACTIONS]),
        (AutoregressiveConfig, "guidance", [1e300]),
        (HybridConfig, "prompt_seconds", [-1, 1e300]),
        (HybridConfig, "decode", ["x"]),
        (RescoreConfig, "weight", [-0.1, 1.1]),
        (RescoreConfig, "guidance", [-1, 1e300]),
        (SamplingMeshConfig, "data", [0, -2, *FRACTIONS]),
        (SamplingMeshConfig, "guidance", [0, 3, 1.0]),
        (KernelConfig, "full", ["x", 3]),
        (KernelConfig, "local_block", [-1, *FRACTIONS]),
    ],
)
def test_settings_out_of_range_are_named(make, name, values):
    for value in (*values, *NO_NUMBERS, *NOT_FINITE):
        if name == "steps" and np.shape(value) == (1,):
            continue  # a list of one number
        with pytest.raises(UserError, match=name):
            make(**{name: value})


def test_a_span_longer_than_the_clip_takes_no_memory(monkeypatch):
    """Such a span would be decoded whole, and attention over it takes the square."""
    run = RunConfig(model=MODEL, decode=DecodeConfig(steps=(1,) * 4))
    loaded = types.SimpleNamespace(config=run, codec=EMBEDDED_CODEC)
    text = tokens_of_text.Text(np.zeros((1, 4), int), np.zeros((1, 4), bool), np.zeros(1, int))
    with pytest.raises(UserError, match="span_length 501 is longer than the clip, .* 500 frames"):
        batch = sampling.Batch(
            text=text, sample_B=np.arange(1), seed=0, canvas=canvas.blank(1, 4, 500),
            decoding=dataclasses.replace(run.decode, span_length=501),
        )  # fmt: skip
        sampling.make_program(loaded, batch, placement.Execution(), platform="cpu", mesh=None)


# --- the API ------------------------------------------------------------------------------------

MODEL = ModelConfig(codebook_size=1024, width=16, num_heads=2, num_layers=1)
HYBRID = dataclasses.replace(MODEL, kind="hybrid", delays=(0, 1, 2, 3))


def stand_in(cls):
    """A model of 10 s clips that has everything but weights."""
    model = {"magnet": MODEL, "hybrid": HYBRID}.get(cls.kind)
    model = model or dataclasses.replace(HYBRID, kind="musicgen")
    objective = "hybrid" if cls is HybridMAGNeT else "magnet"
    config = RunConfig(objective=objective, model=model)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, segment_seconds=10.0)
    )
    made = object.__new__(cls)
    made.loaded = types.SimpleNamespace(config=config, codec=EMBEDDED_CODEC)
    made.generation, made.duration = config.sampling, 10.0
    made.decoder = object.__new__(Codec)
    made.decoder.spec = EMBEDDED_CODEC
    return made


PROMPT = np.zeros((1, 1, 1600), np.float32)
# Of each kind of argument: odd values that are good, and bad ones.
SEEDS = ([np.int64(3), torch.tensor(4)], [-1, 2**31, 2**32, 2**64, *FRACTIONS])
MASS = ([np.float32(0.5), 0, 1], [-0.1, 1.1])
HEAT = ([np.float64(2.5), torch.tensor(0.0), 3], [-1, 1e300])
TOP_K = ([np.int32(5), 0], [-1, 10**12, *FRACTIONS])
GUIDANCE = ([np.float32(2.5), 3], [1e300, -1e300])
LENGTH = ([np.float32(2.5), np.int64(3), torch.tensor(4.0)], [0, -1, 601, 10**9])
FLAG = ([np.True_, False], [1, 0, "yes", np.ones(2, bool)])
COUNT = ([np.int64(2)], [0, -1, 10**9, *FRACTIONS])
PAD = ([None, "batch", np.int64(3)], [-1, 1.5, "longest", 10**12])
CHOICE = ["x", 3, ["max"], object()]
AUTOREGRESSIVE = {
    "use_sampling": FLAG, "top_k": TOP_K, "top_p": MASS, "temperature": HEAT,
    "cfg_coef": GUIDANCE,
}  # fmt: skip
MAGNETS = {
    **{name: kind for name, kind in AUTOREGRESSIVE.items() if name != "cfg_coef"},
    "max_cfg_coef": GUIDANCE,
    "min_cfg_coef": GUIDANCE,
    "decoding_steps": (
        [np.array([4, 3, 2, 1]), [np.int64(2)] * 4, torch.arange(1, 5), range(1, 5)],
        [[1.5] * 4, [1], [], [0] * 4, ["3"] * 4, "3333", 4, [10**7] * 4, [True] * 4, {1: 2},
         np.ones((2, 2), int)],
    ),
    "span_arrangement": (["stride1", np.str_("nonoverlap")], CHOICE),
    "span_scoring": (["prod"], CHOICE),
    "anneal_temp": FLAG,
    "span_len": ([np.int64(5)], [0, -1, 10**6, *FRACTIONS]),
    "whole_spans": FLAG,
    "duration": LENGTH,
}  # fmt: skip
GENERATE = {"progress": ([], FLAG[1]), "return_tokens": ([], FLAG[1]), "seed": ([], SEEDS[1])}
TEXTS = [
    [], [1], ["x", 2.0], "\ud800", ["\udcff"], 3, b"x", {"a": "b"}, {"a"}, object(), ["x"] * 1025,
    (str(i) for i in range(10**9)), np.array("x"), np.zeros(2), [None, ["x"]],
]  # fmt: skip
AUDIO = [  # what is none, whatever it is for
    None, "x", 3, [[[0.1], [0.2, 0.3]]], object(), np.zeros((1, 1, 1, 100)),
    np.zeros((1, 100), np.int16), torch.zeros(1, 100, dtype=torch.int32), np.zeros((1, 100), bool),
    torch.zeros(1, 100, dtype=torch.bfloat16), torch.zeros(1, 100, requires_grad=True),
    torch.zeros(1, 100, device="meta"), torch.zeros(1, 100).to_sparse(),
    np.zeros((1, 100), complex), np.full((1, 100), np.nan), np.full((1, 100), np.inf),
    np.full((1, 100), 1e300), np.zeros((1, 0)), np.zeros((0, 1, 9)), np.array(["x"]), Nasty(),
]  # fmt: skip
PROMPTS = [*AUDIO, np.zeros(100), np.zeros((100, 1)), np.zeros((1, 10**6), np.float32)]
TOKENS = [
    None, "x", [[1, 2], [3]], np.zeros((4, 9), int), np.zeros((1, 3, 9), int),
    np.zeros((1, 4, 0), int), np.zeros((1, 4, 9)), np.zeros((1, 4, 9), bool),
    np.full((1, 4, 9), -1), np.full((1, 4, 9), 1024), np.full((1, 4, 9), 2**40),
    torch.full((1, 4, 9), 1024), torch.zeros(1, 4, 9, requires_grad=True), Nasty(),
]  # fmt: skip
# Each call: what is given besides, and the arguments that are tried.
CALLS = {
    (MAGNeT, "set_generation_params"): (
        {}, MAGNETS | {"preset": (["draft"], [*CHOICE, "fast", "\ud800"])},
    ),
    (HybridMAGNeT, "set_generation_params"): ({}, MAGNETS),
    (HybridMAGNeT, "set_prompt_params"): (
        {}, AUTOREGRESSIVE | {"seconds": ([np.float32(2.5), 0, 999], [-1, 1e300])},
    ),
    (MusicGen, "set_generation_params"): (
        {},
        AUTOREGRESSIVE
        | {"duration": LENGTH, "extend_stride": ([np.float32(2.5), 4], [0, -1, 10, 1e-9])},
    ),
    (MAGNeT, "set_long_params"): (
        {},
        {"mode": (["anchors", "joint"], CHOICE), "anneal": (["rate"], CHOICE),
         "steps": (["auto"], CHOICE), "lead": ([np.float32(0.5), 0], [-0.1, 0.8]),
         "extend_stride": ([np.float32(2.5), 4], [0, -1, 10, 1e-9])},
    ),
    (MusicGen, "set_custom_progress_callback"): (
        {}, {"progress_callback": ([None, print], ["x", 3])},
    ),
    (MAGNeT, "set_rescorer"): (
        {"rescorer": sampling.Rescorer(None, None, None)},
        {"rescorer": ([], [3, object(), True, "x" * 300, "\ud800"]),
         "weight": ([np.float32(0.5), 1], [-0.1, 1.1]),
         "guidance": ([], [-1, 1e300])},
    ),
    (MAGNeT, "generate"): (
        {"descriptions": "x"},
        GENERATE | {"text_pad_len": ([], PAD[1]), "descriptions": ([], TEXTS)},
    ),
    (MusicGen, "generate_unconditional"): (
        {"num_samples": 1}, GENERATE | {"num_samples": ([], [None, *COUNT[1]])},
    ),
    (MAGNeT, "generate_continuation"): (
        {"prompt": PROMPT, "prompt_sample_rate": 16_000},
        GENERATE
        | {
            "prompt": ([], PROMPTS),
            "prompt_sample_rate": ([], [None, 0, -1, 44_100.5, True, "44100", 10**9]),
            "descriptions": ([], [*TEXTS, ["x", "y"]]),
            "text_pad_len": ([], PAD[1]),
        },
    ),
    (MAGNeT, "generate_audio"): ({"gen_tokens": np.zeros((1, 4, 9), int)},
                                 {"gen_tokens": ([], TOKENS)}),
    (MAGNeT, "get_pretrained"): (
        {"name": "nowhere"},
        {
            "name": ([], [None, 3, "\ud800", "a\0b", "x" * 5000, b"x", ["x"], Nasty()]),
            "weights": ([], ["best", 3]),
            "step": ([], [-1, 2**64, *FRACTIONS]),
            "text_encoder": ([], [3, "\0"]),
            "codec": ([], [3, "\ud800"]),
            "compute_dtype": ([], ["float16", np.float32, 3]),
            "codec_backend": ([], ["numpy", 3]),
            "kernels": ([], ["auto", {}]),
            "mesh": ([], [2, "data"]),
        },
    ),
}  # fmt: skip
NUMBERS = (SEEDS, MASS, HEAT, TOP_K, GUIDANCE, LENGTH, COUNT)


def bad_values(kind):
    return [*kind[1], *(NO_NUMBERS + NOT_FINITE + ENDLESS if kind in NUMBERS else [])]


def assert_refused(call, name, value, given):
    cls, method = call
    owner = cls if method == "get_pretrained" else stand_in(cls)
    with pytest.raises(UserError, match=name.replace("descriptions", "description")) as error:
        getattr(owner, method)(**given)
    assert len(str(error.value).splitlines()) == 1, value


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call[0].__name__}.{call[1]}")
def test_what_is_wrong_with_an_argument_is_one_line_that_names_it(call):
    given, tried = CALLS[call]
    for name, kind in tried.items():
        for value in bad_values(kind):
            assert_refused(call, name, value, given | {name: value})
    assert_refused(call, "tempo", None, given | {"tempo": 120})


@pytest.mark.parametrize("seed", range(3))
def test_a_bad_argument_among_odd_good_ones(seed):
    """Draws calls with several good arguments and one bad one; without it they succeed."""
    rng = random.Random(seed)
    setters = [call for call in CALLS if call[1].startswith("set_") and call[1] != "set_rescorer"]
    for _ in range(60):
        call = rng.choice(setters)
        tried = CALLS[call][1]
        names = rng.sample(sorted(tried), rng.randint(1, min(4, len(tried))))
        if {"preset", "decoding_steps"} <= {*names}:
            names.remove("preset")
        good = {name: rng.choice(tried[name][0]) for name in names}
        getattr(stand_in(call[0]), call[1])(**good)
        name = rng.choice(names)
        bad = rng.choice(bad_values(tried[name]))
        print(call, good, name, bad)  # shown where it fails
        assert_refused(call, name, bad, good | {name: bad})


def test_odd_settings_arrive_as_plain_ones():
    model = stand_in(MAGNeT)
    model.set_generation_params(
        temperature=np.float32(2.5), top_k=torch.tensor(7), decoding_steps=np.array([4, 3, 2, 1]),
        duration=np.int64(3), max_cfg_coef=jnp.asarray(2.5), use_sampling=np.True_,
    )  # fmt: skip
    assert model.generation == dataclasses.replace(
        DecodeConfig(), temperature=2.5, top_k=7, steps=(4, 3, 2, 1), max_guidance=2.5
    )
    assert model.duration == 3 and type(model.duration) is float


# --- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("stem_name", [None, 3, "", "\ud800", "a\0b", b"x", "x" * 300]),
        ("wav", AUDIO),
        ("sample_rate", [None, 0, -1, 1.5, *NO_NUMBERS, *NOT_FINITE, *ENDLESS]),
        ("format", CHOICE),
        ("normalize", FLAG[1]),
        ("strategy", CHOICE),
        ("loudness_headroom_db", [1e300, -1e300, *NO_NUMBERS, *NOT_FINITE]),
        ("loudness_compressor", FLAG[1]),
        ("add_suffix", FLAG[1]),
        ("tempo", [120]),
    ],
)
def test_audio_write(tmp_path, name, values):
    given = {"stem_name": tmp_path / "x", "wav": np.zeros((1, 9)), "sample_rate": 16_000}
    for value in values:
        with pytest.raises(UserError, match=name if name != "wav" else "wav|audio") as error:
            audio_write(**given | {name: value})
        assert len(str(error.value).splitlines()) == 1
    assert not any(tmp_path.iterdir())

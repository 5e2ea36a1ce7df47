"""Optimizers and schedules by hand, and the configs of the paper's runs by the paper's numbers."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from configs import ablations
from launch.train import config_names, load_config
from magnet_jax.config import (
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    from_json,
    to_json,
)
from magnet_jax.convert import t5_files
from magnet_jax.errors import UserError
from magnet_jax.model import sharding
from magnet_jax.train import optimizer, steps

SETTINGS = dict(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, d0=1e-6)
SHAPES = {"a": (8, 6), "b": (16,), "c": (4, 2, 2)}


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def gradients(params, step):
    """Of a noisy bowl around 1; with any array library."""
    rng = np.random.default_rng(step)
    noise = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    return {name: 0.1 * (params[name] - 1 + noise[name]) for name in params}


def dadam_by_hand(params, rates, *, b1, b2, eps, weight_decay, d0, growth_rate=math.inf):
    """AudioCraft's `dadam` as a loop over arrays, in float64: the course of d, and the weights."""
    params = {name: p.astype(np.float64) for name, p in params.items()}
    mu, nu, s = ({name: np.zeros(p.shape) for name, p in params.items()} for _ in range(3))
    d, g_sq, course = d0, 0.0, []
    for step, rate in enumerate(rates):
        lr = d * rate
        g_norm = s_norm = s_l1 = 0.0
        for name, g in gradients(params, step).items():
            if rate > 0:
                mu[name] = b1 * mu[name] + (1 - b1) * lr * g
                nu[name] = b2 * nu[name] + (1 - b2) * g**2
                s[name] = b2 * s[name] + (1 - b2) * lr * g
                denominator = np.sqrt(nu[name]) + eps
                g_norm += (g**2 / denominator).sum()
                s_norm += (s[name] ** 2 / denominator).sum()
                s_l1 += np.abs(s[name]).sum()
        if s_l1 > 0:
            g_sq = b2 * g_sq + (1 - b2) * lr**2 * g_norm
            estimate = (s_norm / (1 - b2) - g_sq) / s_l1
            d = max(d, min(estimate, d * growth_rate))
            for name in params:
                params[name] = params[name] * (1 - weight_decay * lr)
                params[name] -= mu[name] / (np.sqrt(nu[name]) + eps)
        course.append(d)
    return np.array(course), params


def run(transform, params, steps, state=None, gradients=gradients):
    """The course of d, the weights and the state."""
    state = jax.jit(transform.init)(params) if state is None else state
    update = jax.jit(transform.update)
    course = []
    for step in range(steps):
        updates, state = update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
        course.append(optimizer.step_size(state))
    return jax.device_get(course), params, state


# --- D-Adaptation --------------------------------------------------------------------------------


@pytest.mark.parametrize("growth_rate", [0.0, 1.3])
@pytest.mark.parametrize("first", [0, 1])
def test_dadam_is_audiocrafts(first, growth_rate):
    """60 steps, the learning rate warming up from zero or from a tenth."""
    rates = [min((step + first) / 10, 1.0) for step in range(60)]
    transform = optimizer.dadam(
        lambda count: jnp.asarray(rates)[count], **SETTINGS, growth_rate=growth_rate
    )
    course, params, _ = run(transform, weights(), 60)
    expected, expected_params = dadam_by_hand(
        weights(), rates, **SETTINGS, growth_rate=growth_rate or math.inf
    )
    assert course[-1] > (1e-3 if not growth_rate else 1e-4)  # it found something
    np.testing.assert_allclose(course, expected, rtol=1e-5)
    for name in SHAPES:
        np.testing.assert_allclose(params[name], expected_params[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cause", ["learning rate", "gradients"])
def test_steps_that_say_nothing_change_nothing(cause):
    """Where others divide zero by zero."""
    rate = 0.0 if cause == "learning rate" else 1.0
    zero_after = lambda count: jnp.where(count < 3, rate, 1.0)  # noqa: E731
    nothing = lambda params, step: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
    transform = optimizer.dadam(zero_after, **SETTINGS)
    course, params, state = run(
        transform, weights(), 3, gradients=nothing if cause == "gradients" else gradients
    )
    assert (course == np.float32(1e-6)).all()
    jax.tree.map(np.testing.assert_array_equal, params, weights())
    assert not any(leaf.any() for leaf in jax.tree.leaves((state.mu, state.nu, state.s)))
    course, params, state = run(transform, params, 40, state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((course, params, state)))
    assert course[-1] > 1e-4


def test_decay_is_decoupled():
    """It takes its share of the weights whatever the gradients, and leaves moments and d alone."""
    results = []
    for decay in (0.0, 0.5):
        transform = optimizer.dadam(
            lambda _: 1.0, **(SETTINGS | {"weight_decay": decay, "d0": 0.1})
        )
        params = weights()
        updates, state = transform.update(gradients(params, 0), transform.init(params), params)
        results.append((updates, state))
    (plain, state), (decayed, decayed_state) = results
    jax.tree.map(np.testing.assert_array_equal, state, decayed_state)
    for name, p in weights().items():
        np.testing.assert_allclose(decayed[name], plain[name] - 0.5 * 0.1 * p, rtol=1e-5)


def test_dadam_on_eight_devices_equals_one():
    """The sums behind d run over all devices, and moments live where the parameters do."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    specs = {"a": jax.P("fsdp", "tensor"), "b": jax.P("tensor"), "c": jax.P(None, None, "fsdp")}
    shardings = {name: jax.NamedSharding(mesh, spec) for name, spec in specs.items()}
    config = OptimizerConfig(name="dadam", peak_lr=1.0, warmup_steps=10, d0=1e-4)
    transform = optimizer.make_optimizer(config)
    course, params, _ = run(transform, weights(), 30)

    abstract = jax.eval_shape(transform.init, weights())
    placed = sharding.like_params(abstract, shardings, mesh)
    split = jax.device_put(weights(), shardings)
    state = jax.jit(transform.init, out_shardings=placed)(split)
    split_course, split_params, state = run(transform, split, 30, state)
    for moments in (state[1].mu, state[1].nu, state[1].s):
        assert {name: leaf.sharding.spec for name, leaf in moments.items()} == specs
        assert all(leaf.dtype == np.float32 for leaf in moments.values())
    assert state[1].d.sharding.is_fully_replicated
    np.testing.assert_allclose(split_course, course, rtol=1e-4)
    for name in SHAPES:
        np.testing.assert_allclose(split_params[name], params[name], rtol=1e-4, atol=1e-5)


def test_moments_of_a_run_are_sharded_as_its_parameters(tmp_path):
    config = tiny.run_config(
        tmp_path, tmp_path, optimizer=OptimizerConfig(name="dadam", peak_lr=1.0)
    )
    t5_config, _, _ = t5_files.load(config.text.source)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    settings = steps.make_settings(config, t5_config, np.dtype("float32"), 30, mesh)
    _, shardings = steps.state_shardings(settings)
    (state,) = shardings["opt"][1:]
    assert state.mu == state.nu == state.s == shardings["params"]
    assert state.d == state.g_sq == state.count == sharding.replicated(mesh)


def test_step_size_is_found_in_a_chain():
    config = OptimizerConfig(name="dadam", peak_lr=1.0, d0=3e-5)
    assert optimizer.step_size(optimizer.make_optimizer(config).init(weights())) == np.float32(3e-5)
    adamw = optimizer.make_optimizer(OptimizerConfig())
    assert optimizer.step_size(adamw.init(weights())) is None


def test_embeddings_and_heads_can_learn_faster():
    params = {"lm": {"embed": jnp.ones(3), "heads": jnp.ones(3), "norm": jnp.ones(3)}}
    params["text"] = {"embed": jnp.ones(3)}  # of another network
    g = jax.tree.map(lambda p: 0.1 * p, params)
    for name in ("adamw", "dadam"):
        steps = []
        for ratios in ({}, {"embed_lr_ratio": 30.0, "head_lr_ratio": 0.5}):
            config = OptimizerConfig(name=name, peak_lr=0.1, warmup_steps=0, schedule="constant")
            made = optimizer.make_optimizer(dataclasses.replace(config, **ratios))
            steps.append(made.update(g, made.init(params), params)[0])
        plain, scaled = steps
        assert float(plain["lm"]["embed"][0]) < 0
        np.testing.assert_allclose(scaled["lm"]["embed"], 30 * plain["lm"]["embed"], rtol=1e-6)
        np.testing.assert_allclose(scaled["lm"]["heads"], 0.5 * plain["lm"]["heads"], rtol=1e-6)
        np.testing.assert_array_equal(scaled["lm"]["norm"], plain["lm"]["norm"])
        np.testing.assert_array_equal(scaled["text"]["embed"], plain["text"]["embed"])


# --- averaged weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 3, 10])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999])
def test_averaged_weights_follow_audiocrafts_law(decay, updates):
    """An update multiplies the count by the decay and adds 1; its weights' share is 1 / count."""
    average = jax.jit(functools.partial(optimizer.average, decay=decay, updates=updates))
    rng = np.random.default_rng(0)
    start = rng.normal(size=5).astype(np.float32)
    found, expected, count = {"w": jnp.asarray(start)}, start.astype(np.float64), 0.0
    for step in range(1, 301):
        weights = rng.normal(size=5).astype(np.float32)
        found = average(found, {"w": jnp.asarray(weights)}, jnp.int32(step))
        if step % updates == 0:
            count = count * decay + 1
            expected = expected * (1 - 1 / count) + weights / count
        np.testing.assert_allclose(found["w"], expected, atol=1e-6, err_msg=f"step {step}")
        if step < updates:
            np.testing.assert_array_equal(found["w"], start)
        elif step == updates:  # nothing of the start is left
            np.testing.assert_array_equal(found["w"], weights)


@pytest.mark.parametrize("name", ["adamw", "dadam"])
def test_an_optimizer_counts_its_steps(name):
    """What the average goes by, and so needs no number of its own in a checkpoint."""
    config = OptimizerConfig(name=name, peak_lr=0.5, warmup_steps=2, schedule_steps=9)
    made, params = optimizer.make_optimizer(config), weights()
    state = made.init(params)
    for step in range(3):
        assert int(optimizer.steps_taken(state)) == step
        zeros = jax.tree.map(np.zeros_like, params)  # which D-Adaptation does not learn from
        _, state = made.update(gradients(params, step) if step else zeros, state, params)


def test_which_runs_are_averaged_every_step():
    """AudioCraft's ten steps where it trains hundreds of thousands; every step in short runs."""
    assert OptimizerConfig().ema_updates == 10
    for name in config_names():
        short = name in ("demo", "recipe", "recipe_small", "recipe_tonal")
        assert load_config(name).optimizer.ema_updates == (1 if short else 10), name


# --- schedules and settings ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "points"),
    [
        # Steps count from 0; the first learns with a hundredth of the peak.
        ({"schedule": "cosine"}, {0: 0.002, 49: 0.1, 99: 0.2, 549: 0.1, 999: 0.0, 2000: 0.0}),
        ({"schedule": "cosine", "final_lr_ratio": 0.5}, {549: 0.15, 999: 0.1}),
        ({"schedule": "constant"}, {0: 0.002, 49: 0.1, 99: 0.2, 10**6: 0.2}),
        ({"schedule": "constant", "warmup_steps": 0}, {0: 0.2, 10**6: 0.2}),
        ({"schedule": "inverse_sqrt"}, {0: 0.002, 49: 0.1, 99: 0.2, 399: 0.1, 9999: 0.02}),
    ],
)
def test_schedules_by_hand(settings, points):
    config = OptimizerConfig(
        **(dict(peak_lr=0.2, warmup_steps=100, schedule_steps=1000) | settings)
    )
    schedule = optimizer.learning_rate(config)
    for step, expected in points.items():
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5, abs=1e-8)
        assert float(jax.jit(schedule)(jnp.int32(step))) == pytest.approx(expected, abs=1e-7)


def test_adamw_is_the_default_and_what_it_was():
    config = OptimizerConfig(warmup_steps=10, schedule_steps=50)
    assert (config.name, config.schedule, config.peak_lr) == ("adamw", "cosine", 3e-4)
    params, g = weights(), gradients(weights(), 0)
    updates, _ = optimizer.make_optimizer(config).update(
        g, optimizer.make_optimizer(config).init(params), params
    )
    norm = math.sqrt(sum((x**2).sum() for x in g.values()))
    for name, p in params.items():
        clipped = g[name] / max(norm, 1.0)
        expected = -3e-5 * (clipped / (np.abs(clipped) + 1e-8) + 0.1 * p)
        np.testing.assert_allclose(updates[name], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dadam"}, "leave it near 1"),
        ({"name": "adamw", "peak_lr": 1.0}, "is dadam's"),
        ({"name": "sgd"}, "optimizer.name must be one of"),
        ({"schedule": "linear"}, "optimizer.schedule must be one of"),
        ({"schedule": "inverse_sqrt", "warmup_steps": 0}, "inverse_sqrt needs"),
        ({"warmup_steps": 100, "schedule_steps": 100}, "must be below"),
        ({"schedule": "constant", "warmup_steps": -1}, "warmup_steps"),
        ({"growth_rate": 0.5}, "growth_rate must be 0 or above 1"),
        ({"d0": 0.0}, "optimizer.d0"),
        ({"ema_updates": 0}, "optimizer.ema_updates"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**settings)


# --- configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "seconds", "batch", "steps"),
    [
        ("music_small_10s", 10, 576, (20, 10, 10, 10)),
        ("music_medium_10s", 10, 576, (20, 10, 10, 10)),
        ("music_small_30s", 30, 192, (60, 10, 10, 10)),
        ("music_medium_30s", 30, 192, (60, 10, 10, 10)),
        ("sound_small", 10, 128, (20, 10, 10, 10)),
        ("sound_medium", 10, 128, (20, 10, 10, 10)),
    ],
)
def test_configs_have_the_papers_numbers(name, seconds, batch, steps):
    config = load_config(name)
    model, adam, decode = config.model, config.optimizer, config.decode
    assert (config.data.segment_seconds, config.data.batch_size) == (seconds, batch)
    assert (model.num_codebooks, model.codebook_size) == (4, 2048)
    assert (model.span_length, model.local_context) == (3, 5)
    sizes = (1536, 24, 48) if "medium" in name else (1024, 16, 24)
    assert (model.width, model.num_heads, model.num_layers) == sizes
    assert (adam.b1, adam.b2, adam.weight_decay, adam.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (adam.ema_decay, adam.ema_updates) == (0.99, 10)
    assert (decode.steps, decode.anneal_temperature, decode.min_guidance) == (steps, True, 1.0)
    texts = (config.data.merge_text_p, config.data.word_dropout)
    if name.startswith("music"):
        assert (adam.name, adam.peak_lr, adam.schedule) == ("dadam", 1.0, "cosine")
        assert (adam.warmup_steps, adam.schedule_steps, config.steps) == (4000, 10**6, 10**6)
        assert (decode.temperature, decode.top_p, decode.max_guidance) == (3.0, 0.9, 10.0)
        assert (config.text.source, model.text_width) == ("t5-base", 768)
        assert (config.condition_dropout, texts) == (0.3, (0.25, 0.3))
    else:
        assert (adam.name, adam.peak_lr, adam.schedule) == ("adamw", 5e-4, "inverse_sqrt")
        assert (adam.warmup_steps, config.steps) == (3000, 200_000)
        assert (decode.temperature, decode.top_p, decode.max_guidance) == (3.5, 0.8, 20.0)
        assert (config.text.source, model.text_width) == ("t5-large", 1024)
        assert (config.condition_dropout, texts) == (0.1, (0.0, 0.0))


@pytest.mark.parametrize(
    ("name", "section", "settings"),
    [
        ("span1", "model", {"span_length": 1}),
        ("span5_full", "model", {"span_length": 5, "local_context": 0}),
        ("span10", "model", {"span_length": 10}),
        ("guidance20to1", "decode", {"max_guidance": 20.0}),
        ("guidance3to3", "decode", {"max_guidance": 3.0, "min_guidance": 3.0}),
        ("first100", "decode", {"steps": (100, 10, 10, 10)}),
        ("others1", "decode", {"steps": (20, 1, 1, 1)}),
    ],
)
def test_ablations_change_one_thing(name, section, settings):
    base = load_config("music_small_10s")
    changed = dataclasses.replace(getattr(base, section), **settings)
    found = load_config(f"music_small_10s_{name}")
    assert found == dataclasses.replace(base, **{section: changed})


def test_ablations_are_those_of_the_paper():
    base = load_config("music_small_10s")
    same = {name for name, config in ablations.variants.items() if config == base}
    suffixes = ("span3", "guidance10to1", "first20", "others10")
    assert same == {f"music_small_10s_{suffix}" for suffix in suffixes}
    assert len(ablations.variants) == 12 + 6 + 5 + 4
    assert not set(config_names()) & set(ablations.variants)


def test_every_config_survives_json(tmp_path):
    for name in (*config_names(), *ablations.variants):
        config = load_config(name)
        (tmp_path / "config.json").write_text(to_json(config))
        assert json.loads((tmp_path / "config.json").read_text())
        assert from_json(RunConfig, tmp_path / "config.json") == config


def test_unrestricted_context_is_a_setting():
    model = ModelConfig(local_context=0)
    assert (model.context(False), model.context(True)) == (None, None)
    assert (ModelConfig().context(False), ModelConfig().context(True)) == (None, 5)
    with pytest.raises(UserError, match="local_context"):
        ModelConfig(local_context=-1)
    near = ModelConfig(first_context=25)
    assert (near.context(False), near.context(True), near.widest_context) == (25, 5, 25)
    with pytest.raises(UserError, match="model.first_context"):
        ModelConfig(first_context=-1)
    with pytest.raises(UserError, match="first_context belongs to kind magnet, not hybrid"):
        ModelConfig(kind="hybrid", delays=(0, 1, 2, 3), first_context=25)

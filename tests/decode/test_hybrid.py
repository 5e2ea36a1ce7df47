"""Hybrid-MAGNeT: its mask, which is what inference sees, its losses, and its decoding."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from launch import export as export_command
from launch import sample
from launch import train as launch_train
from launch.compile import hlo
from magnet_jax import HybridMAGNeT, MAGNeT, MusicGen
from magnet_jax.checkpoints import pretrained
from magnet_jax.config import (
    DecodeConfig,
    KernelConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SamplingMeshConfig,
    TextConfig,
    from_json,
    with_hybrid_objective,
)
from magnet_jax.convert import t5_files
from magnet_jax.decode import (
    autoregressive,
    canvas,
    choose,
    hybrid,
    parallel,
    placement,
    rescore,
    sampler,
    sampling,
    schedule,
)
from magnet_jax.decode.tokens_of_text import TextStates
from magnet_jax.errors import UserError
from magnet_jax.model import attention, patterns, sharding, transformer
from magnet_jax.train import hybrid_objective, loop, objective, steps, watch
from magnet_jax.train.masking import span_count, span_counts, span_mask
from magnet_jax.train.setup import Setup, first_state, set_up, to_devices

MODEL = ModelConfig(
    kind="hybrid", num_codebooks=3, codebook_size=32, width=16, num_heads=2, num_layers=2,
    text_width=12, delays=(0, 1, 3), local_context=2, span_length=2,
)  # fmt: skip
FRAMES = 24
STEPS = patterns.num_steps(FRAMES, MODEL.delays)


@pytest.fixture(scope="module")
def params():
    return transformer.init_params(MODEL, jax.random.key(0))


def texts(batch=2, length=5):
    states = jax.random.normal(jax.random.key(5), (batch, length, MODEL.text_width))
    return states, jnp.ones((batch, length), bool)


def codes(batch=2):
    return jax.random.randint(jax.random.key(1), (batch, 3, FRAMES), 0, 32)


def noise(*firsts, rate=0.6):
    masking = objective.draw_noise(jax.random.key(2), jnp.arange(len(firsts)), FRAMES, 0.0)
    masking = masking._replace(rate_B=jnp.full(len(firsts), rate))
    return hybrid_objective.Noise(masking, jnp.asarray(firsts))


@functools.partial(jax.jit, static_argnames="local")
def losses(params, codes_BKT, drawn, stage, *, local, valid_BT=None):
    states_BSE, text_mask_BS = texts(len(codes_BKT))
    if valid_BT is None:
        valid_BT = jnp.ones((len(codes_BKT), FRAMES), bool)
    batch = {"text_mask_BS": text_mask_BS, "codes_BKT": codes_BKT, "valid_BT": valid_BT}
    return hybrid_objective.loss_fn(
        params, states_BSE, batch, drawn, stage, config=MODEL, local=local
    )[1]


# --- the mask -----------------------------------------------------------------------------------


def visible(first, context, delay, num_steps):
    """The mask in so many words."""
    rows = np.zeros((num_steps, num_steps), bool)
    for query in range(num_steps):
        for key in range(num_steps):
            if query < first:
                rows[query, key] = key <= query
            elif key < first or context is None:
                rows[query, key] = True
            else:
                rows[query, key] = query - delay - context <= key <= query + context
    return rows


@pytest.mark.parametrize(("context", "delay"), [(None, 0), (2, 0), (2, 3)])
@pytest.mark.parametrize("block", [7, 128])
def test_attention_and_its_gradients_are_those_of_the_mask(context, delay, block):
    num_steps, firsts = 20, (1, 8, 20)
    qkv = [jax.random.normal(jax.random.key(i), (3, num_steps, 2, 4)) for i in range(3)]
    seen = jnp.asarray([visible(first, context, delay, num_steps) for first in firsts])

    def plain(query, key, value):
        scores = jnp.einsum("BTNH,BSNH->BNTS", query, key) / 2
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("BNTS,BSNH->BTNH", weights, value)

    blocked = functools.partial(
        attention.hybrid_attention, first_B=jnp.asarray(firsts), context=context, delay=delay,
        block=block,
    )  # fmt: skip
    weight = jax.random.normal(jax.random.key(9), qkv[0].shape)
    one, other = (
        jax.jit(jax.value_and_grad(lambda qkv, f=f: (weight * f(*qkv)).sum()))(qkv)
        for f in (blocked, plain)
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_no_array_of_all_pairs_is_there():
    num_steps = 1000
    shape = jax.ShapeDtypeStruct((1, num_steps, 1, 4), jnp.float32)

    def loss(qkv, delay):
        run = functools.partial(attention.hybrid_attention, first_B=jnp.array([7]), context=2)
        return run(*qkv, delay=delay).sum()

    compiled = jax.jit(jax.grad(loss)).lower((shape,) * 3, 1).compile()
    assert not hlo.square_arrays(compiled.as_text(), num_steps)


# --- what the losses depend on ------------------------------------------------------------------


def leaks(params, half, first, stage, *, rate=0.6):
    """Where a step's embedding changes a half of the loss: bool [S], by its gradient."""
    embed = transformer.Transformer._embed

    @jax.jit
    def gradient(offset_1SD):
        def loss(offset_1SD):
            with pytest.MonkeyPatch.context() as patch:
                shifted = lambda *args: embed(*args) + offset_1SD  # noqa: E731
                patch.setattr(transformer.Transformer, "_embed", shifted)
                found = losses.__wrapped__(
                    params, codes(1), noise(first, rate=rate), stage, local=stage > 0
                )
            return getattr(found, half).nll.sum()

        return jax.grad(loss)(offset_1SD)

    return np.asarray(gradient(jnp.zeros((1, STEPS, MODEL.width))) != 0).any(-1)[0]


def test_the_loss_before_t_depends_on_earlier_steps_alone(params):
    first, stage = 11, 0  # (the stage that sees most)
    found = leaks(params, "autoregressive", first, stage)
    np.testing.assert_array_equal(found, np.arange(STEPS) < first - 1)


def test_the_loss_from_t_on_depends_on_the_whole_prompt_and_the_shifted_window(params):
    first, stage = 8, 2
    # One span of two frames, or the last frame alone.
    found = leaks(params, "parallel", first, stage, rate=0.0)
    mask_1T = span_mask(
        noise(first).masking.starts_BT, jnp.zeros(1), MODEL.span_length,
        jnp.array([first - 1 - MODEL.delays[stage]]),
    )  # fmt: skip
    hidden = 1 + np.flatnonzero(mask_1T[0]) + MODEL.delays[stage]
    assert 1 <= len(hidden) <= 2
    reach, layers = MODEL.local_context, MODEL.num_layers
    step = np.arange(STEPS)
    near = (step >= hidden.min() - layers * (reach + MODEL.delays[stage])) & (
        step <= hidden.max() + layers * reach
    )
    np.testing.assert_array_equal(found, (step < first) | near)
    assert not near[first:].all()


def test_hidden_tokens_do_not_reach_the_network(params, monkeypatch):
    """Nor does what is hidden in codebooks above; the prompt does, in every codebook."""
    first, stage, drawn, codes_BKT = 9, 1, noise(9, 9), codes()
    seen = []
    cross_entropy = objective.cross_entropy

    def spy(logits_BTV, target_BT, mask_BT):
        seen.append((logits_BTV, mask_BT))
        return cross_entropy(logits_BTV, target_BT, mask_BT)

    monkeypatch.setattr(objective, "cross_entropy", spy)

    @jax.jit
    def parallel_logits(codes_BKT):
        losses.__wrapped__(params, codes_BKT, drawn, stage, local=True)
        return seen[0]

    expected, mask_BT = parallel_logits(codes_BKT)
    assert mask_BT.any() and not mask_BT.all()
    given_BKT = np.zeros(codes_BKT.shape, bool)
    for codebook, delay in enumerate(MODEL.delays):
        given_BKT[:, codebook, : first - 1 - delay] = True
    given_BKT[:, 0] = True
    given_BKT[:, stage] |= ~np.asarray(mask_BT)
    found, _ = parallel_logits(jnp.where(given_BKT, codes_BKT, (codes_BKT + 1) % 32))
    np.testing.assert_array_equal(found, expected)
    for codebook in range(3):
        changed, _ = parallel_logits(codes_BKT.at[:, codebook, first - 5].add(1) % 32)
        assert (changed != expected).any(axis=(1, 2)).all()


def test_padding_does_not_reach_the_losses(params):
    valid_BT = jnp.broadcast_to(jnp.arange(FRAMES) < 15, (2, FRAMES))
    one, other = (
        losses(params, codes_BKT, noise(10, 22), 1, local=True, valid_BT=valid_BT)
        for codes_BKT in (codes(), codes().at[..., 15:].set(3))
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
    # Of the second row every codebook's valid frames lie in the prompt.
    assert one.parallel.tokens[1] == 0 and one.autoregressive.tokens[1] == 45


# --- the two halves -----------------------------------------------------------------------------


def test_teacher_forcing_gives_the_logits_of_one_step_at_a_time(params):
    """At every step of the prompt and every codebook, with a cache, at any stage of the rest."""
    steps_BKS = patterns.to_steps(codes(), MODEL.delays, MODEL.mask_id)

    @jax.jit
    def forced(first, delay):
        model = transformer.bind(MODEL, params)
        attend = functools.partial(
            attention.hybrid_attention, first_B=jnp.broadcast_to(first, 2), delay=delay
        )
        states = model.trunk(steps_BKS, model.read_text(*texts()), local=True, attend=attend)
        return model.all_heads(states)

    @jax.jit
    def extend(cache, step_BK1, step):
        model = transformer.bind(MODEL, params)
        states, cache = model.extend(step_BK1, model.read_text(*texts()), cache, step)
        return cache, model.all_heads(states)[:, :, 0]

    cache, logits = transformer.bind(MODEL, params).empty_cache(2, STEPS, jnp.float32), []
    for step in range(STEPS):
        cache, found = extend(cache, steps_BKS[..., step : step + 1], step)
        logits.append(found)
    logits = np.stack(logits, axis=2)
    for first, delay in ((1, 0), (2, 3), (12, 1), (STEPS, 0)):
        expected = forced(first, delay)
        np.testing.assert_allclose(logits[:, :, :first], expected[:, :, :first], atol=1e-5)


def test_every_token_counts_once(params):
    firsts = np.array([1, 5, STEPS])
    found = losses(params, codes(3), noise(*firsts, rate=1.0), 1, local=True)
    prompts = (firsts[:, None] - 1 - np.array(MODEL.delays)).clip(0, FRAMES)
    np.testing.assert_array_equal(found.autoregressive.tokens, prompts.sum(1))
    np.testing.assert_array_equal(found.parallel.tokens, FRAMES - prompts[:, 1])
    np.testing.assert_allclose(found.tokens, prompts.sum(1) / 3 + FRAMES - prompts[:, 1], rtol=1e-6)


def test_t_is_uniform_and_spans_hide_the_wanted_share_of_the_rest():
    drawn = hybrid_objective.draw_noise(jax.random.key(0), jnp.arange(8000), MODEL, 4, 0.0)
    counts = np.bincount(drawn.first_B)
    assert len(counts) == 1 + patterns.num_steps(4, MODEL.delays) and counts[0] == 0
    np.testing.assert_allclose(counts[1:] / 8000, 1 / 8, atol=0.015)
    plain = objective.draw_noise(jax.random.key(0), jnp.arange(8000), 4, 0.0)
    np.testing.assert_array_equal(drawn.masking.starts_BT, plain.starts_BT)

    lengths = np.repeat([0, 2, 17, 50], 500)
    uniform = jax.random.uniform(jax.random.key(1), (2000, 50))
    mask = np.asarray(span_mask(uniform, jnp.full(2000, 0.7), 3, jnp.asarray(50 - lengths)))
    free = np.arange(50) >= 50 - lengths[:, None]
    assert not mask[~free].any()
    for length in (17, 50):
        assert mask[lengths == length][:, -length:].mean() == pytest.approx(0.7, abs=0.05)
    np.testing.assert_array_equal(mask.any(-1), lengths > 0)


def test_spans_are_counted_as_in_the_table():
    lengths, rates = np.meshgrid([3, 4, 17, 50], np.arange(101) / 100, indexing="ij")
    found = span_count(jnp.asarray(lengths.ravel()), jnp.asarray(rates.ravel()), 3, 50)
    expected = np.concatenate([span_counts(length, 3) for length in lengths[:, 0]])
    np.testing.assert_array_equal(found, expected)


# --- decoding -----------------------------------------------------------------------------------


def test_the_rest_sees_what_it_saw_in_training(params):
    """States from the prompt's cache are those of a training pass, at all stages."""
    prompt_steps, codes_BKT = 8, codes()
    steps_BKS = patterns.to_steps(codes_BKT, MODEL.delays, MODEL.mask_id)

    @functools.partial(jax.jit, static_argnames="local")
    def both(stage, local):
        model = transformer.bind(MODEL, params)
        text = model.read_text(*texts())
        cache = model.empty_cache(2, prompt_steps, jnp.float32)
        _, cache = model.extend(steps_BKS[..., :prompt_steps], text, cache, 0)
        beginning = autoregressive.Beginning(
            num_given=0, num_frames=4, whole=False, choice="greedy", guided=False
        )
        assert beginning.num_steps(MODEL.delays) == prompt_steps
        network = hybrid._network_after(
            MODEL, params, text, text, cache, beginning, tiny.task(codes_BKT)
        )
        found = network.trunk(codes_BKT, stage=stage, local=local, guided=False, first_B=None)
        attend = functools.partial(
            attention.hybrid_attention, first_B=jnp.full(2, prompt_steps),
            delay=jnp.asarray(MODEL.delays)[stage],
        )  # fmt: skip
        states = model.trunk(steps_BKS, text, local=local, attend=attend)
        first = 1 + jnp.asarray(MODEL.delays)[stage]
        return found, jax.lax.dynamic_slice_in_dim(states, first, FRAMES, axis=1)

    for stage in range(3):
        found, expected = both(stage, stage > 0)
        given = prompt_steps - 1 - MODEL.delays[stage]
        np.testing.assert_allclose(found[:, given:], expected[:, given:], atol=1e-5)


DECODING = DecodeConfig(steps=(2, 1, 1), greedy=True, max_guidance=3.0)


def generate(
    params, num_frames, *, given=None, guidance=3.0, decoding=DECODING, span_score="max",
    on_step=None,
):  # fmt: skip
    """Two clips that begin with so many frames one step after another."""
    num_given = 0 if given is None else given.shape[-1]
    codes_BKT = np.zeros((2, 3, FRAMES), np.int32)
    codes_BKT[..., :num_given] = given if num_given else 0
    beginning = autoregressive.Beginning(
        num_given=num_given, num_frames=num_frames, whole=num_frames == FRAMES, choice="greedy",
        guided=guidance != 1, apart=True,
    )  # fmt: skip
    decoding = dataclasses.replace(decoding, span_score=span_score)
    rules = tiny.rules(decoding, MODEL.span_length, MODEL.mask_id, on_step=on_step)
    run = functools.partial(hybrid.generate, config=MODEL, beginning=beginning, rules=rules)
    return jax.jit(run)(
        params,
        TextStates(*texts(), jnp.zeros(2, jnp.int32)),
        tiny.task(codes_BKT, num_given=num_given),
        schedule.make_schedule(decoding),
        autoregressive.Sampling(1.0, 0.0, guidance),
    )


def one_after_another(params, prompt_BKP, guidance=3.0):
    return tiny.one_after_another(
        params, *texts(), jnp.zeros(2, jnp.int32), choose.sample_keys(0, jnp.arange(2)),
        prompt_BKP, autoregressive.Sampling(1.0, 0.0, guidance), config=MODEL, num_frames=FRAMES,
        choice="greedy",
    )  # fmt: skip


def test_a_clip_begins_as_the_autoregressive_one_and_is_completed(params):
    """Of what is given, which is kept, five frames; up to the seventh frame, and to the last."""
    given = (codes()[..., :5] + 1) % 32
    whole = np.asarray(one_after_another(params, given))
    np.testing.assert_array_equal(whole[..., :5], given)
    np.testing.assert_array_equal(generate(params, FRAMES, given=given).codes_BKT, whole)
    seen = []
    hear = lambda *numbers: seen.append(tuple(map(int, numbers)))  # noqa: E731
    found = generate(params, 7, given=given, on_step=hear)
    jax.effects_barrier()
    total = (7 - 5) + 3 + sum(DECODING.steps)
    assert sorted(seen) == [(i + 1, total) for i in range(total)]
    codes_BKT, hidden_PBT = map(np.asarray, found)
    assert (codes_BKT < 32).all() and (codes_BKT != whole).any()
    for codebook, first in enumerate((0, 2, 3)):  # step of decoding
        prompt = 7 + 3 - MODEL.delays[codebook]
        np.testing.assert_array_equal(codes_BKT[:, codebook, :prompt], whole[:, codebook, :prompt])
        assert hidden_PBT[first, :, prompt:].all() and not hidden_PBT[first, :, :prompt].any()


def test_a_span_in_which_the_prompt_ends_is_scored_by_what_is_predicted_of_it(params):
    """Predictions are sure. What is given is not predicted, and makes no span less sure."""
    sure = params | {"heads": 100 * params["heads"]}
    decoding = dataclasses.replace(DECODING, steps=(3, 3, 3))
    _, hidden_PBT = generate(sure, 7, decoding=decoding, span_score="prod")
    for codebook, given in enumerate((10, 9, 7)):
        first, _, last = hidden_PBT[3 * codebook : 3 * codebook + 3]  # steps of the codebook
        assert first[:, given:].all() and not first[:, :given].any()
        assert (last.sum(-1) == 2).all()  # one span, and not the half one
        assert not last[:, : given + given % 2].any()


def test_without_a_prompt_decoding_is_magnets_on_delayed_codebooks(params):
    """Against a pass over all steps at every step of decoding."""
    model = transformer.bind(MODEL, params)
    rows = transformer.with_null_rows(model.read_text(*texts()))

    def trunk(codes_BKT, *, stage, local, guided, first_B):
        steps_RKS = patterns.to_steps(
            jnp.concatenate([codes_BKT, codes_BKT]), MODEL.delays, MODEL.mask_id
        )
        delay = jnp.asarray(MODEL.delays)[stage]
        attend = functools.partial(
            attention.hybrid_attention, first_B=jnp.ones(4, jnp.int32), delay=delay
        )
        states = transformer.bind(MODEL, params).trunk(steps_RKS, rows, local=local, attend=attend)
        return jax.lax.dynamic_slice_in_dim(states, 1 + delay, FRAMES, axis=1)

    def head(states_RMD, stage, *, guided):
        both = jnp.split(transformer.bind(MODEL, params).head(states_RMD, stage), 2)
        return both if guided else (both[0], None)

    rules = tiny.rules(DECODING, MODEL.span_length, MODEL.mask_id, guided="all")
    run = functools.partial(parallel.decode, parallel.Network(trunk, head), rules)
    task = tiny.task(np.zeros((2, 3, FRAMES), np.int32))
    expected = jax.jit(run)(task, schedule.make_schedule(DECODING))
    found = generate(params, 0)
    np.testing.assert_array_equal(found.codes_BKT, expected.codes_BKT)
    np.testing.assert_array_equal(found.hidden_PBT, expected.hidden_PBT)


# --- as a user meets it -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step, of the smallest config with the hybrid objective."""
    folder = tmp_path_factory.mktemp("hybrid")
    tiny.write_noise(folder / "tokens", {"train": 8})
    config = tiny.run_config(
        folder / "tokens", folder / "run", steps=1, log_every=1, text=TextConfig(max_tokens=16),
        decode=DecodeConfig(steps=(1, 1, 1, 1)),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        tiny.use_one_device(patch)
        patch.setattr(launch_train, "load_config", lambda name: config)
        launch_train.main(["--objective", "hybrid", "--prompt-seconds", "0.2"])
    return folder / "run"


def test_a_run_tells_both_losses_apart(run):
    config = from_json(RunConfig, run / "config.json")
    assert config.objective == config.model.kind == "hybrid"
    assert config.model.delays == (0, 1, 2, 3)
    (line,) = watch.read_scalars(run)
    halves = line["train/loss_parallel"], line["train/loss_autoregressive"]
    assert min(halves) < line["train/loss"] < max(halves)
    one = objective.LossAux(*(np.full(4, x) for x in (6.0, 1.0, 2.0)))  # by masking rate
    other = objective.LossAux(*(np.full(4, x) for x in (4.0, 0.0, 4.0)))
    found = watch.validation_scalars([hybrid_objective.add_halves(one, other, 4)] * 4)
    assert found["validation/loss_2"] == found["validation/loss_parallel"] == 3.0
    assert found["validation/loss_autoregressive"] == 1.0
    assert found["validation/loss"] == pytest.approx((6 + 4 / 4) / (2 + 4 / 4))


def test_a_mesh_and_parts_train_as_one_device():
    """Clips of several lengths and prompts, so that parts have unlike numbers of tokens."""
    config = with_hybrid_objective(
        tiny.run_config(
            Path("no data"), Path("no run"), optimizer=OptimizerConfig(warmup_steps=0, eps=1e-3)
        )
    )
    t5_config, t5_params, tokenizer = t5_files.load("embedded")
    t5_params, frames = jax.tree.map(np.asarray, t5_params), 18
    rng = np.random.default_rng(0)
    batch = {
        "codes_BKT": rng.integers(0, 1024, (8, 4, frames)).astype(np.int32),
        "valid_BT": np.arange(frames)[None] < rng.integers(3, frames + 1, (8, 1)),
        "text_ids_BS": rng.integers(1, 99, (8, 6)).astype(np.int32),
        "text_mask_BS": np.arange(6)[None] < rng.integers(0, 7, (8, 1)),
        "seed_B": np.arange(8, dtype=np.int32),
    }

    def step(sizes, parts):
        mesh = sharding.make_mesh(
            MeshConfig(**dict(zip(sharding.AXES, sizes))), jax.devices()[: math.prod(sizes)]
        )
        settings = steps.make_settings(config, t5_config, np.dtype("float32"), frames, mesh)
        settings = dataclasses.replace(settings, num_parts=parts)
        setup = Setup(None, t5_config, t5_params, tokenizer, None, frames, settings)
        state, metrics = steps.train_step(
            first_state(setup, jax.random.key(0)), {}, to_devices(batch, mesh),
            jax.random.key(0), 1, settings=settings, local=True,
        )  # fmt: skip
        return state["params"], {name: float(x) for name, x in metrics.items()}

    expected, metrics = step((1, 1, 1), 1)
    found, others = step((2, 1, 2), 2)
    assert others == pytest.approx(metrics, rel=1e-5)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_window_without_a_token_has_no_point():
    window = watch.Window()
    for stage, (one, other) in enumerate([(1.0, np.nan), (3.0, 5.0), (np.nan, np.nan)]):
        metrics = {"loss": 2.0, "loss_parallel": one, "loss_autoregressive": other, "d": 1.0}
        window.add(stage, metrics)
        assert metrics == {"d": 1.0}
    means = {name: watch._mean(losses) for name, losses in window.halves.items()}
    assert means == {"loss": 2.0, "loss_parallel": 2.0, "loss_autoregressive": 5.0}
    assert np.isnan(watch._mean(window.losses[2]))


@pytest.mark.parametrize(
    ("words", "begun_with", "objective"),
    [
        (["--config", "demo"], "hybrid", "hybrid"),
        (["--config", "music_small_30s_hybrid"], "magnet", "hybrid"),
        (["--config", "demo", "--objective", "hybrid"], "magnet", "hybrid"),
        (["--config", "demo"], "magnet", "magnet"),
        (["--config", "recipe"], "magnet", "magnet"),  # (whose own models begin with their codec)
    ],
)
def test_what_is_begun_with_another_model(run, monkeypatch, words, begun_with, objective):
    """The objective is the config's, or the model's; settings of sampling are the model's."""
    settings = from_json(RunConfig, run / "config.json")
    if begun_with == "magnet":
        model = dataclasses.replace(settings.model, kind="magnet", delays=())
        settings = dataclasses.replace(settings, objective="magnet", model=model)
    monkeypatch.setattr(pretrained, "read_settings", lambda source: settings)
    begun = []
    monkeypatch.setattr(loop, "train", begun.append)
    launch_train.main([*words, "--init-from", "another", "--out", str(run.parent / "next")])
    (config,) = begun
    assert config.objective == objective
    assert config.model.delays == ((0, 1, 2, 3) if objective == "hybrid" else ())
    assert (config.model.width, config.prompt_seconds) == (16, 0.2)


def test_the_command_samples_and_exports(run, tmp_path):
    args = ["--checkpoint", str(run), "--prompt", "x", "--out", str(tmp_path / "wavs")]
    (path,) = sample.sample(sample.parse(args))
    settings = json.loads(path.with_suffix(".json").read_text())
    assert settings["decode"]["prompt_seconds"] == 0.2  # the run's own
    assert sample.parse(args).prompt_seconds == 0.2
    again = [*args[:4], "--out", str(tmp_path / "whole"), "--prompt-seconds", "9"]
    (path,) = sample.sample(sample.parse(again))  # (0.6 s are the clip)
    assert json.loads(path.with_suffix(".json").read_text())["decode"]["prompt_seconds"] == 0.6
    given = sample.parse([*args, "--prompt-seconds", "0"])
    assert given.prompt_seconds == 0 and given.decode.steps == (1, 1, 1, 1)

    out = tmp_path / "exported"
    with pytest.raises(UserError, match="AudioCraft has no hybrid models: --no-audiocraft"):
        export_command.main(export_command.Args(checkpoint=run, out=out))
    export_command.main(
        export_command.Args(checkpoint=run, out=out, audiocraft=False, verify=True)
    )  # (with logits from PyTorch)
    one, other = pretrained.load(run), pretrained.load(out)
    assert (other.config.model, other.config.sampling) == (one.config.model, one.config.sampling)
    assert other.config.objective == "hybrid"
    jax.tree.map(np.testing.assert_array_equal, other.params["lm"], one.params["lm"])


def test_the_python_api_and_two_devices(run):
    model = HybridMAGNeT.get_pretrained(run)
    for make in (MAGNeT, MusicGen):
        with pytest.raises(UserError, match="is a hybrid: load it with HybridMAGNeT"):
            make.get_pretrained(run)
    model.set_prompt_params(seconds=0.1, temperature=0)
    model.set_generation_params(decoding_steps=[1, 1, 1, 1], temperature=2.0)
    assert model.generation.autoregressive.greedy and model.generation.decode.temperature == 2.0
    # Longer than the seconds to begin with, of which it is then all.
    given = np.random.default_rng(0).integers(0, 1024, (3, 4, 8))
    one, two = (
        sampling.generate(
            model.loaded, ["a", "b", ""], num_frames=30, decoding=model.generation, seed=0,
            given=canvas.beginning_with(given, 30),
            execution=placement.Execution(mesh=SamplingMeshConfig(data=data)),
        ).codes_BKT
        for data in (1, 2)
    )  # fmt: skip
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one[..., :8], given)


def test_a_rescorer_has_its_say_in_what_is_completed(run):
    """It is sure of every third span alone, and of nothing that the text does not tell."""
    span_length = ModelConfig().span_length

    def read(params, texts_B, *, num_frames, length):
        span_T = jnp.arange(num_frames) // span_length
        sure_BT = (span_T[None] + texts_B[:, None]) % 3 == 0
        return lambda codes_BKT, hidden_BT, stage, *, local: sure_BT.astype(jnp.float32)

    planted = sampler.Rescorer(
        read, (), lambda texts, text_pad_len: np.array([len(text) for text in texts]), 1.0
    )
    loaded = pretrained.load(run)
    settings = loaded.config.sampling
    decoding = dataclasses.replace(
        settings, decode=dataclasses.replace(settings.decode, steps=(4, 1, 1, 1))
    )
    found = sampling.generate(
        loaded, ["a", "bb"], num_frames=60, decoding=decoding, seed=0, rescorer=planted,
    )  # fmt: skip
    given = 10 + 3  # frames of the first codebook that one step after another makes
    for hidden_T, length in zip(found.hidden_PBT[1], (1, 2)):
        kept_S = np.flatnonzero(~hidden_T[15:].reshape(-1, span_length).any(-1)) + 5
        assert 2 <= len(kept_S) <= 3 and ((kept_S + length) % 3 == 0).all()
        assert not hidden_T[:given].any()


@pytest.mark.parametrize("seconds", [0.0, 0.26, 9.0])
def test_whole_spans_cut_a_clip_alike_however_it_begins(run, seconds):
    """Of 14 frames, and a beginning of none, of one beyond the last whole span, and of all."""
    loaded = pretrained.load(run)
    settings = dataclasses.replace(loaded.config.sampling, prompt_seconds=seconds)
    decoding = dataclasses.replace(
        settings, decode=dataclasses.replace(settings.decode, whole_spans=True)
    )
    make = functools.partial(sampling.generate, loaded, ["x"], num_frames=14, seed=0)
    codes_BKT = make(decoding=decoding).codes_BKT
    assert codes_BKT.shape == (1, 4, 12) and codes_BKT.max() < 1024
    with pytest.raises(UserError, match="leaves nothing to generate of 12 whole-span frames"):
        make(decoding=decoding, given=canvas.beginning_with(codes_BKT, 14))


def test_what_does_not_fit_is_one_line(run, tmp_path):
    args = ["--checkpoint", str(run), "--prompt", "x", "--out", str(tmp_path)]
    for more, message in (
        (
            ["--prompt-seconds", "-1"],
            "^--prompt-seconds must be at least 0, and at most 1000000, not -1.0$",
        ),
        (
            ["--prompt-seconds", "9", "--rescorer", str(run)],
            "nothing is rescored of a clip that is made one step after another to its end",
        ),
        (
            ["--prompt-seconds", "9", "--decode.steps", "2", "1", "1", "1"],
            "^--decode has no effect with --prompt-seconds 0.6: leave it out$",
        ),
        (
            ["--prompt-seconds", "0", "--autoregressive.top-k", "5"],
            "^--autoregressive has no effect with --prompt-seconds 0: leave it out$",
        ),
        (["--mesh.frames", "2"], "leave out kernels, mesh.guidance and mesh.frames"),
        (["--kernels.full", "blocks"], "leave out kernels"),
    ):
        with pytest.raises(UserError, match=message):
            sample.sample(sample.parse([*args, *more]))
    loaded, decode = pretrained.load(run), DecodeConfig(steps=(2, 1, 1, 1))
    decoding = dataclasses.replace(loaded.config.sampling, prompt_seconds=9.0, decode=decode)
    second = rescore.from_model(loaded, loaded)
    with pytest.raises(UserError, match="nothing is rescored of a clip that is made one step"):
        sampling.generate(loaded, ["x"], num_frames=14, decoding=decoding, seed=0, rescorer=second)
    for words, message in (
        (["--model.kind", "musicgen"], "a MusicGen is imported .* with --objective hybrid"),
        (["--model.kind", "hybrid"], "--model.kind hybrid: give --objective hybrid"),
    ):
        with pytest.raises(UserError, match=message):
            launch_train.main(["--config", "demo", *words])
    config = from_json(RunConfig, run / "config.json")
    with pytest.raises(UserError, match="--objective hybrid and --model.kind hybrid go together"):
        dataclasses.replace(config, objective="magnet")
    with pytest.raises(UserError, match="leave out kernels"):
        set_up(dataclasses.replace(config, kernels=KernelConfig(full="dense")))

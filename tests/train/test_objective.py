"""The training objective by property (its loss and gradients: test_golden.py)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magnet_jax.config import ModelConfig
from magnet_jax.model import transformer
from magnet_jax.train import objective
from magnet_jax.train.masking import masking_rate

SMALL = ModelConfig(codebook_size=32, width=16, num_heads=2, num_layers=1, text_width=12)


def test_corrupt_hides_the_stage_everything_above_and_padding():
    codes_BKT = jnp.arange(2 * 4 * 6).reshape(2, 4, 6)
    mask_BT = jnp.array([[1, 0, 0, 1, 0, 1], [0, 1, 0, 0, 0, 0]], bool)
    valid_BT = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool)
    out = objective.corrupt(codes_BKT, mask_BT, valid_BT, 1, mask_id=99)
    for b in range(2):
        for t in range(6):
            assert (out.input_BKT[b, 0, t] == 99) == (not valid_BT[b, t])
            assert (out.input_BKT[b, 1, t] == 99) == bool(mask_BT[b, t] or not valid_BT[b, t])
            assert (out.input_BKT[b, 2:, t] == 99).all()
    np.testing.assert_array_equal(out.target_BT, codes_BKT[:, 1])
    np.testing.assert_array_equal(out.mask_BT, mask_BT & valid_BT)


def test_noise_belongs_to_the_clip_not_to_its_row():
    draw = functools.partial(
        objective.draw_noise, jax.random.key(3), num_frames=20, condition_dropout=0.5
    )
    batch = draw(jnp.array([7, 8, 9]))
    alone = draw(jnp.array([9]))
    for one, other in zip(batch, alone):
        np.testing.assert_array_equal(one[2:], other)


def test_noise_follows_its_laws():
    noise = objective.draw_noise(jax.random.key(0), jnp.arange(4000), 4, 0.3)
    assert float(noise.drop_text_B.mean()) == pytest.approx(0.3, abs=0.03)
    # The rate is cos(pi/2 u): its mean is 2/pi, its median cos(pi/4).
    assert float(noise.rate_B.mean()) == pytest.approx(2 / np.pi, abs=0.02)
    assert float(jnp.median(noise.rate_B)) == pytest.approx(float(masking_rate(0.5)), abs=0.03)


def test_stages_are_uniform_and_a_function_of_seed_and_step():
    stages = [objective.stage_of_step(5, step, 4) for step in range(2000)]
    assert stages == [objective.stage_of_step(5, step, 4) for step in range(2000)]
    assert stages != [objective.stage_of_step(6, step, 4) for step in range(2000)]
    np.testing.assert_allclose(np.bincount(stages, minlength=4) / 2000, 0.25, atol=0.04)
    weighted = [objective.stage_of_step(5, step, 4, (6, 0, 1, 1)) for step in range(2000)]
    assert weighted == [objective.stage_of_step(5, step, 4, (0.75, 0, 0.125, 0.125))
                        for step in range(2000)]  # fmt: skip
    shares = np.bincount(weighted, minlength=4) / 2000
    np.testing.assert_allclose(shares, (0.75, 0, 0.125, 0.125), atol=0.04)
    assert shares[1] == 0


def test_hidden_and_padded_tokens_do_not_reach_the_loss():
    """Tokens above the stage, hidden inputs and padding may be anything."""
    params = transformer.init_params(SMALL, jax.random.key(0))
    key = jax.random.key(1)
    codes_BKT = jax.random.randint(key, (2, 4, 12), 0, 32)
    valid_BT = jnp.broadcast_to(jnp.arange(12) < 9, (2, 12))
    noise = objective.draw_noise(key, jnp.arange(2), 12, 0.0)
    run = jax.jit(
        lambda codes_BKT: objective.loss_fn(
            params,
            jnp.ones((2, 3, 12)),
            {"text_mask_BS": jnp.ones((2, 3), bool), "codes_BKT": codes_BKT, "valid_BT": valid_BT},
            noise,
            1,
            config=SMALL,
            local=True,
        )[0]
    )
    other = codes_BKT.at[:, 2:].set(3).at[:, :, 9:].set(5)
    assert run(codes_BKT) == run(other)
    assert run(codes_BKT) != run(codes_BKT.at[:, 0, 0].add(1))

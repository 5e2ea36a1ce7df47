"""A ring has no first frame: turning what is given of it turns what is made."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from magnet_jax.config import DecodeConfig
from magnet_jax.decode import parallel, ring, schedule
from magnet_jax.decode.canvas import Canvas
from magnet_jax.decode.ring import Ring

FRAMES, WINDOW, REACH = 18, 30, 5
EDITS = {"given_have_say": False, "above_hidden": True}


@pytest.mark.parametrize("length", [1, 7, 18])
@pytest.mark.parametrize("around", [False, True])
def test_what_is_heard_is_the_ring_from_one_frame_after_another(length, around):
    begins = set()
    for number in range(1, 200):
        place_W, home_T = map(
            np.asarray,
            ring.view(
                Ring(window=WINDOW, around=(around,) * 2), FRAMES, length, number, around=around
            ),
        )
        assert len(place_W) == (FRAMES if around else WINDOW)
        assert (np.diff(place_W) % length == 1 % length).all()
        np.testing.assert_array_equal(place_W[home_T[:length]], np.arange(length))
        # Its frames lie in the middle, one after another.
        lead = 0 if around else (WINDOW - length) // 2
        assert sorted(home_T[:length]) == list(range(lead, lead + length))
        begins.add(int(place_W[lead]))
    assert begins == set(range(length))


def network(codebook_size, *, around):
    """Logits of each frame by those near it, whatever its place; around the line or along it."""
    keys = jax.random.split(jax.random.key(3), 2)
    table_KVE = jax.random.normal(keys[0], (4, codebook_size + 1, 8))
    weights_SEV = jax.random.normal(keys[1], (2 * REACH + 1, 8, codebook_size))

    def trunk(codes_BKT, *, stage, local, guided, first_B, frame_1T=None):
        x_BTE = table_KVE[jnp.arange(4)[None, :, None], codes_BKT].sum(1)
        mode = "wrap" if around else "constant"
        x_BTE = jnp.pad(x_BTE, ((0, 0), (REACH, REACH), (0, 0)), mode=mode)
        count = codes_BKT.shape[-1]
        return sum(x_BTE[:, i : i + count] @ weight for i, weight in enumerate(weights_SEV))

    def head(states_RMD, stage, *, guided):
        return states_RMD + jnp.sin(stage + jnp.arange(codebook_size))[None, None], None

    return parallel.Network(trunk, head)


@functools.partial(jax.jit, static_argnames=("rules", "around"))
def decode(rules, task, parts, around):
    return parallel.decode(network(16, around=around), rules, task, parts)


@pytest.mark.parametrize("around", [False, True])
def test_a_ring_that_is_turned_is_decoded_alike(around):
    """By a network that knows no places, which greedy decoding asks; by whole spans on the grid."""
    decoding = DecodeConfig(steps=(5, 3, 3, 3), greedy=True)
    rules = tiny.rules(
        decoding, 3, 16, any_text=False, ring=Ring(window=WINDOW, around=(around,) * 2), **EDITS
    )
    rng = np.random.default_rng(0)
    codes_BKT = rng.integers(0, 16, (3, 4, FRAMES)).astype(np.int32)
    given_BKT = np.repeat(rng.random((3, 1, FRAMES)) < 0.3, 4, axis=1)

    def made(turned):
        canvas = Canvas(*(np.roll(x, turned, axis=-1) for x in (codes_BKT, given_BKT)))
        task = tiny.task(codes_BKT, end=FRAMES)._replace(canvas=canvas)
        decoded = decode(rules, task, schedule.make_schedule(decoding), around)
        return np.roll(decoded.codes_BKT, -turned, axis=-1)

    expected_BKT = made(0)
    assert (expected_BKT < 16).all() and len(np.unique(expected_BKT)) > 8
    np.testing.assert_array_equal(expected_BKT[given_BKT], codes_BKT[given_BKT])
    for turned in (3, 9, 15):
        np.testing.assert_array_equal(made(turned), expected_BKT)
    # The ends do hear each other: along a line, turning it would have changed them.
    line = tiny.rules(decoding, 3, 16, any_text=False, **EDITS)
    task = tiny.task(codes_BKT, end=FRAMES)._replace(canvas=Canvas(codes_BKT, given_BKT))
    plain_BKT = decode(line, task, schedule.make_schedule(decoding), False).codes_BKT
    assert (np.asarray(plain_BKT) != expected_BKT).any()

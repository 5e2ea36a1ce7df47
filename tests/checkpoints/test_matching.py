"""Parameters that fit a model in part."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import TINY, assert_same_bits, random_params

from magnet_jax.checkpoints import matching
from magnet_jax.convert import lm_rules
from magnet_jax.errors import UserError
from magnet_jax.io import trees
from magnet_jax.model import transformer


def test_an_exact_match_is_the_given_parameters():
    params = random_params(TINY)
    for wanted in (
        lm_rules.lm_shapes(TINY),
        jax.eval_shape(lambda: transformer.init_params(TINY, jax.random.key(0))),
    ):
        for partial in (False, True):
            tree, lines = matching.match_params(wanted, params, partial, "base")
            assert_same_bits(trees.flatten(tree), trees.flatten(params))
            assert lines[0] == f"base: {len(lines) - 1} of {len(lines) - 1} parameters matched"
            assert all(line.startswith("  matched  ") for line in lines[1:])


def test_partial_matches():
    """From two codebooks without biases to three with: all but what counts codebooks is taken."""
    given = random_params(TINY) | {"stray": np.ones(2, np.float32)}
    model = dataclasses.replace(TINY, num_codebooks=3, mlp_bias=True)
    fresh = random_params(model, seed=4)
    with pytest.raises(UserError) as caught:
        matching.match_params(fresh, given, False, "base")
    message = str(caught.value)
    for part in ("base: ", "2 missing: blocks/mlp/", "2 misshapen: ", "embed [2, 9, 12], not [3, 9",
                 "1 unexpected: stray", "--init-partial"):  # fmt: skip
        assert part in message, message

    tree, lines = matching.match_params(fresh, given, True, "base")
    flat = trees.flatten(tree)
    taken = {path for path, leaf in flat.items() if leaf is not None}
    missing = {"embed", "heads", "blocks/mlp/up_bias", "blocks/mlp/down_bias"}
    assert flat.keys() == lm_rules.lm_shapes(model).keys()
    assert taken == flat.keys() - missing
    assert lines[0] == f"base: {len(taken)} of {len(flat)} parameters matched"
    for line in (
        "  matched  blocks/attn/query [2, 12, 3, 4]",
        "  fresh    embed [3, 9, 12] (given as [2, 9, 12])",
        "  fresh    blocks/mlp/up_bias [2, 24] (not given)",
        "  unused   stray [2]",
    ):
        assert line in lines
    filled = trees.flatten(matching.fill_params(tree, fresh))
    old, new = trees.flatten(given), trees.flatten(fresh)
    assert_same_bits(filled, {path: (old if path in taken else new)[path] for path in flat})


def test_long_lists_are_cut_and_strangers_refused():
    with pytest.raises(UserError, match=r"22 missing: (\S+, ){3}\S+ and 18 more; .*unexpected"):
        matching.match_params(lm_rules.lm_shapes(TINY), {"x": np.ones(2)}, False)
    with pytest.raises(UserError, match="not one parameter of this model"):
        matching.match_params(lm_rules.lm_shapes(TINY), {"x": np.ones(2)}, True)

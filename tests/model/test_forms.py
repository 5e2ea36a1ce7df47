"""The forms of training on TPUs equal the plain ones: losses, and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from magnet_jax.config import KernelConfig, LoraConfig, MeshConfig, ModelConfig
from magnet_jax.errors import UserError
from magnet_jax.io import trees
from magnet_jax.model import chunks, forms, kernels, lora, sharding, transformer
from magnet_jax.train import objective

SIZES = dict(
    codebook_size=32, width=16, num_heads=4, num_layers=2, text_width=12, local_context=2
)  # fmt: skip
BIASED = ModelConfig(
    **SIZES, attention_bias=True, mlp_bias=True, head_bias=True, query_key_norm=True,
    cross_query_key_norm=True,
)  # fmt: skip
PLAIN = forms.PLAIN, KernelConfig(full="dense", local="dense"), "none"
FOR_TPU = forms.FOR_TPU, KernelConfig(full="chunks", local="slices", local_block=10), "products"
ADAPTERS = LoraConfig(rank=2, alpha=2.0)
FRAMES = 33


@functools.partial(jax.jit, static_argnames=("model", "how", "local"))
def loss_and_gradients(params, clips, *, model, how, local):
    form, chosen, remat = how
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    attend = kernels.with_kernels(chosen, near=local, mesh=mesh)

    def loss(params):
        states_BSE, batch, noise = clips
        lm = lora.merge_adapters(params["lm"], params["lora"], ADAPTERS)
        total, aux_B = objective.loss_fn(
            lm, states_BSE, batch, noise, 2 * local, config=model, local=local, attend=attend,
            remat=remat, form=form,
        )  # fmt: skip
        return total / aux_B.tokens.sum()

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("model", [ModelConfig(**SIZES), BIASED], ids=["plain", "biased"])
def test_losses_and_all_gradients_are_those_of_the_plain_forms(model, local, monkeypatch):
    """With padding, texts of several lengths, a row without text, and adapters."""
    two_heads = 2 * 4 * FRAMES**2 * 2
    monkeypatch.setattr(chunks, "SCORE_BYTES", two_heads)
    keys = jax.random.split(jax.random.key(1), 5)
    params = {
        "lm": transformer.init_params(model, keys[0]),
        "lora": lora.init_adapters(ADAPTERS, model, keys[1]),
    }
    # Adapters begin as zeros, and biases too: no gradient would pass.
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(keys[2], x.shape), params)
    batch = {
        "codes_BKT": jax.random.randint(keys[3], (4, 4, FRAMES), 0, 32),
        "valid_BT": jnp.arange(FRAMES)[None] < jnp.array([33, 20, 33, 33])[:, None],
        "text_mask_BS": jnp.arange(5)[None] < jnp.array([5, 2, 0, 3])[:, None],
    }
    noise = objective.draw_noise(keys[0], jnp.arange(4), FRAMES, 0.0)
    noise = noise._replace(drop_text_B=jnp.arange(4) == 3)
    clips = jax.random.normal(keys[4], (4, 5, 12)), batch, noise
    run = functools.partial(loss_and_gradients, params, clips, model=model, local=local)
    (expected, gradients), (found, own) = run(how=PLAIN), run(how=FOR_TPU)
    assert found == pytest.approx(float(expected), rel=2e-6)
    size = float(jnp.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(gradients))))
    own = trees.flatten(own)
    for path, gradient in trees.flatten(gradients).items():
        far = np.linalg.norm(own[path] - gradient)
        # (Keys' biases move all scores of a query alike: their gradients are rounding alone.)
        assert far <= 2e-6 * max(np.linalg.norm(gradient), 0.01 * size), path
        assert np.linalg.norm(gradient) > 0, path


def test_chunks_have_room_in_vector_memory():
    """Clips and heads of a chunk, by clips of a device, frames and heads."""
    for given, expected in {
        (6, 1500, 16): (1, 4),
        (18, 500, 16): (2, 16),
        (9, 500, 24): (1, 24),
        (2, 1500, 24): (1, 4),
        (3, 50, 4): (3, 4),
        (2, 6000, 16): (1, 1),  # one head has no room, and is computed nonetheless
    }.items():
        assert chunks._chunk(*given) == expected


def test_forms_go_by_platform():
    assert forms.choose_forms("tpu") == forms.FOR_TPU
    assert forms.choose_forms("cpu") == forms.choose_forms("gpu") == forms.PLAIN
    for platform, trained, full in (("tpu", True, "chunks"), ("tpu", False, "slices"),
                                    ("gpu", True, "cudnn"), ("cpu", True, "blocks")):  # fmt: skip
        chosen = kernels.choose_kernels(
            KernelConfig(), platform, ModelConfig(), 1500, jnp.bfloat16, trained=trained
        )
        assert chosen.full == full
        if full != "chunks":
            with pytest.raises(UserError, match="chunks is for training on TPUs"):
                kernels.choose_kernels(
                    KernelConfig(full="chunks"), platform, ModelConfig(), 1500, jnp.bfloat16,
                    trained=trained,
                )  # fmt: skip


@pytest.mark.parametrize(("remat", "forwards"), [("products", 1), ("attention", 1), ("full", 2)])
def test_what_cudnn_computes_forward_is_kept_for_its_gradient(remat, forwards, monkeypatch):
    """It names nothing that could be kept. Traced alone: to run it takes a GPU."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)
    model = ModelConfig(codebook_size=32, width=64, num_heads=1, num_layers=2, text_width=12)
    attend = kernels.with_kernels(KernelConfig(full="cudnn", local="blocks"), near=False)
    batch = {
        "codes_BKT": jnp.zeros((1, 4, 64), jnp.int32),
        "valid_BT": jnp.ones((1, 64), bool),
        "text_mask_BS": jnp.ones((1, 5), bool),
    }
    noise = objective.draw_noise(jax.random.key(0), jnp.arange(1), 64, 0.0)

    def loss(params):
        return objective.loss_fn(
            params, jnp.zeros((1, 5, 12)), batch, noise, 0, config=model, local=False,
            attend=attend, remat=remat, dtype=jnp.bfloat16,
        )[0]  # fmt: skip

    params = jax.eval_shape(lambda: transformer.init_params(model, jax.random.key(0)))
    traced = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert traced.count("dot_product_attention_fwd_wrapper[") == forwards
    assert traced.count("dot_product_attention_bwd_wrapper[") == 1

"""AudioCraft's network in plain PyTorch, straight from a state dict: what exports are held to.

It shares no code with the JAX network and reads AudioCraft's own names and layouts, so that equal
logits mean that an export computes in PyTorch what the model computes here.
"""

import math
from collections.abc import Mapping

import numpy as np

from magnet_jax.config import ModelConfig
from magnet_jax.io.torch_env import import_torch


def logits(
    state_dict: Mapping[str, np.ndarray],
    model: ModelConfig,
    codes_BKT: np.ndarray,
    states_BSE: np.ndarray,
    text_lengths_B: np.ndarray,
    stage: int,
    first: int = 1,
) -> np.ndarray:
    """Logits of codebook `stage`, float32 [B, T, V].

    Args:
      state_dict: AudioCraft's tensors.
      model: their sizes.
      codes_BKT: what each position holds, ids 0..V (a musicgen's or a hybrid's: its steps).
      states_BSE: text encoder states.
      text_lengths_B: tokens of each text; as in AudioCraft, all S positions are attended over,
        those past the end as zeros.
      stage: the codebook; a magnet attends to near frames only where it is not 0.
      first: of a hybrid: the first step that is not of the prompt.
    """
    torch = import_torch()
    state = {name: torch.from_numpy(np.asarray(a, np.float32)) for name, a in state_dict.items()}
    codes_BKT, lengths_B = (
        torch.from_numpy(x.astype(np.int64)) for x in (codes_BKT, text_lengths_B)
    )
    with torch.inference_mode():
        states = torch.from_numpy(states_BSE)
        return _logits(torch, state, model, codes_BKT, states, lengths_B, stage, first).numpy()


def _logits(torch, state, model, codes_BKT, states_BSE, text_lengths_B, stage, first):
    functional, width = torch.nn.functional, model.width
    batch, num_codebooks, frames = codes_BKT.shape
    x = sum(state[f"emb.{k}.weight"][codes_BKT[:, k]] for k in range(num_codebooks))
    half = torch.arange(width // 2, dtype=torch.float32)
    phase = torch.arange(frames)[:, None] / 10000 ** (half / (width // 2 - 1))
    x = x + torch.cat([phase.cos(), phase.sin()], dim=1)

    name = "condition_provider.conditioners.description.output_proj"
    text = functional.linear(states_BSE, state[f"{name}.weight"], state[f"{name}.bias"])
    text = text * (torch.arange(text.shape[1]) < text_lengths_B[:, None])[:, :, None]

    place = torch.arange(frames)
    distance = place[:, None] - place
    context, allowed = model.context(stage > 0), None
    if model.kind == "musicgen":
        allowed = distance >= 0
    elif model.kind == "hybrid":
        near = torch.ones_like(distance, dtype=torch.bool)
        if context is not None:
            near = (distance <= context + model.delays[stage]) & (distance >= -context)
        in_prompt = place < first
        allowed = torch.where(in_prompt[:, None], distance >= 0, in_prompt[None] | near)
    elif context is not None:
        allowed = distance.abs() <= context

    def norm(x, name):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return functional.layer_norm(x, (width,), weight, bias)

    def linear(x, name, biased):
        bias = state[f"{name}.bias"] if biased else None
        return functional.linear(x, state[f"{name}.weight"], bias)

    def attend(x, memory, name, mask, normed):
        projections = state[f"{name}.in_proj_weight"].chunk(3)
        biases = state[f"{name}.in_proj_bias"].chunk(3) if model.attention_bias else [None] * 3
        query, key, value = map(functional.linear, (x, memory, memory), projections, biases)
        if normed:
            query, key = norm(query, f"{name}.q_layer_norm"), norm(key, f"{name}.k_layer_norm")
        query, key, value = (
            array.view(batch, -1, model.num_heads, model.head_size).transpose(1, 2)
            for array in (query, key, value)
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(model.head_size)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        out = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, frames, width)
        return linear(out, f"{name}.out_proj", model.attention_bias)

    for i in range(model.num_layers):
        layer = f"transformer.layers.{i}"
        h = norm(x, f"{layer}.norm1")
        x = x + attend(h, h, f"{layer}.self_attn", allowed, model.query_key_norm)
        h = norm(x, f"{layer}.norm_cross")
        x = x + attend(h, text, f"{layer}.cross_attention", None, model.cross_query_key_norm)
        h = linear(norm(x, f"{layer}.norm2"), f"{layer}.linear1", model.mlp_bias)
        x = x + linear(functional.gelu(h), f"{layer}.linear2", model.mlp_bias)
    return linear(norm(x, "out_norm"), f"linears.{stage}", model.head_bias)

"""AudioCraft's network in plain PyTorch, straight from a state dict: what exports are held to, and
what decoding is timed against.

It shares no code with the JAX network and reads AudioCraft's own names and layouts, so that equal
logits mean that an export computes in PyTorch what the model computes here.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from magnet_jax.config import ModelConfig
from magnet_jax.io.torch_env import import_torch

# torch.Tensor, which is slow to import
Tensor = Any
_PROJECTION = "condition_provider.conditioners.description.output_proj"


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
    state = tensors(state_dict)
    with torch.inference_mode():
        lengths_B = torch.from_numpy(text_lengths_B.astype(np.int64))
        text_BSD = read_text(state, torch.from_numpy(states_BSE), lengths_B)
        allowed_TT = _allowed(model, codes_BKT.shape[-1], stage, first)
        codes_BKT = torch.from_numpy(codes_BKT.astype(np.int64))
        (found,) = forward(state, model, codes_BKT, text_BSD, lambda: allowed_TT, [stage])
        return found.numpy()


def tensors(
    state_dict: Mapping[str, np.ndarray], device: str = "cpu", dtype: str = "float32"
) -> dict[str, Tensor]:
    """A state dict in PyTorch."""
    torch = import_torch()
    arrays = {name: np.asarray(array, np.float32) for name, array in state_dict.items()}
    return {
        name: torch.from_numpy(array).to(device, getattr(torch, dtype))
        for name, array in arrays.items()
    }


def read_text(state: Mapping[str, Tensor], states_BSE: Tensor, lengths_B: Tensor) -> Tensor:
    """Text states in the network's width; zeros past the end of a text. [B, S, D]"""
    torch = import_torch()
    weight, bias = state[f"{_PROJECTION}.weight"], state[f"{_PROJECTION}.bias"]
    text_BSD = torch.nn.functional.linear(states_BSE, weight, bias)
    within_BS = torch.arange(text_BSD.shape[1], device=lengths_B.device) < lengths_B[:, None]
    return text_BSD * within_BS[:, :, None]


def _allowed(model: ModelConfig, frames: int, stage: int, first: int) -> Tensor | None:
    """Which position attends to which, bool [T, T]; None: all to all."""
    torch = import_torch()
    place = torch.arange(frames)
    distance = place[:, None] - place
    context = model.context(stage > 0)
    if model.kind == "musicgen":
        return distance >= 0
    if model.kind == "hybrid":
        near = torch.ones_like(distance, dtype=torch.bool)
        if context is not None:
            near = (distance <= context + model.delays[stage]) & (distance >= -context)
        in_prompt = place < first
        return torch.where(in_prompt[:, None], distance >= 0, in_prompt[None] | near)
    return None if context is None else distance.abs() <= context


def forward(
    state: Mapping[str, Tensor],
    model: ModelConfig,
    codes_BKT: Tensor,
    text_BSD: Tensor,
    mask: Callable[[], Tensor | None],
    codebooks: Iterable[int],
) -> list[Tensor]:
    """Logits [B, T, V] of each of the codebooks.

    Args:
      state, model: as `tensors` gives them.
      codes_BKT, text_BSD: what is read.
      mask: gives, in every layer, what self-attention adds to its scores, or the positions that it
        keeps.
      codebooks: whose heads are asked.
    """
    torch = import_torch()
    functional = torch.nn.functional

    def norm(x, name):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return functional.layer_norm(x, (x.shape[-1],), weight, bias)

    def linear(x, name, biased):
        bias = state[f"{name}.bias"] if biased else None
        return functional.linear(x, state[f"{name}.weight"], bias)

    def attend(x, memory, name, mask, normed):
        weight = state[f"{name}.in_proj_weight"]
        bias = state[f"{name}.in_proj_bias"] if model.attention_bias else None
        if memory is x:  # one product, as in AudioCraft
            query, key, value = functional.linear(x, weight, bias).chunk(3, dim=-1)
        else:
            biases = [None] * 3 if bias is None else bias.chunk(3)
            sources = (x, memory, memory)
            query, key, value = map(functional.linear, sources, weight.chunk(3), biases)
        if normed:
            query, key = norm(query, f"{name}.q_layer_norm"), norm(key, f"{name}.k_layer_norm")
        query, key, value = (
            array.unflatten(-1, (model.num_heads, -1)).transpose(1, 2)
            for array in (query, key, value)
        )
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return linear(out.transpose(1, 2).flatten(2), f"{name}.out_proj", model.attention_bias)

    x = sum(state[f"emb.{k}.weight"][codes_BKT[:, k]] for k in range(codes_BKT.shape[1]))
    x = x + _sinusoids(codes_BKT.shape[-1], model.width).to(x)
    for i in range(model.num_layers):
        layer = f"transformer.layers.{i}"
        h = norm(x, f"{layer}.norm1")
        x = x + attend(h, h, f"{layer}.self_attn", mask(), model.query_key_norm)
        h = norm(x, f"{layer}.norm_cross")
        x = x + attend(h, text_BSD, f"{layer}.cross_attention", None, model.cross_query_key_norm)
        h = linear(norm(x, f"{layer}.norm2"), f"{layer}.linear1", model.mlp_bias)
        x = x + linear(functional.gelu(h), f"{layer}.linear2", model.mlp_bias)
    x = norm(x, "out_norm")
    return [linear(x, f"linears.{k}", model.head_bias) for k in codebooks]


def _sinusoids(num_frames: int, width: int) -> Tensor:
    """Positions as cosines then sines, [T, D]."""
    torch = import_torch()
    half = torch.arange(width // 2, dtype=torch.float32)
    phase = torch.arange(num_frames)[:, None] / 10000 ** (half / (width // 2 - 1))
    return torch.cat([phase.cos(), phase.sin()], dim=-1)

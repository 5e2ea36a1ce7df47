"""MusicGen's generation by transformers: what decoding one step after another is timed against."""

import re
from collections.abc import Mapping

import numpy as np

from magnet_jax.config import ModelConfig
from magnet_jax.errors import UserError
from magnet_jax.io.torch_env import import_torch

torch = import_torch()
Tensor = torch.Tensor

# AudioCraft's names of tensors, part by part, as transformers has them.
_NAMES = (
    (r"^emb\.", "model.decoder.embed_tokens."),
    (r"^transformer\.", "model.decoder."),
    (r"^out_norm\.", "model.decoder.layer_norm."),
    (r"^linears\.", "lm_heads."),
    (r"\.cross_attention\.", ".encoder_attn."),
    (r"\.linear(\d)\.", r".fc\1."),
    (r"\.norm1\.", ".self_attn_layer_norm."),
    (r"\.norm_cross\.", ".encoder_attn_layer_norm."),
    (r"\.norm2\.", ".final_layer_norm."),
)
_PROJECTION = "condition_provider.conditioners.description.output_proj"


class Peer:
    """A MusicGen in transformers, in float32 on the CPU, ready to generate greedily.

    Args:
      state_dict: AudioCraft's tensors, such as `lm_rules.to_audiocraft` gives.
      model: their sizes.

    Raises:
      UserError: a model with biases, norms of queries and keys, or delays that transformers lacks.
    """

    def __init__(self, state_dict: Mapping[str, np.ndarray], model: ModelConfig):
        from transformers import MusicgenForCausalLM
        from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

        lacking = ("attention_bias", "mlp_bias", "head_bias", "query_key_norm",
                   "cross_query_key_norm")  # fmt: skip
        if found := [name for name in lacking if getattr(model, name)]:
            raise UserError(f"transformers' MusicGen lacks this model's {', '.join(found)}")
        if model.delays != tuple(range(model.num_codebooks)):
            raise UserError(f"transformers' MusicGen lacks this model's delays {model.delays}")
        self.model = model
        config = MusicgenDecoderConfig(
            vocab_size=model.codebook_size,
            num_hidden_layers=model.num_layers,
            ffn_dim=model.mlp_ratio * model.width,
            num_attention_heads=model.num_heads,
            hidden_size=model.width,
            num_codebooks=model.num_codebooks,
            pad_token_id=model.mask_id,
            bos_token_id=model.mask_id,
            eos_token_id=None,
        )
        tensors = {name: torch.from_numpy(array) for name, array in state_dict.items()}
        self.projection = [tensors.pop(f"{_PROJECTION}.{part}") for part in ("weight", "bias")]
        with torch.device("meta"):  # no weights of its own
            network = MusicgenForCausalLM(config)
        network.load_state_dict(_renamed(tensors), assign=True)
        # (positions are no tensors of the checkpoint)
        positions = network.model.decoder.embed_positions
        positions.weights = positions.get_embedding(2048, model.width)
        self.network = network.eval()

    @torch.inference_mode()
    def generate(
        self, states_BSE: np.ndarray, lengths_B: np.ndarray, *, num_frames: int, guidance: float
    ) -> np.ndarray:
        """Tokens of one clip a text, int64 [B, K, T], from text encoder states."""
        from transformers import DynamicCache, EncoderDecoderCache

        model, batch = self.model, len(states_BSE)
        within_BS = torch.arange(states_BSE.shape[1]) < torch.from_numpy(lengths_B)[:, None]
        text_BSD = torch.nn.functional.linear(torch.from_numpy(states_BSE), *self.projection)
        text_BSD = text_BSD * within_BS[..., None]
        # Rows with their text and, for guidance, as many without.
        codes = self.network.generate(
            inputs=torch.full((batch * model.num_codebooks, 1), model.mask_id),
            # (else it would take the first step, which holds nothing, for padding)
            attention_mask=torch.ones((batch, 1), dtype=torch.long),
            encoder_hidden_states=torch.cat([text_BSD, torch.zeros_like(text_BSD)]),
            encoder_attention_mask=torch.cat([within_BS, torch.zeros_like(within_BS)]).long(),
            decoder_start_token_id=model.mask_id,
            guidance_scale=guidance,
            do_sample=False,
            # (its own choice has no place of its own for the keys of the text)
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            num_return_sequences=1,
            max_length=num_frames + model.num_codebooks,
        )
        return codes.numpy()


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """AudioCraft's tensors under transformers' names, the three input projections apart."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".in_proj_weight"):
            stem = name.removesuffix("in_proj_weight")
            for part, rows in zip("qkv", tensor.chunk(3)):
                found[f"{stem}{part}_proj.weight"] = rows.contiguous()
        else:
            found[name] = tensor
    return found

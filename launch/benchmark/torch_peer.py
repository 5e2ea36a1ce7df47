"""MAGNeT's generation in plain PyTorch, the published implementation's way: what decoding is timed
against.

It does at every step what that implementation does: two rows a clip, with text and without, whose
text is zeros; keys and values of the text projected in every layer; an additive mask for local
attention, a copy for every row in every layer; the heads of all codebooks; a sort for the
nucleus; and a loop on the host. It shares no code with the JAX decoder. Its modules and
tensors are called as AudioCraft calls them, so that a state dict loads as it is.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from magnet_jax.config import DecodeConfig, ModelConfig
from magnet_jax.errors import UserError
from magnet_jax.io.torch_env import import_torch

torch = import_torch()
nn, functional = torch.nn, torch.nn.functional
Tensor = torch.Tensor

KEPT = -1e4  # score of a span that must not be hidden again


# --- the network ---------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention without biases, its three input projections in one matrix."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor, memory_BSD: Tensor | None, mask_NTT: Tensor | None) -> Tensor:
        """Attends to `memory_BSD`, or without one to `x_BTD` itself."""
        if memory_BSD is None:
            projected = functional.linear(x_BTD, self.in_proj_weight).chunk(3, dim=-1)
        else:
            weights = self.in_proj_weight.chunk(3)
            sources = (x_BTD, memory_BSD, memory_BSD)
            projected = [functional.linear(x, weight) for x, weight in zip(sources, weights)]
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, N, T, H]
            for x in projected
        )
        if mask_NTT is not None:
            # The published implementation's kernel takes a mask for every row and head.
            mask_NTT = mask_NTT.repeat(len(x_BTD), 1, 1, 1)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask_NTT)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A pre-norm block: self-attention, cross-attention to the text, MLP."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        width, hidden = model.width, model.mlp_ratio * model.width
        self.norm1, self.norm_cross, self.norm2 = (nn.LayerNorm(width) for _ in range(3))
        self.self_attn = Attention(width, model.num_heads)
        self.cross_attention = Attention(width, model.num_heads)
        self.linear1 = nn.Linear(width, hidden, bias=False)
        self.linear2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor, text_BSD: Tensor, mask_NTT: Tensor | None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.norm1(x_BTD), None, mask_NTT)
        x_BTD = x_BTD + self.cross_attention(self.norm_cross(x_BTD), text_BSD, None)
        return x_BTD + self.linear2(functional.gelu(self.linear1(self.norm2(x_BTD))))


class Network(nn.Module):
    """MAGNeT's transformer under AudioCraft's names."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        width, codebooks = model.width, range(model.num_codebooks)
        self.emb = nn.ModuleList(nn.Embedding(model.codebook_size + 1, width) for _ in codebooks)
        self.transformer = nn.ModuleDict(
            {"layers": nn.ModuleList(Layer(model) for _ in range(model.num_layers))}
        )
        self.out_norm = nn.LayerNorm(width)
        self.linears = nn.ModuleList(
            nn.Linear(width, model.codebook_size, bias=False) for _ in codebooks
        )
        projection = nn.ModuleDict({"output_proj": nn.Linear(model.text_width, width)})
        conditioners = nn.ModuleDict({"description": projection})
        self.condition_provider = nn.ModuleDict({"conditioners": conditioners})

    def read_text(self, states_BSE: Tensor, lengths_B: Tensor) -> Tensor:
        """Text states in the network's width; zeros past the end of a text. [B, S, D]"""
        project = self.condition_provider["conditioners"]["description"]["output_proj"]
        within_BS = torch.arange(states_BSE.shape[1], device=lengths_B.device) < lengths_B[:, None]
        return project(states_BSE) * within_BS[..., None]

    def forward(self, codes_BKT: Tensor, text_BSD: Tensor, mask_NTT: Tensor | None) -> Tensor:
        """Logits of every codebook, [B, K, T, V]."""
        x_BTD = sum(embed(codes_BKT[:, k]) for k, embed in enumerate(self.emb))
        x_BTD = x_BTD + sinusoids(codes_BKT.shape[-1], x_BTD.shape[-1]).to(x_BTD)
        for layer in self.transformer["layers"]:
            x_BTD = layer(x_BTD, text_BSD, mask_NTT)
        x_BTD = self.out_norm(x_BTD)
        return torch.stack([head(x_BTD) for head in self.linears], dim=1)


def sinusoids(num_frames: int, width: int) -> Tensor:
    """Positions as cosines then sines, [T, D]."""
    half = torch.arange(width // 2, dtype=torch.float32)
    phase = torch.arange(num_frames)[:, None] / 10000 ** (half / (width // 2 - 1))
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def local_mask(num_frames: int, context: int) -> Tensor:
    """0 where two frames are at most `context` apart, -inf elsewhere. [T, T]"""
    frames = torch.arange(num_frames)
    far_TT = (frames[:, None] - frames[None, :]).abs() > context
    return torch.zeros(num_frames, num_frames).masked_fill(far_TT, -math.inf)


# --- generation ----------------------------------------------------------------------------------


def sample_top_p(probs_BTV: Tensor, top_p: float) -> Tensor:
    """A token of the nucleus for each place, by a full sort. [B, T]"""
    sorted_BTV, tokens_BTV = probs_BTV.sort(dim=-1, descending=True)
    beyond_BTV = sorted_BTV.cumsum(-1) - sorted_BTV > top_p
    sorted_BTV = sorted_BTV.masked_fill(beyond_BTV, 0.0)
    picked = torch.multinomial(sorted_BTV.flatten(0, 1), num_samples=1)
    return tokens_BTV.gather(-1, picked.view(*probs_BTV.shape[:2], 1))[..., 0]


def check_device(device: str) -> None:
    """Raises `UserError` for a device that PyTorch cannot use here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--peer-device {device}: PyTorch cannot use it ({reason})") from None


def synchronize(device: str) -> None:
    """Waits for the device, so that a clock read next is right."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Peer:
    """A MAGNeT in PyTorch, ready to generate.

    Args:
      state_dict: AudioCraft's tensors, such as `lm_rules.to_audiocraft` gives.
      model: their sizes.
      device, dtype: of weights and activations; probabilities are float32.

    Raises:
      UserError: a model with biases, norms of queries and keys, or a first context.
    """

    def __init__(
        self,
        state_dict: Mapping[str, np.ndarray],
        model: ModelConfig,
        device: str = "cpu",
        dtype: str = "float32",
    ):
        lacking = ("attention_bias", "mlp_bias", "head_bias", "query_key_norm",
                   "cross_query_key_norm", "first_context")  # fmt: skip
        if found := [name for name in lacking if getattr(model, name)]:
            raise UserError(f"the PyTorch peer lacks this model's {', '.join(found)}: no --peer")
        self.model, self.device = model, device
        tensors = {name: torch.from_numpy(array) for name, array in state_dict.items()}
        with torch.device("meta"):  # no weights of its own
            network = Network(model)
        network.load_state_dict(tensors, assign=True)
        self.network = network.to(device, getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def generate(
        self,
        states_BSE: np.ndarray,
        lengths_B: np.ndarray,
        *,
        num_frames: int,
        decoding: DecodeConfig,
        seed: int = 0,
        prompt_BKP: np.ndarray | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Tokens of one clip a text, int64 [B, K, T].

        Args:
          states_BSE: text encoder states, S the longest text of the batch.
          lengths_B: tokens of each text; 0 for none.
          num_frames: T, a multiple of the span length.
          decoding: schedule and sampling; spans that do not overlap, greedy or the nucleus.
          seed: of the sampling.
          prompt_BKP: given first frames.
          on_step: called with (stage, step) after each step.

        Raises:
          UserError: a way of decoding that this implementation lacks.
        """
        self._check(decoding, num_frames)
        torch.manual_seed(seed)
        model, device = self.model, self.device
        dtype = self.network.out_norm.weight.dtype
        span = decoding.span_length or model.span_length
        text_BSD = self.network.read_text(
            torch.tensor(states_BSE, device=device, dtype=dtype),
            torch.tensor(lengths_B, device=device),
        )
        text_BSD = torch.cat([text_BSD, torch.zeros_like(text_BSD)])
        near_NTT = None
        if model.local_context:
            near_TT = local_mask(num_frames, model.local_context).to(device, dtype)
            near_NTT = near_TT.expand(model.num_heads, -1, -1).contiguous()

        shape = (len(states_BSE), model.num_codebooks, num_frames)
        codes_BKT = torch.full(shape, model.mask_id, device=device)
        num_prompt = 0
        if prompt_BKP is not None:
            num_prompt = prompt_BKP.shape[-1]
            codes_BKT[..., :num_prompt] = torch.tensor(prompt_BKP, device=device)
        for stage, steps in enumerate(decoding.steps):
            codes_BKT = self._generate_stage(
                codes_BKT,
                text_BSD,
                near_NTT if stage else None,
                stage=stage,
                steps=steps,
                span=span,
                num_prompt=num_prompt,
                decoding=decoding,
                on_step=on_step,
            )
        return codes_BKT.cpu().numpy()

    def _check(self, decoding: DecodeConfig, num_frames: int) -> None:
        span = decoding.span_length or self.model.span_length
        if decoding.span_arrangement != "nonoverlap" or decoding.top_k:
            raise UserError("the PyTorch peer decodes spans that do not overlap, with the nucleus")
        if num_frames % span:
            raise UserError(f"{num_frames} frames are no whole number of spans of {span}")
        if len(decoding.steps) != self.model.num_codebooks:
            raise UserError(f"decode.steps needs {self.model.num_codebooks} numbers")

    def _generate_stage(
        self,
        codes_BKT: Tensor,
        text_BSD: Tensor,
        mask_NTT: Tensor | None,
        *,
        stage: int,
        steps: int,
        span: int,
        num_prompt: int,
        decoding: DecodeConfig,
        on_step: Callable[[int, int], None] | None,
    ) -> Tensor:
        """Fills one codebook in `steps` steps."""
        batch, _, num_frames = codes_BKT.shape
        mask_id = self.model.mask_id
        prompt_BP = codes_BKT[:, stage, :num_prompt].clone()
        row_BT = torch.full_like(codes_BKT[:, stage], mask_id)
        score_BP = torch.zeros(batch, num_frames // span, device=self.device)
        given = num_prompt // span  # spans
        score_BP[:, :given] = KEPT
        for step, rate in enumerate(torch.cos(torch.linspace(0, 1, steps) * math.pi * 0.5)):
            num_hidden = max(int(rate * (num_frames // span - given)), 1)
            rate = rate.item()
            guidance = rate * decoding.max_guidance + (1 - rate) * decoding.min_guidance
            temperature = decoding.temperature
            if decoding.anneal_temperature:
                temperature *= (steps - 1 - step) / steps

            worst = score_BP.topk(num_hidden, dim=-1).indices
            span_hidden_BP = torch.zeros_like(score_BP, dtype=torch.bool).scatter_(1, worst, True)
            hidden_BT = span_hidden_BP.repeat_interleave(span, dim=1)
            row_BT = row_BT.masked_fill(hidden_BT, mask_id)
            row_BT[:, :num_prompt] = prompt_BP
            codes_BKT[:, stage] = row_BT

            logits_BKTV = self.network(torch.cat([codes_BKT, codes_BKT]), text_BSD, mask_NTT)
            with_text_BTV, without_BTV = logits_BKTV[:, stage].float().chunk(2)
            logits_BTV = without_BTV + guidance * (with_text_BTV - without_BTV)
            probs_BTV = (logits_BTV / max(temperature, 1e-2)).softmax(dim=-1)
            if decoding.greedy:
                token_BT = probs_BTV.argmax(-1)
            else:
                token_BT = sample_top_p(probs_BTV, decoding.top_p)
            row_BT = torch.where(row_BT == mask_id, token_BT, row_BT)
            codes_BKT[:, stage] = row_BT

            prob_BT = probs_BTV.gather(-1, token_BT[..., None])[..., 0]
            score_BP = span_scores(prob_BT.unflatten(1, (-1, span)), decoding.span_score)
            score_BP = score_BP.masked_fill(~span_hidden_BP, KEPT)
            if on_step is not None:
                synchronize(self.device)
                on_step(stage, step)
        return codes_BKT


def span_scores(prob_BPs: Tensor, kind: str) -> Tensor:
    """How unsure the model is of each span, from the probabilities of its tokens. [B, P]"""
    if kind == "max" and prob_BPs.shape[-1] > 1:  # single frames are scored alike by both
        return 1 - prob_BPs.amax(-1)
    return -prob_BPs.clamp_min(1e-30).log().sum(-1)

"""MAGNeT's generation in plain PyTorch, the published implementation's way: what decoding is timed
against.

It does at every step what that implementation does: two rows a clip, with text and without, whose
text is zeros; keys and values of the text projected in every layer; an additive mask for local
attention, a copy for every row in every layer; the heads of all codebooks; a sort for the
nucleus; and a loop on the host. It shares no code with the JAX decoder.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from magnet_jax.config import DecodeConfig, ModelConfig
from magnet_jax.convert import torch_lm
from magnet_jax.errors import UserError
from magnet_jax.io.torch_env import import_torch

torch = import_torch()
Tensor = torch.Tensor

KEPT = -1e4  # score of a span that must not be hidden again


def local_mask(num_frames: int, context: int) -> Tensor:
    """0 where two frames are at most `context` apart, -inf elsewhere. [T, T]"""
    frames = torch.arange(num_frames)
    far_TT = (frames[:, None] - frames[None, :]).abs() > context
    return torch.zeros(num_frames, num_frames).masked_fill(far_TT, -math.inf)


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
      UserError: a model with a first context.
    """

    def __init__(
        self,
        state_dict: Mapping[str, np.ndarray],
        model: ModelConfig,
        device: str = "cpu",
        dtype: str = "float32",
    ):
        if model.first_context:
            raise UserError("the PyTorch peer lacks this model's first_context: no --peer")
        self.model, self.device = model, device
        self.state = torch_lm.tensors(state_dict, device, dtype)

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
        dtype = self.state["out_norm.weight"].dtype
        text_BSD = torch_lm.read_text(
            self.state,
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
        for stage in range(model.num_codebooks):
            self._generate_stage(
                codes_BKT, text_BSD, near_NTT if stage else None, stage, num_prompt, decoding,
                on_step,
            )  # fmt: skip
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
        stage: int,
        num_prompt: int,
        decoding: DecodeConfig,
        on_step: Callable[[int, int], None] | None,
    ) -> None:
        """Fills one codebook of `codes_BKT`, step by step."""
        batch, _, num_frames = codes_BKT.shape
        mask_id, steps = self.model.mask_id, decoding.steps[stage]
        span = decoding.span_length or self.model.span_length
        prompt_BP = codes_BKT[:, stage, :num_prompt].clone()
        row_BT = torch.full_like(codes_BKT[:, stage], mask_id)
        score_BP = torch.zeros(batch, num_frames // span, device=self.device)
        given = num_prompt // span  # spans
        score_BP[:, :given] = KEPT
        for step, rate in enumerate(torch.cos(torch.linspace(0, 1, steps) * math.pi * 0.5)):
            num_hidden = max(int(rate * (num_frames // span - given)), 1)
            worst = score_BP.topk(num_hidden, dim=-1).indices
            span_hidden_BP = torch.zeros_like(score_BP, dtype=torch.bool).scatter_(1, worst, True)
            hidden_BT = span_hidden_BP.repeat_interleave(span, dim=1)
            row_BT = row_BT.masked_fill(hidden_BT, mask_id)
            row_BT[:, :num_prompt] = prompt_BP
            codes_BKT[:, stage] = row_BT

            temperature = decoding.temperature
            if decoding.anneal_temperature:
                temperature *= (steps - 1 - step) / steps
            logits_BTV = self._guided(codes_BKT, text_BSD, mask_NTT, stage, rate.item(), decoding)
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

    def _guided(
        self,
        codes_BKT: Tensor,
        text_BSD: Tensor,
        mask_NTT: Tensor | None,
        stage: int,
        rate: float,
        decoding: DecodeConfig,
    ) -> Tensor:
        """Logits of a codebook, of the rows with text and those without. [B, T, V]"""
        both_BKT = torch.cat([codes_BKT, codes_BKT])
        logits_KBTV = torch_lm.forward(
            self.state,
            self.model,
            both_BKT,
            text_BSD,
            # The published implementation's kernel takes a mask for every row and head.
            lambda: None if mask_NTT is None else mask_NTT.repeat(len(both_BKT), 1, 1, 1),
            range(self.model.num_codebooks),
        )
        with_text_BTV, without_BTV = logits_KBTV[stage].float().chunk(2)
        guidance = rate * decoding.max_guidance + (1 - rate) * decoding.min_guidance
        return without_BTV + guidance * (with_text_BTV - without_BTV)


def span_scores(prob_BPs: Tensor, kind: str) -> Tensor:
    """How unsure the model is of each span, from the probabilities of its tokens. [B, P]"""
    if kind == "max" and prob_BPs.shape[-1] > 1:  # single frames are scored alike by both
        return 1 - prob_BPs.amax(-1)
    return -prob_BPs.clamp_min(1e-30).log().sum(-1)

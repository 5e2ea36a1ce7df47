"""What a token frame hears: the receptive field of EnCodec's encoder (paper, appendix B).

The convolutions' field follows from their strides, kernels and dilations. The LSTM before the last
of them looks back without end, but forgets; how fast depends on weights and audio and is measured:
an impulse is added to long audio, and the latent before quantization is compared with and without.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from magnet_jax.codec import tonal
from magnet_jax.codec.encodec import Codec
from magnet_jax.convert.codec_rules import SeanetConfig
from magnet_jax.errors import UserError
from magnet_jax.io.torch_env import import_torch

Background = Literal["silence", "constant", "noise"]
BACKGROUNDS: tuple[Background, ...] = get_args(Background)
LEVEL = 0.1  # RMS of a background that is not silent
IMPULSE = 1.0  # full scale, as the paper's one-hot input

_LONGEST = 256  # frames to each side that are measured; an LSTM must forget within half of them


class Field(NamedTuple):
    """How far one frame hears."""

    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class Response:
    """Norms of the latent's change, for P impulses at places within one frame.

    The arrays are float64 [P, 2 * frames + 1]; column `frames` is the frame with the impulse in it,
    and those right of it come later.
    """

    frames: int
    """To each side of the impulse."""
    places_P: np.ndarray
    """Samples from the frame's first to the impulse."""
    convolutions_PT: np.ndarray
    """Of the encoder without its LSTM."""
    whole_PT: np.ndarray


def convolutions(config: SeanetConfig) -> Field:
    """The exact field without the LSTM: frame t hears samples t * hop - before ... + after.

    Raises `UserError`, as does what rests on this, for codecs that norm over the whole clip.
    """
    if config.norms_over_clip:
        raise UserError(
            "no receptive field: this codec norms over the whole clip, so that every frame hangs "
            "on every sample; choose one with weight norm, as encodec_24khz has"
        )
    layers = [(config.kernel_size, 1, 1)]  # kernel, stride, dilation
    for ratio in reversed(config.upsampling_ratios):
        # (a residual block's other convolutions have one tap)
        layers += [
            (config.residual_kernel_size, 1, config.dilation_growth_rate**i)
            for i in range(config.num_residual_layers)
        ]
        layers.append((2 * ratio, ratio, 1))
    layers.append((config.last_kernel_size, 1, 1))
    before, after, step = 0, 0, 1  # step: samples between two rows
    for kernel, stride, dilation in layers:
        reach = (kernel - 1) * dilation
        padding = reach + 1 - stride
        left = padding if config.use_causal_conv else padding - padding // 2
        before += left * step
        after += (reach - left) * step
        step *= stride
    return Field(before, after)


def convolution_frames(config: SeanetConfig) -> Field:
    """`convolutions` in frames: a sample that a frame hears lies in one of these, or in itself."""
    field = convolutions(config)
    return Field(-(-field.before // config.hop), field.after // config.hop)


def token_frames(codec: Codec) -> Field:
    """The same of all of a codec's tokens but for the LSTM: a tonal stream may hear further."""
    field = convolution_frames(codec.config)
    if not codec.tonal:
        return field
    heard = tonal.reach(codec.tonal.spectrum, codec.spec.sample_rate, codec.hop)
    return Field(*map(max, field, heard))


def restricted_context(config: SeanetConfig) -> tuple[int, float]:
    """Frames to each side that attention may be restricted to, and the same before rounding up.

    The paper's rule (section 3.2): as far as the convolutions hear to either side, here from the
    middle of a frame. Attention looks to both sides alike, so the further of the two counts.
    """
    field = convolutions(config)
    middle = (config.hop - 1) / 2
    exact = max(field.before + middle, field.after - middle) / config.hop
    return int(np.ceil(exact)), exact


def receptive_field(codec: Codec, *, share: float = 1e-6) -> Field:
    """Frames before and after a frame that its tokens hang on.

    `after` is exact. Of an impulse more than `before` frames back the LSTM keeps less than `share`
    of the energy, be it in silence, in a constant or in noise. That is measured, no bound: music
    may hold the LSTM's state for seconds. Of the shipped clips' tokens, encoded in windows of 100
    frames that overlap by this, 2 in 1000 differ from those of the whole clip. Where the LSTM's
    state is carried from window to window they are the same, and `convolution_frames` is overlap
    enough. All codecs that can be read have an LSTM.

    Raises `UserError` for a codec whose LSTM forgets too slowly, `ValueError` for a `share` not
    between 0 and 1.
    """
    exact = token_frames(codec)
    before = exact.before
    for background in BACKGROUNDS:
        response = impulse_response(
            codec, background=background, frames=_LONGEST, impulses=min(8, codec.hop)
        )
        lasts = lasting_frames(response, share)
        if lasts is None:
            raise UserError(
                f"codec {codec.spec.source}: its LSTM keeps more than {share:g} of an impulse's "
                f"energy for longer than {_LONGEST // 2} frames: take a larger share"
            )
        before = max(before, lasts)
    return Field(before, exact.after)


def lasting_frames(response: Response, share: float) -> int | None:
    """Frames after any of the impulses beyond which less than `share` of its energy is left.

    None where that is more than half of what was measured, and the sum cannot be trusted.
    Raises `ValueError` for a share not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, not {share}")
    energy_PT = np.square(response.whole_PT)
    # (from the far end, where the terms are smallest)
    left_PT = np.cumsum(energy_PT[:, ::-1], axis=1)[:, ::-1] / energy_PT.sum(1, keepdims=True)
    kept = (left_PT[:, response.frames + 1 :] >= share).any(0)
    lasts = int(np.count_nonzero(kept))
    return lasts if lasts <= response.frames // 2 else None


def energy_within(magnitudes_PT: np.ndarray) -> np.ndarray:
    """Share of a response's energy in the frames at most n = 0, 1, ... from the impulse's."""
    energy_T = np.square(magnitudes_PT).sum(0)
    middle = len(energy_T) // 2
    pairs = energy_T[middle:] + energy_T[middle::-1]
    pairs[0] /= 2
    return np.cumsum(pairs) / pairs.sum()


def hears_what_it_should(response: Response, config: SeanetConfig) -> bool:
    """Whether without LSTM the frames that changed are exactly those that `convolutions` says."""
    field = convolutions(config)
    first_T = np.arange(-response.frames, response.frames + 1) * config.hop
    offset_PT = response.places_P[:, None] - first_T
    expected_PT = (-field.before <= offset_PT) & (offset_PT <= field.after)
    return np.array_equal(response.convolutions_PT != 0, expected_PT)


def impulse_response(
    codec: Codec, *, background: Background, frames: int, impulses: int, progress: Any = iter
) -> Response:
    """How an impulse changes the latent, in float64 on the CPU.

    Args:
      codec: any that `convolutions` can read.
      background: what the impulse is added to.
      frames: of background to each side of the impulse's frame.
      impulses: places within the frame, evenly spread; at most a frame's samples.
      progress: wraps the places, as tqdm does.

    Raises `UserError` for too few frames, or impulses out of range.
    """
    hop = codec.hop
    near = 2 * max(convolution_frames(codec.config)) + 2
    if frames < near:
        raise UserError(f"frames must be at least {near} for this codec, not {frames}")
    if not 1 <= impulses <= hop:
        raise UserError(f"impulses must lie between 1 and {hop}, the samples of a frame")
    torch = import_torch()
    front, lstm, back = _parts(torch, codec)
    wav_BCN = torch.from_numpy(_background(background, codec, (2 * frames + 1) * hop))
    # Before the LSTM an impulse changes nothing far from it: only what is near is computed anew.
    around = slice(frames - near, frames + near + 1)
    near_BCN = wav_BCN[..., around.start * hop : around.stop * hop]
    places_P = np.arange(impulses) * hop // impulses
    with torch.inference_mode():
        quiet_BCT, quiet_near_BCT = front(wav_BCN), front(near_BCN)
        quiet_BDT, struck, convolutions_PT = back(quiet_BCT), [], []
        for place in progress(places_P):
            struck_BCN, struck_BCT = near_BCN.clone(), quiet_BCT.clone()
            struck_BCN[..., near * hop + place] += IMPULSE
            # (one shape, one order of sums: what did not change is equal bit by bit)
            struck_BCT[..., around] += front(struck_BCN) - quiet_near_BCT
            struck.append(struck_BCT)
            convolutions_PT.append((back(struck_BCT) - quiet_BDT)[0].norm(dim=0).numpy())
        quiet_BDT, *struck = back(lstm(torch.cat([quiet_BCT, *struck]))).split(1)
        whole_PT = [(struck_BDT - quiet_BDT)[0].norm(dim=0).numpy() for struck_BDT in struck]
    arrays = {"convolutions_PT": np.array(convolutions_PT), "whole_PT": np.array(whole_PT)}
    return Response(frames=frames, places_P=places_P, **arrays)


def _parts(torch: Any, codec: Codec) -> tuple[Any, Any, Any]:
    """What comes before the encoder's LSTM, itself with its skip, and what comes after."""
    from transformers.models.encodec.modeling_encodec import EncodecLSTM

    layers = list(copy.deepcopy(codec.encoder).cpu().double().layers)
    (place,) = [i for i, layer in enumerate(layers) if isinstance(layer, EncodecLSTM)]
    before, after = layers[:place], layers[place + 1 :]
    return torch.nn.Sequential(*before), layers[place], torch.nn.Sequential(*after)


def _background(kind: Background, codec: Codec, samples: int) -> np.ndarray:
    """Audio float64 [1, C, samples]."""
    shape = (1, codec.spec.channels, samples)
    if kind == "noise":
        return LEVEL * np.random.default_rng(0).standard_normal(shape)
    return np.full(shape, LEVEL if kind == "constant" else 0.0)

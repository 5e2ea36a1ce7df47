"""EnCodec's decoder in JAX: tokens to audio within one program (Défossez et al. 2022).

The sum of the codebooks' entries goes through a SEANet: a convolution, an LSTM, and for each ratio
a transposed convolution and residual blocks. Widths and order are those of transformers' EnCodec,
and the samples too, up to float rounding. `encodec.load_decoder` reads parameters of any published
kind; they are nested dicts and lists of float32 (K codebooks, V entries, E code width, W taps, C
and O channels in and out, G four gates of C, S the ratio, L LSTM layers):

    codebooks [K,V,E]; first, last: a convolution; lstm/{input, hidden [L,G,C], bias [L,G]};
    stages, one for each ratio: upsample {kernel [2,C,S*O], bias [O]}, residuals: lists of
    {narrow, widen and, with `use_conv_shortcut`, shortcut}: convolutions

A convolution is {kernel [W,C,O], bias [O]}, weight norm multiplied out; those of codecs with
`time_group_norm` hold norm_scale [O] and norm_bias [O] beside.

Arrays here are [B,T,C]: the layout that accelerators and XLA's CPU convolutions like. Wherever a
`length` goes along, it counts the rows of T that are real, and all others are zero.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from magnet_jax.codec.encodec import split_sides
from magnet_jax.convert.codec_rules import NOMINAL_RMS, SeanetConfig

Params = dict[str, Any]

# float32 means float32: accelerators would otherwise round the factors.
_PRECISION = jax.lax.Precision.HIGHEST
_NORM_EPSILON = 1e-5
_convolution = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=(1,),
    dimension_numbers=("NWC", "WIO", "NWC"),
    precision=_PRECISION,
)


def decode(
    params: Params,
    codes_BKT: jax.Array,
    *,
    config: SeanetConfig,
    length: jax.Array | int | None = None,
    lstm_rows: int = 1,
    piece: int | None = None,
) -> jax.Array:
    """Audio [B, C, T * hop] (float32) of codes [B, K, T]; pure, and made to be jitted.

    Of twice as many codebooks as `params` has, left and right are interleaved (`CodecSpec`): each
    is decoded by itself, and the audio is [B, 2, T * hop].

    Args:
      params: as in the module's docstring.
      codes_BKT: integers in [0, V), K the number of codebooks in `params`.
      config: of the codec; static.
      length: how many of the T frames are real, at least 1; may be traced, so that one program
        serves every length. The samples are those of codes_BKT[..., :length], then zeros, whatever
        the codes beyond are. None: all T.
      lstm_rows: the LSTM runs on a multiple of so many rows, the batch filled up with zeros. More
        than 1 changes no number; matrix units, such as a TPU's, may want 8 rows.
      piece: frames whose samples are computed at once, with the few around them that they depend
        on; what is not yet samples then takes the memory of a piece, not of a clip. None: all T,
        as are those of codecs that norm over the whole clip.

    Raises:
      ValueError: a wrong shape, or codes that are no integers.
    """
    x_BTC = features(params, codes_BKT, config=config, length=length, lstm_rows=lstm_rows)
    wav_BCN = samples(params, x_BTC, config=config, length=length, piece=piece)
    return wav_BCN.reshape(len(codes_BKT), -1, wav_BCN.shape[-1])


def features(
    params: Params,
    codes_BKT: jax.Array,
    *,
    config: SeanetConfig,
    length: jax.Array | int | None = None,
    lstm_rows: int = 1,
) -> jax.Array:
    """The LSTM's output [B, T, C], from which `samples` makes audio, frames near each other alone.

    Arguments and errors are those of `decode`. Interleaved stereo has two rows for each clip, left
    and right.
    """
    num_codebooks = params["codebooks"].shape[0]
    if codes_BKT.ndim == 3 and codes_BKT.shape[1] == 2 * num_codebooks:
        codes_BKT = split_sides(codes_BKT, 2)
    if codes_BKT.ndim != 3 or codes_BKT.shape[1] != num_codebooks or 0 in codes_BKT.shape:
        raise ValueError(f"codes_BKT {codes_BKT.shape}: expected [B, {num_codebooks}, T]")
    if not jnp.issubdtype(codes_BKT.dtype, jnp.integer):
        raise ValueError(f"codes_BKT: expected integers, not {codes_BKT.dtype}")
    x_BTC = _masked(_look_up(params["codebooks"], codes_BKT), length)
    x_BTC = _convolve(x_BTC, params["first"], config, length)
    return _masked(_lstm(x_BTC, params["lstm"], lstm_rows), length)


def samples(
    params: Params,
    x_BTC: jax.Array,
    *,
    config: SeanetConfig,
    length: jax.Array | int | None = None,
    piece: int | None = None,
) -> jax.Array:
    """Audio [B, C, T * hop] of the LSTM's output [B, T, C]; arguments are those of `decode`."""
    frames, around = x_BTC.shape[1], reach(config)
    window = 2 * around + (piece or frames)
    if window >= frames or config.norm_type == "time_group_norm":
        return jnp.swapaxes(_samples(params, x_BTC, config, length), 1, 2)

    def samples_of(start: jax.Array) -> jax.Array:
        # A window that meets an end of the clip ends there, and pads as the whole clip would.
        first = jnp.clip(start - around, 0, frames - window)
        x_BWC = jax.lax.dynamic_slice_in_dim(x_BTC, first, window, axis=1)
        y_BNC = _samples(params, x_BWC, config, None if length is None else length - first)
        own = (start - first) * config.hop
        return jax.lax.dynamic_slice_in_dim(y_BNC, own, piece * config.hop, axis=1)

    # The last piece begins early enough to be a whole one.
    count = -(-frames // piece)
    starts = jnp.minimum(jnp.arange(count) * piece, frames - piece)
    y_PBNC = jax.lax.map(samples_of, starts)
    rest = (frames - (count - 1) * piece) * config.hop
    y_BCPN = jnp.transpose(y_PBNC, (1, 3, 0, 2))
    before_BCN = y_BCPN[:, :, :-1].reshape(*y_BCPN.shape[:2], -1)
    return jnp.concatenate([before_BCN, y_BCPN[:, :, -1, -rest:]], axis=-1)


def reach(config: SeanetConfig) -> int:
    """Frames behind the LSTM, to each side, on which a frame's samples can depend; at most."""
    rows = config.last_kernel_size - 1
    for ratio in reversed(config.upsampling_ratios):
        dilations = sum(config.dilation_growth_rate**i for i in range(config.num_residual_layers))
        rows += (config.residual_kernel_size - 1) * dilations
        rows = -(-rows // ratio) + 1
    return rows


def _samples(
    params: Params, x_BTC: jax.Array, config: SeanetConfig, length: jax.Array | int | None
) -> jax.Array:
    """What follows the LSTM: [B,T,C] -> samples [B,T*hop,C]."""
    for ratio, stage in zip(config.upsampling_ratios, params["stages"], strict=True):
        x_BTC = _upsample(jax.nn.elu(x_BTC), stage["upsample"], ratio, config, length)
        length = None if length is None else length * ratio
        for i, layer in enumerate(stage["residuals"]):
            x_BTC = _residual(x_BTC, layer, config.dilation_growth_rate**i, config, length)
    x_BTC = _convolve(jax.nn.elu(x_BTC), params["last"], config, length)
    if config.normalize:
        x_BTC = x_BTC * NOMINAL_RMS
    return x_BTC


def _look_up(codebooks_KVE: jax.Array, codes_BKT: jax.Array) -> jax.Array:
    """Sums of the codebooks' entries [B,T,E]; a code out of range, as of padding, is clamped."""

    def entries(codebook_VE: jax.Array, codes_BT: jax.Array) -> jax.Array:
        return jnp.take(codebook_VE, codes_BT, axis=0, mode="clip")

    return jax.vmap(entries, in_axes=(0, 1))(codebooks_KVE, codes_BKT).sum(0)


def _masked(x_BTC: jax.Array, length: jax.Array | int | None) -> jax.Array:
    if length is None:
        return x_BTC
    return jnp.where(jnp.arange(x_BTC.shape[1])[None, :, None] < length, x_BTC, 0.0)


def _residual(
    x_BTC: jax.Array,
    layer: Params,
    dilation: int,
    config: SeanetConfig,
    length: jax.Array | int | None,
) -> jax.Array:
    y_BTC = _convolve(jax.nn.elu(x_BTC), layer["narrow"], config, length, dilation)
    y_BTC = _convolve(jax.nn.elu(y_BTC), layer["widen"], config, length)
    if config.use_conv_shortcut:
        x_BTC = _convolve(x_BTC, layer["shortcut"], config, length)
    return x_BTC + y_BTC


def _convolve(
    x_BTC: jax.Array,
    layer: Params,
    config: SeanetConfig,
    length: jax.Array | int | None,
    dilation: int = 1,
) -> jax.Array:
    """A convolution that keeps T, with the codec's padding and norm."""
    x_BTC = _padded(x_BTC, (layer["kernel"].shape[0] - 1) * dilation, config, length)
    y_BTO = _convolution(x_BTC, layer["kernel"], padding="VALID", rhs_dilation=(dilation,))
    return _masked(_biased_and_normed(y_BTO, layer, length), length)


def _upsample(
    x_BTC: jax.Array,
    layer: Params,
    ratio: int,
    config: SeanetConfig,
    length: jax.Array | int | None,
) -> jax.Array:
    """The transposed convolution of stride S and 2S taps: [B,T,C] -> [B,T*S,O].

    S samples hang on one row and the row before, so it is a plain convolution of two taps that
    gives S*O channels a row; XLA would have a transposed one multiply by the zeros between.
    """
    batch, rows, _ = x_BTC.shape
    y_BTO = _convolution(x_BTC, layer["kernel"], padding=((1, 1),))
    y_BTO = y_BTO.reshape(batch, (rows + 1) * ratio, -1)
    # (the reference norms before it trims)
    y_BTO = _biased_and_normed(y_BTO, layer, None if length is None else (length + 1) * ratio)
    right = math.ceil(ratio * config.trim_right_ratio) if config.use_causal_conv else ratio // 2
    y_BTO = jax.lax.slice_in_dim(y_BTO, ratio - right, ratio - right + rows * ratio, axis=1)
    return _masked(y_BTO, None if length is None else length * ratio)


def _biased_and_normed(
    y_BTC: jax.Array, layer: Params, length: jax.Array | int | None
) -> jax.Array:
    """Adds the bias, then norms over all channels and real rows where the layer has a norm."""
    y_BTC = y_BTC + layer["bias"][None, None]
    if "norm_scale" not in layer:
        return y_BTC
    count = (y_BTC.shape[1] if length is None else length) * y_BTC.shape[2]

    def mean(x_BTC: jax.Array) -> jax.Array:
        # (one axis after the other rounds less: the terms of a sum are of one size)
        total_B = _masked(x_BTC, length).sum(-1).sum(-1)
        return (total_B / count)[:, None, None]

    y_BTC = y_BTC - mean(y_BTC)
    y_BTC = y_BTC * jax.lax.rsqrt(mean(jnp.square(y_BTC)) + _NORM_EPSILON)
    return y_BTC * layer["norm_scale"][None, None] + layer["norm_bias"][None, None]


def _padded(
    x_BTC: jax.Array, total: int, config: SeanetConfig, length: jax.Array | int | None
) -> jax.Array:
    """`total` more rows, before row 0 and after the last real one, as `pad_mode` has them."""
    right = 0 if config.use_causal_conv else total // 2
    left = total - right
    if total == 0:
        return x_BTC
    if config.pad_mode == "constant":
        return jnp.pad(x_BTC, ((0, 0), (left, right), (0, 0)))
    rows = x_BTC.shape[1] if length is None else length
    before = _rows_beyond(x_BTC, jnp.arange(-left, 0), rows, left, config.pad_mode)
    after = _rows_beyond(x_BTC, rows + jnp.arange(right), rows, left, config.pad_mode)
    padded = jnp.concatenate([before, x_BTC, after], axis=1)
    if length is None or right == 0:
        return padded
    return jax.lax.dynamic_update_slice_in_dim(padded, after, left + rows, axis=1)


def _rows_beyond(
    x_BTC: jax.Array, place: jax.Array, rows: jax.Array | int, widest: int, pad_mode: str
) -> jax.Array:
    """What stands at places outside [0, rows), the real rows of x; `widest` of the two paddings."""
    if pad_mode == "replicate":
        source = jnp.clip(place, 0, rows - 1)
    else:
        # Audio too short to be reflected is first drawn out with zeros, as in the reference.
        last = jnp.maximum(rows, widest + 1) - 1
        source = jnp.where(place < 0, -place, place)
        source = jnp.where(source > last, 2 * last - source, source)
    found = jnp.take(x_BTC, source, axis=1, mode="clip")
    return jnp.where((source < rows)[None, :, None], found, 0.0)


def _lstm(x_BTC: jax.Array, layers: Params, multiple: int) -> jax.Array:
    """The LSTM's layers one after the other, and past them all a skip.

    The batch stands last in the recurrent product, [G,C] by [C,B]: on CPUs that is four times
    faster at eight rows than [B,C] by [C,G], whose large factor is packed anew at every step.
    Running a layer one step behind the other in one scan would read its input weights at every
    step, where here they are part of one large product.
    """
    y_TCB = jnp.transpose(x_BTC, (1, 2, 0))
    more = ((0, 0), (0, -x_BTC.shape[0] % multiple))

    def layer(y_TCB: jax.Array, weights: Params) -> tuple[jax.Array, None]:
        gates_TGB = jnp.einsum("GC,TCB->TGB", weights["input"], y_TCB, precision=_PRECISION)
        gates_TGB = gates_TGB + weights["bias"][None, :, None]
        batch = y_TCB.shape[2]

        def step(state: tuple[jax.Array, jax.Array], gates_GB: jax.Array) -> tuple:
            hidden_CB, cell_CB = state
            gates_GB = jnp.pad(gates_GB, more)  # here, as gates of all steps are large
            gates_GB += jnp.einsum("GC,CB->GB", weights["hidden"], hidden_CB, precision=_PRECISION)
            write, keep, value, read = jnp.split(gates_GB, 4)
            cell_CB = jax.nn.sigmoid(keep) * cell_CB + jax.nn.sigmoid(write) * jnp.tanh(value)
            hidden_CB = jax.nn.sigmoid(read) * jnp.tanh(cell_CB)
            return (hidden_CB, cell_CB), hidden_CB[:, :batch]

        start = jnp.pad(jnp.zeros_like(y_TCB[0]), more)
        return jax.lax.scan(step, (start, start), gates_TGB)[1], None

    y_TCB, _ = jax.lax.scan(layer, y_TCB, layers)
    return x_BTC + jnp.transpose(y_TCB, (2, 0, 1))

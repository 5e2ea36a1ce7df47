"""transformers' EnCodec <-> AudioCraft's EnCodec, one table of names for both ways; and to JAX.

Both hold the same tensors in the same layout and differ in names only; shapes follow from the
transformers folder's config.json, and so does AudioCraft's xp.cfg. The parameters of the JAX
decoder (`seanet`) are made from the same table.
"""

import copy
import dataclasses
import json
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from magnet_jax.arguments import check, check_fields
from magnet_jax.config import ASSETS, EMBEDDED, CodecSpec, Count, require
from magnet_jax.convert import transformers_folder
from magnet_jax.convert.audiocraft import misfits, xp_setting
from magnet_jax.errors import UserError
from magnet_jax.io import hub, trees

# Codecs that renormalise give their audio back at this RMS (-20 dBFS).
NOMINAL_RMS = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeanetConfig:
    """The part of a transformers EncodecModel's config.json that decides what is computed.

    Its names, its defaults.
    """

    audio_channels: Count = 1
    codebook_size: Count = 1024
    compress: Count = 2
    dilation_growth_rate: Count = 2
    hidden_size: Count = 128
    kernel_size: Count = 7
    last_kernel_size: Count = 7
    norm_type: Literal["weight_norm", "time_group_norm"] = "weight_norm"
    normalize: bool = False
    num_filters: Count = 32
    num_lstm_layers: Count = 2
    num_residual_layers: Count = 1
    pad_mode: Literal["reflect", "constant", "replicate"] = "reflect"
    residual_kernel_size: Count = 3
    sampling_rate: Count = 24_000
    # A whole number stays one, as the codec's hash is made of these settings as they stand.
    trim_right_ratio: int | float = 1.0
    upsampling_ratios: tuple[Count, ...] = (8, 5, 4, 2)
    use_causal_conv: bool = True
    use_conv_shortcut: bool = True

    def __post_init__(self):
        check_fields(self, "")
        trim = self.trim_right_ratio
        require(
            (self.upsampling_ratios, "upsampling_ratios must hold one number at least"),
            (self.codebook_size >= 2, "codebook_size must be at least 2"),
            (
                self.compress <= self.num_filters,
                f"compress {self.compress} leaves no channel of {self.num_filters}",
            ),
            (0 <= trim <= 1, f"trim_right_ratio must lie in [0, 1], not {trim!r}"),
            (
                trim == 1 or self.use_causal_conv,
                "trim_right_ratio other than 1 needs use_causal_conv",
            ),
        )

    @property
    def hop(self) -> int:
        """Audio samples in a token frame."""
        return math.prod(self.upsampling_ratios)

    @property
    def norms_over_clip(self) -> bool:
        """Whether every number hangs on all of a clip."""
        return self.normalize or self.norm_type == "time_group_norm"

    @property
    def bits_per_second(self) -> int:
        """Of one codebook, as transformers counts: bits a code times codes a second, rounded up."""
        return math.ceil(math.log2(self.codebook_size)) * math.ceil(self.sampling_rate / self.hop)


# The tensor of a codec whose first codebook is a tonal stream (`codec.tonal`), and the section of
# its config.json. AudioCraft has neither: there the codebook, of zeros, is one like the others.
TONAL_CENTROIDS = "tonal.centroids"
TONAL_SECTION = "tonal"

# The settings of a transformers config.json that decide what is computed with the tensors.
CODEC_SETTINGS = tuple(field.name for field in dataclasses.fields(SeanetConfig))


def check_tensors(
    where: str, found: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises one `UserError` that names every missing, unknown, misshapen or non-float tensor."""
    problems = [f"{n} {list(s)} is missing" for n, s in expected.items() if n not in found]
    for name, array in found.items():
        if name not in expected:
            problems.append(f"{name} {list(array.shape)} is unknown")
        elif tuple(array.shape) != tuple(expected[name]):
            problems.append(f"{name} is {list(array.shape)}, not {list(expected[name])}")
        elif not np.issubdtype(array.dtype, np.floating):
            problems.append(f"{name} is {array.dtype}, not floating point")
    if problems:
        noun = "tensor does" if len(problems) == 1 else "tensors do"
        raise UserError(f"{where}: {len(problems)} {noun} not fit the model: {'; '.join(problems)}")


def check_norms(where: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises `UserError` for a direction that is all zeros, by whose norm its weight is divided."""
    for name, array in tensors.items():
        directions = name.endswith(".parametrizations.weight.original1") and array.ndim == 3
        if directions and not np.any(array, axis=(1, 2)).all():
            raise UserError(f"{where}: the tensor {name} has a row of zeros, which has no norm")


def codec_folder(codec: CodecSpec) -> Path | None:
    """Where the codec's transformers folder lies; None for a published codec."""
    if codec.source == EMBEDDED:
        return ASSETS / "codec"
    return Path(codec.source) if Path(codec.source).is_dir() else None


def codec_pointer(codec: CodecSpec) -> str | None:
    """The hub id by which AudioCraft finds a published codec; None where the weights lie here.

    Raises `UserError` for a codec that is neither, or that AudioCraft cannot decode.
    """
    if codec_folder(codec):
        return None
    if Path(codec.source).is_file() or _renormalizes(codec.source):
        raise UserError(
            f"codec {codec.source}: AudioCraft has no checkpoint of this kind; export with "
            "--no-audiocraft to write model.safetensors alone"
        )
    if codec.source == "encodec_24khz":
        return "facebook/encodec_24khz"  # the same weights, as AudioCraft loads them
    if "/" in codec.source and hub.is_hub_id(codec.source):
        return codec.source
    raise UserError(f"codec {codec.source}: no such folder, and not a hub id like owner/name")


def _renormalizes(source: str) -> bool:
    """Whether a published codec decodes to RMS 1, which AudioCraft's MAGNeT leaves as it is."""
    if source in ("encodec_48khz", "facebook/encodec_48khz"):
        return True
    if "/" not in source or not hub.is_hub_id(source):
        return False
    config = hub.cached_file(source, "config.json")  # whoever used the codec here has it
    return config is not None and json.loads(config.read_text()).get("normalize") is True


def read_codec_folder(
    folder: Path, where: str | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A transformers EncodecModel folder: its config.json, and its tensors by their newer names.

    Raises `UserError`, which calls the folder `where`, for what is not there or damaged.
    """
    folder = Path(folder)
    where = where or str(folder)
    try:
        settings = json.loads((folder / "config.json").read_text())
        model_type = settings["model_type"]
    except FileNotFoundError:
        other = folder / "compression_state_dict.bin"
        hint = f"; AudioCraft's codec is {other}" if other.exists() else ""
        raise UserError(f"{where}: no config.json in {folder}{hint}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: damaged config.json ({error!r})") from None
    settings, prefix = transformers_folder.part_of(settings, "audio_encoder")
    if settings.get("model_type") != "encodec":
        model_type = settings.get("model_type", model_type)
        raise UserError(f"{where}: a {model_type} model, not an encodec model")
    tensors, _ = transformers_folder.read_tensors(folder, prefix=prefix)
    return settings, {parametrized_name(name): array for name, array in tensors.items()}


def parametrized_name(name: str) -> str:
    """A tensor's name as torch's parametrizations have it; older files call it as AudioCraft."""
    name = name.replace(".weight_g", ".parametrizations.weight.original0")
    return name.replace(".weight_v", ".parametrizations.weight.original1")


def weight_norm_name(name: str) -> str:
    """The inverse of `parametrized_name`."""
    name = name.replace(".parametrizations.weight.original0", ".weight_g")
    return name.replace(".parametrizations.weight.original1", ".weight_v")


# One table for both ways: (transformers' name, AudioCraft's name, axes). I and O are channels in
# and out, S the kernel's size, G four gates of O, V codes of size D.
Names = tuple[tuple[str, str, str], ...]


def _convolution_names(norm_type: str, module: str, axes: str) -> Names:
    """Of a convolution; `module` is what AudioCraft calls it, twice over."""
    inner = f"{module}.{module}"
    bias = ("conv.bias", f"{inner}.bias", "O")
    if norm_type == "weight_norm":
        ours = "conv.parametrizations.weight.original"
        scale = (f"{ours}0", f"{inner}.weight_g", f"{axes[0]}11")
        return bias, scale, (f"{ours}1", f"{inner}.weight_v", axes)
    weight = ("conv.weight", f"{inner}.weight", axes)
    norm = (
        ("norm.bias", f"{module}.norm.bias", "O"),
        ("norm.weight", f"{module}.norm.weight", "O"),
    )
    return bias, weight, *norm


def _names(norm_type: str) -> dict[str, Names]:
    lstm = {"weight_ih": "GO", "weight_hh": "GO", "bias_ih": "G", "bias_hh": "G"}
    codebook = {"inited": "1", "cluster_size": "V", "embed": "VD", "embed_avg": "VD"}
    return {
        "conv": _convolution_names(norm_type, "conv", "OIS"),
        "upsample": _convolution_names(norm_type, "convtr", "IOS"),
        "lstm": tuple((f"lstm.{n}_l{{n}}", f"lstm.{n}_l{{n}}", axes) for n, axes in lstm.items()),
        "codebook": tuple(
            (f"codebook.{n}", f"_codebook.{n}", axes) for n, axes in codebook.items()
        ),
    }


def _check_codec_settings(settings: Mapping) -> None:
    problems = [f"{name} is missing" for name in CODEC_SETTINGS if name not in settings]
    if settings.get("norm_type") != "weight_norm":
        problems.append(f"norm_type must be weight_norm, not {settings.get('norm_type')}")
    if settings.get("normalize"):
        problems.append("normalize must be false: AudioCraft would decode far too loud")
    if settings.get("chunk_length_s") is not None:
        problems.append("AudioCraft does not code audio in chunks (chunk_length_s)")
    if settings.get("codebook_dim") not in (None, settings.get("hidden_size")):
        problems.append("codebook_dim must equal hidden_size")
    if problems:
        raise UserError(f"codec config.json: cannot be converted: {'; '.join(problems)}")


def _codec_modules(c: Mapping, num_codebooks: int) -> Iterator[tuple[str, str, str, dict]]:
    """Each module that holds tensors: transformers' name, AudioCraft's, kind, sizes of its axes."""
    kernel, last_kernel = c["kernel_size"], c["last_kernel_size"]
    ratios, residuals = c["upsampling_ratios"], c["num_residual_layers"]

    def module(side: str, place: str, kind: str, i: int, o: int, s: int = 1):
        sizes = {"I": i, "O": o, "S": s, "G": 4 * o}
        return f"{side}.layers.{place}", f"{side}.model.{place}", kind, sizes

    def residual(side: str, place: int, width: int):
        hidden = width // c["compress"]
        yield module(side, f"{place}.block.1", "conv", width, hidden, c["residual_kernel_size"])
        yield module(side, f"{place}.block.3", "conv", hidden, width)
        if c["use_conv_shortcut"]:
            yield module(side, f"{place}.shortcut", "conv", width, width)

    # Places are numbered along the whole stack; activations take a place and hold no tensors.
    side, width, place = "encoder", c["num_filters"], 1
    yield module(side, "0", "conv", c["audio_channels"], width, kernel)
    for ratio in reversed(ratios):
        for _ in range(residuals):
            yield from residual(side, place, width)
            place += 1
        yield module(side, str(place + 1), "conv", width, 2 * width, 2 * ratio)
        width, place = 2 * width, place + 2
    yield module(side, str(place), "lstm", width, width)
    yield module(side, str(place + 2), "conv", width, c["hidden_size"], last_kernel)

    side, place = "decoder", 2
    yield module(side, "0", "conv", c["hidden_size"], width, kernel)
    yield module(side, "1", "lstm", width, width)
    for ratio in ratios:
        yield module(side, str(place + 1), "upsample", width, width // 2, 2 * ratio)
        width, place = width // 2, place + 2
        for _ in range(residuals):
            yield from residual(side, place, width)
            place += 1
    yield module(side, str(place + 1), "conv", width, c["audio_channels"], last_kernel)

    for k in range(num_codebooks):
        sizes = {"V": c["codebook_size"], "D": c["hidden_size"]}
        yield f"quantizer.layers.{k}", f"quantizer.vq.layers.{k}", "codebook", sizes


def codec_layout(settings: Mapping, num_codebooks: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """Every tensor of an EnCodec: transformers' name, AudioCraft's name, shape (equal in both).

    `settings` are a transformers EncodecModel's config.json. Raises `UserError` for those that
    AudioCraft's EnCodec lacks.
    """
    _check_codec_settings(settings)
    return encodec_layout(settings, num_codebooks)


def encodec_layout(settings: Mapping, num_codebooks: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """`codec_layout`, of any settings that a `SeanetConfig` may have.

    AudioCraft's names are those of the `encodec` package too.
    """
    tables = _names(settings["norm_type"])
    layout = []
    for here, there, kind, sizes in _codec_modules(settings, num_codebooks):
        for n in range(settings["num_lstm_layers"] if kind == "lstm" else 1):
            for our_name, their_name, axes in tables[kind]:
                shape = tuple(1 if a == "1" else sizes[a] for a in axes)
                layout.append(
                    (f"{here}.{our_name.format(n=n)}", f"{there}.{their_name.format(n=n)}", shape)
                )
    return layout


def codec_to_audiocraft(
    tensors: Mapping[str, np.ndarray], settings: Mapping, num_codebooks: int
) -> dict[str, np.ndarray]:
    """transformers' EncodecModel tensors under AudioCraft's names, the first codebooks only.

    Codebooks are residual, so leaving out the last ones changes none of the codes kept. Of a tonal
    stream a codebook of zeros is left, which AudioCraft's encoder fills with code 0; subtracting
    zeros it finds the other codes as they are here.
    """
    layout = codec_layout(settings, num_codebooks)
    kept = {}
    for name, array in tensors.items():
        found = re.match(r"quantizer\.layers\.(\d+)\.", name)
        if name != TONAL_CENTROIDS and (not found or int(found[1]) < num_codebooks):
            kept[name] = array
    check_tensors("codec", kept, {here: shape for here, _, shape in layout})
    return {there: kept[here] for here, there, _ in layout}


def codec_from_audiocraft(
    state_dict: Mapping[str, np.ndarray],
    settings: Mapping,
    num_codebooks: int,
    where: str = "codec",
) -> dict[str, np.ndarray]:
    """The inverse of `codec_to_audiocraft`; takes torch's newer names of weight norms as well."""
    return renamed_from_audiocraft(state_dict, codec_layout(settings, num_codebooks), where)


def renamed_from_audiocraft(
    state_dict: Mapping[str, np.ndarray], layout: list[tuple[str, str, tuple[int, ...]]], where: str
) -> dict[str, np.ndarray]:
    """The tensors of a layout under transformers' names; `UserError` where they do not fit it."""
    state_dict = {weight_norm_name(name): array for name, array in state_dict.items()}
    check_tensors(where, state_dict, {there: shape for _, there, shape in layout})
    return {here: state_dict[there] for here, there, _ in layout}


def decoder_params(
    tensors: Mapping[str, np.ndarray], config: SeanetConfig, num_codebooks: int
) -> dict[str, Any]:
    """Parameters of the JAX decoder, see `seanet`, from a transformers EncodecModel's tensors.

    The first `num_codebooks` codebooks are kept. NumPy arrays, float32.
    """
    modules = _codec_modules(dataclasses.asdict(config), num_codebooks)
    first, lstm, *between, last = [place for place, *_ in modules if place.startswith("decoder.")]
    parts = ("narrow", "widen", "shortcut")[: 3 if config.use_conv_shortcut else 2]

    def convolution(place: str) -> dict[str, np.ndarray]:
        weight_OIS, rest = _convolution(tensors, place)
        return {"kernel": np.ascontiguousarray(weight_OIS.transpose(2, 1, 0)), **rest}

    def upsample(place: str) -> dict[str, np.ndarray]:
        weight_IOS, rest = _convolution(tensors, place)
        channels_in, channels_out, taps = weight_IOS.shape
        # The first S of the 2S taps weigh a row's own samples, the last S those of the next row:
        # of the two taps over rows the later one, and the earlier one.
        weight = weight_IOS.reshape(channels_in, channels_out, 2, taps // 2)
        weight = weight.transpose(2, 0, 3, 1)[::-1]
        return {"kernel": weight.reshape(2, channels_in, -1), **rest}

    def stage(up: str, *places: str) -> dict[str, Any]:
        residuals = [places[i : i + len(parts)] for i in range(0, len(places), len(parts))]
        residuals = [dict(zip(parts, map(convolution, block), strict=True)) for block in residuals]
        return {"upsample": upsample(up), "residuals": residuals}

    def stacked(name: str) -> np.ndarray:
        layers = range(config.num_lstm_layers)
        return np.stack([tensors[f"{lstm}.lstm.{name}_l{n}"] for n in layers])

    size = 1 + config.num_residual_layers * len(parts)
    codebooks = [tensors[f"quantizer.layers.{k}.codebook.embed"] for k in range(num_codebooks)]
    return {
        "codebooks": np.stack(codebooks),
        "first": convolution(first),
        "lstm": {
            "input": stacked("weight_ih"),
            "hidden": stacked("weight_hh"),
            "bias": stacked("bias_ih") + stacked("bias_hh"),
        },
        "stages": [stage(*between[i : i + size]) for i in range(0, len(between), size)],
        "last": convolution(last),
    }


def _convolution(
    tensors: Mapping[str, np.ndarray], place: str
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Weight, its norm multiplied out, and the vectors that go with it."""
    rest = {"bias": tensors[f"{place}.conv.bias"]}
    if f"{place}.norm.weight" in tensors:
        rest["norm_scale"] = tensors[f"{place}.norm.weight"]
        rest["norm_bias"] = tensors[f"{place}.norm.bias"]
        return tensors[f"{place}.conv.weight"], rest
    prefix = f"{place}.conv.parametrizations.weight.original"
    scale, direction = tensors[f"{prefix}0"], tensors[f"{prefix}1"].astype(np.float64)
    norm = np.sqrt(np.square(direction).sum((1, 2), keepdims=True))
    return (direction * (scale / norm)).astype(np.float32), rest


# One table for both ways: transformers' setting and xp.cfg's names for it, which must agree where
# there are several. `true_skip` is the opposite of `use_conv_shortcut`.
_CODEC_XP_SETTINGS = (
    ("sampling_rate", ("sample_rate", "encodec.sample_rate")),
    ("audio_channels", ("channels", "encodec.channels", "seanet.channels")),
    ("use_causal_conv", ("encodec.causal", "seanet.causal")),
    ("normalize", ("encodec.renormalize",)),
    ("hidden_size", ("seanet.dimension",)),
    ("num_filters", ("seanet.n_filters",)),
    ("num_residual_layers", ("seanet.n_residual_layers",)),
    ("upsampling_ratios", ("seanet.ratios",)),
    ("norm_type", ("seanet.norm",)),
    ("kernel_size", ("seanet.kernel_size",)),
    ("residual_kernel_size", ("seanet.residual_kernel_size",)),
    ("last_kernel_size", ("seanet.last_kernel_size",)),
    ("dilation_growth_rate", ("seanet.dilation_base",)),
    ("pad_mode", ("seanet.pad_mode",)),
    ("use_conv_shortcut", ("seanet.true_skip",)),
    ("compress", ("seanet.compress",)),
    ("num_lstm_layers", ("seanet.lstm",)),
    ("trim_right_ratio", ("seanet.decoder.trim_right_ratio",)),
    ("codebook_size", ("rvq.bins",)),
)
# What AudioCraft's builders take where xp.cfg, perhaps an older one, does not say.
_CODEC_XP_DEFAULTS = {
    "encodec.causal": False,
    "encodec.renormalize": False,
    "seanet.causal": False,
    "seanet.true_skip": True,
    "seanet.decoder.trim_right_ratio": 1.0,
}
# What transformers' EnCodec computes besides: each setting with the only value that fits.
_CODEC_XP_FITTING = {
    "compression_model": "encodec",
    "encodec.autoencoder": "seanet",
    "encodec.quantizer": "rvq",
}
# The same; where the setting is absent, AudioCraft's own default is the value that fits.
_CODEC_XP_FITTING_OR_ABSENT = {
    "seanet.activation": "ELU",
    "seanet.activation_params": {"alpha": 1.0},
    "seanet.norm_params": {},
    "seanet.disable_norm_outer_blocks": 0,
    "seanet.decoder.final_activation": None,
    "seanet.encoder": {},
}
# Settings of training, or of what is not there, which the builders want all the same.
_CODEC_XP_UNUSED = {
    "device": "cpu",
    "seanet.decoder.final_activation_params": None,
    "rvq.q_dropout": False,
    "rvq.decay": 0.99,
    "rvq.kmeans_init": True,
    "rvq.kmeans_iters": 50,
    "rvq.threshold_ema_dead_code": 2,
    "rvq.orthogonal_reg_weight": 0.0,
    "rvq.orthogonal_reg_active_codes_only": False,
}


def make_codec_xp_cfg(settings: Mapping, num_codebooks: int) -> dict[str, Any]:
    """The xp.cfg of an exported codec, from a transformers EncodecModel's config.json."""
    _check_codec_settings(settings)
    named = _CODEC_XP_FITTING | _CODEC_XP_FITTING_OR_ABSENT | _CODEC_XP_UNUSED
    named |= {"rvq.n_q": num_codebooks}
    for setting, names in _CODEC_XP_SETTINGS:
        value = settings[setting]
        value = not value if setting == "use_conv_shortcut" else value
        named |= dict.fromkeys(names, list(value) if isinstance(value, tuple) else value)
    return trees.unflatten(copy.deepcopy(named), ".")


def codec_settings_from_xp_cfg(xp_cfg: Mapping, where: str) -> tuple[dict[str, Any], int]:
    """The inverse of `make_codec_xp_cfg`: a transformers EncodecModel's config.json, and K.

    Raises `UserError`, beginning with `where`, that lists all that transformers' EnCodec lacks.
    """
    problems = misfits(xp_cfg, _CODEC_XP_FITTING, _CODEC_XP_FITTING_OR_ABSENT)
    settings: dict[str, Any] = {}
    decoder = xp_setting(xp_cfg, "seanet.decoder", {})
    known = {"trim_right_ratio", "final_activation", "final_activation_params"}
    if isinstance(decoder, Mapping) and (others := sorted(map(str, decoder.keys() - known))):
        problems.append(f"seanet.decoder has settings of its own: {', '.join(others)}")
    hints = typing.get_type_hints(SeanetConfig, include_extras=True) | {"rvq.n_q": Count}

    def take(setting: str, value: Any, name: str) -> None:
        try:
            settings[setting] = check(hints[setting], value, name)
        except UserError as error:
            problems.append(str(error))

    for setting, names in _CODEC_XP_SETTINGS:
        found = [xp_setting(xp_cfg, name, _CODEC_XP_DEFAULTS.get(name)) for name in names]
        found = [value for value in found if value is not None]
        # (repr tells True from 1)
        if len({repr(value) for value in found}) != 1:
            problems.append(f"{' and '.join(names)} must be given, and equal, not {found}")
        else:
            take(setting, found[0], names[0])
    take("rvq.n_q", xp_setting(xp_cfg, "rvq.n_q"), "rvq.n_q")
    if settings.get("normalize"):
        problems.append("encodec.renormalize must be False: tokens alone would lose the loudness")
    if settings.get("norm_type", "weight_norm") != "weight_norm":
        problems.append(f"seanet.norm must be weight_norm, not {settings['norm_type']}")
    if settings.get("codebook_size", 2) < 2:
        problems.append("rvq.bins must be at least 2")
    if problems:
        raise UserError(f"{where}: not a codec that can be converted: {'; '.join(problems)}")
    num_codebooks = settings.pop("rvq.n_q")
    settings |= {
        "trim_right_ratio": float(settings["trim_right_ratio"]),
        "upsampling_ratios": list(settings["upsampling_ratios"]),
        "use_conv_shortcut": not settings["use_conv_shortcut"],
    }
    return folder_settings(settings, [bandwidth(settings, num_codebooks)]), num_codebooks


def folder_settings(settings: Mapping[str, Any], kbps: Sequence[float]) -> dict[str, Any]:
    """A transformers EncodecModel's config.json of these `CODEC_SETTINGS` and bandwidths."""
    return {
        **settings,
        "model_type": "encodec",
        "architectures": ["EncodecModel"],
        "chunk_length_s": None,
        "overlap": None,
        "codebook_dim": settings["hidden_size"],
        "target_bandwidths": list(kbps),
    }


def bandwidth(settings: Mapping, num_codebooks: int) -> float:
    """The kbit/s for which transformers builds that many codebooks: it divides and rounds down."""
    frame_rate = math.ceil(settings["sampling_rate"] / math.prod(settings["upsampling_ratios"]))
    bits = frame_rate * math.ceil(math.log2(settings["codebook_size"]))
    exact = num_codebooks * bits / 1000
    # (where the exact number falls short by a rounding, a little more does)
    return exact if int(1000 * exact // bits) == num_codebooks else exact + bits / 2000


def codec_folder_from_audiocraft(
    state_dict: Mapping[str, np.ndarray], xp_cfg: Mapping, folder: Path, where: str
) -> None:
    """Writes an AudioCraft codec into an existing folder as a transformers EncodecModel, float32.

    Raises `UserError`, which calls the checkpoint `where`, for what does not fit.
    """
    settings, num_codebooks = codec_settings_from_xp_cfg(xp_cfg, where)
    tensors = codec_from_audiocraft(state_dict, settings, num_codebooks, where)
    write_codec_folder(folder, settings, tensors)


def write_codec_folder(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Writes what `read_codec_folder` gives into an existing folder, float32."""
    # float16 is widened, which is exact.
    tensors = {name: np.ascontiguousarray(a, np.float32) for name, a in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")

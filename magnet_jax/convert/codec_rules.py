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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from magnet_jax.config import ASSETS, EMBEDDED, CodecSpec
from magnet_jax.convert import transformers_folder
from magnet_jax.convert.audiocraft import misfits, xp_setting
from magnet_jax.errors import UserError
from magnet_jax.io import hub

# Codecs that renormalise give their audio back at this RMS (-20 dBFS).
NOMINAL_RMS = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeanetConfig:
    """The part of a transformers EncodecModel's config.json that decides what is computed.

    Its names, its defaults.
    """

    audio_channels: int = 1
    codebook_size: int = 1024
    compress: int = 2
    dilation_growth_rate: int = 2
    hidden_size: int = 128
    kernel_size: int = 7
    last_kernel_size: int = 7
    norm_type: str = "weight_norm"
    normalize: bool = False
    num_filters: int = 32
    num_lstm_layers: int = 2
    num_residual_layers: int = 1
    pad_mode: str = "reflect"
    residual_kernel_size: int = 3
    sampling_rate: int = 24_000
    trim_right_ratio: float = 1.0
    upsampling_ratios: tuple[int, ...] = (8, 5, 4, 2)
    use_causal_conv: bool = True
    use_conv_shortcut: bool = True

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and not _of_kind(value, int):
                raise UserError(f"{field.name} must be a whole number above 0, not {value!r}")
            if field.type is bool and type(value) is not bool:
                raise UserError(f"{field.name} must be true or false, not {value!r}")
        if isinstance(self.upsampling_ratios, list):  # as JSON has it
            object.__setattr__(self, "upsampling_ratios", tuple(self.upsampling_ratios))
        ratios = self.upsampling_ratios
        if type(ratios) is not tuple or not _of_kind(list(ratios), list):
            raise UserError(f"upsampling_ratios must be whole numbers above 0, not {ratios!r}")
        for name, known in (
            ("norm_type", ("weight_norm", "time_group_norm")),
            ("pad_mode", ("reflect", "constant", "replicate")),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be {' or '.join(known)}, not {getattr(self, name)!r}")
        if self.codebook_size < 2:
            raise UserError("codebook_size must be at least 2")
        if self.compress > self.num_filters:
            raise UserError(f"compress {self.compress} leaves no channel of {self.num_filters}")
        trim = self.trim_right_ratio
        if not _of_kind(trim, float) or not 0 <= trim <= 1:
            raise UserError(f"trim_right_ratio must lie in [0, 1], not {trim!r}")
        if trim != 1 and not self.use_causal_conv:
            raise UserError("trim_right_ratio other than 1 needs use_causal_conv")

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
_CONVOLUTIONS = {
    "weight_norm": {
        "conv": (
            ("conv.bias", "conv.conv.bias", "O"),
            ("conv.parametrizations.weight.original0", "conv.conv.weight_g", "O11"),
            ("conv.parametrizations.weight.original1", "conv.conv.weight_v", "OIS"),
        ),
        "upsample": (
            ("conv.bias", "convtr.convtr.bias", "O"),
            ("conv.parametrizations.weight.original0", "convtr.convtr.weight_g", "I11"),
            ("conv.parametrizations.weight.original1", "convtr.convtr.weight_v", "IOS"),
        ),
    },
    "time_group_norm": {
        "conv": (
            ("conv.bias", "conv.conv.bias", "O"),
            ("conv.weight", "conv.conv.weight", "OIS"),
            ("norm.bias", "conv.norm.bias", "O"),
            ("norm.weight", "conv.norm.weight", "O"),
        ),
        "upsample": (
            ("conv.bias", "convtr.convtr.bias", "O"),
            ("conv.weight", "convtr.convtr.weight", "IOS"),
            ("norm.bias", "convtr.norm.bias", "O"),
            ("norm.weight", "convtr.norm.weight", "O"),
        ),
    },
}
_CODEC_TENSORS = {
    "lstm": (
        ("lstm.weight_ih_l{n}", "lstm.weight_ih_l{n}", "GO"),
        ("lstm.weight_hh_l{n}", "lstm.weight_hh_l{n}", "GO"),
        ("lstm.bias_ih_l{n}", "lstm.bias_ih_l{n}", "G"),
        ("lstm.bias_hh_l{n}", "lstm.bias_hh_l{n}", "G"),
    ),
    "codebook": (
        ("codebook.inited", "_codebook.inited", "1"),
        ("codebook.cluster_size", "_codebook.cluster_size", "V"),
        ("codebook.embed", "_codebook.embed", "VD"),
        ("codebook.embed_avg", "_codebook.embed_avg", "VD"),
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

    Args:
      settings: a transformers EncodecModel's config.json.
      num_codebooks: how many to count.

    Raises:
      UserError: settings that AudioCraft's EnCodec lacks.
    """
    _check_codec_settings(settings)
    return encodec_layout(settings, num_codebooks)


def encodec_layout(settings: Mapping, num_codebooks: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """`codec_layout`, of any settings that a `SeanetConfig` may have.

    AudioCraft's names are those of the `encodec` package too.
    """
    tables = _CODEC_TENSORS | _CONVOLUTIONS[settings["norm_type"]]
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

    Codebooks are residual, so leaving out the last ones changes none of the codes kept.
    """
    layout = codec_layout(settings, num_codebooks)
    kept = {}
    for name, array in tensors.items():
        found = re.match(r"quantizer\.layers\.(\d+)\.", name)
        if not found or int(found[1]) < num_codebooks:
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
    names = iter([here for here, _, kind, _ in modules if kind != "codebook"])
    names = (name for name in names if name.startswith("decoder."))

    def convolution() -> dict[str, np.ndarray]:
        weight_OIS, rest = _convolution(tensors, next(names))
        return {"kernel": np.ascontiguousarray(weight_OIS.transpose(2, 1, 0)), **rest}

    def upsample() -> dict[str, np.ndarray]:
        weight_IOS, rest = _convolution(tensors, next(names))
        channels_in, channels_out, taps = weight_IOS.shape
        # The first S of the 2S taps weigh a row's own samples, the last S those of the next row:
        # of the two taps over rows the later one, and the earlier one.
        weight = weight_IOS.reshape(channels_in, channels_out, 2, taps // 2)
        weight = weight.transpose(2, 0, 3, 1)[::-1]
        return {"kernel": weight.reshape(2, channels_in, -1), **rest}

    def residual() -> dict[str, dict]:
        parts = ("narrow", "widen", "shortcut")[: 3 if config.use_conv_shortcut else 2]
        return {part: convolution() for part in parts}

    def stage() -> dict[str, Any]:
        up = upsample()
        return {
            "upsample": up,
            "residuals": [residual() for _ in range(config.num_residual_layers)],
        }

    def lstm() -> dict[str, np.ndarray]:
        place = next(names)

        def stacked(name: str) -> np.ndarray:
            layers = range(config.num_lstm_layers)
            return np.stack([tensors[f"{place}.lstm.{name}_l{n}"] for n in layers])

        bias = stacked("bias_ih") + stacked("bias_hh")
        return {"input": stacked("weight_ih"), "hidden": stacked("weight_hh"), "bias": bias}

    codebooks = [tensors[f"quantizer.layers.{k}.codebook.embed"] for k in range(num_codebooks)]
    # (in the order of the modules, which `names` follows)
    return {
        "codebooks": np.stack(codebooks),
        "first": convolution(),
        "lstm": lstm(),
        "stages": [stage() for _ in config.upsampling_ratios],
        "last": convolution(),
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


# One table for both ways: transformers' setting, its type, and xp.cfg's names for it, which must
# agree where there are several. `true_skip` is the opposite of `use_conv_shortcut`.
_CODEC_XP_SETTINGS = (
    ("sampling_rate", int, ("sample_rate", "encodec.sample_rate")),
    ("audio_channels", int, ("channels", "encodec.channels", "seanet.channels")),
    ("use_causal_conv", bool, ("encodec.causal", "seanet.causal")),
    ("normalize", bool, ("encodec.renormalize",)),
    ("hidden_size", int, ("seanet.dimension",)),
    ("num_filters", int, ("seanet.n_filters",)),
    ("num_residual_layers", int, ("seanet.n_residual_layers",)),
    ("upsampling_ratios", list, ("seanet.ratios",)),
    ("norm_type", str, ("seanet.norm",)),
    ("kernel_size", int, ("seanet.kernel_size",)),
    ("residual_kernel_size", int, ("seanet.residual_kernel_size",)),
    ("last_kernel_size", int, ("seanet.last_kernel_size",)),
    ("dilation_growth_rate", int, ("seanet.dilation_base",)),
    ("pad_mode", str, ("seanet.pad_mode",)),
    ("use_conv_shortcut", bool, ("seanet.true_skip",)),
    ("compress", int, ("seanet.compress",)),
    ("num_lstm_layers", int, ("seanet.lstm",)),
    ("trim_right_ratio", float, ("seanet.decoder.trim_right_ratio",)),
    ("codebook_size", int, ("rvq.bins",)),
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
    for setting, _, names in _CODEC_XP_SETTINGS:
        value = settings[setting]
        value = not value if setting == "use_conv_shortcut" else value
        named |= dict.fromkeys(names, list(value) if isinstance(value, tuple) else value)
    xp_cfg: dict[str, Any] = {}
    for name, value in named.items():
        *sections, last = name.split(".")
        node = xp_cfg
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = copy.deepcopy(value)
    return xp_cfg


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
    for setting, kind, names in _CODEC_XP_SETTINGS:
        found = [xp_setting(xp_cfg, name, _CODEC_XP_DEFAULTS.get(name)) for name in names]
        found = [value for value in found if value is not None]
        # (repr tells True from 1)
        if len({repr(value) for value in found}) != 1:
            problems.append(f"{' and '.join(names)} must be given, and equal, not {found}")
        elif not _of_kind(found[0], kind):
            problems.append(f"{names[0]} cannot be {found[0]!r}")
        else:
            value = kind(found[0])  # a float may stand there as a whole number
            settings[setting] = not value if setting == "use_conv_shortcut" else value
    num_codebooks = xp_setting(xp_cfg, "rvq.n_q")
    if not _of_kind(num_codebooks, int):
        problems.append(f"rvq.n_q cannot be {num_codebooks!r}")
    if settings.get("normalize"):
        problems.append("encodec.renormalize must be False: tokens alone would lose the loudness")
    if settings.get("norm_type", "weight_norm") != "weight_norm":
        problems.append(f"seanet.norm must be weight_norm, not {settings['norm_type']}")
    if settings.get("codebook_size", 2) < 2:
        problems.append("rvq.bins must be at least 2")
    if problems:
        raise UserError(f"{where}: not a codec that can be converted: {'; '.join(problems)}")
    settings |= {
        "model_type": "encodec",
        "architectures": ["EncodecModel"],
        "chunk_length_s": None,
        "overlap": None,
        "codebook_dim": settings["hidden_size"],
        "target_bandwidths": [bandwidth(settings, num_codebooks)],
    }
    return settings, num_codebooks


def _of_kind(value: Any, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and bool(value) and all(_of_kind(v, int) for v in value)
    if kind is int:
        return type(value) is int and value >= 1
    return type(value) is kind or (kind is float and type(value) is int)


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
    """Writes an AudioCraft codec as a transformers EncodecModel folder, float32.

    Args:
      state_dict, xp_cfg: of the checkpoint.
      folder: an existing one.
      where: how to call the checkpoint in messages.

    Raises:
      UserError: settings or tensors that do not fit.
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

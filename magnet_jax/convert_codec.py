"""transformers' EnCodec <-> AudioCraft's EnCodec, one table of names for both ways.

Both hold the same tensors in the same layout and differ in names only; shapes follow from the
transformers folder's config.json, and so does AudioCraft's xp.cfg.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from magnet_jax import hub
from magnet_jax.config import ASSETS, EMBEDDED, CodecSpec
from magnet_jax.errors import UserError


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


def read_codec_folder(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A transformers EncodecModel folder: its config.json and its tensors."""
    folder = Path(folder)
    try:
        settings = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: not a readable EncodecModel folder ({error})") from None
    if not isinstance(settings, dict) or settings.get("model_type") != "encodec":
        raise UserError(f"{folder}/config.json: not the config of an EncodecModel")
    return settings, {parametrized_name(name): array for name, array in tensors.items()}


def parametrized_name(name: str) -> str:
    """A tensor's name as torch's parametrizations have it; older files call it as AudioCraft."""
    name = name.replace(".weight_g", ".parametrizations.weight.original0")
    return name.replace(".weight_v", ".parametrizations.weight.original1")


# One table for both ways: (transformers' name, AudioCraft's name, axes). I and O are channels in
# and out, S the kernel's size, G four gates of O, V codes of size D.
_CODEC_TENSORS = {
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
# The settings of a transformers config.json that decide what is computed with the tensors.
CODEC_SETTINGS = (
    "audio_channels",
    "codebook_size",
    "compress",
    "dilation_growth_rate",
    "hidden_size",
    "kernel_size",
    "last_kernel_size",
    "norm_type",
    "normalize",
    "num_filters",
    "num_lstm_layers",
    "num_residual_layers",
    "pad_mode",
    "residual_kernel_size",
    "sampling_rate",
    "trim_right_ratio",
    "upsampling_ratios",
    "use_causal_conv",
    "use_conv_shortcut",
)


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
    layout = []
    for here, there, kind, sizes in _codec_modules(settings, num_codebooks):
        for n in range(settings["num_lstm_layers"] if kind == "lstm" else 1):
            for our_name, their_name, axes in _CODEC_TENSORS[kind]:
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
    state_dict: Mapping[str, np.ndarray], settings: Mapping, num_codebooks: int
) -> dict[str, np.ndarray]:
    """The inverse of `codec_to_audiocraft`."""
    layout = codec_layout(settings, num_codebooks)
    check_tensors("codec", state_dict, {there: shape for _, there, shape in layout})
    return {here: state_dict[there] for here, there, _ in layout}


def make_codec_xp_cfg(settings: Mapping, num_codebooks: int) -> dict[str, Any]:
    """The xp.cfg of an exported codec, from a transformers EncodecModel's config.json."""
    _check_codec_settings(settings)
    channels, causal = settings["audio_channels"], settings["use_causal_conv"]
    return {
        "compression_model": "encodec",
        "device": "cpu",
        "sample_rate": settings["sampling_rate"],
        "channels": channels,
        "encodec": {
            "autoencoder": "seanet",
            "quantizer": "rvq",
            "sample_rate": settings["sampling_rate"],
            "channels": channels,
            "causal": causal,
            "renormalize": settings["normalize"],
        },
        "seanet": {
            "dimension": settings["hidden_size"],
            "channels": channels,
            "causal": causal,
            "n_filters": settings["num_filters"],
            "n_residual_layers": settings["num_residual_layers"],
            "ratios": list(settings["upsampling_ratios"]),
            "activation": "ELU",
            "activation_params": {"alpha": 1.0},
            "norm": settings["norm_type"],
            "norm_params": {},
            "kernel_size": settings["kernel_size"],
            "residual_kernel_size": settings["residual_kernel_size"],
            "last_kernel_size": settings["last_kernel_size"],
            "dilation_base": settings["dilation_growth_rate"],
            "pad_mode": settings["pad_mode"],
            "true_skip": not settings["use_conv_shortcut"],
            "compress": settings["compress"],
            "lstm": settings["num_lstm_layers"],
            "disable_norm_outer_blocks": 0,
            "decoder": {
                "trim_right_ratio": settings["trim_right_ratio"],
                "final_activation": None,
                "final_activation_params": None,
            },
            "encoder": {},
        },
        "rvq": {
            "n_q": num_codebooks,
            "q_dropout": False,
            "bins": settings["codebook_size"],
            "decay": 0.99,
            "kmeans_init": True,
            "kmeans_iters": 50,
            "threshold_ema_dead_code": 2,
            "orthogonal_reg_weight": 0.0,
            "orthogonal_reg_active_codes_only": False,
        },
    }

"""EnCodec in PyTorch: audio to tokens and back, for every published kind of weights."""

import hashlib
import json
import math
import pickle
import tempfile
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from magnet_jax import hub
from magnet_jax.audiocraft import CODEC_FILE, read_file
from magnet_jax.config import ASSETS, EMBEDDED, CodecSpec
from magnet_jax.convert_codec import (
    CODEC_SETTINGS,
    check_tensors,
    codec_folder_from_audiocraft,
    parametrized_name,
)
from magnet_jax.errors import UserError
from magnet_jax.torch_env import import_torch, load_tensors

# The `encodec` package's models and the files that hold their weights.
ENCODEC_WEIGHTS = {
    "encodec_24khz": "encodec_24khz-d7cc33bc.th",
    "encodec_48khz": "encodec_48khz-7e698e3e.th",
}
# Codecs trained for several bandwidths are used at the largest of them up to this one.
DEFAULT_KBPS = 6.0
# Codecs that renormalise give their audio back at this RMS (-20 dBFS).
NOMINAL_RMS = 0.1


class Codec:
    """A loaded EnCodec; make one with `load_codec`.

    `spec` says what it is, `hop` is the number of audio samples in a token frame.
    """

    def __init__(self, spec: CodecSpec, model: Any, quantizer: Any, normalize: bool, device: str):
        self.spec = spec
        self.hop = round(spec.sample_rate / spec.frame_rate)
        self._encoder = model.encoder.to(device).eval()
        self._decoder = model.decoder.to(device).eval()
        self._quantizer = quantizer.to(device).eval()
        self._normalize = normalize
        self._device = device

    def encode(self, wav_BCN: np.ndarray) -> np.ndarray:
        """Codes [B, K, ceil(N / hop)] (int16) of audio [B, C, N] (float32 in [-1, 1]).

        The whole of each clip is encoded at once, and nothing is padded, so a clip's codes do not
        depend on the clips beside it. Codecs made for renormalised one-second chunks (the 48 kHz
        model) would give a loudness per chunk beside the codes, and codes that overlap in time;
        here the clip is one chunk brought to RMS 1, so that its codes alone decode to it, up to
        its level.

        Raises `ValueError` for a wrong shape.
        """
        torch = import_torch()
        if wav_BCN.ndim != 3 or wav_BCN.shape[1] != self.spec.channels or wav_BCN.shape[2] < 1:
            raise ValueError(f"wav_BCN {wav_BCN.shape}: expected [B, {self.spec.channels}, N]")
        with torch.inference_mode(), _exact(torch):
            wav = torch.from_numpy(np.ascontiguousarray(wav_BCN, np.float32)).to(self._device)
            if self._normalize:
                wav = wav / (wav.mean(1, keepdim=True).square().mean(2, keepdim=True).sqrt() + 1e-8)
            codes_KBT = self._quantizer.encode(self._encoder(wav))
            return codes_KBT.transpose(0, 1).to(torch.int16).cpu().numpy()

    def decode(self, codes_BKT: np.ndarray) -> np.ndarray:
        """Audio [B, C, T * hop] (float32) of codes [B, K, T].

        Raises `ValueError` for a wrong shape or a code outside [0, V), such as a mask id.
        """
        torch = import_torch()
        codes_BKT = np.asarray(codes_BKT)
        if codes_BKT.ndim != 3 or codes_BKT.shape[1] != self.spec.num_codebooks:
            raise ValueError(
                f"codes_BKT {codes_BKT.shape}: expected [B, {self.spec.num_codebooks}, T]"
            )
        if codes_BKT.min() < 0 or codes_BKT.max() >= self.spec.codebook_size:
            raise ValueError(f"codes_BKT: codes must lie in [0, {self.spec.codebook_size})")
        with torch.inference_mode(), _exact(torch):
            codes = torch.from_numpy(codes_BKT.astype(np.int64)).to(self._device)
            wav = self._decoder(self._quantizer.decode(codes.transpose(0, 1)))
            if self._normalize:
                wav = wav * NOMINAL_RMS
            return wav.float().cpu().numpy()


def load_codec(source: str, device: str = "cpu", num_codebooks: int | None = None) -> Codec:
    """Loads an EnCodec.

    `source` is one of: 'embedded'; a folder or hub id of a transformers EncodecModel; AudioCraft's
    file `compression_state_dict.bin`; the names 'encodec_24khz' and 'encodec_48khz', whose weights
    the `encodec` package publishes; or the path of such a published weights file (.th or
    .safetensors, under a name that begins so).
    `num_codebooks` keeps the first K codebooks; None keeps those of the largest bandwidth up to
    6 kbit/s that the codec was trained for.

    Raises `UserError` when the codec cannot be found or read, or the choice does not fit it.
    """
    torch = import_torch()
    _check_device(torch, source, device)
    if num_codebooks is not None and num_codebooks < 1:
        raise UserError(f"num_codebooks must be at least 1, not {num_codebooks}")
    path = Path(source)
    if source == EMBEDDED:
        parts = _from_transformers(ASSETS / "codec", source)
    elif source in ENCODEC_WEIGHTS:
        parts = _from_encodec(source, _download_encodec(source), source)
    elif path.name == CODEC_FILE and path.is_file():
        parts = _from_audiocraft(path)
    elif path.is_file():
        parts = _from_encodec(architecture_of(path), load_tensors(path), source)
    elif path.is_dir():
        parts = _from_transformers(path, source)
    elif "/" in source and hub.is_hub_id(source):
        folder = hub.fetch(source, ("config.json", "model.safetensors"), "codec")
        parts = _from_transformers(folder, source)
    else:
        raise UserError(
            f"codec {source}: no such folder or file, and no hub id (owner/name); "
            f"'{EMBEDDED}' names the codec that ships with this package"
        )
    model, quantizer, facts = parts
    codebook_size = facts["codebook_size"]
    if codebook_size >= 2**15:
        raise UserError(f"codec {source}: {codebook_size} entries a codebook do not fit int16")
    frame_rate = facts["sample_rate"] / facts["hop"]
    count = num_codebooks
    if count is None:
        # (count as the codecs do: bits per code times codes per second, both rounded up)
        bits = math.ceil(math.log2(codebook_size)) * math.ceil(frame_rate)
        fitting = [kbps for kbps in facts["bandwidths"] if kbps <= DEFAULT_KBPS]
        count = max(1, int(1000 * (max(fitting) if fitting else min(facts["bandwidths"])) // bits))
    if count > len(quantizer.layers):
        raise UserError(
            f"codec {source} has {len(quantizer.layers)} codebooks: "
            f"num_codebooks {count} is too many"
        )
    spec = CodecSpec(
        source=source,
        sha256=_sha256(model.state_dict(), facts["settings"]),
        sample_rate=facts["sample_rate"],
        channels=facts["channels"],
        frame_rate=frame_rate,
        num_codebooks=count,
        codebook_size=codebook_size,
    )
    quantizer.layers = quantizer.layers[:count]
    return Codec(spec, model, quantizer, facts["normalize"], device)


def check_same_codec(found: CodecSpec, expected: CodecSpec, where: str) -> None:
    """Raises `UserError` unless both specs mean the same tokens; `where` names what holds `found`.

    The source may differ: a codec is its weights and what is computed with them.
    """
    if found.sha256 != expected.sha256:
        raise UserError(
            f"{where}: its tokens come from codec {found.source} ({found.sha256[:12]}), but "
            f"{expected.source} ({expected.sha256[:12]}) is wanted: tokenize again with that codec"
        )
    for name in ("num_codebooks", "codebook_size", "sample_rate", "channels", "frame_rate"):
        a, b = getattr(found, name), getattr(expected, name)
        if a != b:
            raise UserError(f"{where}: its codec has {name} {a}, but {b} is wanted")


def _exact(torch: Any) -> Any:
    """On GPUs: the same codes every time, and no shortened floats."""
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )


def _check_device(torch: Any, source: str, device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device}: cannot hold codec {source} ({reason})") from None


def _sha256(state: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """One hash for the same tensors computed with alike, whatever file they came in.

    The weights alone would not do: made causal, or padded otherwise, they give other tokens.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    tensors = {parametrized_name(name): tensor for name, tensor in state.items()}
    for name in sorted(tensors):
        array = tensors[name].detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _from_transformers(folder: Path, source: str) -> tuple[Any, Any, dict]:
    """(model, quantizer, facts) of a transformers EncodecModel folder."""
    try:
        settings = json.loads((folder / "config.json").read_text())
        model_type = settings["model_type"]
    except FileNotFoundError:
        raise UserError(f"codec {source}: no config.json in {folder}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"codec {source}: damaged config.json ({error!r})") from None
    if model_type != "encodec":
        raise UserError(f"codec {source}: a {model_type} model, not an encodec model")
    if not (folder / "model.safetensors").exists():
        raise UserError(f"codec {source}: no model.safetensors in {folder}")
    torch = import_torch()
    # The parts themselves: the whole model wants codebooks of a power of two, which they do not.
    from transformers.models.encodec import modeling_encodec as parts
    from transformers.models.encodec.configuration_encodec import EncodecConfig

    try:
        config = EncodecConfig(**settings)
        model = torch.nn.ModuleDict(
            {
                "encoder": parts.EncodecEncoder(config),
                "decoder": parts.EncodecDecoder(config),
                "quantizer": parts.EncodecResidualVectorQuantizer(config),
            }
        )
    except Exception as error:  # whatever a setting that makes no sense leads to
        raise UserError(f"codec {source}: cannot be built ({_first_line(error)})") from None
    # (a name to every tensor, whatever the age of the file)
    found = load_tensors(folder / "model.safetensors")
    found = {parametrized_name(name): tensor.float() for name, tensor in found.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    arrays = {name: tensor.numpy() for name, tensor in found.items()}
    check_tensors(f"codec {source}", arrays, expected)
    model.load_state_dict(found)
    facts = {
        "sample_rate": config.sampling_rate,
        "channels": config.audio_channels,
        "hop": config.hop_length,
        "codebook_size": config.codebook_size,
        "bandwidths": list(config.target_bandwidths),
        "normalize": config.normalize,
        "settings": {name: getattr(config, name) for name in CODEC_SETTINGS},
    }
    return model, model["quantizer"], facts


def _from_audiocraft(path: Path) -> tuple[Any, Any, dict]:
    """(model, quantizer, facts) of an AudioCraft codec with weights of its own."""
    file = read_file(path)
    if file.pretrained:
        raise UserError(f"codec {path}: points to {file.pretrained}, holds no weights; name that")
    with tempfile.TemporaryDirectory() as folder:
        codec_folder_from_audiocraft(file.tensors, file.xp_cfg, Path(folder), str(path))
        return _from_transformers(Path(folder), str(path))


def _from_encodec(name: str, state: dict[str, Any], source: str) -> tuple[Any, Any, dict]:
    """(model, quantizer, facts) of one of the `encodec` package's models with these weights."""
    import warnings

    import encodec

    build = {
        "encodec_24khz": encodec.EncodecModel.encodec_model_24khz,
        "encodec_48khz": encodec.EncodecModel.encodec_model_48khz,
    }[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that package's weight norm is deprecated in torch
        model = build(pretrained=False)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"codec {source}: not the weights of {name} ({_first_line(error)})"
        ) from None
    facts = {
        "sample_rate": model.sample_rate,
        "channels": model.channels,
        "hop": model.encoder.hop_length,
        "codebook_size": model.quantizer.bins,
        "bandwidths": list(model.target_bandwidths),
        "normalize": model.normalize,
        "settings": {"encodec": name},  # the package's name stands for all of them
    }
    return model, model.quantizer.vq, facts


def architecture_of(path: Path) -> str:
    """Which of the `encodec` package's models a weights file is for, by its name."""
    for name in ENCODEC_WEIGHTS:
        if path.name.startswith(name) and path.suffix in (".th", ".safetensors"):
            return name
    raise UserError(
        f"codec {path}: a weights file must be called encodec_24khz*.th, encodec_48khz*.th or "
        f"the same with .safetensors; a transformers model is named by its folder"
    )


def _download_encodec(name: str) -> dict[str, Any]:
    torch = import_torch()
    from encodec.model import ROOT_URL

    file = ENCODEC_WEIGHTS[name]
    try:
        return torch.hub.load_state_dict_from_url(
            ROOT_URL + file, map_location="cpu", check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError, HTTPException, pickle.UnpicklingError) as error:
        raise UserError(
            f"codec {name}: its weights cannot be fetched ({_first_line(error)}); copy {file} "
            f"here and pass its path instead"
        ) from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

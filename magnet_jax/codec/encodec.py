"""EnCodec: audio to tokens and back in PyTorch, and tokens to audio in JAX.

Whoever computes, one piece of code reads every published kind of weights and says what codec it is.
"""

import dataclasses
import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from magnet_jax.codec import tonal
from magnet_jax.codec.tonal import Spectrum, Tonal
from magnet_jax.config import ASSETS, EMBEDDED, CodecSpec, from_dict
from magnet_jax.convert import transformers_folder
from magnet_jax.convert.audiocraft import CODEC_FILE, read_file
from magnet_jax.convert.codec_rules import (
    CODEC_SETTINGS,
    NOMINAL_RMS,
    TONAL_CENTROIDS,
    TONAL_SECTION,
    SeanetConfig,
    bandwidth,
    check_norms,
    check_tensors,
    codec_from_audiocraft,
    codec_settings_from_xp_cfg,
    decoder_params,
    encodec_layout,
    folder_settings,
    parametrized_name,
    read_codec_folder,
    renamed_from_audiocraft,
    write_codec_folder,
)
from magnet_jax.errors import UserError, first_line
from magnet_jax.io import files, hub
from magnet_jax.io.torch_env import as_arrays, import_torch, load_tensors

# The `encodec` package's models: the files that hold their weights, and their settings.
ENCODEC_WEIGHTS = {
    "encodec_24khz": "encodec_24khz-d7cc33bc.th",
    "encodec_48khz": "encodec_48khz-7e698e3e.th",
}
_ENCODEC_URL = "https://dl.fbaipublicfiles.com/encodec/v0/"
_ENCODEC_CONFIGS = {
    "encodec_24khz": SeanetConfig(),
    "encodec_48khz": SeanetConfig(
        audio_channels=2,
        norm_type="time_group_norm",
        normalize=True,
        sampling_rate=48_000,
        use_causal_conv=False,
    ),
}
_ENCODEC_KBPS = {
    "encodec_24khz": (1.5, 3.0, 6.0, 12.0, 24.0),
    "encodec_48khz": (3.0, 6.0, 12.0, 24.0),
}
# Codecs trained for several bandwidths are used at the largest of them up to this one.
DEFAULT_KBPS = 6.0
_LAYERS = "quantizer.layers."
# The vectors of a tonal stream's codebook, which are zeros.
_TONAL_VECTORS = f"{_LAYERS}0.codebook.embed"
# What a transformers config.json means that does not say.
_TRANSFORMERS_KBPS = (1.5, 3.0, 6.0, 12.0, 24.0)


class Decoder(NamedTuple):
    """What `seanet.decode` needs to turn the tokens of `spec` into audio."""

    spec: CodecSpec
    config: SeanetConfig
    params: dict[str, Any]


class Weights(NamedTuple):
    """A codec as its files have it, all its codebooks."""

    config: SeanetConfig
    kbps: Sequence[float]  # the bandwidths that it was trained for
    tensors: dict[str, np.ndarray]  # float32, by transformers' names
    sha256: str
    tonal: Tonal | None = None  # what encodes the first codebook, whose vectors are then zeros

    @property
    def num_codebooks(self) -> int:
        return int(1000 * self.kbps[-1] // self.config.bits_per_second)


class Codec:
    """A loaded EnCodec; make one with `load_codec`.

    `spec` says what it is, `config` what is computed, `hop` is the number of audio samples in a
    token frame, `encoder` the PyTorch module from audio to the latent that `quantizer` takes;
    `tonal` is None, or encodes the first codebook in the quantizer's place.
    """

    def __init__(
        self,
        spec: CodecSpec,
        config: SeanetConfig,
        model: Any,
        quantizer: Any,
        device: str,
        tonal: Tonal | None = None,
    ):
        self.spec = spec
        self.tonal = tonal
        self.config = config
        self.hop = config.hop
        self.encoder = model.encoder.to(device).eval()
        self._decoder = model.decoder.to(device).eval()
        self.quantizer = quantizer.to(device).eval()
        self.device = device

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
        sides = self.spec.sides
        wav_BCN = wav_BCN.reshape(-1, self.spec.channels // sides, wav_BCN.shape[2])
        with torch.inference_mode(), exactly(torch):
            # (arrays that come from JAX cannot be written to, of which PyTorch warns)
            wav = torch.from_numpy(np.require(wav_BCN, np.float32, "CW")).to(self.device)
            if self.config.normalize:
                wav = wav / (wav.mean(1, keepdim=True).square().mean(2, keepdim=True).sqrt() + 1e-8)
            latent = self.encoder(wav)
            if not torch.isfinite(latent).all():
                raise UserError(
                    f"codec {self.spec.source}: computes NaN or infinity from this audio: it, or "
                    "the codec, is damaged"
                )
            codes_BKT = self.codes(latent)
        if self.tonal:
            codes_BKT[:, 0] = self.tonal_codes(wav_BCN)
        return join_sides(codes_BKT, sides)

    def codes(self, latent_BET: Any) -> np.ndarray:
        """What the quantizer makes of a latent: int16 [B, K, T], one side's codebooks.

        Of a tonal stream it makes nothing: its codes are `tonal_codes`.
        """
        torch = import_torch()
        if not self.tonal and not self.quantizer.layers[0].codebook.embed.any():
            raise UserError(
                f"codec {self.spec.source}: its first codebook is zeros, which a tonal stream left "
                "where no AudioCraft file has room for it: name the codec's own folder (--codec)"
            )
        codes_KBT = self.quantizer.encode(latent_BET)
        return codes_KBT.transpose(0, 1).to(torch.int16).cpu().numpy()

    def tonal_codes(self, wav_BCN: np.ndarray) -> np.ndarray:
        """The tonal stream [B, ceil(N / hop)] (int16) of one side's audio."""
        return tonal.encode(self.tonal, wav_BCN, self.spec.sample_rate, self.hop)

    def decode(self, codes_BKT: np.ndarray) -> np.ndarray:
        """Audio [B, C, T * hop] (float32) of codes [B, K, T].

        Raises `ValueError` for a wrong shape or a code outside [0, V), such as a mask id.
        """
        torch = import_torch()
        codes_BKT = check_codes(codes_BKT, self.spec)
        with torch.inference_mode(), exactly(torch):
            codes = split_sides(codes_BKT.astype(np.int64), self.spec.sides)
            codes = torch.from_numpy(np.ascontiguousarray(codes)).to(self.device)
            wav = self._decoder(self.quantizer.decode(codes.transpose(0, 1)))
            if self.config.normalize:
                wav = wav * NOMINAL_RMS
            return wav.float().cpu().numpy().reshape(len(codes_BKT), self.spec.channels, -1)


def load_codec(
    source: str, device: str = "cpu", num_codebooks: int | None = None, interleaved: bool = False
) -> Codec:
    """Loads an EnCodec.

    `source` is one of: 'embedded'; a folder or hub id of a transformers EncodecModel; AudioCraft's
    file `compression_state_dict.bin`; the names 'encodec_24khz' and 'encodec_48khz', whose weights
    the `encodec` package publishes; or the path of such a published weights file (.th or
    .safetensors, under a name that begins so).
    `num_codebooks` keeps the first K codebooks; None keeps those of the largest bandwidth up to
    6 kbit/s that the codec was trained for, and its tonal stream if it has one.
    `interleaved` makes a mono codec one of interleaved stereo, see `CodecSpec`; `num_codebooks`
    then counts those of both sides.

    Raises `UserError` when the codec cannot be found or read, or the choice does not fit it.
    """
    torch = import_torch()
    check_device(source, device)
    spec, weights = _read(source, num_codebooks, interleaved)
    model = _torch_model(torch, weights)
    model["quantizer"].layers = model["quantizer"].layers[: spec.num_codebooks // spec.sides]
    return Codec(spec, weights.config, model, model["quantizer"], device, weights.tonal)


def read_spec(source: str, num_codebooks: int | None = None) -> CodecSpec:
    """What an EnCodec's tokens mean; arguments and errors are those of `load_codec`."""
    return _read(source, num_codebooks)[0]


def interleaved_spec(spec: CodecSpec) -> CodecSpec:
    """What stereo is, both sides of which a mono codec encodes; `UserError` for other codecs."""
    if spec.channels != 1:
        raise UserError(
            f"codec {spec.source} has {spec.channels} channels: interleaved stereo takes a mono one"
        )
    return dataclasses.replace(
        spec, channels=2, num_codebooks=2 * spec.num_codebooks, interleaved=True
    )


def join_sides(codes: Any, sides: int) -> Any:
    """Codes [B * S, K, T] of S sides each, one after the other, to interleaved ones [B, K * S, T].

    Takes arrays of NumPy and JAX, as `split_sides` does.
    """
    _, count, frames = codes.shape
    return codes.reshape(-1, sides, count, frames).swapaxes(1, 2).reshape(-1, count * sides, frames)


def split_sides(codes: Any, sides: int) -> Any:
    """The inverse of `join_sides`."""
    batch, count, frames = codes.shape
    count //= sides
    return codes.reshape(batch, count, sides, frames).swapaxes(1, 2).reshape(-1, count, frames)


def load_decoder(
    source: str, num_codebooks: int | None = None, interleaved: bool = False
) -> Decoder:
    """The decoder of an EnCodec for `seanet.decode`, its parameters on JAX's default device.

    Arguments, errors and `spec` are those of `load_codec`. PyTorch is imported for nothing but to
    open the files that it wrote: AudioCraft's .bin and the `encodec` package's .th.
    """
    import jax  # here, as tokenization needs none

    spec, weights = _read(source, num_codebooks, interleaved)
    with np.errstate(over="ignore", invalid="ignore"):
        params = decoder_params(weights.tensors, weights.config, spec.num_codebooks // spec.sides)
    leaves = jax.tree.leaves_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    # Finite numbers may become infinite where norms are multiplied out and biases added.
    files.finite(f"codec {source}", {f"decoder/{n}": leaf for n, (_, leaf) in zip(names, leaves)})
    return Decoder(spec, weights.config, jax.tree.map(jax.numpy.asarray, params))


def codebook_vectors(
    source: str, num_codebooks: int | None = None, interleaved: bool = False
) -> tuple[CodecSpec, np.ndarray]:
    """What each token stands for: float32 [K, V, E]; arguments and errors as of `load_codec`.

    A tonal stream's tokens stand for spectra, see `tonal.vectors`.
    """
    spec, weights = _read(source, num_codebooks, interleaved)
    params = decoder_params(weights.tensors, weights.config, spec.num_codebooks // spec.sides)
    vectors_KVE = np.array(params["codebooks"], np.float32)
    if weights.tonal:
        vectors_KVE[0] = tonal.vectors(weights.tonal, *vectors_KVE.shape[1:])
    return spec, np.repeat(vectors_KVE, spec.sides, axis=0)


def _read(
    source: str, num_codebooks: int | None, interleaved: bool = False
) -> tuple[CodecSpec, Weights]:
    """What a codec is, with so many codebooks, and its weights; see `load_codec`."""
    if interleaved:
        if num_codebooks is not None and num_codebooks % 2:
            raise UserError(
                f"interleaved stereo has as many codebooks left as right: num_codebooks must be "
                f"even, not {num_codebooks}"
            )
        spec, weights = _read(source, num_codebooks and num_codebooks // 2)
        return interleaved_spec(spec), weights
    if num_codebooks is not None and num_codebooks < 1:
        raise UserError(f"num_codebooks must be at least 1, not {num_codebooks}")
    weights = _find(source)
    check_norms(f"codec {source}", weights.tensors)
    config = weights.config
    if config.codebook_size >= 2**15:
        raise UserError(
            f"codec {source}: {config.codebook_size} entries a codebook do not fit int16"
        )
    count = num_codebooks
    if count is None:
        most = DEFAULT_KBPS + (config.bits_per_second / 1000 if weights.tonal else 0)
        fitting = [kbps for kbps in weights.kbps if kbps <= most]
        kbps = max(fitting) if fitting else min(weights.kbps)
        count = max(1, int(1000 * kbps // config.bits_per_second))
    if weights.tonal and count < 2:
        raise UserError(
            f"codec {source}: its first codebook is tonal and makes no sound alone: num_codebooks "
            "must be at least 2 (of interleaved stereo 4)"
        )
    if count > weights.num_codebooks:
        raise UserError(
            f"codec {source} has {weights.num_codebooks} codebooks: "
            f"num_codebooks {count} is too many"
        )
    spec = CodecSpec(
        source=source,
        sha256=weights.sha256,
        sample_rate=config.sampling_rate,
        channels=config.audio_channels,
        frame_rate=config.sampling_rate / config.hop,
        num_codebooks=count,
        codebook_size=config.codebook_size,
    )
    return spec, weights


def _find(source: str) -> Weights:
    path = Path(source)
    if source == EMBEDDED:
        return _from_transformers(ASSETS / "codec", source)
    if source in ENCODEC_WEIGHTS:
        state = as_arrays(f"codec {source}", _download_encodec(source))
        return _from_encodec(source, state, source)
    if path.name == CODEC_FILE and path.is_file():
        return _from_audiocraft(path)
    if path.is_file():
        name, safe = architecture_of(path), path.suffix == ".safetensors"
        state = files.read_tensors(path) if safe else as_arrays(f"codec {path}", load_tensors(path))
        return _from_encodec(name, state, source)
    if path.is_dir():
        return _from_transformers(path, source)
    if "/" in source and hub.is_hub_id(source):
        folder = transformers_folder.fetch(source, ("config.json",), "codec")
        return _from_transformers(folder, source)
    raise UserError(
        f"codec {source}: no such folder or file, and no hub id (owner/name); "
        f"'{EMBEDDED}' names the codec that ships with this package"
    )


def check_codes(codes_BKT: np.ndarray, spec: CodecSpec) -> np.ndarray:
    """The codes as an array.

    Raises `ValueError` for a wrong shape or a code outside [0, V), such as a mask id.
    """
    codes_BKT = np.asarray(codes_BKT)
    if codes_BKT.ndim != 3 or codes_BKT.shape[1] != spec.num_codebooks or 0 in codes_BKT.shape:
        raise ValueError(f"codes_BKT {codes_BKT.shape}: expected [B, {spec.num_codebooks}, T]")
    if codes_BKT.min() < 0 or codes_BKT.max() >= spec.codebook_size:
        raise ValueError(f"codes_BKT: codes must lie in [0, {spec.codebook_size})")
    return codes_BKT


def check_same_codec(found: CodecSpec, expected: CodecSpec, where: str) -> None:
    """Raises `UserError` unless both specs mean the same tokens; `where` names what holds `found`.

    The source may differ: a codec is its weights and what is computed with them.
    """
    if found.sha256 != expected.sha256:
        raise UserError(
            f"{where}: its tokens come from codec {found.source} ({found.sha256[:12]}), but "
            f"{expected.source} ({expected.sha256[:12]}) is wanted: tokenize again with that codec"
        )
    for name in ("interleaved", *CodecSpec.__dataclass_fields__):
        a, b = getattr(found, name), getattr(expected, name)
        if a != b and name != "source":
            raise UserError(f"{where}: its codec has {name} {a}, but {b} is wanted")


def exactly(torch: Any) -> Any:
    """On GPUs: the same codes every time, and no shortened floats."""
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )


def check_device(source: str, device: str) -> None:
    """Raises `UserError` if PyTorch cannot use a device, such as 'cuda' where it has no CUDA."""
    torch = import_torch()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        if device.startswith("cuda") and not (torch.version.cuda or torch.version.hip):
            reason = (
                f"this PyTorch, {torch.__version__}, is built without CUDA, and JAX's does not "
                f"serve it: install a build of torch {torch.__version__.partition('+')[0]} with "
                "CUDA, see pytorch.org"
            )
        raise UserError(f"device {device}: cannot hold codec {source} ({reason})") from None


def _sha256(tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> str:
    """One hash for the same tensors computed with alike, whatever file they came in.

    The weights alone would not do: made causal, or padded otherwise, they give other tokens.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    tensors = {parametrized_name(name): array for name, array in tensors.items()}
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _torch_model(torch: Any, weights: Weights) -> Any:
    """Encoder, decoder and quantizer as transformers' modules.

    The parts themselves: the whole model wants codebooks of a power of two, which they do not.
    """
    from transformers.models.encodec import modeling_encodec as parts
    from transformers.models.encodec.configuration_encodec import EncodecConfig

    settings = dataclasses.asdict(weights.config)
    config = EncodecConfig(**settings, target_bandwidths=list(weights.kbps))
    model = torch.nn.ModuleDict(
        {
            "encoder": parts.EncodecEncoder(config),
            "decoder": parts.EncodecDecoder(config),
            "quantizer": parts.EncodecResidualVectorQuantizer(config),
        }
    )
    tensors = {name: torch.from_numpy(array.copy()) for name, array in weights.tensors.items()}
    model.load_state_dict(tensors)
    return model


def _from_transformers(folder: Path, source: str) -> Weights:
    where = f"codec {source}"
    return _from_settings(*read_codec_folder(folder, where), where)


def _from_audiocraft(path: Path) -> Weights:
    """An AudioCraft codec with weights of its own."""
    file = read_file(path)
    if file.pretrained:
        raise UserError(f"codec {path}: points to {file.pretrained}, holds no weights; name that")
    settings, count = codec_settings_from_xp_cfg(file.xp_cfg, str(path))
    tensors = codec_from_audiocraft(file.tensors, settings, count, str(path))
    return _from_settings(settings, tensors, f"codec {path}")


def _from_settings(
    settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray], where: str
) -> Weights:
    """Settings of a transformers config.json, and tensors by transformers' names."""
    given = {name: settings[name] for name in CODEC_SETTINGS if name in settings}
    kbps = settings.get("target_bandwidths", _TRANSFORMERS_KBPS)
    try:
        config = SeanetConfig(**given)
        if settings.get("codebook_dim") not in (None, config.hidden_size):
            raise UserError("codebook_dim must equal hidden_size")
        if not isinstance(kbps, Sequence) or not all(type(k) in (int, float) for k in kbps or [""]):
            raise UserError(f"target_bandwidths must be numbers, not {kbps!r}")
    except UserError as error:
        raise UserError(f"{where}: cannot be built ({error})") from None
    tensors = {name: array.astype(np.float32, copy=False) for name, array in tensors.items()}
    hashed = dataclasses.asdict(config)
    stream = None
    if TONAL_SECTION in settings:
        stream = _tonal(settings[TONAL_SECTION], tensors, config, where)
        hashed[TONAL_SECTION] = dataclasses.asdict(stream.spectrum)
    sha256 = _sha256(tensors, hashed)
    if stream:
        del tensors[TONAL_CENTROIDS]
    weights = Weights(config, kbps, tensors, sha256, stream)
    layout = encodec_layout(dataclasses.asdict(config), weights.num_codebooks)
    check_tensors(where, tensors, {here: shape for here, _, shape in layout})
    return weights


def _tonal(
    settings: Any, tensors: Mapping[str, np.ndarray], config: SeanetConfig, where: str
) -> Tonal:
    """The tonal stream of a codec's config.json and tensors; `UserError` where they do not fit."""
    spectrum = from_dict(Spectrum, settings, f"{where}: config.json: {TONAL_SECTION}")
    tonal.check_rate(spectrum, config.sampling_rate, f"{where}: config.json: {TONAL_SECTION}")
    centroids_CM = tensors.get(TONAL_CENTROIDS)
    if centroids_CM is None:
        raise UserError(f"{where}: the tensor {TONAL_CENTROIDS} is missing")
    size = len(centroids_CM) if centroids_CM.ndim else 0
    if centroids_CM.shape != (size, spectrum.bands) or not 2 <= size <= config.codebook_size:
        raise UserError(
            f"{where}: the tensor {TONAL_CENTROIDS} is {list(centroids_CM.shape)}, not 2 to "
            f"{config.codebook_size} rows of {spectrum.bands}"
        )
    if np.any(tensors.get(_TONAL_VECTORS, 0)):
        raise UserError(f"{where}: the tensor {_TONAL_VECTORS}, of its tonal stream, must be zeros")
    return Tonal(spectrum, centroids_CM)


def read_base(source: str) -> Weights:
    """A codec as its files have it, less a tonal stream: one may be put before it.

    Raises `UserError` for a codec that norms over the whole clip.
    """
    weights = _without_stream(_find(source))
    if weights.config.norms_over_clip:
        raise UserError(
            f"codec {source}: norms over chunks or clips, as encodec_48khz does; a tonal stream "
            "takes one with weight norm"
        )
    return weights


def write_tonal(base: Weights, stream: Tonal, folder: Path) -> None:
    """Writes a codec with a tonal stream before its own codebooks into an existing folder.

    It is a transformers EncodecModel's folder with a section and a tensor more.
    """
    settings = dataclasses.asdict(base.config)
    counts = [int(1000 * one // base.config.bits_per_second) for one in base.kbps]
    settings = folder_settings(settings, [bandwidth(settings, 1 + count) for count in counts])
    settings[TONAL_SECTION] = dataclasses.asdict(stream.spectrum)
    tensors = _behind_zeros(base.tensors) | {TONAL_CENTROIDS: stream.centroids_CM}
    write_codec_folder(folder, settings, tensors)


def extends(source: str, base: str) -> bool:
    """Whether a codec is another one with a tonal stream, or another stream, before its codebooks.

    A codec that is not to be found here is none.
    """
    try:
        if not is_tonal(source):
            return False
        one, other = read_base(source), read_base(base)
    except UserError:
        return False
    return (one.config, one.tensors.keys()) == (other.config, other.tensors.keys()) and all(
        np.array_equal(other.tensors[name], array) for name, array in one.tensors.items()
    )


def is_tonal(source: str) -> bool:
    """Whether a codec's first codebook is a tonal stream, on each side of a stereo one."""
    return _find(source).tonal is not None


def _without_stream(weights: Weights) -> Weights:
    """A codec behind its tonal stream; itself without one."""
    if not weights.tonal:
        return weights
    tensors = {}
    for name, array in weights.tensors.items():
        number, _, rest = name.removeprefix(_LAYERS).partition(".")
        if not name.startswith(_LAYERS):
            tensors[name] = array
        elif number != "0":
            tensors[f"{_LAYERS}{int(number) - 1}.{rest}"] = array
    settings = dataclasses.asdict(weights.config)
    counts = [int(1000 * one // weights.config.bits_per_second) for one in weights.kbps]
    kbps = [bandwidth(settings, count - 1) for count in counts if count > 1]
    return Weights(weights.config, kbps, tensors, _sha256(tensors, settings))


def _behind_zeros(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A codec's tensors with a codebook of zeros before its own.

    Decoders, which add codebooks up, need not know of it.
    """
    found, first = {}, f"{_LAYERS}0.codebook."
    for name, array in tensors.items():
        number, _, rest = name.removeprefix(_LAYERS).partition(".")
        if not name.startswith(_LAYERS):
            found[name] = array
            continue
        found[f"{_LAYERS}{int(number) + 1}.{rest}"] = array
        if name.startswith(first):
            found[name] = np.zeros_like(array)
    found[f"{first}inited"] = np.ones_like(tensors[f"{first}inited"])
    return found


def _from_encodec(name: str, state: Mapping[str, np.ndarray], source: str) -> Weights:
    """One of the `encodec` package's models with these weights, by the package's names."""
    config = _ENCODEC_CONFIGS[name]
    state = {key: array.astype(np.float32, copy=False) for key, array in state.items()}
    # (the package's name stands for all settings)
    weights = Weights(config, _ENCODEC_KBPS[name], {}, _sha256(state, {"encodec": name}))
    layout = encodec_layout(dataclasses.asdict(config), weights.num_codebooks)
    where = f"codec {source}: not the weights of {name}"
    return weights._replace(tensors=renamed_from_audiocraft(state, layout, where))


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
    file = ENCODEC_WEIGHTS[name]
    try:
        return import_torch().hub.load_state_dict_from_url(
            _ENCODEC_URL + file, map_location="cpu", check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError, HTTPException, pickle.UnpicklingError) as error:
        raise UserError(
            f"codec {name}: its weights cannot be fetched ({first_line(error)}); copy {file} here "
            "and pass its path instead"
        ) from None

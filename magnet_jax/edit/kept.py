"""Tokens that are kept beside the sound file that was made of them, and found by what it holds."""

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from magnet_jax import prompts
from magnet_jax.codec import encodec
from magnet_jax.config import CodecSpec
from magnet_jax.errors import UserError
from magnet_jax.io.files import replacing_file
from magnet_jax.prompts import Description

SUFFIX = ".tokens.npz"


class Kept(NamedTuple):
    """What is known of a clip that was made here."""

    path: Path
    codes_KT: np.ndarray  # int32
    codec: str  # sha256 of the codec, see `CodecSpec`
    sample_rate: int
    text: Description
    seed: int | None
    settings: dict[str, Any]


def save(
    audio: Path,
    codes_KT: np.ndarray,
    spec: CodecSpec,
    *,
    text: Description = "",
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Writes NAME.tokens.npz beside a sound file NAME.wav, never half of it.

    Args:
      audio: the sound file.
      codes_KT, spec, text, seed, settings: see `encoded`.

    Raises:
      ValueError: codes that are not the codec's.
      UserError: the file cannot be written.
    """
    audio = Path(audio)
    content = encoded(audio.read_bytes(), codes_KT, spec, text=text, seed=seed, settings=settings)
    path = audio.with_suffix(SUFFIX)
    with replacing_file(path) as temporary:
        temporary.write_bytes(content)
    return path


def encoded(
    audio: bytes | memoryview,
    codes_KT: np.ndarray,
    spec: CodecSpec,
    *,
    text: Description = "",
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> memoryview:
    """What NAME.tokens.npz holds.

    Args:
      audio: bytes of the sound file.
      codes_KT: its tokens.
      spec: of the codec.
      text, seed, settings: how the clip was made; settings become JSON.

    Raises `ValueError` for codes that are not the codec's.
    """
    encodec.check_codes(np.asarray(codes_KT)[None], spec)
    about = {
        "audio_sha256": _sha256(audio),
        "codec_sha256": spec.sha256,
        "codec": dataclasses.asdict(spec),
        "sample_rate": spec.sample_rate,
        "text": prompts.as_json(text),
        "seed": seed,
        "settings": dict(settings or {}),
    }
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, codes_KT=np.asarray(codes_KT).astype(np.uint16), about=json.dumps(about)
    )
    return buffer.getbuffer()


def find(audio: Path, spec: CodecSpec | None = None) -> Kept | None:
    """What is kept of a sound file, whatever it and its tokens are called by now; None if nothing.

    The file of its own name is looked at first, then every NAME.tokens.npz of the folder.

    Args:
      audio: the sound file.
      spec: of the codec that is to decode the tokens.

    Raises:
      ValueError: the tokens are another codec's.
      UserError: the sound file, or its own file of tokens, cannot be read or is damaged.
    """
    audio = Path(audio)
    try:
        digest = _sha256(audio.read_bytes())
    except OSError as error:
        raise UserError(f"{audio}: cannot be read ({error.strerror})") from None
    own = audio.with_suffix(SUFFIX)
    others = (path for path in sorted(audio.parent.glob(f"*{SUFFIX}")) if path != own)
    for path in (own, *others):
        if path.exists() and (found := _read(path, digest)) is not None:
            if spec is not None:
                _check(found, spec)
            return found
    return None


def _check(found: Kept, spec: CodecSpec) -> None:
    if found.codec != spec.sha256 or len(found.codes_KT) != spec.num_codebooks:
        raise ValueError(
            f"{found.path}: holds {len(found.codes_KT)} codebooks of codec {found.codec[:12]}, not "
            f"{spec.num_codebooks} of {spec.source} ({spec.sha256[:12]})"
        )
    encodec.check_codes(found.codes_KT[None], spec)


def _sha256(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(path: Path, digest: str) -> Kept | None:
    """A file of tokens; None for one of another sound."""
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            if about["audio_sha256"] != digest:
                return None
            codes_KT = file["codes_KT"]
        if codes_KT.ndim != 2 or codes_KT.dtype != np.uint16 or not codes_KT.size:
            raise ValueError(f"tokens {codes_KT.dtype} {list(codes_KT.shape)}")
        return Kept(
            path,
            codes_KT.astype(np.int32),
            str(about["codec_sha256"]),
            int(about["sample_rate"]),
            prompts.from_json(about["text"]),
            about["seed"],
            dict(about["settings"]),
        )
    except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: is damaged ({reason}); remove it to edit without it") from None

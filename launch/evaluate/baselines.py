"""What a model's scores are held against: its codec alone, and tokens drawn without a model."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from magnet_jax.codec.encodec import Codec, check_same_codec
from magnet_jax.config import CodecSpec
from magnet_jax.data import records
from magnet_jax.errors import UserError
from magnet_jax.evaluation import scores
from magnet_jax.evaluation.scores import Listening
from magnet_jax.io import audio, ledger


def about_round_trip(codec: Codec, clips: str, listening: Listening) -> dict[str, Any]:
    """All that the result of `codec_round_trip` depends on; `clips` is their digest."""
    return {"codec": codec.spec.sha256, "clips": clips, **dataclasses.asdict(listening)}


def about_unigrams(data: Path, num_frames: int, seed: int) -> dict[str, Any]:
    """All that the result of `unigram_tokens` depends on."""
    return {"data": records.digest(data), "num_frames": num_frames, "seed": seed}


def begin(out: Path, notes: Path, names: list[str], about: dict[str, Any]) -> dict[str, Path]:
    """The files of a baseline by the names of their clips; those that are there are kept.

    Args:
      out: folder of the files.
      notes: folder that what they are made of is noted in.
      names: of the clips.
      about: what they are made of.

    Raises:
      UserError: files are there that were made of something else.
    """
    path = notes / f"{out.name}.json"
    has_clips = out.exists() and any(out.iterdir())
    if has_clips and not path.exists():
        raise UserError(f"{out}: is there, and no evaluation made it; name another --out")
    if not has_clips:
        path.unlink(missing_ok=True)
    ledger.claim(path, about, where=str(out), advice="name another --out, or remove it")
    return {name: out / f"{name}.wav" for name in names}


def codec_round_trip(
    codec: Codec, clips: Mapping[str, Path], listening: Listening, written: Mapping[str, Path]
) -> None:
    """Writes each clip through the codec: the best that any model of its tokens can do.

    A clip is mixed to mono first, as embedders hear it. `written` is what `begin` gave; files that
    are there are kept.
    """
    spec = codec.spec
    for name, path in tqdm(written.items(), desc="codec", unit="clip", leave=False, delay=2):
        if path.exists():
            continue
        wav_N = scores.read_mono(clips[name], spec.sample_rate, listening)
        wav_CN = np.repeat(wav_N[None], spec.channels, axis=0)
        decoded_CN = codec.decode(codec.encode(wav_CN[None]))[0][:, : len(wav_N)]
        audio.write_wav(path, decoded_CN, spec.sample_rate)


def unigram_tokens(
    codec: Codec, data: Path, written: Mapping[str, Path], *, num_frames: int, seed: int
) -> None:
    """Writes clips of tokens drawn one by one as often as they occur in a data set: the floor.

    Args:
      codec: decodes them.
      data: the data set, of the same codec; it may have more codebooks, as for training.
      written: what `begin` gave; files that are there are kept.
      num_frames: token frames of a clip.
      seed: of the draws.
    """
    check_data(data, codec.spec)
    counts_KV = token_counts(data, codec.spec.codebook_size)[: codec.spec.num_codebooks]
    cumulative_KV = counts_KV.cumsum(1)
    for index, path in enumerate(written.values()):
        if path.exists():
            continue
        random = np.random.default_rng([seed, index])
        codes_KT = np.stack(
            [
                np.searchsorted(counts_V, random.integers(0, counts_V[-1], num_frames), "right")
                for counts_V in cumulative_KV
            ]
        )
        audio.write_wav(path, codec.decode(codes_KT[None])[0], codec.spec.sample_rate)


def check_data(data: Path, spec: CodecSpec) -> None:
    """Raises `UserError` unless a data set has the tokens of a model's codec, as training wants."""
    found = records.read_codec_spec(data)
    if not found.interleaved and found.num_codebooks > spec.num_codebooks:
        found = dataclasses.replace(found, num_codebooks=spec.num_codebooks)
    check_same_codec(found, spec, str(data))


def token_counts(data: Path, codebook_size: int) -> np.ndarray:
    """How often each token occurs in the training split, int64 [K, V]."""
    source = records.open_split(data, "train")
    counts_KV = 0
    for index in tqdm(range(len(source)), desc="counting tokens", leave=False, delay=2):
        codes_KT = records.decode_example(source[index])["codes_KT"]
        counts_KV += np.stack([np.bincount(row_T, minlength=codebook_size) for row_T in codes_KT])
    return counts_KV

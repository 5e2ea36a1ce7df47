"""What a model's scores are held against: its codec alone, and tokens drawn without a model."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from magnet_jax import audio, pretrained, records, sampling
from magnet_jax.codec import load_codec
from magnet_jax.evaluation import scores
from magnet_jax.evaluation.scores import Listening
from magnet_jax.pretrained import Loaded


def codec_round_trip(
    loaded: Loaded, files: Mapping[str, Path], listening: Listening, out: Path
) -> None:
    """Writes each clip through the model's codec: the best that any model of its tokens can do.

    Encoding takes PyTorch. A clip is mixed to mono first, as embedders hear it.
    """
    spec = loaded.codec
    codec = load_codec(
        loaded.codec_source, num_codebooks=spec.num_codebooks, interleaved=spec.interleaved
    )
    for name, path in _missing(files, out, "codec round trip"):
        wav_N = scores.read_mono(path, spec.sample_rate, listening)
        wav_CN = np.repeat(wav_N[None], spec.channels, axis=0)
        decoded_CN = codec.decode(codec.encode(wav_CN[None]))[0][:, : len(wav_N)]
        audio.write_wav(out / f"{name}.wav", decoded_CN, spec.sample_rate)


def unigram_tokens(
    loaded: Loaded,
    where: str,
    data: Path,
    names: list[str],
    *,
    num_frames: int,
    seed: int,
    out: Path,
) -> None:
    """Writes clips of tokens drawn one by one as often as they occur in a data set: the floor.

    Args:
      loaded, where: the model whose codec decodes them, and what it is called.
      data: the data set, of the same codec.
      names: of the clips.
      num_frames: token frames of a clip.
      seed, out: of the draws, and the folder to write to.
    """
    decoder = pretrained.load_decoder(loaded, where)
    cumulative_KV = token_counts(data, loaded.codec.codebook_size).cumsum(1)
    for index, name in enumerate(names):
        if (out / f"{name}.wav").exists():
            continue
        random = np.random.default_rng([seed, index])
        codes_KT = np.stack(
            [
                np.searchsorted(counts_V, random.integers(0, counts_V[-1], num_frames), "right")
                for counts_V in cumulative_KV
            ]
        )
        wav_CN = sampling.decode_audio(decoder, codes_KT[None].astype(np.int32))[0]
        audio.write_wav(out / f"{name}.wav", wav_CN, loaded.codec.sample_rate)


def token_counts(data: Path, codebook_size: int) -> np.ndarray:
    """How often each token occurs in the training split, int64 [K, V]."""
    source = records.open_split(data, "train")
    counts_KV = 0
    for index in tqdm(range(len(source)), desc="counting tokens", leave=False, delay=2):
        codes_KT = records.decode_example(source[index])["codes_KT"]
        counts_KV += np.stack([np.bincount(row_T, minlength=codebook_size) for row_T in codes_KT])
    return counts_KV


def _missing(files: Mapping[str, Path], out: Path, what: str) -> tqdm:
    wanted = [item for item in files.items() if not (out / f"{item[0]}.wav").exists()]
    return tqdm(wanted, desc=what, unit="clip", leave=False, delay=2)

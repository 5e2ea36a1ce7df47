"""Makes the files of the music tagger (magnet_jax/assets/tagger) from musicnn's wheel.

TensorFlow reads the checkpoint and librosa has the mel filters; they are needed for nothing else,
so give them an environment of their own:

python -m venv tf && tf/bin/pip install tensorflow-cpu librosa tyro safetensors
tf/bin/pip download --no-deps musicnn==0.1.0
tf/bin/python -m launch.make.tagger --wheel musicnn-0.1.0-py3-none-any.whl --out tagger
"""

import ast
import json
import re
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from magnet_jax import cli, errors
from magnet_jax.errors import UserError
from magnet_jax.io import files

_MODEL = "musicnn/MTT_musicnn"
SAMPLE_RATE, FFT_SIZE, NUM_MELS = 16_000, 512, 96
_EPSILON = 1e-3  # of tf.layers.batch_normalization
# Our layers, and TensorFlow's names of their weights and batch norms, in the order of its graph.
_LAYERS = {
    "input": (None, "batch_normalization"),
    "timbre_38": ("conv2d", "batch_normalization_1"),
    "timbre_67": ("conv2d_1", "batch_normalization_2"),
    "tempo_128": ("conv2d_2", "batch_normalization_3"),
    "tempo_64": ("conv2d_3", "batch_normalization_4"),
    "tempo_32": ("conv2d_4", "batch_normalization_5"),
    "middle_0": ("conv2d_5", "batch_normalization_6"),
    "middle_1": ("conv2d_6", "batch_normalization_7"),
    "middle_2": ("conv2d_7", "batch_normalization_8"),
    "pooled": (None, "batch_normalization_9"),
    "hidden": ("dense", "batch_normalization_10"),
    "tags": ("dense_1", None),
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Read the MTT_musicnn checkpoint out of musicnn's wheel, write it as safetensors."""

    wheel: Path
    """musicnn-0.1.0-py3-none-any.whl, as PyPI has it."""
    out: Path
    """Folder to write; it must be new or empty."""


def read_checkpoint(wheel: zipfile.ZipFile) -> dict[str, np.ndarray]:
    """The network's variables by TensorFlow's names, without the optimizer's."""
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "checkpoint")
        for suffix in ("index", "data-00000-of-00001"):
            prefix.with_suffix(f".{suffix}").write_bytes(wheel.read(f"{_MODEL}/.{suffix}"))
        reader = tf.train.load_checkpoint(str(prefix))
        names = [name for name in reader.get_variable_to_shape_map() if "Adam" not in name]
        return {name: reader.get_tensor(name) for name in names}


def mel_filters() -> np.ndarray:
    """[FFT_SIZE // 2 + 1, NUM_MELS]: triangles of equal area on Slaney's scale."""
    import librosa

    filters_MF = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=FFT_SIZE, n_mels=NUM_MELS)
    return np.ascontiguousarray(filters_MF.T, np.float32)


def convert(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors as `tagger.load` wants them: float16 kernels, batch norms as scale and shift."""
    tensors = {}
    for layer, (weights, norm) in _LAYERS.items():
        if weights is not None:
            kernel = variables[f"{weights}/kernel"]
            if layer.startswith("middle"):  # a row of features is what the taps run over: channels
                kernel = kernel.transpose(0, 2, 1, 3)
            with np.errstate(over="ignore"):  # infinity is refused when all are there
                tensors[f"{layer}/kernel"] = kernel.astype(np.float16)
            tensors[f"{layer}/bias"] = variables[f"{weights}/bias"]
        if norm is not None:
            gamma, beta, mean, variance = (
                variables[f"{norm}/{part}"].astype(np.float64)
                for part in ("gamma", "beta", "moving_mean", "moving_variance")
            )
            scale = gamma / np.sqrt(variance + _EPSILON)
            tensors[f"{layer}/scale"] = scale.astype(np.float32)
            tensors[f"{layer}/shift"] = (beta - mean * scale).astype(np.float32)
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def main(args: Args) -> None:
    """Writes weights, tags and licence; raises `UserError` for what cannot be read or written."""
    files.check_new_folder("--out", args.out)
    try:
        with zipfile.ZipFile(args.wheel) as wheel:
            tensors = convert(read_checkpoint(wheel)) | {"spectrogram/mel": mel_filters()}
            source = wheel.read("musicnn/configuration.py").decode()
            licence = wheel.read("musicnn-0.1.0.dist-info/LICENSE.md").decode()
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"--wheel {args.wheel}: not musicnn's wheel 0.1.0 ({error})") from None
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed: pip install tensorflow-cpu librosa, in an "
            "environment of its own"
        ) from None
    files.finite(args.wheel, tensors)
    tags = ast.literal_eval(re.search(r"^MTT_LABELS = (\[.*\])$", source, re.MULTILINE)[1])
    with files.replacing(args.out) as folder:
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"tags": tags}, indent=1) + "\n")
        (folder / "LICENSE").write_text(licence.strip() + "\n")
    print(f"{args.out}: {sum(t.size for t in tensors.values()):,} numbers, {len(tags)} tags")


if __name__ == "__main__":
    with errors.reported():
        main(cli.parse(Args, prog="python -m launch.make.tagger"))

"""Makes the files of the transcriber (magnet_jax/assets/transcriber) from basic-pitch's wheel.

The onnx package reads the network; it is needed for nothing else:

pip install onnx && pip download --no-deps basic-pitch==0.4.0
python -m launch.make.transcriber --wheel basic_pitch-0.4.0-py2.py3-none-any.whl --out transcriber
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from magnet_jax import cli, errors
from magnet_jax.errors import UserError
from magnet_jax.io import files

_MODEL = "basic_pitch/saved_models/icassp_2022/nmp.onnx"
_LICENCES = ("LICENSE", "NOTICE")
# Our layers, and the shapes of their kernels in the graph, which has each shape once.
_LAYERS = {
    "contour_1": (8, 8, 3, 39),
    "contour_2": (1, 8, 5, 5),
    "note_1": (32, 1, 7, 7),
    "note_2": (1, 32, 7, 3),
    "onset_1": (32, 8, 5, 5),
    "onset_2": (1, 33, 3, 3),
}
_CONSTANT_Q, _LOW_PASS = (36, 1, 1, 256), (1, 1, 1, 256)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Read the ICASSP 2022 model out of basic-pitch's wheel, write it as safetensors."""

    wheel: Path
    """basic_pitch-0.4.0-py2.py3-none-any.whl, as PyPI has it."""
    out: Path
    """Folder to write; it must be new or empty."""


def convert(model: bytes) -> dict[str, np.ndarray]:
    """Tensors as `transcriber.load` wants them, in float32, with the batch norms folded in.

    Raises `ValueError` where the graph is another one.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(model).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    convolutions: dict[tuple[int, ...], list[tuple[np.ndarray, np.ndarray]]] = {}
    for node in graph.node:
        if node.op_type == "Conv":
            kernel, bias = (constants[name] for name in node.input[1:])
            found = convolutions.setdefault(kernel.shape, [])
            if not any(kernel is other for other, _ in found):  # octaves share their kernels
                found.append((kernel, bias))
    counts = {shape: len(found) for shape, found in convolutions.items()}
    if counts != {_CONSTANT_Q: 2, _LOW_PASS: 1} | dict.fromkeys(_LAYERS.values(), 1):
        raise ValueError("its convolutions are others")
    tensors = {}
    for layer, shape in _LAYERS.items():
        ((kernel, bias),) = convolutions[shape]
        tensors |= {f"{layer}/kernel": kernel.transpose(2, 3, 1, 0), f"{layer}/bias": bias}
    # The real and imaginary parts, of which the network hears the magnitude: either may be first.
    parts = [kernel[:, 0, 0].T for kernel, _ in convolutions[_CONSTANT_Q]]
    tensors["constant_q/kernels"] = np.stack(parts, 1)
    tensors["constant_q/low_pass"] = convolutions[_LOW_PASS][0][0].reshape(-1)
    (lengths,) = (array for name, array in constants.items() if "Sqrt" in name)
    tensors["constant_q/scale"] = lengths.reshape(-1)
    norm = [
        (node.op_type, constants[node.input[1]])
        for node in graph.node
        if node.op_type in ("Mul", "Add") and "batch_normalization/" in node.input[1]
    ]
    tensors["spectrum/scale"], tensors["spectrum/shift"] = (dict(norm)[op] for op in ("Mul", "Add"))
    return {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}


def main(args: Args) -> None:
    """Writes weights and licence; raises `UserError` for what cannot be read or written."""
    files.check_new_folder("--out", args.out)
    try:
        with zipfile.ZipFile(args.wheel) as wheel:
            tensors = convert(wheel.read(_MODEL))
            licences = {n: wheel.read(f"basic_pitch-0.4.0.dist-info/{n}") for n in _LICENCES}
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise UserError(f"--wheel {args.wheel}: not basic-pitch's wheel 0.4.0 ({error})") from None
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install onnx") from None
    files.finite(args.wheel, tensors)
    with files.replacing(args.out) as folder:
        save_file(tensors, folder / "model.safetensors")
        for name, content in licences.items():
            (folder / name).write_bytes(content)
    print(f"{args.out}: {sum(tensor.size for tensor in tensors.values()):,} numbers")


if __name__ == "__main__":
    with errors.reported():
        main(cli.parse(Args, prog="python -m launch.make.transcriber"))

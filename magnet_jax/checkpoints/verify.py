"""What an export holds, read back and compared with the model: every bit, and the logits."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from magnet_jax.checkpoints import bundle
from magnet_jax.checkpoints.bundle import TEXT_FOLDER, Bundle
from magnet_jax.config import ModelConfig
from magnet_jax.convert import codec_rules, lm_rules, t5_files, torch_lm
from magnet_jax.convert.audiocraft import CODEC_FILE, LM_FILE, read_file
from magnet_jax.errors import UserError
from magnet_jax.io import trees
from magnet_jax.model import attention, teacher_forcing, transformer
from magnet_jax.model.patterns import to_steps

LOGITS_TOLERANCE = 1e-3  # float32 sums in another order


def read_back(folder: Path, written: Bundle, t5_params: dict, audiocraft: bool) -> int:
    """Reads everything back from `folder` and compares it bit for bit; how many tensors there are.

    Raises `RuntimeError`, naming what differs: that would be a bug or a failing disk.
    """
    if (model := bundle.read_config(folder).model) != written.model:
        raise RuntimeError(f"config.json: describes {model}, not {written.model}")
    params = trees.flatten(written.params)
    _require_equal_file(folder / "model.safetensors", params)
    count = len(params)
    lm = trees.flatten(written.params["lm"])
    if audiocraft:
        model, lm_params, *_ = lm_rules.read_audiocraft(folder)
        if model != written.model:
            raise RuntimeError(f"{LM_FILE}: xp.cfg describes {model}, not {written.model}")
        _require_equal(LM_FILE, trees.flatten(lm_params), lm)
        del lm_params
        count += len(lm) + _check_codec(folder, written)
    if written.text.source == TEXT_FOLDER:
        _, found, _ = t5_files.load(str(folder / TEXT_FOLDER))
        _require_equal(TEXT_FOLDER, trees.flatten(found), trees.flatten(t5_params))
        count += len(trees.flatten(t5_params))
    return count


def _check_codec(folder: Path, written: Bundle) -> int:
    """The same for AudioCraft's codec; how many tensors it compared."""
    file = read_file(folder / CODEC_FILE)
    shipped = folder / written.codec.source
    codec = dataclasses.replace(
        written.codec, source=str(shipped) if shipped.is_dir() else written.codec.source
    )
    if pointer := lm_rules.audiocraft_pointer(codec, written.origin):
        if file.pretrained != pointer:
            raise RuntimeError(f"{CODEC_FILE}: does not point to {pointer}")
        return 0
    settings, tensors = codec_rules.read_codec_folder(codec_rules.codec_folder(codec))
    back = codec_rules.codec_from_audiocraft(file.tensors, settings, codec.num_codebooks)
    back = {name: array.astype(np.float32, copy=False) for name, array in back.items()}
    _require_equal(CODEC_FILE, back, {name: tensors[name] for name in back})
    return len(back)


def _require_equal_file(path: Path, expected: dict) -> None:
    """`_require_equal` for a safetensors file of a large model, which is not to be held twice."""
    with safetensors.safe_open(path, "np") as file:
        differing = set(file.keys()) ^ expected.keys()
        names = expected.keys() - differing
        differing |= {n for n in names if file.get_slice(n).get_shape() != [*expected[n].shape]}
    for name in expected.keys() - differing:
        # Opened for each tensor: what was read stays in memory until the file is closed.
        with safetensors.safe_open(path, "np") as file:
            rows = file.get_slice(name)
            for i, row in enumerate(expected[name]):
                found = rows[i : i + 1].astype(np.float32, copy=False)
                if not _same_bits(found[0], np.asarray(row)):
                    differing.add(name)
    if differing:
        raise RuntimeError(
            f"{path.name}: what was read back differs: {', '.join(sorted(differing))}"
        )


def _require_equal(what: str, found: dict, expected: dict) -> None:
    differing = found.keys() ^ expected.keys()
    for name in found.keys() & expected.keys():
        a, b = np.asarray(found[name]), np.asarray(expected[name])
        if a.dtype != b.dtype or a.shape != b.shape or not _same_bits(a, b):
            differing.add(name)
    if differing:
        raise RuntimeError(f"{what}: what was read back differs: {', '.join(sorted(differing))}")


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    # (as integers: a NaN equals itself, 0 differs from -0, and nothing is copied)
    return np.array_equal(*(np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}") for x in (a, b)))


def compare_logits(folder: Path, written: Bundle, from_audiocraft: bool, where: str) -> str:
    """Runs what was written in PyTorch and the model in JAX, on random tokens and text states.

    Raises `RuntimeError` where they differ by more than `LOGITS_TOLERANCE`, and `UserError` where
    the model, called `where`, overflows.
    """
    if from_audiocraft:
        state_dict = read_file(folder / LM_FILE).tensors
    else:
        params = bundle.read_safetensors(folder).params["lm"]
        state_dict = lm_rules.to_audiocraft(params, written.model)
    with jax.default_matmul_precision("highest"):  # accelerators would shorten float32
        worst = logits_difference(written.params["lm"], written.model, state_dict)
    if not np.isfinite(worst):
        raise UserError(
            f"{where}: the model computes NaN or infinity in place of logits: its weights "
            "are damaged, or their training diverged"
        )
    if not worst <= LOGITS_TOLERANCE:
        raise RuntimeError(f"{folder.name}: logits in PyTorch differ by {worst:.1e}")
    return f"checked: logits in PyTorch within {worst:.1e} of those in JAX"


def logits_difference(params: dict, model: ModelConfig, state_dict: dict) -> float:
    """The largest difference of any logit between JAX and PyTorch, over all codebooks.

    Of a hybrid half of the steps are its prompt.

    Args:
      params: our parameters.
      model: their sizes.
      state_dict: the same as AudioCraft has them.
    """
    frames, width = 3 * model.span_length + 2 * model.widest_context, 6
    first = frames // 2
    rng = np.random.default_rng(0)
    shape = (2, model.num_codebooks, frames)
    codes_BKT = rng.integers(0, model.codebook_size + 1, shape).astype(np.int32)
    states_BSE = rng.normal(size=(2, width, model.text_width)).astype(np.float32)
    lengths_B = np.array([width - 2, width])
    text = (states_BSE, np.arange(width) < lengths_B[:, None], (width - lengths_B).astype(np.int32))
    if model.kind == "musicgen":
        steps_BKS = np.asarray(to_steps(codes_BKT, model.delays, model.mask_id, frames))
        ours_BKTV = teacher_forcing.step_logits(params, *text, steps_BKS, config=model)
    else:
        steps_BKS = codes_BKT
        stages = range(model.num_codebooks)
        ours_BKTV = jnp.stack(
            [_stage_logits(params, *text, codes_BKT, s, first, model, s > 0) for s in stages],
            axis=1,
        )
    theirs_BKTV = np.stack(
        [
            torch_lm.logits(state_dict, model, steps_BKS, states_BSE, lengths_B, stage, first)
            for stage in range(model.num_codebooks)
        ],
        axis=1,
    )
    with np.errstate(invalid="ignore"):  # a model may overflow
        return float(np.abs(np.asarray(ours_BKTV) - theirs_BKTV).max())


@jax.jit(static_argnames=("model", "local"))
def _stage_logits(params, states_BSE, mask_BS, zeros_B, codes_BKT, stage, first, model, local):
    network = transformer.bind(model, params)
    text = network.read_text(states_BSE, mask_BS, zeros_B)
    attend = attention.self_attention
    if model.kind == "hybrid":
        attend = functools.partial(
            attention.hybrid_attention,
            first_B=jnp.broadcast_to(first, len(codes_BKT)),
            delay=jnp.asarray(model.delays)[stage],
        )
    return network.head(network.trunk(codes_BKT, text, local=local, attend=attend), stage)

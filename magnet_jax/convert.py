"""AudioCraft's language models <-> our parameters, one table of rules for both ways.

`LM_RULES` says how tensors are called and laid out; `make_xp_cfg` and `model_from_xp_cfg` do the
same for settings. All of it works on NumPy arrays; torch only opens and writes `.bin` files.

An AudioCraft folder holds `state_dict.bin`, the language model, and `compression_state_dict.bin`,
the codec (convert_codec.py). Both are `torch.save` files of {'best_state': tensors, 'xp.cfg': YAML
text, 'version', 'exported'}; a codec may instead be a pointer {'pretrained': name}.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from magnet_jax.config import CodecSpec, ModelConfig, RunConfig
from magnet_jax.convert_codec import (
    check_tensors,
    codec_folder,
    codec_pointer,
    codec_to_audiocraft,
    make_codec_xp_cfg,
    read_codec_folder,
)
from magnet_jax.errors import UserError
from magnet_jax.torch_env import import_torch, load_tensors

AUDIOCRAFT_VERSION = "1.4.0a2"  # of the layout written here
LM_FILE = "state_dict.bin"
CODEC_FILE = "compression_state_dict.bin"

# The text encoders that AudioCraft builds by name, with the width of their states.
PUBLISHED_T5_WIDTHS = {
    "t5-small": 512,
    "t5-base": 768,
    "t5-large": 1024,
    "t5-3b": 1024,
    "t5-11b": 1024,
    "google/flan-t5-small": 512,
    "google/flan-t5-base": 768,
    "google/flan-t5-large": 1024,
}


# --- the language model -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one kind of tensor is called and laid out there and here.

    Axes are letters: K codebooks, L layers, D width, N heads, H head size, F MLP width, E text
    width, V codebook size, W = V + 1. Letters written together, as in 'CNH D', are one axis there
    that counts through them, the last fastest. C counts through several tensors of ours.
    """

    theirs: str
    """AudioCraft's name; {K} or {L} stands for a number, our leading axis."""
    their_axes: str
    ours: tuple[str, ...]
    """Our paths, more than one where theirs stacks them along C."""
    our_axes: str
    """Without the leading axis."""

    @property
    def stack(self) -> str:
        """The letter of our leading axis, '' without one."""
        found = re.search(r"\{(\w)\}", self.theirs)
        return found[1] if found else ""


def _attention_rules(theirs: str, ours: str) -> list[Rule]:
    prefix = "transformer.layers.{L}."
    qkv = tuple(f"blocks/{ours}/{name}" for name in ("query", "key", "value"))
    return [
        Rule(f"{prefix}{theirs}.in_proj_weight", "CNH D", qkv, "D N H"),
        Rule(f"{prefix}{theirs}.out_proj.weight", "D NH", (f"blocks/{ours}/out",), "N H D"),
    ]


def _norm_rules(theirs: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{theirs}.weight", "D", (f"{ours}/scale",), "D"),
        Rule(f"{theirs}.bias", "D", (f"{ours}/bias",), "D"),
    ]


_TEXT_PROJECTION = "condition_provider.conditioners.description.output_proj"

LM_RULES: tuple[Rule, ...] = (
    Rule(f"{_TEXT_PROJECTION}.weight", "D E", ("text_proj/kernel",), "E D"),
    Rule(f"{_TEXT_PROJECTION}.bias", "D", ("text_proj/bias",), "D"),
    Rule("emb.{K}.weight", "W D", ("embed",), "W D"),
    *_attention_rules("self_attn", "self"),
    Rule("transformer.layers.{L}.linear1.weight", "F D", ("blocks/mlp/up",), "D F"),
    Rule("transformer.layers.{L}.linear2.weight", "D F", ("blocks/mlp/down",), "F D"),
    *_norm_rules("transformer.layers.{L}.norm1", "blocks/norm_self"),
    *_norm_rules("transformer.layers.{L}.norm2", "blocks/norm_mlp"),
    *_attention_rules("cross_attention", "cross"),
    *_norm_rules("transformer.layers.{L}.norm_cross", "blocks/norm_cross"),
    *_norm_rules("out_norm", "norm_final"),
    Rule("linears.{K}.weight", "V D", ("heads",), "D V"),
)


def _sizes(model: ModelConfig) -> dict[str, int]:
    return {
        "C": 3,
        "K": model.num_codebooks,
        "L": model.num_layers,
        "D": model.width,
        "N": model.num_heads,
        "H": model.head_size,
        "F": model.mlp_ratio * model.width,
        "E": model.text_width,
        "V": model.codebook_size,
        "W": model.codebook_size + 1,
    }


def _expand(sizes: dict[str, int]) -> Iterator[tuple[str, Rule, int]]:
    """Every tensor of a checkpoint in AudioCraft's order: its name, its rule, its number."""
    for stack, group in itertools.groupby(LM_RULES, key=lambda rule: rule.stack):
        rules = list(group)
        for index in range(sizes[stack] if stack else 1):
            for rule in rules:
                yield rule.theirs.format(**{stack: index} if stack else {}), rule, index


def audiocraft_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of AudioCraft's language model of this size, in its order."""
    sizes = _sizes(model)
    return {
        name: tuple(math.prod(sizes[a] for a in axis) for axis in rule.their_axes.split())
        for name, rule, _ in _expand(sizes)
    }


def lm_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path ('blocks/self/query') and shape of every parameter of our language model."""
    sizes = _sizes(model)
    return {
        path: tuple(sizes[a] for a in rule.stack + rule.our_axes.replace(" ", ""))
        for rule in LM_RULES
        for path in rule.ours
    }


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """A nested dict as {'blocks/self/query': leaf}."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict:
    """The inverse of `flatten`."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def to_audiocraft(
    lm_params: Mapping, model: ModelConfig, where: str = "parameters"
) -> dict[str, np.ndarray]:
    """Our parameters under AudioCraft's names and in its layout: new, contiguous float arrays.

    Raises `UserError` that lists every parameter that does not fit `model`.
    """
    sizes = _sizes(model)
    flat = {path: np.asarray(leaf) for path, leaf in flatten(lm_params).items()}
    check_tensors(where, flat, lm_shapes(model))
    shapes = audiocraft_shapes(model)
    state_dict = {}
    for name, rule, index in _expand(sizes):
        leaves = [flat[path][index] if rule.stack else flat[path] for path in rule.ours]
        letters = rule.our_axes.replace(" ", "")
        if "C" in rule.their_axes:
            array, letters = np.stack(leaves), "C" + letters
        else:
            (array,) = leaves
        order = [letters.index(a) for a in rule.their_axes.replace(" ", "")]
        # A copy, so that no tensor shares memory with the parameters.
        state_dict[name] = np.array(array.transpose(order), order="C").reshape(shapes[name])
    return state_dict


def from_audiocraft(
    state_dict: Mapping[str, np.ndarray], model: ModelConfig, where: str = "state dict"
) -> dict:
    """AudioCraft's tensors as our parameters, float32 (float16 is widened, which is exact).

    Raises `UserError` that lists every tensor that is missing, unknown or misshapen.
    """
    sizes = _sizes(model)
    check_tensors(where, state_dict, audiocraft_shapes(model))
    flat = {path: np.empty(shape, np.float32) for path, shape in lm_shapes(model).items()}
    for name, rule, index in _expand(sizes):
        their_letters = rule.their_axes.replace(" ", "")
        our_letters = rule.our_axes.replace(" ", "")
        split = state_dict[name].reshape([sizes[a] for a in their_letters])
        if "C" in their_letters:
            our_letters = "C" + our_letters
        parts = split.transpose([their_letters.index(a) for a in our_letters])
        for part, path in zip(parts if "C" in their_letters else [parts], rule.ours, strict=True):
            # Filled in place: a large model is held once there and once here, never thrice.
            flat[path][index if rule.stack else ...] = part
    return unflatten(flat)


# --- AudioCraft's xp.cfg ------------------------------------------------------------------------


def _whole(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def segment_seconds(config: RunConfig) -> int:
    """Clip length for AudioCraft, which sizes its attention masks by whole seconds only."""
    return max(1, round(config.data.segment_seconds))


def make_xp_cfg(config: RunConfig, codec: CodecSpec, text_encoder: str) -> dict[str, Any]:
    """The xp.cfg of an exported language model: every setting that AudioCraft's builders read.

    Args:
      config: of the run.
      codec: that made the tokens.
      text_encoder: a name in `PUBLISHED_T5_WIDTHS`, or the folder that holds the encoder.
    """
    model, decode, k = config.model, config.decode, config.model.num_codebooks
    pointer = codec_pointer(codec)
    return {
        "lm_model": "transformer_lm_magnet",
        "solver": "magnet",
        "sample_rate": codec.sample_rate,
        "channels": codec.channels,
        "device": "cpu",
        "dtype": "float32",
        "autocast": True,
        "autocast_dtype": "float16",
        "efficient_attention_backend": "xformers",
        "compression_model_checkpoint": f"//pretrained/{pointer}" if pointer else CODEC_FILE,
        "dataset": {"segment_duration": segment_seconds(config)},
        "masking": {"span_len": model.span_length},
        "codebooks_pattern": {
            "modeling": "parallel",
            "parallel": {"empty_initial": -1},
            "delay": {"delays": list(range(k)), "flatten_first": 0, "empty_initial": 0},
            "unroll": {"flattening": list(range(k)), "delays": [0] * k},
            "music_lm": {"group_by": 2},
            "coarse_first": {"delays": [0] * (k - 1)},
        },
        "transformer_lm": {
            "dim": model.width,
            "num_heads": model.num_heads,
            "num_layers": model.num_layers,
            "hidden_scale": model.mlp_ratio,
            "n_q": k,
            "card": model.codebook_size,
            "dropout": 0.0,
            "emb_lr": None,
            "activation": "gelu",
            "norm_first": True,
            "bias_ff": False,
            "bias_attn": False,
            "bias_proj": False,
            "past_context": None,
            "causal": False,
            "custom": False,
            "memory_efficient": True,
            "attention_as_float32": False,
            "layer_scale": None,
            "positional_embedding": "sin",
            "xpos": False,
            "checkpointing": "none",
            "weight_init": "gaussian",
            "depthwise_init": "current",
            "zero_bias_init": True,
            "norm": "layer_norm",
            "cross_attention": False,  # AudioCraft turns it on where the fuser has a 'cross' entry
            "qk_layer_norm": False,
            "qk_layer_norm_cross": False,
            "attention_dropout": None,
            "kv_repeat": 1,
            "two_step_cfg": False,
            "subcodes_context": model.local_context,
            "compression_model_framerate": _whole(codec.frame_rate),
            "segment_duration": segment_seconds(config),
            "span_len": model.span_length,
        },
        "classifier_free_guidance": {
            "training_dropout": config.condition_dropout,
            "inference_coef": 3.0,  # required by the builders; MAGNeT's decoding does not read it
        },
        "attribute_dropout": {},
        "fuser": {
            "cross_attention_pos_emb": False,
            "cross_attention_pos_emb_scale": 1,
            "sum": [],
            "prepend": [],
            "cross": ["description"],
            "input_interpolate": [],
        },
        "conditioners": {
            "description": {
                "model": "t5",
                "t5": {
                    "name": text_encoder,
                    "finetune": False,
                    "word_dropout": config.data.word_dropout,
                    "normalize_text": False,
                },
            }
        },
        "generate": {
            "lm": {
                "use_sampling": not decode.greedy,
                "temp": decode.temperature,
                "top_k": 0,
                "top_p": decode.top_p,
                "max_cfg_coef": decode.max_guidance,
                "min_cfg_coef": decode.min_guidance,
                "decoding_steps": list(decode.steps),
                "anneal_temp": decode.anneal_temperature,
                "span_scoring": decode.span_score,
                "span_arrangement": "nonoverlap",
            }
        },
    }


# What our transformer computes, in xp.cfg's terms: each setting with the only value that fits.
_FITTING = {
    "lm_model": "transformer_lm_magnet",
    "transformer_lm.activation": "gelu",
    "transformer_lm.norm": "layer_norm",
    "transformer_lm.norm_first": True,
    "transformer_lm.bias_ff": False,
    "transformer_lm.bias_attn": False,
    "transformer_lm.bias_proj": False,
    "conditioners.description.model": "t5",
    "conditioners.description.t5.finetune": False,
    "fuser.cross": ["description"],
}
# The same; where the setting is absent, AudioCraft's own default is the value that fits.
_FITTING_OR_ABSENT = {
    "transformer_lm.causal": False,
    "transformer_lm.layer_scale": None,
    "transformer_lm.past_context": None,
    "transformer_lm.positional_embedding": "sin",
    "transformer_lm.positional_scale": 1,
    "transformer_lm.xpos": False,
    "transformer_lm.qk_layer_norm": False,
    "transformer_lm.qk_layer_norm_cross": False,
    "transformer_lm.kv_repeat": 1,
    "fuser.sum": [],
    "fuser.prepend": [],
    "fuser.input_interpolate": [],
    "fuser.cross_attention_pos_emb": False,
}
_MODEL_SETTINGS = {
    "num_codebooks": "transformer_lm.n_q",
    "codebook_size": "transformer_lm.card",
    "width": "transformer_lm.dim",
    "num_heads": "transformer_lm.num_heads",
    "num_layers": "transformer_lm.num_layers",
    "mlp_ratio": "transformer_lm.hidden_scale",
    "local_context": "transformer_lm.subcodes_context",
    "span_length": "masking.span_len",
}


def xp_setting(xp_cfg: Mapping, name: str, default: Any = None) -> Any:
    """The setting 'a.b' of an xp.cfg, or `default`; '${c.d}' is followed to what it stands for."""
    path, node = name, None
    for _ in range(10):  # references in a ring end as the text they are
        node = xp_cfg
        for part in path.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return default
            node = node[part]
        reference = re.fullmatch(r"\$\{([\w.]+)\}", node) if isinstance(node, str) else None
        if not reference:
            return node
        path = reference[1]
    return node


def model_from_xp_cfg(xp_cfg: Mapping, text_width: int, where: str) -> ModelConfig:
    """The model that an xp.cfg describes; `UserError` lists all of it that this project lacks."""
    problems = []
    for name, fitting in _FITTING.items():
        value = xp_setting(xp_cfg, name)
        if value != fitting:
            problems.append(f"{name} must be {fitting}, not {value}")
    for name, fitting in _FITTING_OR_ABSENT.items():
        value = xp_setting(xp_cfg, name, fitting)
        if value != fitting:
            problems.append(f"{name} must be {fitting}, not {value}")
    # 'args' holds settings of text augmentation, not a conditioner.
    conditioners = xp_setting(xp_cfg, "conditioners")
    if isinstance(conditioners, Mapping) and (others := {*conditioners} - {"args", "description"}):
        problems.append(f"conditioners other than text: {', '.join(sorted(map(str, others)))}")
    settings = {}
    for field, name in _MODEL_SETTINGS.items():
        value = xp_setting(xp_cfg, name)
        if not isinstance(value, int) or isinstance(value, bool):
            problems.append(f"{name} must be a whole number, not {value}")
        settings[field] = value
    if problems:
        raise UserError(f"{where}: not a model that can be converted: {'; '.join(problems)}")
    try:
        return ModelConfig(**settings, text_width=text_width)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


# --- AudioCraft's files -------------------------------------------------------------------------


def read_checkpoint(path: Path) -> dict[str, Any]:
    """An AudioCraft `.bin` file: tensors as NumPy arrays, 'xp.cfg' as a dict. Runs no code in it.

    Returns {'pretrained': name, ...} for a pointer, else {'best_state', 'xp.cfg', ...}.
    Raises `UserError` for a missing, damaged or unsafe file, or one of another layout.
    """
    torch, content = import_torch(), load_tensors(path)
    if isinstance(content, dict) and isinstance(content.get("pretrained"), str):
        return content
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("best_state"), dict)
        or not isinstance(content.get("xp.cfg"), str)
    ):
        raise UserError(f"{path}: not an AudioCraft checkpoint (no 'best_state' and 'xp.cfg')")
    tensors = {}
    for name, tensor in content["best_state"].items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path}: 'best_state' holds {name}, which is not a tensor")
        # NumPy has no bfloat16; widening is exact.
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        try:
            tensors[name] = tensor.detach().numpy()
        except (TypeError, RuntimeError) as error:  # sparse, quantised and the like
            raise UserError(f"{path}: {name} is not a plain tensor ({error})") from None
    try:
        xp_cfg = yaml.safe_load(content["xp.cfg"])
    except (yaml.YAMLError, RecursionError):
        xp_cfg = None
    if not isinstance(xp_cfg, dict):
        raise UserError(f"{path}: its 'xp.cfg' is not YAML settings")
    return {**content, "best_state": tensors, "xp.cfg": xp_cfg}


def _write_torch(path: Path, content: dict[str, Any]) -> None:
    with path.open("wb") as file:  # given a path, torch reports a full disk as RuntimeError
        import_torch().save(content, file)


def _write_checkpoint(path: Path, tensors: Mapping[str, np.ndarray], xp_cfg: Mapping) -> None:
    torch = import_torch()
    content = {
        "best_state": {name: torch.from_numpy(np.array(a)) for name, a in tensors.items()},
        "xp.cfg": yaml.safe_dump(dict(xp_cfg), sort_keys=False),
        "version": AUDIOCRAFT_VERSION,
        "exported": True,
    }
    _write_torch(path, content)


def read_audiocraft(directory: Path) -> tuple[ModelConfig, dict, dict[str, Any]]:
    """A MAGNeT folder's language model: its config, our parameters (float32) and its xp.cfg.

    Raises `UserError` for a file that is missing, damaged, unsafe, or of a model that we lack.
    """
    path = Path(directory) / LM_FILE
    content = read_checkpoint(path)
    if "pretrained" in content:
        raise UserError(f"{path}: points to {content['pretrained']} and holds no language model")
    state_dict, xp_cfg = content["best_state"], content["xp.cfg"]
    # The text width stands nowhere in xp.cfg but in the encoder's name.
    projection = state_dict.get(f"{_TEXT_PROJECTION}.weight")
    if projection is not None and projection.ndim == 2:
        text_width = projection.shape[1]
    else:
        text_width = ModelConfig.text_width  # the check of the tensors reports the projection
    model = model_from_xp_cfg(xp_cfg, text_width, str(path))
    return model, from_audiocraft(state_dict, model, str(path)), xp_cfg


def write_audiocraft(
    directory: Path, lm_params: Mapping, model: ModelConfig, xp_cfg: Mapping, codec: CodecSpec
) -> None:
    """Writes `state_dict.bin` and `compression_state_dict.bin` into an existing folder.

    Args:
      directory: existing folder.
      lm_params: our parameters.
      model: their sizes.
      xp_cfg: from `make_xp_cfg`, or the one that `read_audiocraft` gave.
      codec: the codec that made the tokens; a folder's weights are converted, a published codec
        is pointed to.

    Raises:
      UserError: parameters that do not fit, or a codec that AudioCraft cannot express.
    """
    directory = Path(directory)
    _write_checkpoint(directory / LM_FILE, to_audiocraft(lm_params, model), xp_cfg)
    if pointer := codec_pointer(codec):
        content = {"pretrained": pointer, "exported": True, "version": AUDIOCRAFT_VERSION}
        _write_torch(directory / CODEC_FILE, content)
    else:
        settings, tensors = read_codec_folder(codec_folder(codec))
        _write_checkpoint(
            directory / CODEC_FILE,
            codec_to_audiocraft(tensors, settings, codec.num_codebooks),
            make_codec_xp_cfg(settings, codec.num_codebooks),
        )

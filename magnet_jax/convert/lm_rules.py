"""AudioCraft's language models <-> our parameters, one table of rules for both ways.

`LM_RULES` says how tensors are called and laid out; `make_xp_cfg` and `model_from_xp_cfg` do the
same for settings. All of it works on NumPy arrays and serves MAGNeT and MusicGen alike, whose
tensors are the same.
"""

import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from magnet_jax.config import CodecSpec, DecodeConfig, ModelConfig, RunConfig
from magnet_jax.convert.audiocraft import (
    CODEC_FILE,
    LM_FILE,
    Origin,
    misfits,
    read_file,
    write_pointer,
    write_weights,
    xp_setting,
)
from magnet_jax.convert.codec_rules import (
    check_tensors,
    codec_folder,
    codec_pointer,
    codec_to_audiocraft,
    make_codec_xp_cfg,
    read_codec_folder,
)
from magnet_jax.errors import UserError
from magnet_jax.io import trees

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
    setting: str = ""
    """The setting of the model without which there is no such tensor; '' for what all have."""

    @property
    def stack(self) -> str:
        """The letter of our leading axis, '' without one."""
        found = re.search(r"\{(\w)\}", self.theirs)
        return found[1] if found else ""


def _attention_rules(theirs: str, ours: str, normed: str) -> list[Rule]:
    """`normed` is the setting that adds norms of queries and keys."""
    theirs, ours = "transformer.layers.{L}." + theirs, f"blocks/{ours}"
    qkv = tuple(f"{ours}/{name}" for name in ("query", "key", "value"))
    qkv_bias = tuple(f"{path}_bias" for path in qkv)
    return [
        Rule(f"{theirs}.in_proj_weight", "CNH D", qkv, "D N H"),
        Rule(f"{theirs}.in_proj_bias", "CNH", qkv_bias, "N H", "attention_bias"),
        Rule(f"{theirs}.out_proj.weight", "D NH", (f"{ours}/out",), "N H D"),
        Rule(f"{theirs}.out_proj.bias", "D", (f"{ours}/out_bias",), "D", "attention_bias"),
        *_norm_rules(f"{theirs}.q_layer_norm", f"{ours}/norm_query", normed),
        *_norm_rules(f"{theirs}.k_layer_norm", f"{ours}/norm_key", normed),
    ]


def _mlp_rules(theirs: str, their_axes: str, ours: str) -> list[Rule]:
    theirs, ours = "transformer.layers.{L}." + theirs, f"blocks/mlp/{ours}"
    out, into = their_axes.split()
    return [
        Rule(f"{theirs}.weight", their_axes, (ours,), f"{into} {out}"),
        Rule(f"{theirs}.bias", out, (f"{ours}_bias",), out, "mlp_bias"),
    ]


def _norm_rules(theirs: str, ours: str, setting: str = "") -> list[Rule]:
    return [
        Rule(f"{theirs}.weight", "D", (f"{ours}/scale",), "D", setting),
        Rule(f"{theirs}.bias", "D", (f"{ours}/bias",), "D", setting),
    ]


_TEXT_PROJECTION = "condition_provider.conditioners.description.output_proj"

LM_RULES: tuple[Rule, ...] = (
    Rule(f"{_TEXT_PROJECTION}.weight", "D E", ("text_proj/kernel",), "E D"),
    Rule(f"{_TEXT_PROJECTION}.bias", "D", ("text_proj/bias",), "D"),
    Rule("emb.{K}.weight", "W D", ("embed",), "W D"),
    *_attention_rules("self_attn", "attn", "query_key_norm"),
    *_mlp_rules("linear1", "F D", "up"),
    *_mlp_rules("linear2", "D F", "down"),
    *_norm_rules("transformer.layers.{L}.norm1", "blocks/norm_attn"),
    *_norm_rules("transformer.layers.{L}.norm2", "blocks/norm_mlp"),
    *_attention_rules("cross_attention", "cross_attn", "cross_query_key_norm"),
    *_norm_rules("transformer.layers.{L}.norm_cross", "blocks/norm_cross_attn"),
    *_norm_rules("out_norm", "norm_final"),
    Rule("linears.{K}.weight", "V D", ("heads",), "D V"),
    Rule("linears.{K}.bias", "V", ("heads_bias",), "V", "head_bias"),
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


def _rules(model: ModelConfig) -> list[Rule]:
    """The rules of the tensors that this model has."""
    return [rule for rule in LM_RULES if not rule.setting or getattr(model, rule.setting)]


def _expand(model: ModelConfig) -> Iterator[tuple[str, Rule, int]]:
    """Every tensor of a checkpoint in AudioCraft's order: its name, its rule, its number."""
    sizes = _sizes(model)
    for stack, group in itertools.groupby(_rules(model), key=lambda rule: rule.stack):
        rules = list(group)
        for index in range(sizes[stack] if stack else 1):
            for rule in rules:
                yield rule.theirs.format(**{stack: index} if stack else {}), rule, index


def audiocraft_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of AudioCraft's language model of this size, in its order."""
    sizes = _sizes(model)
    return {
        name: tuple(math.prod(sizes[a] for a in axis) for axis in rule.their_axes.split())
        for name, rule, _ in _expand(model)
    }


def lm_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path ('blocks/attn/query') and shape of every parameter of our language model."""
    sizes = _sizes(model)
    return {
        path: tuple(sizes[a] for a in rule.stack + rule.our_axes.replace(" ", ""))
        for rule in _rules(model)
        for path in rule.ours
    }


def to_audiocraft(
    lm_params: Mapping, model: ModelConfig, where: str = "parameters"
) -> dict[str, np.ndarray]:
    """Our parameters under AudioCraft's names and in its layout: new, contiguous float arrays.

    Raises `UserError` that lists every parameter that does not fit `model`.
    """
    flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(lm_params).items()}
    check_tensors(where, flat, lm_shapes(model))
    shapes = audiocraft_shapes(model)
    state_dict = {}
    for name, rule, index in _expand(model):
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
    state_dict: dict[str, np.ndarray],
    model: ModelConfig,
    where: str = "state dict",
    *,
    empty: bool = False,
) -> dict:
    """AudioCraft's tensors as our parameters, float32 (float16 is widened, which is exact).

    With `empty`, tensors leave `state_dict` as they are converted, so that of a large model little
    more than one copy is held at any time.

    Raises `UserError` that lists every tensor that is missing, unknown or misshapen.
    """
    sizes = _sizes(model)
    check_tensors(where, state_dict, audiocraft_shapes(model))
    flat = {path: np.empty(shape, np.float32) for path, shape in lm_shapes(model).items()}
    for name, rule, index in _expand(model):
        letters = rule.their_axes.replace(" ", "")
        array = state_dict.pop(name) if empty else state_dict[name]
        array = array.reshape([sizes[a] for a in letters])
        stacked = "C" * ("C" in letters)
        order = [letters.index(a) for a in stacked + rule.our_axes.replace(" ", "")]
        parts = array.transpose(order) if stacked else [array.transpose(order)]
        for part, path in zip(parts, rule.ours, strict=True):
            flat[path][index if rule.stack else ...] = part
    return trees.unflatten(flat)


# --- AudioCraft's xp.cfg ------------------------------------------------------------------------


def _whole(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def segment_seconds(config: RunConfig) -> int:
    """Clip length for AudioCraft, which sizes its attention masks by whole seconds only."""
    return max(1, round(config.data.segment_seconds))


def make_xp_cfg(config: RunConfig, codec: CodecSpec, text_encoder: str) -> dict[str, Any]:
    """The xp.cfg of an exported language model: every setting that AudioCraft's builders read.

    `text_encoder` is a name in `PUBLISHED_T5_WIDTHS`, or the folder that holds the encoder.
    """
    model, k = config.model, config.model.num_codebooks
    magnet = model.kind == "magnet"
    pointer, seconds = codec_pointer(codec), segment_seconds(config)
    named = {
        "lm_model": "transformer_lm_magnet" if magnet else "transformer_lm",
        "solver": model.kind,
        "sample_rate": codec.sample_rate,
        "channels": codec.channels,
        **_UNUSED,
        "compression_model_checkpoint": f"//pretrained/{pointer}" if pointer else CODEC_FILE,
        "dataset.segment_duration": seconds,
        "masking.span_len": model.span_length,
        **_FITTING_KIND["magnet" if magnet else "musicgen"],
        **_UNUSED_OF_MODEL,
        "codebooks_pattern.delay.delays": list(model.delays or range(k)),
        "codebooks_pattern.unroll": {"flattening": list(range(k)), "delays": [0] * k},
        "codebooks_pattern.coarse_first.delays": [0] * (k - 1),
        "classifier_free_guidance.training_dropout": config.condition_dropout,
        # Required by the builders; MAGNeT's decoding does not read it.
        "classifier_free_guidance.inference_coef": config.autoregressive.guidance,
        "attribute_dropout": {},
        "fuser.cross_attention_pos_emb_scale": 1,
        **_FITTING,
        **_FITTING_OR_ABSENT,
        "conditioners.description.t5.name": text_encoder,
        "conditioners.description.t5.word_dropout": config.data.word_dropout,
        "generate.lm": _generate_settings(config),
    }
    fields = _SETTINGS | (_MAGNET_SETTINGS if magnet else {})
    named |= {theirs: getattr(model, ours) for ours, theirs in fields.items()}
    if magnet:
        named |= {
            "transformer_lm.subcodes_context": model.local_context or _UNRESTRICTED,
            "transformer_lm.compression_model_framerate": _whole(codec.frame_rate),
            "transformer_lm.segment_duration": seconds,
            "transformer_lm.span_len": model.span_length,
        }
    return trees.unflatten(copy.deepcopy(named), ".")


def _generate_settings(config: RunConfig) -> dict[str, Any]:
    sampling, decode = config.sampling, config.decode
    settings = {
        "use_sampling": not sampling.greedy,
        "temp": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": 0.0 if sampling.top_k else sampling.top_p,
    }
    if config.model.kind == "magnet":
        settings |= {
            "max_cfg_coef": decode.max_guidance,
            "min_cfg_coef": decode.min_guidance,
            "decoding_steps": list(decode.steps),
            "anneal_temp": decode.anneal_temperature,
            "span_scoring": decode.span_score,
            "span_arrangement": decode.span_arrangement,
        }
    return settings


# AudioCraft's subcodes_context of a model that sees all frames at all stages: our local_context 0.
# Its 0, a frame that sees itself alone, is nothing that we have.
_UNRESTRICTED = -1
# One table for both ways: our settings, and xp.cfg's names for them.
_SETTINGS = {
    "width": "transformer_lm.dim",
    "num_heads": "transformer_lm.num_heads",
    "num_layers": "transformer_lm.num_layers",
    "mlp_ratio": "transformer_lm.hidden_scale",
    "num_codebooks": "transformer_lm.n_q",
    "codebook_size": "transformer_lm.card",
    # A file must say whether there are biases: AudioCraft's own default is that there are, which
    # its configs turn off.
    "attention_bias": "transformer_lm.bias_attn",
    "mlp_bias": "transformer_lm.bias_ff",
    "head_bias": "transformer_lm.bias_proj",
    "query_key_norm": "transformer_lm.qk_layer_norm",
    "cross_query_key_norm": "transformer_lm.qk_layer_norm_cross",
}
_MAGNET_SETTINGS = {
    "local_context": "transformer_lm.subcodes_context",
    "span_length": "masking.span_len",
}
_DEFAULTS = {"query_key_norm": False, "cross_query_key_norm": False}
# What our transformer computes, in xp.cfg's terms: each setting with the only value that fits.
_FITTING = {
    "transformer_lm.activation": "gelu",
    "transformer_lm.norm": "layer_norm",
    "transformer_lm.norm_first": True,
    "fuser.cross": ["description"],
    "conditioners.description.model": "t5",
    "conditioners.description.t5.finetune": False,
}
# The same; where the setting is absent, AudioCraft's own default is the value that fits.
_FITTING_OR_ABSENT = {
    "transformer_lm.layer_scale": None,
    "transformer_lm.past_context": None,
    "transformer_lm.positional_embedding": "sin",
    "transformer_lm.xpos": False,
    "transformer_lm.kv_repeat": 1,
    "conditioners.description.t5.normalize_text": False,
    "fuser.sum": [],
    "fuser.prepend": [],
    "fuser.input_interpolate": [],
    "fuser.cross_attention_pos_emb": False,
    "codebooks_pattern.delay.flatten_first": 0,
    "codebooks_pattern.delay.empty_initial": 0,
}
# The same, of settings that AudioCraft's own configs leave out.
_FITTING_UNWRITTEN = {
    "transformer_lm.positional_scale": 1,
    "interleave_stereo_codebooks.use": False,
}
# What tells the two kinds of model apart, beside their class.
_CLASSES = {"transformer_lm_magnet": "magnet", "transformer_lm": "musicgen"}
_FITTING_KIND = {
    "magnet": {"codebooks_pattern.modeling": "parallel", "transformer_lm.causal": False},
    "musicgen": {"codebooks_pattern.modeling": "delay", "transformer_lm.causal": True},
}
# Settings of training, or of what is not there, which the builders want all the same.
_UNUSED = {
    "device": "cpu",
    "dtype": "float32",
    "autocast": True,
    "autocast_dtype": "float16",
    "efficient_attention_backend": "xformers",
}
_UNUSED_OF_MODEL = {
    "codebooks_pattern.parallel.empty_initial": -1,
    "codebooks_pattern.music_lm.group_by": 2,
    "transformer_lm.dropout": 0.0,
    "transformer_lm.emb_lr": None,
    "transformer_lm.custom": False,
    "transformer_lm.memory_efficient": True,
    "transformer_lm.attention_as_float32": False,
    "transformer_lm.checkpointing": "none",
    "transformer_lm.weight_init": "gaussian",
    "transformer_lm.depthwise_init": "current",
    "transformer_lm.zero_bias_init": True,
    # AudioCraft turns it on where the fuser has a 'cross' entry.
    "transformer_lm.cross_attention": False,
    "transformer_lm.attention_dropout": None,
    "transformer_lm.two_step_cfg": False,
}


def model_from_xp_cfg(xp_cfg: Mapping, text_width: int, where: str) -> ModelConfig:
    """The model that an xp.cfg describes; `UserError` lists all of it that this project lacks."""
    name = xp_setting(xp_cfg, "lm_model")
    kind = _CLASSES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise UserError(
            f"{where}: not a model that can be converted: lm_model must be "
            f"{' or '.join(_CLASSES)}, not {name}"
        )
    or_absent = _FITTING_OR_ABSENT | _FITTING_UNWRITTEN
    problems = misfits(xp_cfg, _FITTING | _FITTING_KIND[kind], or_absent)
    # 'args' holds settings of text augmentation, not a conditioner.
    conditioners = xp_setting(xp_cfg, "conditioners")
    if isinstance(conditioners, Mapping) and (others := {*conditioners} - {"args", "description"}):
        problems.append(f"conditioners other than text: {', '.join(sorted(map(str, others)))}")
    settings: dict[str, Any] = {"kind": kind}
    for field, name in (_SETTINGS | (_MAGNET_SETTINGS if kind == "magnet" else {})).items():
        value = xp_setting(xp_cfg, name, _DEFAULTS.get(field))
        if field.endswith(("_bias", "_norm")):
            if type(value) is not bool:
                problems.append(f"{name} must be true or false, not {value}")
        elif type(value) is not int:
            problems.append(f"{name} must be a whole number, not {value}")
        elif field == "local_context":
            if value < _UNRESTRICTED or value == 0:
                problems.append(f"{name} must be {_UNRESTRICTED} or positive, not {value}")
            value = max(value, 0)
        settings[field] = value
    if kind == "musicgen":
        name = "codebooks_pattern.delay.delays"
        delays = xp_setting(xp_cfg, name)
        if isinstance(delays, list) and all(type(delay) is int for delay in delays):
            settings["delays"] = tuple(delays)
        else:
            problems.append(f"{name} must be a list of whole numbers, not {delays}")
    if problems:
        raise UserError(f"{where}: not a model that can be converted: {'; '.join(problems)}")
    try:
        return ModelConfig(**settings, text_width=text_width)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def published_defaults(xp_cfg: Mapping, model: ModelConfig, seconds: float) -> DecodeConfig:
    """The decoding that AudioCraft's authors give for such a MAGNeT: by kind and by length.

    Music and sound take other temperatures; the first codebook takes 2 steps a second, at least
    20 (the paper's 20 for 10 s and 60 for 30 s).
    """
    steps = (max(20, round(2 * seconds)), *[10] * (model.num_codebooks - 1))
    if xp_setting(xp_cfg, "solver") == "audio_magnet":
        return DecodeConfig(steps=steps, temperature=3.5, top_p=0.8, max_guidance=20.0)
    return DecodeConfig(steps=steps)


# --- AudioCraft's files -------------------------------------------------------------------------


class ImportedLM(NamedTuple):
    """A language model as an AudioCraft file holds it."""

    model: ModelConfig
    params: dict  # our layout, float32
    xp_cfg: dict[str, Any]
    xp_cfg_text: str
    dtype: str  # of the file's tensors: 'float16' or 'float32'


def read_audiocraft(directory: Path) -> ImportedLM:
    """The language model of an AudioCraft folder, MAGNeT or MusicGen.

    Raises `UserError` for a file that is missing, damaged, unsafe, or of a model that we lack.
    """
    path = Path(directory) / LM_FILE
    file = read_file(path)
    if file.pretrained:
        raise UserError(f"{path}: points to {file.pretrained} and holds no language model")
    # The text width stands nowhere in xp.cfg but in the encoder's name.
    projection = file.tensors.get(f"{_TEXT_PROJECTION}.weight")
    if projection is not None and projection.ndim == 2:
        text_width = projection.shape[1]
    else:
        text_width = ModelConfig.text_width  # the check of the tensors reports the projection
    model = model_from_xp_cfg(file.xp_cfg, text_width, str(path))
    params = from_audiocraft(file.tensors, model, str(path), empty=True)
    return ImportedLM(model, params, file.xp_cfg, file.xp_cfg_text, file.dtype)


def audiocraft_pointer(codec: CodecSpec, origin: Origin | None) -> str | None:
    """The hub id that stands for a codec in AudioCraft's file; None where its weights do.

    Raises `UserError` for a codec that AudioCraft cannot express.
    """
    return (origin and origin.codec_pretrained) or codec_pointer(codec)


def write_audiocraft(
    directory: Path,
    lm_params: Mapping,
    model: ModelConfig,
    xp_cfg: Mapping | str,
    codec: CodecSpec,
    origin: Origin | None = None,
) -> None:
    """Writes `state_dict.bin` and `compression_state_dict.bin` into an existing folder.

    Args:
      directory: existing folder.
      lm_params, model: our parameters and their sizes.
      xp_cfg: from `make_xp_cfg`; of an imported model, the text that it came with.
      codec: the codec that made the tokens; a folder's weights are converted, a published codec
        is pointed to.
      origin: of an imported model: its tensors have the width that they had there, and its codec
        is pointed to or described as it was there.

    Raises:
      UserError: parameters that do not fit, or a codec that AudioCraft cannot express.
    """
    directory = Path(directory)
    lm_dtype = origin.lm_dtype if origin else "float32"
    write_weights(directory / LM_FILE, to_audiocraft(lm_params, model), xp_cfg, lm_dtype)
    if pointer := audiocraft_pointer(codec, origin):
        write_pointer(directory / CODEC_FILE, pointer)
        return
    settings, tensors = read_codec_folder(codec_folder(codec))
    tensors = codec_to_audiocraft(tensors, settings, codec.num_codebooks)
    if origin and origin.codec_xp_cfg:
        codec_settings, codec_dtype = origin.codec_xp_cfg, origin.codec_dtype
    else:
        codec_settings = make_codec_xp_cfg(settings, codec.num_codebooks)
        codec_dtype = "float32"
    write_weights(directory / CODEC_FILE, tensors, codec_settings, codec_dtype)

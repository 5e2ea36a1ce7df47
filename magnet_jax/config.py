"""Every setting of the project, with its default: frozen dataclasses, checks, JSON in and out.

A default stands here and nowhere else. `configs/*.py` hold deltas on `RunConfig`; a run keeps its
resolved config as `config.json`.
"""

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from magnet_jax.arguments import Between, check_fields
from magnet_jax.errors import UserError

ASSETS = Path(__file__).parent / "assets"
# Of models, as people call them; each is a class of the Python API.
KIND_NAMES = {"magnet": "MAGNeT", "musicgen": "MusicGen", "hybrid": "HybridMAGNeT"}
FullKernel = Literal["auto", "dense", "slices", "blocks", "splash", "cudnn"]
LocalKernel = Literal["auto", "dense", "slices", "blocks", "splash"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
LoraTarget = Literal["self", "cross", "mlp"]
Remat = Literal["none", "products", "attention", "full"]
# What steers sampling; the Python API and the commands hold their arguments to the same limits.
Steps = tuple[Annotated[int, Between(1, 1000)], ...]
Temperature = Annotated[float, Between(1e-6, 1e6)]
Guidance = Annotated[float, Between(-1000, 1000)]
NucleusMass = Annotated[float, Between(0, 1, above=True)]
TopK = Annotated[int, Between(0, 2**31 - 1)]
SpanLength = Annotated[int, Between(0, 30_000)]
PromptSeconds = Annotated[float, Between(0, 1e6, words="be at least 0, and at most 1000000")]
EMBEDDED = "embedded"  # names the codec and the text encoder that ship with the package


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _added(default: Any, **before: Any) -> Any:
    """A setting that files written before it was there lack.

    `from_dict` gives it `default`, or `before` where they were written by another law.
    """
    return dataclasses.field(default=default, metadata={"added": True} | before)


def _was(default: Any, old: dict[Any, Any]) -> Any:
    """A setting whose values had other names in older files, where `old` translates them."""
    return dataclasses.field(default=default, metadata={"was": old})


def _checked(hint: Any, value: Any, where: str) -> Any:
    """The value of a scalar setting, if it is of the type that the dataclass wants."""
    if typing.get_origin(hint) is Literal:
        known = typing.get_args(hint)
        _require(value in known, f"{where} must be one of {known}, not {value!r}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    _require(type(value) is hint, f"{where} must be of type {hint.__name__}, not {value!r}")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecSpec:
    """What tokens mean: the codec that made them. Tokenization writes it, all else checks it."""

    source: str
    """'embedded', folder or hub id of a transformers EncodecModel, or encodec_24khz, _48khz."""
    sha256: str
    """Hash of the codec's weights and settings; two codecs are the same if and only if it is."""
    sample_rate: int
    """Samples per second of the audio."""
    channels: int
    """Audio channels, 1 or 2."""
    frame_rate: float
    """Token frames per second."""
    num_codebooks: int
    """Codebooks kept, K."""
    codebook_size: int
    """Entries of one codebook, V."""
    interleaved: bool = _added(False)
    """Whether left and right were encoded by themselves, by a mono codec. The codebooks alternate:
    the first of the left, the first of the right, the second of the left, ...; K counts both."""

    @property
    def sides(self) -> int:
        """Into how many parts the channels and codebooks are split, each the codec's own."""
        return 2 if self.interleaved else 1

    @property
    def layout(self) -> str:
        """How the codebooks lie, in words."""
        return "interleaved stereo" if self.interleaved else "one stream of codebooks"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer (paper, section 4): MAGNeT, the same network made autoregressive, or both."""

    kind: Literal["magnet", "musicgen", "hybrid"] = "magnet"
    """magnet fills masked spans in parallel; musicgen predicts the next step from those before;
    hybrid does this for the first steps of a clip and that for the others (section 5.2)."""
    num_codebooks: int = 4
    """K; at most the data set's, whose further ones are left out."""
    codebook_size: int = 2048
    """V; must equal the data set's. Id V stands for 'masked'."""
    width: int = 1024
    """D, the model width."""
    num_heads: int = 16
    """N; the head size is width / num_heads."""
    num_layers: int = 24
    """L."""
    mlp_ratio: int = 4
    """The MLP is mlp_ratio * width wide."""
    text_width: int = 768
    """E, the width of the text encoder's states."""
    local_context: int = 5
    """Frames seen to each side by codebooks above the first (section 3.2); 0 is all frames."""
    first_context: int = _added(0)
    """magnet: frames seen to each side by the first codebook; 0 is all frames, as in the paper.
    A small model that sees all learns late to look at the nearest ones (docs/recipe.md)."""
    span_length: int = 3
    """Frames in a masked span; 3 frames are 60 ms at 50 Hz (section 3.1)."""
    delays: tuple[int, ...] = ()
    """musicgen and hybrid: frames by which each codebook lags behind (Copet et al. 2023, section
    2.2)."""
    attention_bias: bool = _added(False)
    """Add biases in the projections of self- and cross-attention."""
    mlp_bias: bool = _added(False)
    """Add biases in both layers of the MLP."""
    head_bias: bool = _added(False)
    """Add biases to the logits."""
    query_key_norm: bool = _added(False)
    """Layer-normalise queries and keys of self-attention, over the width of all heads."""
    cross_query_key_norm: bool = _added(False)
    """The same in cross-attention."""

    def __post_init__(self):
        for name in ("num_codebooks", "codebook_size", "width", "num_heads", "num_layers",
                     "mlp_ratio", "text_width", "span_length"):  # fmt: skip
            _require(getattr(self, name) >= 1, f"model.{name} must be at least 1")
        for name in ("local_context", "first_context"):
            _require(getattr(self, name) >= 0, f"model.{name} must not be negative")
        _require(
            self.kind == "magnet" or not self.first_context,
            f"model.first_context belongs to kind magnet, not {self.kind}",
        )
        _require(self.width >= 4, "model.width must be at least 4")
        _require(
            self.width % (2 * self.num_heads) == 0,
            f"model.width {self.width} must be an even multiple of model.num_heads "
            f"{self.num_heads}",
        )
        delays = self.delays
        if self.autoregressive:
            _require(
                len(delays) == self.num_codebooks
                and all(0 <= a <= b for a, b in zip((0, *delays), delays)),
                f"model.delays {delays} must hold one number a codebook "
                f"({self.num_codebooks}), from 0 up, none below the one before",
            )
            _require(delays[0] == 0, "model.delays must begin with 0")
        else:
            _require(not delays, "model.delays belongs to kinds musicgen and hybrid")

    @property
    def autoregressive(self) -> bool:
        """Whether it can generate step after step, its codebooks in the delay pattern."""
        return self.kind != "magnet"

    @property
    def parallel(self) -> bool:
        """Whether it can fill masked spans."""
        return self.kind != "musicgen"

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads

    @property
    def mask_id(self) -> int:
        return self.codebook_size

    def context(self, local: bool) -> int | None:
        """Frames seen to each side at the stages above 0 (`local`) or at 0; None is all frames."""
        return (self.local_context if local else self.first_context) or None

    @property
    def widest_context(self) -> int:
        """The most frames that a stage with a restricted context sees to each side; 0 is none."""
        return max(self.local_context, self.first_context)

    @property
    def null_text_adds_nothing(self) -> bool:
        """Whether cross-attention to no text adds exact zeros, so that it can be skipped.

        With biases it adds a vector. With norms alone it does not: they change what is attended to,
        but the values there stay zeros.
        """
        return not self.attention_bias


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The T5 text encoder."""

    source: str = EMBEDDED
    """'embedded', a folder (config.json, tokenizer.json, model.safetensors) or a hub id."""
    max_tokens: int = 64
    """S; longer texts are cut, shorter ones padded and masked."""
    finetune: bool = False
    """Train the text encoder along with the model (for encoders that were not pre-trained)."""
    trained: bool = _added(False)
    """Whether an earlier run has trained it, so that it is no longer `source`'s; --init-from sets
    this."""

    @property
    def changed(self) -> bool:
        """Whether its weights are others than those of `source`."""
        return self.finetune or self.trained

    def __post_init__(self):
        _require(self.max_tokens >= 2, "text.max_tokens must be at least 2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a training batch is made of."""

    path: str = ""
    """Folder that `python -m tokenization.job --out` wrote; every host may have its own copy."""
    segment_seconds: float = 30.0
    """Length of a training crop; shorter records are padded, the padding left out of the loss."""
    batch_size: int = 192
    """Clips in a global batch."""
    merge_text_p: float = 0.25
    """Probability that a description is merged with the other metadata (genre, key, ...)."""
    drop_description_p: float = 0.5
    """Given a merge: probability that the description itself is left out."""
    drop_field_p: float = 0.5
    """Given a merge: probability that each metadata field is left out."""
    word_dropout: float = 0.3
    """Probability that each word of the final text is left out."""
    shuffle: bool = True
    """Draw records in a new random order every epoch."""
    num_threads: int = 4
    """Reader threads per host."""
    prefetch: int = 16
    """Batches read ahead per host."""

    def __post_init__(self):
        for name in ("merge_text_p", "drop_description_p", "drop_field_p", "word_dropout"):
            _require(0 <= getattr(self, name) <= 1, f"data.{name} must lie in [0, 1]")
        _require(self.segment_seconds > 0, "data.segment_seconds must be positive")
        _require(self.batch_size >= 1, "data.batch_size must be at least 1")
        for name in ("num_threads", "prefetch"):
            _require(getattr(self, name) >= 0, f"data.{name} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, by itself or with D-Adaptation, after a linear warm-up (section 4)."""

    name: Literal["adamw", "dadam"] = _added("adamw")
    """dadam finds its own step size, which the learning rate multiplies (D-Adaptation)."""
    schedule: Literal["cosine", "inverse_sqrt", "constant"] = _added("cosine")
    """What follows the warm-up."""
    peak_lr: float = 3e-4
    """Learning rate after the warm-up; with dadam leave it near 1."""
    final_lr_ratio: float = 0.0
    """cosine: learning rate at the end of the schedule, as a share of peak_lr."""
    embed_lr_ratio: float = _added(1.0)
    """Learning rate of the tokens' embeddings, as a multiple of the others'. A batch has few of
    each token: in a training of thousands of steps, not hundreds of thousands, 30 to 60 learns
    much faster (docs/recipe.md)."""
    head_lr_ratio: float = _added(1.0)
    """The same of the heads, which turn states into logits."""
    warmup_steps: int = 4000
    """Linear warm-up."""
    schedule_steps: int = 1_000_000
    """cosine: steps after which it has reached its end, warm-up included."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled; on every parameter, as in the reference."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    ema_decay: float = 0.99
    """Decay of the averaged weights that evaluation, sampling and export use; each average counts
    all its weights to 1, so that none of the start is left. Adapters are not averaged."""
    ema_updates: int = _added(10, before=1)
    """Steps from one update of the averaged weights to the next: AudioCraft's 10. A run of
    thousands of steps is better averaged at every one of them, with 1."""
    d0: float = _added(1e-6)
    """dadam: first estimate of the step size, below any that could be right."""
    growth_rate: float = _added(0.0)
    """dadam: the estimate grows by at most this factor a step; 0 sets no limit."""

    def __post_init__(self):
        for name in ("name", "schedule"):
            hint = typing.get_type_hints(OptimizerConfig)[name]
            _checked(hint, getattr(self, name), f"optimizer.{name}")
        _require(self.peak_lr > 0, "optimizer.peak_lr must be positive")
        # The two optimizers' learning rates lie orders of magnitude apart; one taken over from the
        # other would train to nothing, or diverge.
        _require(
            self.name != "dadam" or self.peak_lr >= 0.01,
            f"optimizer.peak_lr {self.peak_lr:g} multiplies the step size that dadam finds: leave "
            "it near 1 (--optimizer.peak-lr 1)",
        )
        _require(
            self.name != "adamw" or self.peak_lr < 1,
            f"optimizer.peak_lr {self.peak_lr:g} is dadam's; adamw wants about 3e-4 "
            "(--optimizer.peak-lr 3e-4)",
        )
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps must not be negative")
        _require(
            self.schedule != "cosine" or self.warmup_steps < self.schedule_steps,
            "optimizer.warmup_steps must be below optimizer.schedule_steps",
        )
        _require(
            self.schedule != "inverse_sqrt" or self.warmup_steps >= 1,
            "optimizer.schedule inverse_sqrt needs optimizer.warmup_steps of at least 1",
        )
        _require(
            self.growth_rate == 0 or self.growth_rate > 1,
            "optimizer.growth_rate must be 0 or above 1",
        )
        for name in ("b1", "b2", "ema_decay"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name} must lie in [0, 1)")
        _require(self.ema_updates >= 1, "optimizer.ema_updates must be at least 1")
        for name in ("eps", "clip_norm", "d0", "embed_lr_ratio", "head_lr_ratio"):
            _require(getattr(self, name) > 0, f"optimizer.{name} must be positive")
        for name in ("weight_decay", "final_lr_ratio"):
            _require(getattr(self, name) >= 0, f"optimizer.{name} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters of the transformer's weights (Hu et al. 2021), see finetune.py."""

    rank: int = 0
    """Rank r of every adapter; 0 trains the weights themselves."""
    alpha: float = 16.0
    """Adapters count alpha / rank times (the paper, section 4.1)."""
    targets: tuple[LoraTarget, ...] = ("self", "cross", "mlp")
    """What is adapted: the four projections of self- or cross-attention, both layers of the MLP."""

    def __post_init__(self):
        _require(self.rank >= 0, "lora.rank must not be negative")
        _require(0 < self.alpha < math.inf, "lora.alpha must be positive")
        known = typing.get_args(LoraTarget)
        _require(
            len(self.targets) > 0
            and set(self.targets) <= set(known)
            and len(set(self.targets)) == len(self.targets),
            f"lora.targets must name some of {', '.join(known)}, each once, not "
            f"{list(self.targets)}",
        )

    @property
    def scale(self) -> float:
        """By what the product of an adapter's two factors is multiplied."""
        return self.alpha / self.rank if self.rank else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How text becomes tokens (section 3.3; defaults of section 4, text-to-music)."""

    steps: Steps = (20, 10, 10, 10)
    """Decoding steps of each codebook."""
    temperature: Temperature = 3.0
    """At the first step of a codebook."""
    anneal_temperature: bool = True
    """Bring the temperature down to 0 linearly over a codebook's steps."""
    top_p: NucleusMass = 0.9
    """Nucleus mass; 1 keeps every token."""
    top_k: TopK = 0
    """Sample among the k most probable tokens instead of the nucleus; 0 uses the nucleus."""
    max_guidance: Guidance = 10.0
    """Guidance coefficient where everything is masked (equation 6)."""
    min_guidance: Guidance = 1.0
    """Guidance coefficient where nothing is masked."""
    greedy: bool = False
    """Take the most probable token instead of sampling."""
    span_score: Literal["max", "prod"] = "max"
    """Score a span by its most probable token (the paper) or by the product of all."""
    span_arrangement: Literal["nonoverlap", "stride1"] = "nonoverlap"
    """Hide whole spans of a fixed grid, or any neighbouring frames (scored by their product)."""
    span_length: SpanLength = 0
    """Frames in a span; 0 is what the model was trained with."""
    whole_spans: bool = False
    """Cut a clip's end down to whole spans as AudioCraft does; stride1 has no grid to cut to."""

    def __post_init__(self):
        check_fields(self, "decode.")
        _require(len(self.steps) > 0, "decode.steps needs one number a codebook, and has none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RescoreConfig:
    """How a second model takes part in decoding (section 3.3 and Figure 4 of the paper)."""

    weight: Annotated[float, Between(0, 1)] = 0.5
    """Share of the rescorer's probabilities in the scores of spans: 0 is no rescorer, 1 the
    rescorer alone. It is the w of Figure 4; in equation 5 w is the model's own share, 1 - weight.
    The paper does not say which value it used."""
    guidance: Guidance = 1.0
    """Guidance coefficient of the rescorer; 1 is none, and half the work of any other."""

    def __post_init__(self):
        check_fields(self, "rescorer ")
        _require(
            self.guidance >= 0,
            f"rescorer guidance must be a number of at least 0, not {self.guidance:g}",
        )


Preset = Literal["paper", "paper-30s", "balanced", "draft"]
# Decoding steps of each codebook. Time goes with their sum.
PRESETS: dict[str, tuple[int, ...]] = {
    "paper": (20, 10, 10, 10),  # section 4
    "paper-30s": (60, 10, 10, 10),  # what AudioCraft's configs say for the 30 s models
    "balanced": (20, 5, 5, 5),  # Appendix G: FAD 0.61, as with the default
    "draft": (20, 1, 1, 1),  # Appendix G, Fig. 7: 8 % worse
}


def preset_steps(preset: str, num_codebooks: int) -> tuple[int, ...]:
    """The decoding steps that a preset names.

    Raises `UserError` for an unknown name, or a model that has not four codebooks.
    """
    _require(preset in PRESETS, f"preset must be one of {', '.join(PRESETS)}, not {preset!r}")
    steps = PRESETS[preset]
    _require(
        len(steps) == num_codebooks,
        f"presets are for {len(steps)} codebooks, and this model has {num_codebooks}: "
        "give the steps themselves",
    )
    return steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig:
    """How text becomes tokens one step after another; the defaults are MusicGen's."""

    temperature: Temperature = 1.0
    top_k: TopK = 250
    """Sample among the k most probable tokens; 0 uses the nucleus."""
    top_p: NucleusMass = 1.0
    """Nucleus mass where top_k is 0; 1 keeps every token."""
    guidance: Guidance = 3.0
    """Guidance coefficient; 1 is none."""
    greedy: bool = False
    """Take the most probable token instead of sampling."""

    def __post_init__(self):
        check_fields(self, "autoregressive.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """How a model of kind hybrid turns text into tokens: the first seconds one step after another,
    the rest of the clip in parallel (section 5.2)."""

    prompt_seconds: PromptSeconds = 1.0
    """Seconds generated autoregressively; 0 is none of the clip, its length or more all of it."""
    autoregressive: AutoregressiveConfig = AutoregressiveConfig()
    decode: DecodeConfig = DecodeConfig()

    def __post_init__(self):
        check_fields(self, "hybrid_")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """How attention is computed (kernels.py); it changes rounding alone."""

    full: FullKernel = "auto"
    """Attention over everything; auto goes by platform and length."""
    local: LocalKernel = "auto"
    """Attention over near frames; auto goes by platform and length."""
    local_block: int = 0
    """Queries a block of local attention in blocks or slices, at least twice the context; 0 goes
    by platform."""

    def __post_init__(self):
        check_fields(self, "kernels.")
        _require(self.local_block >= 0, "kernels.local_block must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingMeshConfig:
    """How many devices sampling uses; the clips are the same on any, up to rounding."""

    data: int = 1
    """Devices that split a batch; -1 takes what the others leave."""
    guidance: Literal[1, 2] = 1
    """2 computes the rows with text on one device and those without on another."""
    frames: int = 1
    """Devices that split the frames of a clip."""

    def __post_init__(self):
        check_fields(self, "mesh.")
        _require(self.data >= 1 or self.data == -1, "mesh.data must be positive, or -1")
        _require(self.frames >= 1, "mesh.frames must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each mesh axis gets; the product is the device count."""

    data: int = -1
    """Copies of the model that split the batch; -1 takes what the others leave."""
    fsdp: int = 0
    """Devices that split both the batch and the parameters; 0 takes the fewest with which a step
    fits into memory, as the compiler measures it."""
    tensor: int = 1
    """Devices that split heads and MLP."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run, whole."""

    objective: Literal["magnet", "hybrid"] = _added("magnet")
    """magnet predicts masked spans; hybrid predicts the next step as well, up to a random time
    (Appendix E), and makes a model of kind hybrid."""
    model: ModelConfig = ModelConfig()
    text: TextConfig = TextConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    decode: DecodeConfig = DecodeConfig()
    autoregressive: AutoregressiveConfig = AutoregressiveConfig()
    """How a model of kind musicgen, or the beginning of a clip of a hybrid, is sampled."""
    hybrid_prompt_seconds: float = _added(HybridConfig.prompt_seconds)
    """Of a hybrid: seconds of a sampled clip that are generated autoregressively."""
    mesh: MeshConfig = MeshConfig()
    out: str = ""
    """Folder of the run, on a file system that all hosts see, or gs://BUCKET/FOLDER; the same
    command with the same folder resumes it."""
    seed: int = 0
    """Seeds initialisation, data order, crops, masks and dropout."""
    steps: int = 1_000_000
    """Training ends after this many steps."""
    condition_dropout: float = 0.3
    """Probability that a clip is trained without its text."""
    stage_weights: tuple[float, ...] = _added(())
    """How often each codebook is trained, a number each; () is all alike, as in the paper."""
    compute_dtype: ComputeDtype = "auto"
    """Precision of matrix products; auto is bfloat16 on accelerators, float32 on CPU."""
    remat: Remat = _was("none", {True: "full", False: "none"})
    """What the backward pass computes again to save memory: nothing; all but matrix products; all
    but attention; or all, for about a third more time."""
    clips_per_device: int = _added(0)
    """Clips that a device computes at once; gradients of a larger share of the batch are summed up
    in parts, exactly. 0 is as many as fit."""
    kernels: KernelConfig = _added(KernelConfig())
    init_from: str = _added("")
    """Begin with the parameters of this run, export or imported AudioCraft checkpoint; a folder, or
    its gs:// URL."""
    init_codes: Literal["random", "codec"] = _added("random")
    """Embeddings and heads of a new model's tokens: random numbers, as in AudioCraft, or
    projections of the codec's own vectors, so that tokens that sound alike begin alike."""
    init_partial: bool = _added(False)
    """Let init_from match in part; what matches is listed, the rest is initialised."""
    lora: LoraConfig = _added(LoraConfig())
    log_every: int = 50
    """Steps between lines of TensorBoard scalars."""
    eval_every: int = 2000
    """Steps between validation losses; 0 never."""
    eval_batches: int = 8
    """Batches of a validation loss."""
    sample_every: int = 10_000
    """Steps between sample WAVs; 0 never."""
    sample_prompts: tuple[str, ...] = ()
    """Texts to sample from."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep_last: int = 3
    """Newest checkpoints to keep."""
    keep_every: int = _added(0)
    """Keep every checkpoint of a step that is a multiple of this; 0 keeps none for that."""
    keep_best: int = _added(0)
    """Checkpoints of lowest validation loss to keep; save_every must meet eval_every for it."""
    distributed: str = _added("auto")
    """Several processes: auto detects TPU pods, Slurm, Kubernetes and Open MPI; off runs alone;
    HOST:PORT,INDEX,COUNT names them."""
    profile: tuple[int, ...] = _added(())
    """First and last step to record a profile of, for TensorBoard or Perfetto."""
    wandb: str = _added("")
    """Project of Weights & Biases to log to as well (pip install wandb)."""

    def __post_init__(self):
        _checked(Remat, self.remat, "remat")
        _checked(typing.get_type_hints(RunConfig)["objective"], self.objective, "objective")
        _require(
            (self.objective == "hybrid") == (self.model.kind == "hybrid"),
            f"objective {self.objective} does not train a model of kind {self.model.kind}: "
            "--objective hybrid and --model.kind hybrid go together",
        )
        HybridConfig(prompt_seconds=self.hybrid_prompt_seconds)  # checks it
        weights, num_codebooks = self.stage_weights, self.model.num_codebooks
        _require(
            not weights
            or (
                len(weights) == num_codebooks and min(weights) >= 0 and 0 < sum(weights) < math.inf
            ),
            f"stage_weights {list(weights)} must be {num_codebooks} numbers, one a codebook, none "
            "negative and not all 0; or none (--stage-weights and nothing after it)",
        )
        _require(self.clips_per_device >= 0, "clips_per_device must not be negative")
        _require(self.keep_every >= 0, "keep_every must not be negative")
        _require(self.keep_best >= 0, "keep_best must not be negative")
        _require(
            not self.keep_best or (self.eval_every and not self.save_every % self.eval_every),
            f"keep_best needs a validation loss at every checkpoint: save_every {self.save_every} "
            f"must be a multiple of eval_every {self.eval_every}",
        )
        _require(
            not self.profile
            or (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]),
            f"profile {list(self.profile)} must be the first and the last step to record",
        )
        _require(
            not self.lora.rank or bool(self.init_from),
            "lora.rank trains adapters for another model: give it with --init-from",
        )
        _require(
            not (self.lora.rank and self.text.finetune),
            "lora trains adapters alone: leave text.finetune off (--no-text.finetune)",
        )
        ratios = (self.optimizer.embed_lr_ratio, self.optimizer.head_lr_ratio)
        _require(
            not self.lora.rank or ratios == (1, 1),
            "lora trains no embeddings or heads: --optimizer.embed-lr-ratio 1 "
            "--optimizer.head-lr-ratio 1",
        )
        _checked(typing.get_type_hints(RunConfig)["init_codes"], self.init_codes, "init_codes")
        _require(
            self.init_codes == "random" or not self.init_from,
            "init_codes codec is for a new model: leave it out, or init_from",
        )
        _require(
            not self.init_partial or bool(self.init_from),
            "init_partial says how to read init_from, which is not given",
        )
        _require(0 <= self.condition_dropout < 1, "condition_dropout must lie in [0, 1)")
        _require(self.steps >= 1, "steps must be at least 1")
        _require(0 <= self.seed < 2**31, "seed must lie between 0 and 2147483647")
        _require(self.save_every >= 1, "save_every must be at least 1")
        _require(self.keep_last >= 1, "keep_last must be at least 1")
        _require(self.eval_batches >= 1, "eval_batches must be at least 1")
        _require(self.eval_every >= 0, "eval_every must not be negative")
        _require(self.sample_every >= 0, "sample_every must not be negative")
        _require(self.log_every >= 1, "log_every must be at least 1")
        _require(
            self.model.kind == "musicgen" or len(self.decode.steps) == self.model.num_codebooks,
            f"decode.steps needs one number a codebook: {self.model.num_codebooks}, "
            f"not {len(self.decode.steps)}",
        )

    @property
    def sampling(self) -> "SamplingConfig":
        """How a model of this kind turns text into tokens."""
        if self.model.kind == "hybrid":
            return HybridConfig(
                prompt_seconds=self.hybrid_prompt_seconds,
                autoregressive=self.autoregressive,
                decode=self.decode,
            )
        return self.autoregressive if self.model.kind == "musicgen" else self.decode


SamplingConfig = DecodeConfig | AutoregressiveConfig | HybridConfig
SAMPLING_CONFIGS = {
    "magnet": DecodeConfig,
    "musicgen": AutoregressiveConfig,
    "hybrid": HybridConfig,
}


def with_sampling(config: RunConfig, sampling: SamplingConfig) -> RunConfig:
    """The run with other settings of `RunConfig.sampling`, of its model's kind."""
    if isinstance(sampling, HybridConfig):
        return dataclasses.replace(
            config,
            hybrid_prompt_seconds=sampling.prompt_seconds,
            autoregressive=sampling.autoregressive,
            decode=sampling.decode,
        )
    name = "autoregressive" if isinstance(sampling, AutoregressiveConfig) else "decode"
    return dataclasses.replace(config, **{name: sampling})


def with_hybrid_objective(config: RunConfig) -> RunConfig:
    """The same run with the hybrid objective; codebooks lag as the model says, or 0, 1, 2, ...

    A hybrid's first codebook sees all frames, whatever that of the model sees.
    """
    delays = config.model.delays or tuple(range(config.model.num_codebooks))
    model = dataclasses.replace(config.model, kind="hybrid", delays=delays, first_context=0)
    return dataclasses.replace(config, objective="hybrid", model=model)


def to_json(config: Any) -> str:
    """Any config of this module as JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_dict(cls: type, values: dict, where: str) -> Any:
    """The inverse of `dataclasses.asdict`; missing and unknown names raise `UserError`.

    Settings that were added later may be missing, and have their defaults.
    """
    _require(
        isinstance(values, dict), f"{where}: expected an object with the fields of {cls.__name__}"
    )
    _require(
        cls is not KernelConfig or "products" not in values,
        f"{where}: is of an earlier release, whose export of it can be loaded",
    )
    fields = dataclasses.fields(cls)
    added = {
        f.name: f.metadata.get("before", f.default)
        for f in fields
        if "added" in f.metadata and f.name not in values
    }
    for field in fields:
        old, value = field.metadata.get("was", {}), values.get(field.name)
        if isinstance(value, bool) and value in old:  # (1 == True, and was never meant)
            values = values | {field.name: old[value]}
    hints = typing.get_type_hints(cls)
    if problems := sorted(hints.keys() ^ (values.keys() | added.keys())):
        raise UserError(f"{where}: missing or unknown settings: {', '.join(problems)}")
    kwargs = dict(added)
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = from_dict(hint, value, f"{where}: {name}")
        elif typing.get_origin(hint) is tuple:
            _require(isinstance(value, list), f"{where}: {name} must be a list")
            (item, _) = typing.get_args(hint)
            value = tuple(_checked(item, element, f"{where}: {name}") for element in value)
        else:
            value = _checked(hint, value, f"{where}: {name}")
        kwargs[name] = value
    return cls(**kwargs)


def from_json(cls: type, path: Path) -> Any:
    """Reads what `to_json` wrote; a missing or damaged file raises `UserError`."""
    try:
        values = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    return from_dict(cls, values, str(path))

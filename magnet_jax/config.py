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

from tyro.conf import arg

from magnet_jax.arguments import RARE, Between, Seed, check, check_fields
from magnet_jax.errors import UserError

ASSETS = Path(__file__).parent / "assets"
# Of models, as people call them; each is a class of the Python API.
KIND_NAMES = {"magnet": "MAGNeT", "musicgen": "MusicGen", "hybrid": "HybridMAGNeT"}
FullKernel = Literal["auto", "dense", "slices", "blocks", "chunks", "splash", "cudnn"]
LocalKernel = Literal["auto", "dense", "slices", "blocks", "splash"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
LoraTarget = Literal["self", "cross", "mlp"]
Remat = Literal["auto", "none", "products", "mlp", "attention", "full"]
# What steers sampling; the Python API and the commands hold their arguments to the same limits.
Steps = tuple[Annotated[int, Between(1, 1000)], ...]
Temperature = Annotated[float, Between(1e-6, 1e6)]
Guidance = Annotated[float, Between(-1000, 1000)]
NucleusMass = Annotated[float, Between(0, 1, above=True)]
TopK = Annotated[int, Between(0, 2**31 - 1)]
SpanLength = Annotated[int, Between(0, 30_000)]
PromptSeconds = Annotated[float, Between(0, 1e6, words="be at least 0, and at most 1000000")]
# Numbers of any setting.
Whole = Annotated[int, Between(0, 2**31 - 1, words="be a whole number of at least 0")]
Count = Annotated[int, Between(1, 2**31 - 1, words="be a whole number of at least 1")]
Positive = Annotated[float, Between(0, math.inf, above=True, words="be a positive number")]
NotNegative = Annotated[float, Between(0, math.inf, words="be a number of at least 0")]
Share = Annotated[float, Between(0, 1)]
BelowOne = Annotated[float, Between(0, math.nextafter(1, 0), words="lie in [0, 1)")]
EMBEDDED = "embedded"  # names the codec and the text encoder that ship with the package


def require(*rules: tuple[Any, str]) -> None:
    """Raises `UserError` with the message of the first rule whose condition does not hold."""
    for condition, message in rules:
        if not condition:
            raise UserError(message)


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
    interleaved: bool = False
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
    num_codebooks: Count = 4
    """K, at most as many as the data set has; its further ones are left out."""
    codebook_size: Annotated[Count, RARE] = 2048
    """V; must equal the data set's. Id V stands for 'masked'."""
    width: Annotated[int, Between(4, 2**31 - 1, words="be a whole number of at least 4")] = 1024
    """D, the model width."""
    num_heads: Count = 16
    """N; the head size is width / num_heads."""
    num_layers: Count = 24
    """L, the layers of the transformer."""
    mlp_ratio: Annotated[Count, RARE] = 4
    """The MLP is mlp_ratio * width wide."""
    text_width: Count = 768
    """E, the width of the text encoder's states."""
    local_context: Whole = 5
    """Frames seen to each side by codebooks above the first (section 3.2); 0 is all frames."""
    first_context: Annotated[Whole, RARE] = 0
    """magnet: frames seen to each side by the first codebook; 0 is all frames, as in the paper.
    A small model that sees all learns late to look at the nearest ones (docs/recipe.md)."""
    span_length: Count = 3
    """Frames in a masked span; 3 frames are 60 ms at 50 Hz (section 3.1)."""
    delays: Annotated[tuple[int, ...], RARE] = ()
    """musicgen and hybrid: frames by which each codebook lags behind (Copet et al. 2023, section
    2.2)."""
    attention_bias: Annotated[bool, RARE] = False
    """Add biases in the projections of self- and cross-attention."""
    mlp_bias: Annotated[bool, RARE] = False
    """Add biases in both layers of the MLP."""
    head_bias: Annotated[bool, RARE] = False
    """Add biases to the logits."""
    query_key_norm: Annotated[bool, RARE] = False
    """Layer-normalise queries and keys of self-attention, over the width of all heads."""
    cross_query_key_norm: Annotated[bool, RARE] = False
    """Layer-normalise queries and keys of cross-attention, over the width of all heads."""

    def __post_init__(self):
        check_fields(self, "model.")
        delays = self.delays
        require(
            (
                self.kind == "magnet" or not self.first_context,
                f"model.first_context belongs to kind magnet, not {self.kind}",
            ),
            (
                self.width % (2 * self.num_heads) == 0,
                f"model.width {self.width} must be an even multiple of model.num_heads "
                f"{self.num_heads}",
            ),
            (self.autoregressive or not delays, "model.delays belongs to musicgen and hybrid"),
            (
                not self.autoregressive
                or (len(delays) == self.num_codebooks and delays == tuple(sorted(delays))),
                f"model.delays {delays} must hold one number a codebook "
                f"({self.num_codebooks}), from 0 up, none below the one before",
            ),
            (not delays or delays[0] == 0, "model.delays must begin with 0"),
        )

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
    max_tokens: Annotated[int, Between(2, 2**31 - 1, words="be a whole number of at least 2")] = 64
    """S, the tokens read of a text; longer texts are cut, shorter ones padded and masked."""
    finetune: bool = False
    """Train the text encoder along with the model (for encoders that were not pre-trained)."""
    trained: Annotated[bool, RARE] = False
    """Whether an earlier run has trained it, so that it is no longer `source`'s; --init-from sets
    this."""

    @property
    def changed(self) -> bool:
        """Whether its weights are others than those of `source`."""
        return self.finetune or self.trained

    def __post_init__(self):
        check_fields(self, "text.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a training batch is made of."""

    path: Annotated[str, arg(name="data", prefix_name=False, metavar="DIR")] = ""
    """Folder that `python -m tokenization.job --out` wrote; every host may have its own copy."""
    segment_seconds: Positive = 30.0
    """Length of a training crop; shorter records are padded, the padding left out of the loss."""
    batch_size: Annotated[Count, arg(prefix_name=False)] = 192
    """Clips in a global batch."""
    merge_text_p: Share = 0.25
    """Probability that a description is merged with the other metadata (genre, key, ...)."""
    drop_description_p: Share = 0.5
    """Probability that a merge leaves out the description itself."""
    drop_field_p: Share = 0.5
    """Probability that a merge leaves out a metadata field."""
    word_dropout: Share = 0.3
    """Probability that each word of the final text is left out."""
    shuffle: Annotated[bool, RARE] = True
    """Draw records in a new random order every epoch."""
    num_threads: Annotated[Whole, RARE] = 4
    """Reader threads per host."""
    prefetch: Annotated[Whole, RARE] = 16
    """Batches read ahead per host."""

    def __post_init__(self):
        check_fields(self, "data.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, by itself or with D-Adaptation, after a linear warm-up (section 4)."""

    name: Literal["adamw", "dadam"] = "adamw"
    """dadam finds its own step size, which the learning rate multiplies (D-Adaptation)."""
    schedule: Literal["cosine", "inverse_sqrt", "constant"] = "cosine"
    """What follows the warm-up."""
    peak_lr: Positive = 3e-4
    """Learning rate after the warm-up; with dadam leave it near 1."""
    final_lr_ratio: Annotated[NotNegative, RARE] = 0.0
    """cosine: learning rate at the end of the schedule, as a share of peak_lr."""
    embed_lr_ratio: Annotated[Positive, RARE] = 1.0
    """Learning rate of the tokens' embeddings, as a multiple of the others'. A batch has few of
    each token: in a training of thousands of steps, not hundreds of thousands, 30 to 60 learns
    much faster (docs/recipe.md)."""
    head_lr_ratio: Annotated[Positive, RARE] = 1.0
    """Learning rate of the heads, which turn states into logits, as a multiple of the others'."""
    warmup_steps: Whole = 4000
    """Steps of the linear warm-up."""
    schedule_steps: Count = 1_000_000
    """cosine: steps after which it has reached its end, warm-up included."""
    b1: Annotated[BelowOne, RARE] = 0.9
    """Decay of the average of gradients."""
    b2: Annotated[BelowOne, RARE] = 0.95
    """Decay of the average of squared gradients."""
    eps: Annotated[Positive, RARE] = 1e-8
    """Number that keeps the division by the average of squares finite."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of every parameter, as in the reference."""
    clip_norm: Positive = 1.0
    """Gradients are scaled down to this global norm."""
    ema_decay: BelowOne = 0.99
    """Decay of the averaged weights that evaluation, sampling and export use; each average counts
    all its weights to 1, so that none of the start is left. Adapters are not averaged."""
    ema_updates: Annotated[Count, RARE] = 10
    """Steps from one update of the averaged weights to the next: AudioCraft's 10. A run of
    thousands of steps is better averaged at every one of them, with 1."""
    d0: Annotated[Positive, RARE] = 1e-6
    """dadam: first estimate of the step size, below any that could be right."""
    growth_rate: Annotated[NotNegative, RARE] = 0.0
    """dadam: the estimate grows by at most this factor a step; 0 sets no limit."""

    def __post_init__(self):
        check_fields(self, "optimizer.")
        # The two optimizers' learning rates lie orders of magnitude apart; one taken over from the
        # other would train to nothing, or diverge.
        require(
            (
                self.name != "dadam" or self.peak_lr >= 0.01,
                f"optimizer.peak_lr {self.peak_lr:g} multiplies the step size that dadam finds: "
                "leave it near 1 (--optimizer.peak-lr 1)",
            ),
            (
                self.name != "adamw" or self.peak_lr < 1,
                f"optimizer.peak_lr {self.peak_lr:g} is dadam's; adamw wants about 3e-4 "
                "(--optimizer.peak-lr 3e-4)",
            ),
            (
                self.schedule != "cosine" or self.warmup_steps < self.schedule_steps,
                "optimizer.warmup_steps must be below optimizer.schedule_steps",
            ),
            (
                self.schedule != "inverse_sqrt" or self.warmup_steps >= 1,
                "optimizer.schedule inverse_sqrt needs optimizer.warmup_steps of at least 1",
            ),
            (not 0 < self.growth_rate <= 1, "optimizer.growth_rate must be 0 or above 1"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters of the transformer's weights (Hu et al. 2021), see model/lora.py."""

    rank: Whole = 0
    """Rank r of every adapter; 0 trains the weights themselves."""
    alpha: Positive = 16.0
    """Adapters count alpha / rank times (the paper, section 4.1)."""
    targets: Annotated[tuple[LoraTarget, ...], RARE] = ("self", "cross", "mlp")
    """What is adapted: the four projections of self- or cross-attention, both layers of the MLP."""

    def __post_init__(self):
        check_fields(self, "lora.")
        once = self.targets and len(set(self.targets)) == len(self.targets)
        require((once, f"lora.targets must name each target once, not {list(self.targets)}"))

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
    """Temperature at the first step of a codebook."""
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
    span_score: Annotated[Literal["max", "prod"], RARE] = "max"
    """Score a span by its most probable token (the paper) or by the product of all."""
    span_arrangement: Annotated[Literal["nonoverlap", "stride1"], RARE] = "nonoverlap"
    """Hide whole spans of a fixed grid, or any neighbouring frames (scored by their product)."""
    span_length: SpanLength = 0
    """Frames in a span; 0 is what the model was trained with."""
    whole_spans: Annotated[bool, RARE] = False
    """Cut a clip's end down to whole spans as AudioCraft does; stride1 has no grid to cut to."""
    order: Literal["confidence", "random", "halton"] = "confidence"
    """Keep the spans first that the model is surest of, as in the paper, or in a random order, or
    always the span that lies farthest from those that are kept already."""

    def __post_init__(self):
        check_fields(self, "decode.")
        require((self.steps, "decode.steps needs one number a codebook, and has none"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditConfig:
    """How a part of a clip is decoded, given the rest of it."""

    above: Literal["hidden", "shown"] = "hidden"
    """Hide the codebooks above the one that is predicted everywhere, as in training, or show what
    is given there, as AudioCraft does when it goes on from a prompt."""
    anneal: Literal["rate", "count"] = "rate"
    """Take guidance and temperature from the share of the whole clip that is hidden, or begin with
    those of a blank clip however little is hidden."""
    steps: Literal["auto", "all"] = "auto"
    """Fewer steps for fewer spans, or as many as for a whole clip."""
    edge: Literal["outside", "inside"] = "outside"
    """Make all of a region new, and change a little around it as well; or change no sample outside
    the region, and make a little less of it new."""
    fade: Annotated[float, Between(0, 10)] = 0.03
    """Seconds of the cross-fades between an edit and a file that was not made here."""
    side: Literal["fade", "keep"] = "fade"
    """What becomes of the difference between channels where the codec is mono: take it away within
    a region, or keep it."""
    context: Positive = 4.0
    """Seconds of a clip that are heard while it is made longer, at most three quarters of what the
    model hears at once."""
    replay: Share | None = None
    """Say a clip once more under another text, with the chance that made it (`choose.replay`); the
    share of tokens that are drawn anew."""

    ring: bool = False
    """Whether the clip's last frame leads to its first, as a loop's does (`decode/ring.py`)."""

    def __post_init__(self):
        check_fields(self, "edit.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongConfig:
    """How a MAGNeT makes clips that are longer than what it hears at once (docs/long.md)."""

    mode: Literal["sliding", "anchors", "joint"] = "sliding"
    """sliding makes a window after another, each of which goes on from what is there. anchors makes
    windows that lie apart, at once, then what is between them, at once. joint makes windows that
    overlap by half, all at once, and averages what they say."""
    lead: Annotated[float, Between(0, 0.7), RARE] = 0.3
    """Share of a window of anchors that is the end of the first one, so that all of them go on from
    it; 0 has them know nothing of each other."""
    anneal: Annotated[Literal["count", "rate"], RARE] = "count"
    """Guidance and temperature of windows of which a part is given, as of --edit.anneal."""
    steps: Annotated[Literal["all", "auto"], RARE] = "all"
    """Steps of such windows: as many as of others, or fewer as fewer spans are made."""

    def __post_init__(self):
        check_fields(self, "long.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RescoreConfig:
    """How a second model takes part in decoding (section 3.3 and Figure 4 of the paper)."""

    weight: Share = 0.5
    """Share of the rescorer's probabilities in the scores of spans: 0 is no rescorer, 1 the
    rescorer alone. It is the w of Figure 4; in equation 5 w is the model's own share, 1 - weight.
    The paper does not say which value it used."""
    guidance: Annotated[float, Between(0, 1000)] = 1.0
    """Guidance coefficient of the rescorer; 1 is none, and half the work of any other."""

    def __post_init__(self):
        check_fields(self, "rescorer ")


Preset = Literal["paper", "paper-30s", "balanced", "draft"]
# Decoding steps of the first codebook, and of each further one.
PRESETS: dict[str, tuple[int, int]] = {
    "paper": (20, 10),  # section 4
    "paper-30s": (60, 10),  # what AudioCraft's configs say for the 30 s models
    "balanced": (20, 5),  # Appendix G: FAD 0.61, as with the default
    "draft": (20, 1),  # Appendix G, Fig. 7: 8 % worse
}


def preset_steps(preset: str, num_codebooks: int) -> tuple[int, ...]:
    """The decoding steps of each codebook that a preset names.

    The paper's models have four codebooks. Raises `UserError` for an unknown name.
    """
    first, above = PRESETS[check(Preset, preset, "preset")]
    return (first, *[above] * (num_codebooks - 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig:
    """How text becomes tokens one step after another; the defaults are MusicGen's."""

    temperature: Temperature = 1.0
    """Temperature of the sampling."""
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
        check_fields(self, "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """How attention is computed (kernels.py); it changes rounding alone."""

    full: FullKernel = "auto"
    """Attention over everything; auto goes by platform and length."""
    local: LocalKernel = "auto"
    """Attention over near frames; auto goes by platform."""
    local_block: Whole = 0
    """Queries a block of local attention in blocks or slices, at least twice the context; 0 goes
    by platform."""

    def __post_init__(self):
        check_fields(self, "kernels.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingMeshConfig:
    """How many devices sampling uses; the clips are the same on any, up to rounding."""

    data: int = 1
    """Devices that split a batch; -1 takes what the others leave."""
    guidance: Literal[1, 2] = 1
    """2 computes the rows with text on one device and those without on another."""
    frames: Count = 1
    """Devices that split the frames of a clip."""

    def __post_init__(self):
        check_fields(self, "mesh.")
        require((self.data >= 1 or self.data == -1, "mesh.data must be positive, or -1"))


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

    objective: Literal["magnet", "hybrid"] = "magnet"
    """magnet predicts masked spans; hybrid predicts the next step as well, up to a random time
    (Appendix E), and makes a model of kind hybrid."""
    model: ModelConfig = ModelConfig()
    text: TextConfig = TextConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    decode: DecodeConfig = DecodeConfig()
    autoregressive: AutoregressiveConfig = AutoregressiveConfig()
    """How a model of kind musicgen, or the beginning of a clip of a hybrid, is sampled."""
    prompt_seconds: PromptSeconds = HybridConfig.prompt_seconds
    """Of a hybrid: seconds of a sampled clip that are generated autoregressively."""
    mesh: MeshConfig = MeshConfig()
    out: str = ""
    """Folder of the run, on a file system that all hosts see, or gs://BUCKET/FOLDER; the same
    command with the same folder resumes it."""
    seed: Seed = 0
    """Seeds initialisation, data order, crops, masks and dropout."""
    steps: Count = 1_000_000
    """Training ends after this many steps."""
    condition_dropout: BelowOne = 0.3
    """Probability that a clip is trained without its text."""
    stage_weights: Annotated[tuple[NotNegative, ...], RARE] = ()
    """How often each codebook is trained, a number each; () is all alike, as in the paper."""
    compute_dtype: ComputeDtype = "auto"
    """Precision of matrix products; auto is bfloat16 on accelerators, float32 on CPU."""
    remat: Remat = "auto"
    """What the backward pass computes again to save memory: nothing; all but products and
    attention; the MLP's first product as well; all but attention; or all, for about a third more
    time. auto is the least that fits, as the compiler measures it, and on CPUs nothing."""
    clips_per_device: Annotated[Whole, RARE] = 0
    """Clips that a device computes at once; gradients of a larger share of the batch are summed up
    in parts, exactly. 0 is as many as fit."""
    kernels: Annotated[KernelConfig, RARE] = KernelConfig()
    init_from: str = ""
    """Begin with the parameters of this run, export or imported AudioCraft checkpoint; a folder, or
    its gs:// URL."""
    init_codes: Annotated[Literal["random", "codec"], RARE] = "random"
    """Embeddings and heads of a new model's tokens: random numbers, as in AudioCraft, or
    projections of the codec's own vectors, so that tokens that sound alike begin alike."""
    init_partial: Annotated[bool, RARE] = False
    """Let init_from match in part; what matches is listed, the rest is initialised."""
    lora: LoraConfig = LoraConfig()
    log_every: Count = 50
    """Steps between lines of TensorBoard scalars."""
    eval_every: Whole = 2000
    """Steps between validation losses; 0 never."""
    eval_batches: Count = 8
    """Batches of a validation loss."""
    sample_every: Whole = 10_000
    """Steps between sample WAVs; 0 never."""
    sample_prompts: tuple[str, ...] = ()
    """Texts to sample from."""
    save_every: Count = 1000
    """Steps between checkpoints."""
    keep_last: Count = 3
    """Newest checkpoints to keep."""
    keep_every: Annotated[Whole, RARE] = 0
    """Keep every checkpoint of a step that is a multiple of this; 0 keeps none for that."""
    keep_best: Annotated[Whole, RARE] = 0
    """Checkpoints of lowest validation loss to keep; save_every must meet eval_every for it."""
    distributed: str = "auto"
    """Several processes: auto lets JAX find those of TPU pods, Slurm, Open MPI and Kubernetes; off
    runs alone; HOST:PORT,INDEX,COUNT names them."""
    profile: Annotated[tuple[int, ...], RARE] = ()
    """First and last step to record a profile of, for TensorBoard or Perfetto."""
    wandb: str = ""
    """Project of Weights & Biases to log to as well (pip install wandb)."""

    def __post_init__(self):
        check_fields(self, "")
        weights, num_codebooks, profile = self.stage_weights, self.model.num_codebooks, self.profile
        ratios = (self.optimizer.embed_lr_ratio, self.optimizer.head_lr_ratio)
        require(
            (
                (self.objective == "hybrid") == (self.model.kind == "hybrid"),
                f"objective {self.objective} does not train a model of kind {self.model.kind}: "
                "--objective hybrid and --model.kind hybrid go together",
            ),
            (
                not weights or (len(weights) == num_codebooks and 0 < sum(weights) < math.inf),
                f"stage_weights {list(weights)} must be {num_codebooks} numbers, one a codebook, "
                "and not all 0; or none (--stage-weights and nothing after it)",
            ),
            (
                not self.keep_best or (self.eval_every and not self.save_every % self.eval_every),
                f"keep_best needs a validation loss at every checkpoint: save_every "
                f"{self.save_every} must be a multiple of eval_every {self.eval_every}",
            ),
            (
                not profile or (len(profile) == 2 and 1 <= profile[0] <= profile[1]),
                f"profile {list(profile)} must be the first and the last step to record",
            ),
            (
                not self.lora.rank or self.init_from,
                "lora.rank trains adapters for another model: give it with --init-from",
            ),
            (
                not (self.lora.rank and self.text.finetune),
                "lora trains adapters alone: leave text.finetune off (--text.no-finetune)",
            ),
            (
                not self.lora.rank or ratios == (1, 1),
                "lora trains no embeddings or heads: --optimizer.embed-lr-ratio 1 "
                "--optimizer.head-lr-ratio 1",
            ),
            (
                self.init_codes == "random" or not self.init_from,
                "init_codes codec is for a new model: leave it out, or init_from",
            ),
            (
                not self.init_partial or self.init_from,
                "init_partial says how to read init_from, which is not given",
            ),
            (
                self.model.kind == "musicgen" or len(self.decode.steps) == num_codebooks,
                f"decode.steps needs one number a codebook: {num_codebooks}, "
                f"not {len(self.decode.steps)}",
            ),
        )

    @property
    def sampling(self) -> "SamplingConfig":
        """How a model of this kind turns text into tokens."""
        if self.model.kind == "hybrid":
            return HybridConfig(
                prompt_seconds=self.prompt_seconds,
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


def decode_of(sampling: SamplingConfig) -> DecodeConfig | AutoregressiveConfig:
    """The settings, of a hybrid those by which it completes a clip."""
    return sampling.decode if isinstance(sampling, HybridConfig) else sampling


def with_decode(sampling: SamplingConfig, decode: DecodeConfig) -> SamplingConfig:
    """The settings with another `decode_of`."""
    if isinstance(sampling, HybridConfig):
        return dataclasses.replace(sampling, decode=decode)
    return decode


def replaced(settings: Any, **given) -> Any:
    """The settings with what was given; None is what was not."""
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(settings, **given)


def with_sampling(config: RunConfig, sampling: SamplingConfig) -> RunConfig:
    """The run with other settings of `RunConfig.sampling`, of its model's kind."""
    if isinstance(sampling, HybridConfig):
        return dataclasses.replace(config, **vars(sampling))
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


def from_dict(cls: type, values: Any, where: str) -> Any:
    """The inverse of `dataclasses.asdict`; what is missing has its default.

    Raises `UserError`, which names the setting, for one that is unknown, is missing and has no
    default, or has a value of another type.
    """
    require((isinstance(values, dict), f"{where}: expected the fields of {cls.__name__}"))
    fields = dataclasses.fields(cls)
    needed = {f.name for f in fields if f.default is dataclasses.MISSING}
    unknown, missing = values.keys() - {f.name for f in fields}, needed - values.keys()
    require(
        (not unknown, f"{where}: unknown settings: {', '.join(sorted(unknown))}"),
        (not missing, f"{where}: missing settings: {', '.join(sorted(missing))}"),
    )
    hints = typing.get_type_hints(cls, include_extras=True)
    return cls(**{name: _from_json(hints[name], value, f"{where}: {name}")
                  for name, value in values.items()})  # fmt: skip


def _from_json(hint: Any, value: Any, where: str) -> Any:
    kind = getattr(hint, "__origin__", hint)  # of Annotated
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, where)
    return check(hint, value, where)


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

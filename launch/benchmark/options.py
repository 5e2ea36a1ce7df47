"""The options of `launch.benchmark`, which are read before JAX is loaded."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from launch.benchmark import report
from magnet_jax.arguments import Between, Count, Seconds, Seed, check_fields
from magnet_jax.config import (
    ASSETS,
    EMBEDDED,
    ComputeDtype,
    DecodeConfig,
    Preset,
    RescoreConfig,
    preset_steps,
)
from magnet_jax.errors import UserError
from magnet_jax.io.files import PICTURES, check_new_file
from tokenization.settings import Job

Minutes = Annotated[float, Between(0.1, 600)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loader:
    """Frames a second: the loader alone, and a train step alone on batches in memory."""

    data: Path
    """A data set of `python -m tokenization.job`."""
    config: str = "demo"
    """Config of the train step."""
    batches: Annotated[int, Between(1, 1_000_000)] = 200
    """Batches to load."""
    steps: Annotated[int, Between(1, 1_000_000)] = 20
    """Steps to run, after those that compile."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """Seconds and FLOPs a clip for several batch sizes, by part, and the programs compiled."""

    checkpoint: str | Path | None = None
    """Folder of a training run, an export or an AudioCraft checkpoint; or --model."""
    model: Literal["small", "medium"] | None = None
    """A model of a published size with random weights, made in memory; or --checkpoint."""
    seconds: Seconds | None = None
    """Length of a clip, cut down to whole spans; by default what the model was trained on."""
    batch_sizes: tuple[Count, ...] = (1, 2, 4)
    """Clips at once."""
    repeats: Annotated[int, Between(1, 10_000)] = 3
    """Calls timed a batch size, of which the fastest counts; the first without its compilation."""
    steps: Annotated[tuple[Count, ...] | None, tyro.conf.arg(name="decode.steps")] = None
    """Decoding steps of each codebook, by default the model's own."""
    preset: Preset | None = None
    """Decoding steps by name: paper, paper-30s, balanced or draft."""
    compute_dtype: ComputeDtype | None = None
    """Precision of the products, by default the model's own."""
    parts: bool = True
    """Time the parts of a call at the first batch size, which compiles one more program."""
    rescorer: str | Path | None = None
    """Also time rescoring by this model at the first batch size, against its own passes alone."""
    rescorer_weight: float = RescoreConfig.weight
    """The rescorer's share of the scores, as for launch.sample; above 0, it changes no cost."""
    rescorer_guidance: float = RescoreConfig.guidance
    """Guidance coefficient of the rescorer; 1 is none, and half the work of any other."""
    peer: bool = False
    """Also time the PyTorch peer, on the same weights, text states and schedule."""
    peer_device: str = "cpu"
    """PyTorch device of the peer."""
    peer_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the peer."""
    peer_steps: Count | None = None
    """Cut the schedule to so many steps a codebook, for both alike."""
    vs: str | None = None
    """Another command to time: its wall seconds, or the "seconds" of a line of JSON it prints."""
    json: Path | None = None
    """File for all figures."""

    def __post_init__(self):
        check_fields(self, "--")
        if not self.batch_sizes:
            raise UserError("--batch-sizes: give one at least")
        if self.steps and self.preset:
            raise UserError("give --decode.steps or --preset, not both")
        if not self.peer and (self.peer_device, self.peer_dtype) != ("cpu", "float32"):
            raise UserError("--peer-device and --peer-dtype need --peer")
        rescoring = RescoreConfig(weight=self.rescorer_weight, guidance=self.rescorer_guidance)
        if self.rescorer is None and rescoring != RescoreConfig():
            raise UserError("--rescorer-weight and --rescorer-guidance need --rescorer")
        if self.rescorer_weight == 0:
            raise UserError("--rescorer-weight 0 is no rescorer: there is nothing to time")
        if self.peer_steps is not None and not self.peer:
            raise UserError("--peer-steps needs --peer")
        report.check_parent("--json", self.json)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoregressive:
    """Seconds from texts to tokens of a MusicGen, greedy and guided, beside transformers' own."""

    checkpoint: str | Path | None = None
    """Folder of a MusicGen; or --model."""
    model: Literal["small", "medium"] | None = None
    """A model of a published size with random weights, made in memory; or --checkpoint."""
    seconds: Annotated[float, Between(0, 30, above=True)] = 2.0
    """Length of a clip."""
    batch_sizes: tuple[Count, ...] = (1,)
    """Clips at once."""
    repeats: Annotated[int, Between(1, 10_000)] = 3
    """Calls timed a batch size, of which the fastest counts."""
    peer: bool = True
    """Time transformers' MusicGen as well, in turns with ours."""
    json: Path | None = None
    """File for all figures."""

    def __post_init__(self):
        check_fields(self, "--")
        if not self.batch_sizes:
            raise UserError("--batch-sizes: give one at least")
        report.check_parent("--json", self.json)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """A run's share of the fastest matrix product, and the compile time of a step by depth."""

    data: Path
    """A data set of `python -m tokenization.job`."""
    config: str = "demo"
    """Config of the run; its sizes, clip length, batch and precision can be changed below."""
    width: int | None = None
    layers: int | None = None
    seconds: float | None = None
    batch_size: int | None = None
    compute_dtype: ComputeDtype | None = None
    steps: Annotated[int, Between(1, 1_000_000)] = 24
    """Steps to measure, after as many that compile and warm up."""
    json: Path | None = None
    """File for the figures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenize:
    """Seconds of audio a second: the codec alone on full batches, and the whole job on files."""

    codec: str = EMBEDDED
    """As in tokenization.job."""
    tracks: Count = 8
    """Files to make and tokenize: FLAC, 44.1 kHz, stereo, noise that swells."""
    track_minutes: Minutes = 3.0
    batch_size: Count = Job.batch_size
    window_seconds: Annotated[float, Between(0.1, 600)] = Job.window_seconds
    workers: Count = 1
    """More than 1 also times the job with so many, start-up included, against one."""
    cores_per_worker: Count | None = None
    """CPU cores that each of these workers may use (Linux); by default all of them."""
    whole: Path | None = None
    """Folder of audio: also compares its files, end to end, encoded in windows and at once."""
    whole_minutes: Minutes = 10.0
    """Of that audio, from its start again where it is shorter."""
    json: Path | None = None
    """File for the figures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tradeoff:
    """Latency against prompt length, steps a codebook, and rescoring: the paper's Table 3, Fig. 2c
    and Fig. 7."""

    checkpoint: str | Path | None = None
    """A MAGNeT, or a hybrid for the prompts as well, as for launch.sample; or --model."""
    model: Literal["small", "medium"] | None = None
    """A hybrid of a published size with random weights, made in memory; or --checkpoint."""
    seconds: Seconds | None = None
    """Length of a clip, cut down to whole spans; by default what the model was trained on."""
    batch_size: Count = 1
    """Clips at once."""
    repeats: Annotated[int, Between(1, 10_000)] = 3
    """Calls timed for each point, of which the fastest counts; the first compiles beforehand."""
    prompt_seconds: tuple[Annotated[float, Between(0, 600)], ...] | None = None
    """Of a hybrid: lengths of its autoregressive beginning, by default 0, 0.5, 1, 2 and 5; the
    whole clip comes in addition."""
    first_steps: tuple[Count, ...] = (5, 10, 20, 40)
    """Steps of the first codebook; the others have theirs from the model."""
    other_steps: tuple[Count, ...] = (1, 2, 5, 10)
    """Steps of each of the other codebooks; the first has its from the model."""
    rescorer: str | Path | None = None
    """A second model, as for launch.sample: also with and without it."""
    rescorer_weight: float = RescoreConfig.weight
    """The rescorer's share of the scores, as for launch.sample."""
    rescorer_guidance: float = RescoreConfig.guidance
    """Guidance coefficient of the rescorer; 1 is none, and half the work of any other."""
    json: Path | None = None
    """File for the figures, each with the options of launch.sample that do the same."""

    def __post_init__(self):
        check_fields(self, "--")
        rescoring = RescoreConfig(weight=self.rescorer_weight, guidance=self.rescorer_guidance)
        if self.rescorer is None and rescoring != RescoreConfig():
            raise UserError("--rescorer-weight and --rescorer-guidance need --rescorer")
        if self.rescorer_weight == 0:
            raise UserError("--rescorer-weight 0 is no rescorer: there is nothing to compare")
        report.check_parent("--json", self.json)


LONG_TEXTS = (
    "A slow chorale on the organ",
    "A calm, gentle melody played on the harp",
    "A lively jig played on the violin",
    "A slow waltz played on the piano",
    "A fast melody in D major played on the flute",
    "A sad madrigal sung by a choir",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Long:
    """Clips longer than the window, made in each way: cost, seams, and drift from first to last."""

    checkpoint: str | Path = "demo"
    """A MAGNeT, as for launch.sample."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")] = (
        LONG_TEXTS
    )
    """Texts, one after another."""
    clips: Count = 6
    """How many, each of them made in every way."""
    seconds: Seconds = 60.0
    """Length of a clip."""
    ways: tuple[str, ...] = ("sliding", "sliding, rate", "anchors", "anchors, lead 0", "joint")
    """What is compared: these, and windows that know nothing of each other."""
    steps: Annotated[tuple[Count, ...] | None, tyro.conf.arg(name="decode.steps")] = None
    """Decoding steps of each codebook, by default those of the preset balanced."""
    seed: Seed = 0
    json: Path | None = None
    """File for all figures, written anew after each clip."""

    def __post_init__(self):
        check_fields(self, "--")
        unknown = set(self.ways) - set(type(self).ways)
        if unknown or not self.ways:
            known = "; ".join(type(self).ways)
            raise UserError(f"--ways must be some of: {known}; not {sorted(unknown) or 'none'}")
        if not self.prompt:
            raise UserError("--prompt: give one at least")
        report.check_parent("--json", self.json)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Editing:
    """Holes in real clips decoded in every way, wrong tokens found, and the cost of an edit."""

    checkpoint: str | Path = "demo"
    """A MAGNeT, as for launch.sample."""
    audio: Path = ASSETS / "clips"
    """Folder of sound files with a .json each, whose description is the text."""
    clips: int = 4
    """How many of those that fill the model's window."""
    holes: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Seconds of a hole, at a quarter and at three quarters of the window."""
    steps: tuple[Count, ...] | None = None
    """Decoding steps of each codebook, by default those of the preset balanced."""
    seed: int = 0
    """Of the decoding, of the planted errors and of the intervals."""
    json: Path | None = None
    """File for all figures."""
    picture: Path | None = None
    """PNG, PDF or SVG file for a clip with planted errors, before and after its repair."""

    def __post_init__(self):
        check_fields(self, "--")
        if self.clips < 2:
            raise UserError("--clips must be at least 2: a clip is read within another's sides")
        if not self.holes or not all(0 < seconds < 1e4 for seconds in self.holes):
            raise UserError("--holes must be seconds above 0")
        report.check_parent("--json", self.json)
        check_new_file("--picture", self.picture, PICTURES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """The server's clips in a time against those of batches without it, and of single requests."""

    checkpoint: str | Path = "demo"
    """The model, as for launch.sample."""
    seconds: Annotated[float, Between(0, 600, above=True)] = 2.0
    """Length of a clip."""
    steps: tuple[Count, ...] | None = None
    """Decoding steps of each codebook, by default those of the preset balanced."""
    requests: Count = 48
    """Clips of each way, in each repeat."""
    concurrency: Count = 8
    """Requests at a time, and clips in a batch."""
    repeats: Count = 3
    """How often all ways are measured, in turn."""

    def __post_init__(self):
        check_fields(self, "--")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loops:
    """How well loops close beside clips of the same texts played twice, and the cost of one."""

    checkpoint: str | Path = "demo"
    """A MAGNeT, as for launch.sample."""
    clips: Annotated[int, Between(2, 1000)] = 30
    """How many of each."""
    bpm: Annotated[float, Between(20, 400)] = 120.0
    """Quarters a minute."""
    bars: Count = 2
    """Of a loop."""
    steps: tuple[Count, ...] | None = None
    """Decoding steps of each codebook, by default those of the preset balanced."""
    seed: int = 0
    """Of the decoding and of the intervals."""
    json: Path | None = None
    """File for all figures."""

    def __post_init__(self):
        check_fields(self, "--")
        report.check_parent("--json", self.json)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """Whether blends, texts over time and negative texts do what they say, and what they cost."""

    checkpoint: str | Path = "demo"
    """A MAGNeT, as for launch.sample."""
    texts: tuple[str, str] = (
        "A moderate melody played on the harpsichord",
        "A moderate melody played on the flute",
    )
    """Two texts that name a tag of the tagger each."""
    neither: str = "A moderate melody"
    """A text that names neither."""
    shares: tuple[Annotated[float, Between(0, 1)], ...] = (0.25, 0.5, 0.75)
    """Shares of the second text in blends, rising."""
    clips: Annotated[Count, Between(4, 1024)] = 16
    """Clips of each row, and of each text for the probe."""
    seconds: Annotated[float, Between(6, 600)] = 6.0
    """Length of a clip; a text over time changes in its middle."""
    fade: Annotated[float, Between(0, 60)] = 0.5
    """Seconds in which it does."""
    steps: tuple[Count, ...] | None = None
    """Decoding steps of each codebook, by default those of the preset balanced."""
    batch_size: Count = 8
    """Clips at once."""
    seed: Seed = 0
    """Of the clips and of the intervals."""
    costs: bool = True
    """Count FLOPs as well, which compiles a few programs more."""
    json: Path | None = None
    """File for all figures."""

    def __post_init__(self):
        check_fields(self, "--")
        if list(self.shares) != sorted(set(self.shares)):
            raise UserError("--shares must rise")
        report.check_parent("--json", self.json)


def balanced(steps: tuple[int, ...] | None, model: DecodeConfig) -> tuple[int, ...]:
    """Decoding steps as given, or those of the preset balanced for a model of these settings."""
    return steps or preset_steps("balanced", len(model.steps))

"""What an evaluation is asked for, and whether that goes together."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import tyro

from magnet_jax.arguments import Between, Seconds, Seed, check_fields
from magnet_jax.errors import UserError
from magnet_jax.evaluation.embedders import DEFAULT_WEIGHTS, Name
from magnet_jax.evaluation.scores import Listening
from magnet_jax.io import bucket
from magnet_jax.io.files import PICTURES, check_new_file, read_object

FORMAT = "magnet_jax evaluation 1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Where an embedder's weights are: a folder, a file or a hub id, as docs/evaluation.md says."""

    musicnn: str = DEFAULT_WEIGHTS["musicnn"]
    vggish: str = DEFAULT_WEIGHTS["vggish"]
    passt: str = DEFAULT_WEIGHTS["passt"]
    clap: str = DEFAULT_WEIGHTS["clap"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    out: Path
    """Folder for receipt.json and for what is generated."""
    generated: Path | None = None
    """Folder of generated audio, a file a clip, named by its id."""
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Model that generates the clips instead, from --prompts; as for launch.sample."""
    prompts: Path | None = None
    """Ids and captions: .csv (MusicCaps, AudioCaps and others), .jsonl, .txt, or a folder of
    clips with sidecars. Of a --generated folder the captions may also lie beside its clips."""
    limit: Annotated[int, Between(1, 2**31)] | None = None
    """Only so many prompts, from the beginning of the list."""
    reference: Path | None = None
    """Folder of real audio, for FAD and KL: for KL, clips of the same ids."""
    embedders: tuple[Name, ...] = ("musicnn",)
    """Networks to listen with: musicnn ships, docs/evaluation.md has the others."""
    weights: Weights = Weights()
    """Where the embedders' weights are."""
    probe: Path | None = None
    """Folder of further real clips with sidecars: a small classifier learns --probe-field from
    them, and is asked whether it hears what the captions name."""
    probe_field: str = "instrument"
    """Of the .json files in --probe."""
    probe_codec: Annotated[str | None, tyro.conf.arg(metavar="CODEC")] = None
    """Fit a second classifier to the clips of --probe and to what this codec makes of them, which
    does not take a codec's sound for another instrument; as for tokenization.job."""
    probe_round_trip: Path | None = None
    """Folder for what that codec makes of them, which any evaluations may share; by default
    OUT/probe-round-trip."""
    notes: bool = False
    """Score tunes as well: the notes that a transcriber hears, beside those of the reference and
    of what is left of it where its tunes are destroyed."""
    picture: Path | None = None
    """Draw spectrograms of the first three clips beside their real ones into this .png, .pdf or
    .svg."""
    lufs: Annotated[float, Between(-70, 0)] | None = None
    """Bring every clip, real and generated, to this loudness first, such as -14."""
    seconds: Seconds | None = None
    """Listen to only so much of each clip; also the length that is generated. With --checkpoint
    by default what the model was trained on, else all."""
    seed: Seed = 0
    """Of the clips that are generated, and of everything drawn for the scores."""
    resamples: Annotated[int, Between(0, 1_000_000)] = 200
    """Draws behind each interval (95 %); 0 for none."""
    baselines: bool = False
    """Score beside the model: shuffled captions, its codec alone, unigram tokens of --data."""
    data: Path | None = None
    """Folder that tokenization.job wrote, for --baselines."""
    sample_options: str = ""
    """Further options of launch.sample, as --sample-options="--preset draft --batch-size 4"."""
    cache: Path = Path(platformdirs.user_cache_dir("magnet_jax")) / "evaluation"
    """Folder in which what embedders make of real clips is kept."""

    @property
    def listening(self) -> Listening:
        """How every clip is heard."""
        return Listening(lufs=self.lufs, seconds=self.seconds)

    @property
    def settings(self) -> Path:
        """Folder that says what made each clip.

        It lies beside the clips: fadtk takes whatever lies among them for audio.
        """
        return self.out / "settings"


def checked(args: Args) -> Args:
    """The arguments, with the model's length where none is given.

    Raises `UserError` for those that do not fit or do not go together.
    """
    check_fields(args, "--")
    for mistake, is_made in _mistakes(args).items():
        if is_made:
            raise UserError(mistake)
    _check_places(args)
    check_new_file("--picture", args.picture, PICTURES)
    if args.seconds is None and args.checkpoint is not None:
        from magnet_jax.checkpoints import pretrained  # JAX is slow to load

        seconds = pretrained.read_settings(args.checkpoint).data.segment_seconds
        return dataclasses.replace(args, seconds=seconds)
    return args


def _mistakes(args: Args) -> dict[str, bool]:
    """What does not go together: what to say of it, and whether it is so."""
    is_given, is_made = args.generated is not None, args.checkpoint is not None
    needed = (args.checkpoint, args.reference, args.data)
    codec, named = args.probe_codec is not None, args.embedders
    found = {
        "give --generated FOLDER, or --checkpoint MODEL and --prompts LIST": is_given == is_made,
        "--checkpoint generates from a list: give --prompts FILE": is_made and args.prompts is None,
        "--baselines needs --checkpoint MODEL, --reference FOLDER and --data TOKENS": (
            args.baselines and None in needed
        ),
        "--probe-codec goes with --probe FOLDER": codec and args.probe is None,
        "--probe-field goes with --probe FOLDER": (
            args.probe_field != Args.probe_field and args.probe is None
        ),
        "--probe-round-trip goes with --probe-codec CODEC": (
            args.probe_round_trip is not None and not codec
        ),
        "--data is for --baselines": args.data is not None and not args.baselines,
        "--limit goes with --prompts": args.limit is not None and args.prompts is None,
        "--sample-options is for clips that are generated: give --checkpoint MODEL": (
            args.sample_options != "" and not is_made
        ),
        "--embedders: name each once, and one at least": not 0 < len(named) == len(set(named)),
    }
    for name, source in dataclasses.asdict(args.weights).items():
        is_idle = name not in named and source != DEFAULT_WEIGHTS[name]
        found[f"--weights.{name} goes with --embedders {name}"] = is_idle
    return found


def _check_places(args: Args) -> None:
    """Raises `UserError` for folders elsewhere, and for files that no evaluation wrote."""
    for option in ("out", "generated", "reference", "prompts", "probe", "probe_round_trip"):
        if (path := getattr(args, option)) is not None and bucket.is_url(path):
            raise UserError(
                f"{_spelled(option)} {path}: needs a file or folder on disk; copy it from there"
            )
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file, and the receipt needs a folder")
    receipt, listed = args.out / "receipt.json", args.out / "prompts.jsonl"
    if receipt.exists() and read_object(receipt, "").get("format") != FORMAT:
        raise UserError(f"{receipt}: is there, and no evaluation wrote it; name another --out")
    if args.checkpoint is None or not listed.exists():
        return
    is_cut = args.limit is not None and listed.resolve() == args.prompts.resolve()
    if is_cut or not args.settings.is_dir():
        raise UserError(f"{listed}: would be replaced by the list that is used; name another --out")


def words_of(args: Any, prefix: str = "") -> list[str]:
    """The options that ask for these arguments; what is left at its default is left out."""
    words = []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if value == field.default:
            continue
        if dataclasses.is_dataclass(value):
            words += words_of(value, f"{prefix}{field.name}.")
        elif value is True:
            words.append(_spelled(prefix + field.name))
        elif isinstance(value, tuple):
            words += [_spelled(prefix + field.name), *map(str, value)]
        elif str(value).startswith("-"):  # which would be taken for an option
            words.append(f"{_spelled(prefix + field.name)}={value}")
        else:
            words += [_spelled(prefix + field.name), str(value)]
    return words


def _spelled(name: str) -> str:
    return "--" + name.replace("_", "-")

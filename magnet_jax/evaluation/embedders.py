"""Networks that audio is judged with, behind one signature: mono samples in, rows of numbers out.

musicnn ships. Of the others the weights come from a folder or file, or from where their makers put
them; vggish and passt need a package more (`pip install --no-deps -r requirements-eval.txt`).
"""

import functools
import hashlib
import importlib
import io
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.error import URLError

import numpy as np

from magnet_jax.errors import UserError
from magnet_jax.io import hub
from magnet_jax.io.torch_env import as_arrays, import_torch, load_tensors

Name = Literal["musicnn", "vggish", "passt", "clap"]

# Where weights come from if nobody says otherwise.
DEFAULT_WEIGHTS: dict[Name, str] = {
    "musicnn": "embedded",
    "vggish": "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth",
    "passt": "https://github.com/kkoutini/PaSST/releases/download/v0.0.1-audioset/"
    "passt-s-f128-p16-s10-ap.476-swa.pt",
    "clap": "laion/larger_clap_music",
}
_SHORTEST = 0.15  # seconds of a last piece that are still worth a look; AudioCraft's for PaSST


class Embedded(NamedTuple):
    """What a network makes of a clip, a row for each piece of it (P)."""

    embeddings_PE: np.ndarray
    logits_PL: np.ndarray | None
    """Of its labels, if it is a classifier."""


class Embedder(NamedTuple):
    """A network; `load` makes one."""

    name: str
    sample_rate: int
    embed: Callable[[np.ndarray], Embedded]
    """Mono audio at that rate, float32 [N] with full scale 1, to its rows."""
    weights: str
    sha256: str
    """Of the weights."""
    pieces: str
    """How a clip is cut, for people."""
    tags: tuple[str, ...] = ()
    """Its labels, where they are words that captions use."""
    embed_texts: Callable[[Sequence[str]], np.ndarray] | None = None
    """Texts to rows [N, E] of the same space, where the network has one for both."""


def load(name: Name, weights: str | None = None) -> Embedder:
    """Loads an embedder.

    `weights` are a folder (clap: of transformers; musicnn: of `launch.convert_tagger`), a file
    (vggish, passt) or a hub id (clap); None is `DEFAULT_WEIGHTS`.

    Raises `UserError` for an unknown name, and for a package or weights that are not there.
    """
    makers = {"musicnn": _musicnn, "vggish": _vggish, "passt": _passt, "clap": _clap}
    if name not in makers:
        raise UserError(f"embedder {name!r}: there are {', '.join(makers)}")
    return makers[name](weights or DEFAULT_WEIGHTS[name])


def cut(wav_N: np.ndarray, sample_rate: int, seconds: float) -> list[np.ndarray]:
    """Pieces of `seconds`, the last as long as it is, or left out where that is next to nothing."""
    size = round(seconds * sample_rate)
    pieces = [wav_N[first : first + size] for first in range(0, len(wav_N), size)]
    if len(pieces) > 1 and len(pieces[-1]) < _SHORTEST * sample_rate:
        pieces.pop()
    return pieces


# --- musicnn --------------------------------------------------------------------------------------


def _musicnn(weights: str) -> Embedder:
    from magnet_jax.evaluation import tagger  # JAX is slow to load

    loaded = tagger.load() if weights == "embedded" else tagger.load(Path(weights))

    def embed(wav_N: np.ndarray) -> Embedded:
        tagged = tagger.tag(loaded, wav_N)
        return Embedded(tagged.embeddings_PE, tagged.logits_PL)

    rate, pieces = tagger.SAMPLE_RATE, "3 s, one every 1.5 s"
    return Embedder("musicnn", rate, embed, weights, loaded.sha256, pieces, tags=loaded.tags)


# --- torchvggish and hear21passt -----------------------------------------------------------------


def _package(name: str, embedder: Name) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # not there, or for another torch
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"embedder {embedder} needs the package {name.split('.')[0]}: "
            f"pip install --no-deps -r requirements-eval.txt ({reason})"
        ) from None


def _fetch_file(weights: str, embedder: Name) -> Path:
    """The file of weights; one with a URL is downloaded into torch's cache, unless it is there."""
    torch = import_torch()
    if not weights.startswith("https://"):
        path = Path(weights)
        if not path.is_file():
            raise UserError(f"--weights.{embedder} {path}: no such file")
        return path
    path = Path(torch.hub.get_dir(), "checkpoints", weights.rsplit("/", 1)[1])
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(weights, str(path), progress=False)
            # (its makers have published no hash to hold it against; the receipt has it, too)
            print(f"{path}: SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
        except (URLError, OSError) as error:
            raise UserError(
                f"embedder {embedder}: its weights cannot be fetched ({error}); put {path.name}, "
                f"from {weights}, in {path.parent}, or name it: --weights.{embedder} FILE"
            ) from None
    return path


def _vggish(weights: str) -> Embedder:
    torch = import_torch()
    vggish = _package("torchvggish", "vggish")
    path = _fetch_file(weights, "vggish")
    model = vggish.VGG(vggish.make_layers(), postprocess=False)
    _fill(model, load_tensors(path), path)
    # FAD is measured before the last ReLU, as Kilgour et al. and frechet-audio-distance do.
    model.embeddings = model.embeddings[:-1]
    model.eval()

    def embed(wav_N: np.ndarray) -> Embedded:
        size = round(0.975 * 16_000)  # of the one window that an example needs
        if len(wav_N) < size:
            wav_N = np.pad(wav_N, (0, size - len(wav_N)))
        with torch.inference_mode():
            examples = vggish.waveform_to_examples(wav_N, 16_000).detach()
            return Embedded(model(examples).numpy(), None)

    return Embedder("vggish", 16_000, embed, weights, _digest([path]), "0.96 s")


def _passt(weights: str) -> Embedder:
    torch = import_torch()
    # (hear21passt finds it as an attribute)
    _package("torchaudio.compliance.kaldi", "passt")
    base = _import_hear21passt()
    path = _fetch_file(weights, "passt")
    with redirect_stdout(io.StringIO()):  # it prints the network
        net = base.get_model_passt(arch="passt_s_swa_p16_128_ap476", pretrained=False)
        mel = base.AugmentMelSTFT(
            n_mels=128, sr=32_000, win_length=800, hopsize=320, n_fft=1024, freqm=0, timem=0,
            htk=False, fmin=0.0, fmax=None, norm=1, fmin_aug_range=10, fmax_aug_range=2000,
        )  # fmt: skip
        model = base.PasstBasicWrapper(mel=mel, net=net, mode="all").eval()
    _fill(net, load_tensors(path), path)

    def embed(wav_N: np.ndarray) -> Embedded:
        rows = []
        for piece_N in cut(wav_N, 32_000, 10.0):
            # (it prints shapes, and warns of them)
            with (
                torch.inference_mode(),
                redirect_stdout(io.StringIO()),
                warnings.catch_warnings(action="ignore"),
            ):
                rows.append(model(torch.from_numpy(piece_N)[None]).numpy()[0])
        logits_PL, embeddings_PE = np.split(np.stack(rows), [527], axis=1)
        return Embedded(embeddings_PE, logits_PL)

    return Embedder("passt", 32_000, embed, weights, _digest([path]), "10 s")


def _import_hear21passt() -> Any:
    # Of timm it takes one function, for downloads that are not asked of it here; and timm would
    # take a torchvision that loads, which PyPI does not have for a CPU torch.
    name = "timm.models._hub"
    if name in sys.modules:
        return _package("hear21passt.base", "passt")
    sys.modules[name] = types.SimpleNamespace(download_cached_file=None)
    try:
        return _package("hear21passt.base", "passt")
    finally:
        del sys.modules[name]


def _fill(model: Any, state: Any, path: Path) -> None:
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: other weights than the network's ({reason})") from None
    as_arrays(path, state)  # raises where they are not finite


# --- transformers ---------------------------------------------------------------------------------


def _clap_folder(weights: str) -> Path:
    if Path(weights).is_dir():
        return Path(weights)
    if not hub.is_hub_id(weights):
        raise UserError(f"--weights.clap {weights}: no such folder, and not a hub id")
    patterns = ["*.json", "*.txt", "*.safetensors", "*.bin"]
    instead = (
        f"a folder with {weights}'s config.json, preprocessor_config.json, model.safetensors and "
        "tokenizer.json: --weights.clap DIR"
    )
    return hub.fetch(weights, patterns, "embedder clap", instead)


def _from_pretrained(kind: Any, folder: Path) -> Any:
    try:
        found = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what transformers raises depends on what is missing
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"--weights.clap {folder}: not a folder of {kind.__name__} ({reason})"
        ) from None
    if hasattr(found, "state_dict"):  # a model, not what prepares its input
        as_arrays(f"--weights.clap {folder}", found.state_dict())
    return found


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _weights_of(folder: Path) -> list[Path]:
    """The file or files that transformers reads, which prefers safetensors."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def _clap(weights: str) -> Embedder:
    import_torch()
    from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

    folder = _clap_folder(weights)
    model = _from_pretrained(ClapModel, folder).eval()
    extractor = _from_pretrained(ClapFeatureExtractor, folder)
    tokenizer = _from_pretrained(AutoTokenizer, folder)
    if model.config.audio_config.enable_fusion:
        raise UserError(
            f"--weights.clap {weights}: a model with fusion draws parts of a clip at random; name "
            "one without, such as laion/clap-htsat-unfused"
        )
    return Embedder(
        name="clap",
        sample_rate=extractor.sampling_rate,
        embed=functools.partial(_clap_audio, model, extractor),
        weights=weights,
        sha256=_digest(_weights_of(folder)),
        pieces=f"{extractor.max_length_s:g} s",
        embed_texts=functools.partial(_clap_texts, model, tokenizer),
    )


def _clap_audio(model: Any, extractor: Any, wav_N: np.ndarray) -> Embedded:
    torch, rate = import_torch(), extractor.sampling_rate
    # No piece is longer than the model takes, so nothing is cut at random; short ones are repeated.
    pieces = cut(wav_N, rate, extractor.max_length_s)
    how = {"truncation": "rand_trunc", "padding": "repeatpad", "return_tensors": "pt"}
    inputs = extractor(pieces, sampling_rate=rate, **how)
    with torch.inference_mode():
        return Embedded(model.get_audio_features(**inputs).pooler_output.numpy(), None)


def _clap_texts(model: Any, tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    torch, rows = import_torch(), []
    for text in texts:
        inputs = tokenizer([text], truncation=True, max_length=77, return_tensors="pt")
        with torch.inference_mode():
            found = model.get_text_features(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            )
        rows.append(found.pooler_output[0].numpy())
    return np.stack(rows)

"""Trains a small EnCodec on a folder of audio, with the `encodec` package's own modules.

Défossez et al. 2022 (arXiv 2210.13438): a SEANet encoder and decoder, a residual vector quantizer
whose codebooks are running means, L1 in time and a multi-resolution spectral loss, weighted by the
gradients they give on the audio. What differs: there is no discriminator, the spectral loss is of
STFTs, not of mel bands, entries that are hardly used are revived in another way (`revive`), and the
codec may begin from a trained one.

What a step sees depends on (seed, step) alone, and a checkpoint holds all that training needs: a
stopped run goes on as if it had not been, bit for bit on the same machine with as many threads.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from magnet_jax.arguments import Between, Seed, check_fields
from magnet_jax.codec.encodec import read_base
from magnet_jax.config import ASSETS, EMBEDDED
from magnet_jax.convert.codec_rules import (
    TONAL_SECTION,
    SeanetConfig,
    bandwidth,
    codec_layout,
    codec_to_audiocraft,
    folder_settings,
    read_codec_folder,
    renamed_from_audiocraft,
)
from magnet_jax.data.records import remove_temporaries
from magnet_jax.errors import UserError
from magnet_jax.evaluation.scores import describe
from magnet_jax.io import ledger
from magnet_jax.io.files import (
    held,
    is_left_over,
    not_half_written,
    put_back,
    read_object,
    replacing,
    replacing_file,
)
from magnet_jax.io.formats import RejectedError, open_sound
from magnet_jax.io.torch_env import as_arrays, import_torch, load_tensors

CODEC = SeanetConfig(
    hidden_size=64, num_filters=16, num_lstm_layers=1, sampling_rate=16_000, use_causal_conv=False
)
NUM_CODEBOOKS = 4
_WINDOWS = (128, 256, 512, 1024, 2048)  # samples
_FLOOR = 1e-3  # of magnitudes, before the logarithm
_NORMS_DECAY = 0.999
_DEAD = 0.03  # of the mean use of an entry
_MOST_REVIVED = 16  # entries of a codebook in a step
_VALIDATION_SECONDS = 5.0

FromOne = Annotated[int, Between(1, 10**9)]
Share = Annotated[float, Between(0, 1)]
BelowOne = Annotated[float, Between(0, 1 - 1e-9)]
Weight = Annotated[float, Between(0, 1e9)]


@dataclass(frozen=True, kw_only=True)
class Training:
    """Trains a small EnCodec.

    Run the same command again to go on after an interruption, or with more steps.
    """

    audio: Path
    """Folder of .flac and .wav files at the codec's rate, mono, to train on."""
    valid: Path
    """The same, to measure on; launch.recipe writes both."""
    out: Path
    """Folder of the run; the codec is in its folder codec."""
    init_from: str | None = None
    """Transformers EncodecModel folder to begin with, or 'embedded'; its sizes are taken over.
    By default weights are random."""
    steps: FromOne = 60_000
    """Updates of the codec."""
    batch_size: FromOne = 8
    segment_seconds: Annotated[float, Between(0.25, 60)] = 1.0
    """Length of what a step sees of each clip."""
    learning_rate: Annotated[float, Between(0, 1, above=True)] = 3e-4
    warmup_steps: FromOne = 500
    decay_from: Share = 0.6
    """Share of the steps after which the learning rate falls, as a cosine, to a hundredth."""
    time_weight: Weight = 0.1
    """Share of the gradient on the audio that the L1 distance in time gets."""
    spectral_weight: Weight = 1.0
    """Share of it that the spectral loss gets."""
    commitment_weight: Weight = 0.25
    """Of the quantizer's commitment loss, which is not balanced with the others."""
    gain_db: Annotated[float, Between(0, 60)] = 4.0
    """Levels of segments are drawn within so many dB of the clip's."""
    codebook_decay: BelowOne = 0.998
    """Of the running means that are the codebooks' entries; small batches need a long memory."""
    average: BelowOne = 0.999
    """Of the weights over steps; the averaged weights are what is measured and written."""
    validate_every: FromOne = 1000
    save_every: FromOne = 500
    threads: FromOne = 2
    """Of the CPU."""
    seed: Seed = 0


class Clips:
    """Audio files of one rate, of which segments are read."""

    def __init__(self, option: str, folder: Path, rate: int, least_seconds: float):
        if not folder.is_dir():
            raise UserError(f"{option} {folder}: no such folder")
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".flac", ".wav"))
        self.paths, self.frames = [], []
        for path in paths:
            try:
                its_rate, channels, seconds = describe(path)
            except UserError as error:
                raise UserError(f"{option}: {error}") from None
            if (its_rate, channels) != (rate, 1):
                raise UserError(
                    f"{option}: {path} has {channels} channels at {its_rate} Hz, not 1 at {rate} Hz"
                )
            if seconds >= least_seconds:
                self.paths.append(path)
                self.frames.append(round(seconds * rate))
        if not self.paths:
            raise UserError(f"{option} {folder}: no .flac or .wav of {least_seconds:g} s or more")
        names = "\n".join(f"{p.relative_to(folder)} {n}" for p, n in zip(self.paths, self.frames))
        self.fingerprint = hashlib.sha256(names.encode()).hexdigest()
        self._ends = np.cumsum(self.frames)

    def draw(self, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
        """Random segments [count, length] (float32), all seconds of audio equally likely."""
        found = []
        for place in rng.integers(self._ends[-1], size=count):
            i = int(np.searchsorted(self._ends, place, side="right"))
            start = int(rng.integers(self.frames[i] - length + 1))
            found.append(self.read(i, start, length))
        return np.stack(found)

    def read(self, i: int, start: int, length: int) -> np.ndarray:
        try:
            with open_sound(str(self.paths[i])) as sound:
                return np.concatenate(list(sound.read(start, length)))[:, 0]
        except (RejectedError, ValueError, OSError) as error:
            raise UserError(f"{self.paths[i]}: cannot be read any more ({error})") from None


def learning_rate(settings: Training, step: int) -> float:
    """Rises linearly, stays, falls as a cosine."""
    begin = settings.decay_from * settings.steps
    done = min(1.0, max(0.0, (step - begin) / max(1.0, settings.steps - begin)))
    fall = 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2
    return settings.learning_rate * min(1.0, (step + 1) / settings.warmup_steps) * fall


def build_codec(settings: Mapping[str, Any], codebook_decay: float = 0.99) -> Any:
    """The `encodec` package's encoder, decoder and quantizer, for a transformers config.json."""
    torch = import_torch()
    from encodec.modules import SEANetDecoder, SEANetEncoder
    from encodec.quantization import ResidualVectorQuantizer

    config = SeanetConfig(**{f.name: settings[f.name] for f in dataclasses.fields(SeanetConfig)})
    shape = {
        "channels": config.audio_channels,
        "dimension": config.hidden_size,
        "n_filters": config.num_filters,
        "n_residual_layers": config.num_residual_layers,
        "ratios": list(config.upsampling_ratios),
        "norm": config.norm_type,
        "kernel_size": config.kernel_size,
        "last_kernel_size": config.last_kernel_size,
        "residual_kernel_size": config.residual_kernel_size,
        "dilation_base": config.dilation_growth_rate,
        "causal": config.use_causal_conv,
        "pad_mode": config.pad_mode,
        "true_skip": not config.use_conv_shortcut,
        "compress": config.compress,
        "lstm": config.num_lstm_layers,
    }
    return torch.nn.ModuleDict(
        {
            "encoder": SEANetEncoder(**shape),
            "decoder": SEANetDecoder(**shape, trim_right_ratio=config.trim_right_ratio),
            "quantizer": ResidualVectorQuantizer(
                dimension=config.hidden_size,
                n_q=NUM_CODEBOOKS,
                bins=config.codebook_size,
                decay=codebook_decay,
                threshold_ema_dead_code=0,  # see `revive`
            ),
        }
    )


def revive(codebook: Any, vectors: Any) -> None:
    """Moves entries that are hardly used to vectors that the codebook has just been given.

    In place of the package's way, which overwrites what it revives within the same step, and counts
    all entries as dead where a batch has few frames.

    Args:
      codebook: the package's, after a step.
      vectors: what it quantized in that step, [N, E].
    """
    torch = import_torch()
    used = codebook.cluster_size
    mean = used.mean()
    dead = torch.nonzero(used < _DEAD * mean).flatten()
    dead = dead[torch.randperm(len(dead))[:_MOST_REVIVED]]
    chosen = vectors[torch.randperm(len(vectors))[: len(dead)]]
    dead = dead[: len(chosen)]
    # (as if it had been used like all others, so that it has time to find its place)
    codebook.embed[dead] = chosen
    codebook.embed_avg[dead] = chosen * mean
    codebook.cluster_size[dead] = mean


def fresh_settings() -> dict[str, Any]:
    """The config.json of the codec that is trained from nothing."""
    settings = dataclasses.asdict(CODEC)
    return folder_settings(settings, [bandwidth(settings, NUM_CODEBOOKS)])


def read_initial(source: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings of a codec folder, and its tensors by the package's names.

    Both are of the first codebooks, as many as are trained.
    """
    folder = ASSETS / "codec" if source == EMBEDDED else Path(source)
    settings, tensors = read_codec_folder(folder, f"--init-from {source}")
    if TONAL_SECTION in settings:  # which is fitted to audio, not trained
        tensors = read_base(source).tensors
        del settings[TONAL_SECTION]
    tensors = codec_to_audiocraft(tensors, settings, NUM_CODEBOOKS)
    return settings | {"target_bandwidths": [bandwidth(settings, NUM_CODEBOOKS)]}, tensors


def write_codec(folder: Path, settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Writes tensors of the package's names as a transformers EncodecModel folder."""
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in state.items()}
    layout = codec_layout(settings, NUM_CODEBOOKS)
    tensors = renamed_from_audiocraft(arrays, layout, "the codec in training")
    with replacing(folder) as partial:
        tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        (partial / "config.json").write_text(text)


def spectral_loss(made_BN: Any, real_BN: Any) -> Any:
    """Mean over window lengths of the L1 distances of magnitudes and of their logarithms."""
    torch = import_torch()
    total = 0.0
    for size in _WINDOWS:
        window = torch.hann_window(size)
        how = {"n_fft": size, "hop_length": size // 4, "window": window, "return_complex": True}
        scale = window.square().sum().sqrt()
        # (the square root has no gradient at 0)
        made, real = (
            torch.sqrt(torch.view_as_real(torch.stft(wav, **how)).square().sum(-1) + 1e-10) / scale
            for wav in (made_BN, real_BN)
        )
        logs = torch.log(made + _FLOOR) - torch.log(real + _FLOOR)
        total = total + (made - real).abs().mean() / real.mean().clamp_min(1e-4) + logs.abs().mean()
    return total / len(_WINDOWS)


def balance(
    grads: Mapping[str, Any], weights: Mapping[str, float], norms: Mapping[str, Sequence[float]]
) -> tuple[Any, dict[str, list[float]]]:
    """The sum of gradients on the audio, each brought to its weight's share (EnCodec, section 3.4).

    Args:
      grads: of each loss, [B, 1, N].
      weights: of each loss.
      norms: of each loss the decayed sum of its past norms, and of their counts; {} at first.

    Returns:
      The gradient, and the new `norms`.
    """
    new, total = {}, 0.0
    whole = sum(weights[name] for name in grads)
    for name, grad in grads.items():
        past, counts = norms.get(name, (0.0, 0.0))
        norm = float(grad.flatten(1).norm(dim=1).mean())
        past, counts = _NORMS_DECAY * past + norm, _NORMS_DECAY * counts + 1
        new[name] = [past, counts]
        total = total + grad * (weights[name] / whole / (past / counts + 1e-12))
    return total, {**norms, **new}


class Run:
    """A run's state: networks, optimizers, averaged weights, and how far it is."""

    def __init__(self, settings: Training):
        torch = import_torch()
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.config, initial = fresh_settings(), None
        if settings.init_from is not None:
            self.config, initial = read_initial(settings.init_from)
        self.codec = build_codec(self.config, settings.codebook_decay)
        self._quantized: list[Any] = []  # what each codebook was given in this step
        for layer in self.codec["quantizer"].vq.layers:
            layer._codebook.register_forward_pre_hook(
                lambda _, args: self._quantized.append(args[0].detach().flatten(0, 1))
            )
        if initial is not None:
            self.codec.load_state_dict({k: torch.from_numpy(v) for k, v in initial.items()})
        self.optimizer = torch.optim.Adam(
            self.codec.parameters(), lr=settings.learning_rate, betas=(0.5, 0.9)
        )
        self.averaged = {k: v.detach().clone() for k, v in self.codec.state_dict().items()}
        self.norms: dict[str, list[float]] = {}
        self.step = 0

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "norms": self.norms,
            "averaged": self.averaged,
            "codec": self.codec.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.step, self.norms = state["step"], state["norms"]
        self.averaged = state["averaged"]
        self.codec.load_state_dict(state["codec"])
        self.optimizer.load_state_dict(state["optimizer"])

    def advance(self, clips: Clips) -> dict[str, float]:
        """One update of everything; the losses."""
        torch = import_torch()
        s = self.settings
        rng = np.random.default_rng([s.seed, self.step])
        torch.manual_seed(int(rng.integers(2**62)))  # for the quantizer
        real = self._draw(rng, clips)
        self.codec.train()
        self._quantized.clear()
        quantized = self.codec["quantizer"](self.codec["encoder"](real), sample_rate=1)
        made = self.codec["decoder"](quantized.quantized)[..., : real.shape[-1]]
        audio = made.detach().requires_grad_()
        losses = {
            "time": (audio - real).abs().mean(),
            "spectral": spectral_loss(audio[:, 0], real[:, 0]),
        }
        grads = {name: torch.autograd.grad(loss, audio)[0] for name, loss in losses.items()}
        weights = {name: getattr(s, f"{name}_weight") for name in losses}
        grad, self.norms = balance(grads, weights, self.norms)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(
            [made, s.commitment_weight * quantized.penalty],
            [grad, torch.ones_like(quantized.penalty)],
        )
        _update(self.optimizer, learning_rate(s, self.step))
        for layer, vectors in zip(self.codec["quantizer"].vq.layers, self._quantized):
            revive(layer._codebook, vectors)
        # A short memory at first, so that the average forgets the beginning.
        decay = min(s.average, (1 + self.step) / (10 + self.step))
        for name, value in self.codec.state_dict().items():
            self.averaged[name].lerp_(value, 1 - decay)
        self.step += 1
        found = {name: float(loss.detach()) for name, loss in losses.items()}
        found["commitment"] = float(quantized.penalty.detach())
        self._check_finite(found)
        return found

    def _draw(self, rng: np.random.Generator, clips: Clips) -> Any:
        """Segments at other levels, [B, 1, N]."""
        s = self.settings
        length = round(s.segment_seconds * self.config["sampling_rate"])
        wav = clips.draw(rng, s.batch_size, length)
        gain = 10 ** (rng.uniform(-s.gain_db, s.gain_db, (s.batch_size, 1)) / 20)
        peak = np.abs(wav).max(1, keepdims=True)
        wav = wav * np.minimum(gain, 0.99 / np.maximum(peak, 1e-3)).astype(np.float32)
        return import_torch().from_numpy(wav.astype(np.float32))[:, None]

    def _check_finite(self, losses: Mapping[str, float]) -> None:
        """Raises `UserError` where this step's losses, or what it made of the weights, are not."""
        bad = [f"{name} loss is {loss}" for name, loss in losses.items() if not math.isfinite(loss)]
        for part, tensor in self.codec.state_dict().items():
            if not math.isfinite(float(tensor.sum())):
                bad.append(f"codec's {part} is not finite")
        if bad:
            raise UserError(
                f"--out {self.settings.out}: training diverged at step {self.step}: {bad[0]}; what "
                "was saved before is as it was. Lower --learning-rate, and name a new --out"
            )


def _update(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def measure(config: Mapping[str, Any], state: Mapping[str, Any], clips: Clips) -> dict[str, float]:
    """Spectral loss, SNR in dB, and codebook use of a codec on the middle of each of 32 clips."""
    torch = import_torch()
    codec = build_codec(config).eval()
    codec.load_state_dict(state)
    length = min(round(_VALIDATION_SECONDS * config["sampling_rate"]), min(clips.frames))
    places = np.unique(np.linspace(0, len(clips.paths) - 1, 32).astype(int))
    spectral, snr, used = [], [], []
    with torch.inference_mode():
        for i in places:
            wav = clips.read(int(i), (clips.frames[i] - length) // 2, length)
            real = torch.from_numpy(wav)[None, None]
            codes = codec["quantizer"].encode(codec["encoder"](real), sample_rate=1)
            made = codec["decoder"](codec["quantizer"].decode(codes))[..., :length]
            spectral.append(float(spectral_loss(made[:, 0], real[:, 0])))
            error = (made - real).square().sum().clamp_min(1e-12)
            snr.append(10 * math.log10(float(real.square().sum() / error)))
            used.append(codes.flatten(1))
    codes = torch.cat(used, 1)
    return {
        "valid_spectral": float(np.mean(spectral)),
        "valid_snr_db": float(np.mean(snr)),
        "codes_used": float(np.mean([len(book.unique()) for book in codes])),
    }


def train(settings: Training) -> Iterator[dict[str, float]]:
    """Trains to the last step; gives what metrics.jsonl gets. `UserError` for what cannot be."""
    torch = import_torch()
    _check(settings)
    torch.set_num_threads(settings.threads)
    run = Run(settings)
    rate = run.config["sampling_rate"]
    clips = Clips("--audio", settings.audio, rate, settings.segment_seconds)
    valid = Clips("--valid", settings.valid, rate, 1.0)
    with held(settings.out / ".lock") as mine:
        if not mine:
            raise UserError(f"--out {settings.out}: another process is training there")
        yield from _train(settings, run, clips, valid)


def _train(settings: Training, run: Run, clips: Clips, valid: Clips) -> Iterator[dict[str, float]]:
    torch = import_torch()
    checkpoint = settings.out / "checkpoint.pt"
    _begin(settings, clips, is_new=not checkpoint.exists())
    remove_temporaries(settings.out)
    if checkpoint.exists():
        state = load_tensors(checkpoint)
        for name in ("averaged", "codec"):
            as_arrays(f"{checkpoint}: {name}", state[name])  # raises where there is NaN
        run.restore(state)
        print(f"{settings.out}: goes on at step {run.step}", flush=True)
    put_back(settings.out / "codec")
    _forget(settings.out, run.step)
    if not run.step:
        yield _note(settings, {"step": 0, **measure(run.config, run.averaged, valid)})
    sums: dict[str, list[float]] = {}
    began = time.perf_counter()
    for _ in tqdm(range(run.step, settings.steps), initial=run.step, total=settings.steps,
                  desc="codec", mininterval=30):  # fmt: skip
        for name, value in run.advance(clips).items():
            sums.setdefault(name, []).append(value)
        last = run.step == settings.steps
        if last or run.step % settings.validate_every == 0:
            means = {name: float(np.mean(values)) for name, values in sums.items()}
            means["seconds_per_step"] = (time.perf_counter() - began) / len(sums["time"])
            found = measure(run.config, run.averaged, valid)
            write_codec(settings.out / "codec", run.config, run.averaged)
            yield _note(settings, {"step": run.step, **means, **found})
            sums, began = {}, time.perf_counter()
        if last or run.step % settings.save_every == 0:
            # (given a path, torch reports a full disk as RuntimeError)
            with replacing_file(checkpoint) as path, path.open("wb") as file:
                torch.save(run.state(), file)


def _check(settings: Training) -> None:
    check_fields(settings, "--")
    if not settings.time_weight + settings.spectral_weight:
        raise UserError("--time-weight and --spectral-weight are both 0: nothing would be learnt")
    names = {path.name for path in settings.out.glob("*") if not is_left_over(path.name)}
    if names - {".lock"} and "training.json" not in names:
        raise UserError(f"--out {settings.out}: holds other files ({min(names)}); name another")


def _begin(settings: Training, clips: Clips, *, is_new: bool) -> None:
    """Notes what the run is begun with, or checks that it was begun with the same."""
    free = ("audio", "valid", "out", "steps", "validate_every", "save_every", "threads")
    begun = {k: v for k, v in dataclasses.asdict(settings).items() if k not in free}
    begun["clips"] = clips.fingerprint
    path = settings.out / "training.json"
    if is_new:
        path.unlink(missing_ok=True)
    ledger.claim(path, begun, free=["clips"])
    if read_object(path, "the run's settings")["clips"] != clips.fingerprint:
        print(f"--audio {settings.audio}: changed since the run was begun, which goes on with it")


def _forget(out: Path, step: int) -> None:
    """Takes out of metrics.jsonl what a process that was killed noted after it had last saved.

    The steps are made, and noted, again. Before the first save that is all of them.
    """
    path = out / "metrics.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines() if step else ():
        with contextlib.suppress(ValueError):  # a line that the kill cut
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    with replacing_file(path) as temporary:
        temporary.write_text("".join(kept))


def _note(settings: Training, values: dict[str, float]) -> dict[str, float]:
    path = settings.out / "metrics.jsonl"
    with not_half_written(path), path.open("a") as file:
        file.write(json.dumps(values) + "\n")
    return values

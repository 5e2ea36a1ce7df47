"""What a run tells while it trains: scalars to TensorBoard, JSON lines and W&B, speed, profiles."""

import contextlib
import dataclasses
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from magnet_jax.config import RunConfig
from magnet_jax.errors import UserError
from magnet_jax.io import files
from magnet_jax.train import chips, distributed, flops, hybrid_objective, optimizer
from magnet_jax.train.setup import Setup
from magnet_jax.train.steps import RATE_BINS, LossAux, StepSettings


class Scalars:
    """Numbers over steps: TensorBoard, lines of JSON in RUN/metrics.jsonl, and W&B if asked for."""

    def __init__(self, config: RunConfig, run: Path, step: int):
        """What a process logged in `run` after `step`, killed before it saved, is forgotten."""
        from tensorboardX import SummaryWriter  # it imports PyTorch, and one process writes

        self.path = run / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in read_scalars(run) if line["step"] <= step]
            files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self.wandb = _open_wandb(config, run) if config.wandb else None

    def log(self, step: int, values: dict[str, Any]) -> None:
        values = {name: float(value) for name, value in values.items()}
        # (a half of the hybrid objective may have no token for a while)
        values = {name: value for name, value in values.items() if not math.isnan(value)}
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.path}: step {step} cannot be logged ({error.strerror}); make room, and the "
                "same command goes on from the last checkpoint"
            ) from error

    def log_audio(self, step: int, wavs: list[Path], prompts: tuple[str, ...]) -> None:
        if self.wandb is not None:
            import wandb

            audio = [wandb.Audio(str(w), caption=prompt) for w, prompt in zip(wavs, prompts)]
            self.wandb.log({"samples": audio}, step=step)

    def flush(self) -> None:
        """Writes what is still in memory to the run's folder."""
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()


def _open_wandb(config: RunConfig, run: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"--wandb {config.wandb}: Weights & Biases is not installed: pip install wandb"
        ) from None
    run = run.resolve()
    # The folder's name makes a resumed run go on in the same place.
    return wandb.init(
        project=config.wandb,
        name=run.name,
        id=run.name,
        resume="allow",
        dir=str(run),
        config=dataclasses.asdict(config),
    )


def read_scalars(run: Path) -> list[dict[str, float]]:
    """The lines of RUN/metrics.jsonl, each with its "step"; a line cut by a kill is left out."""
    lines = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


class Window:
    """What happened since the last line of scalars."""

    def __init__(self):
        self.losses = defaultdict(list)  # of each codebook, still on the devices
        self.halves = defaultdict(list)  # of a hybrid: by name, over all codebooks
        self.unchecked = []  # what must be finite, of each step since the last check
        self.waited = 0.0  # seconds for data
        self.started = time.perf_counter()

    def add(self, stage: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the losses, and what is not for people, out of a step's metrics."""
        numbers = [metrics.pop("sum_nll", 0.0), metrics.get("grad_norm", 0.0)]
        self.unchecked.append([*numbers, metrics.pop("param_norm", 0.0)])
        losses = {name: metrics.pop(name) for name in [*metrics] if name.startswith("loss")}
        self.losses[stage].append(losses.get("loss_parallel", losses["loss"]))
        if len(losses) > 1:
            for name, loss in losses.items():
                self.halves[name].append(loss)

    def check_finite(self, step: int, saved: int) -> None:
        """Raises `UserError` that names the first step, up to `step`, at which training diverged.

        Waits for the steps to finish. An optimizer may leave out a step whose gradient is NaN, so
        that nothing of it is to be seen later on. `step` is the last one that was added, `saved`
        that of the newest checkpoint, or 0.
        """
        numbers = jax.device_get(self.unchecked)
        self.unchecked = []
        for i, values in enumerate(numbers, start=step - len(numbers) + 1):
            names = ("loss of", "gradient norm of", "norm of the parameters after")
            for name, value in zip(names, values):
                if not np.isfinite(value):
                    raise UserError(diverged(f"the {name} step {i} is {value}", saved))

    def scalars(
        self, settings: StepSettings, batch_size: int, frames: int, text: int
    ) -> dict[str, float]:
        """Mean losses and speeds; waits for the steps to finish."""
        means = {k: _mean(losses) for k, losses in sorted(self.losses.items())}
        seconds = time.perf_counter() - self.started
        clips = sum(map(len, self.losses.values())) * batch_size
        values = {f"train/loss_{codebook}": mean for codebook, mean in means.items()}
        values |= {f"train/{name}": _mean(losses) for name, losses in self.halves.items()}
        values["train/loss"] = np.mean(list(means.values()))
        values["speed/frames_per_second"] = clips * frames / seconds
        values["speed/wait_for_data_share"] = self.waited / seconds
        device = settings.mesh.devices.flat[0]
        if (chip := chips.chip_of(device)) is not None:
            trained = [len(self.losses[k]) for k in range(settings.model.num_codebooks)]
            done = clips * flops.training_flops(settings.model, frames, text, trained) / seconds
            peak = chip.device_flops * settings.mesh.size
            values["speed/model_flops_utilization"] = done / peak
        local = jax.local_devices()[0]
        if (used := (local.memory_stats() or {}).get("peak_bytes_in_use")) is not None:
            values["memory/peak_gb"] = used / 1e9
        return values


def diverged(what: str, saved: int) -> str:
    """The line that ends a run which is not finite any more; `saved` as of `Window`."""
    last = f"the checkpoint of step {saved}" if saved else "the start: none was saved yet"
    return (
        f"{what}, and nothing of it was saved; the last good state is {last}. Go on from there "
        "with a lower --optimizer.peak-lr as another run (--init-from), or begin anew"
    )


def _mean(losses: list[jax.Array]) -> float:
    """The mean of those steps that had a token; NaN if none had."""
    losses = np.asarray(jax.device_get(losses))
    return float(np.mean(losses[~np.isnan(losses)])) if not np.isnan(losses).all() else math.nan


def validation_scalars(aux_K: list[LossAux]) -> dict[str, float]:
    """Mean losses of a masked token, from the sums [RATE_BINS] of every codebook's `eval_step`.

    They are those of each codebook, and of each quarter of the masking rates. A hybrid has also
    those of both halves, and of all.
    """
    if isinstance(aux_K[0], hybrid_objective.LossAux):
        values = validation_scalars([aux.parallel for aux in aux_K])
        # All stages share their prompts, and so the autoregressive half.
        found = jax.tree.map(lambda *x: np.sum(x), *aux_K).metrics()
        losses = {name: float(x) for name, x in found.items() if name.startswith("loss")}
        return values | {f"validation/{name}": loss for name, loss in losses.items()}
    values, losses = {}, []
    for stage, aux in enumerate(aux_K):
        losses.append(float(aux.metrics()["loss"]))
        values[f"validation/loss_{stage}"] = losses[-1]
        for i in range(RATE_BINS):
            if tokens := float(aux.tokens[i]):
                name = f"validation/loss_{stage}_rate_{i / RATE_BINS:g}_{(i + 1) / RATE_BINS:g}"
                values[name] = float(aux.nll[i]) / tokens
    return values | {"validation/loss": float(np.mean(losses))}


class Profile:
    """A profile of steps first..last in RUN/profile, for TensorBoard or Perfetto."""

    def __init__(self, config: RunConfig, run: Path):
        self.steps, self.folder, self.running = config.profile, run / "profile", False

    def before(self, step: int) -> None:
        """To be called before step number `step`, the first being 1."""
        if self.steps and step == self.steps[0]:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def after(self, step: int, outputs: Any) -> None:
        if self.running and step == self.steps[1]:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False


class Report:
    """What a training loop tells: a bar, scalars, and the end if it has diverged.

    Attributes:
      saved: step of the newest checkpoint; 0 is none.
    """

    def __init__(self, config: RunConfig, setup: Setup, step: int):
        first = distributed.is_first()
        self.config, self.setup, self.saved = config, setup, step
        self.window, self.profile = Window(), Profile(config, setup.run)
        self.scalars = Scalars(config, setup.run, step) if first else None
        self.learning_rate = optimizer.learning_rate(config.optimizer)
        self.bar = tqdm(
            total=config.steps, initial=step, unit="step", desc="train", smoothing=0.1,
            disable=not first,
        )  # fmt: skip

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The time of what is done within is waiting for data."""
        before = time.perf_counter()
        yield
        self.window.waited += time.perf_counter() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time of what is done within does not count as training."""
        before = time.perf_counter()
        yield
        self.window.started += time.perf_counter() - before

    def after(self, step: int, stage: int, metrics: dict[str, jax.Array], last: bool) -> None:
        """Takes in a step, and tells what happened since the last line of scalars if it is time."""
        self.profile.after(step, metrics)
        self.window.add(stage, metrics)
        self.bar.update()
        if step % self.config.log_every and not last:
            return
        self.check_finite(step)
        config, setup = self.config, self.setup
        values = self.window.scalars(
            setup.settings, config.data.batch_size, setup.frames, config.text.max_tokens
        )
        metrics["learning_rate"] = self.learning_rate(step - 1)
        values |= {f"train/{name}": value for name, value in metrics.items()}
        self.log(step, values)
        self.bar.set_postfix(
            loss=f"{values['train/loss']:.3f}",
            frames_per_s=f"{values['speed/frames_per_second']:,.0f}",
        )
        self.window = Window()

    def check_finite(self, step: int) -> None:
        """Raises `UserError` where training has diverged; waits for the steps to finish."""
        self.window.check_finite(step, self.saved)

    def log(self, step: int, values: dict[str, Any]) -> None:
        if self.scalars:
            self.scalars.log(step, values)

    def log_audio(self, step: int, wavs: list[Path]) -> None:
        if self.scalars:
            self.scalars.log_audio(step, wavs, self.config.sample_prompts)

    def flush(self) -> None:
        """Writes what is still in memory to the run's folder."""
        if self.scalars:
            self.scalars.flush()

    def close(self) -> None:
        self.bar.close()
        self.profile.close()
        if self.scalars:
            self.scalars.close()

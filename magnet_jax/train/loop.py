"""Training: one linear story from a config to a folder of checkpoints, resumed exactly.

A step is a pure function of (state, batch, stage): the batch follows from the seed and the
data position, the stage from (seed, step), all noise from (seed, each clip's own seed). So a run
that was killed and resumed is the run that never was, on however many processes and devices.

Several processes run this same program (distributed.py): each reads its share of every batch, all
save and restore together, the first alone writes everything else.
"""

import contextlib
import functools
import shlex
import signal
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from magnet_jax.checkpoints import run_folder
from magnet_jax.config import RunConfig
from magnet_jax.data import records
from magnet_jax.errors import UserError
from magnet_jax.io import lock
from magnet_jax.model import sharding, transformer
from magnet_jax.train import distributed, evaluate, objective, optimizer, steps, watch
from magnet_jax.train.setup import (
    Setup,
    first_state,
    frozen_params,
    open_data,
    push,
    restored_state,
    set_up,
    to_devices,
)


class Stop:
    """Whether any process was told to stop, by SIGTERM or Ctrl-C.

    A second signal does what it always does.
    """

    def __init__(self):
        self.caught: int | None = None
        self._handlers, self._votes = {}, deque()

    def __enter__(self) -> "Stop":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _: Any) -> None:
        self.caught = number
        self.__exit__()

    def asked(self) -> bool:
        """The same answer in all processes, which must all ask after every step.

        Votes of several processes are read a step late, so that no step waits for them.
        """
        self._votes.append(distributed.vote(self.caught is not None))
        late = jax.process_count() > 1
        return len(self._votes) > late and bool(self._votes.popleft())


def train(config: RunConfig) -> None:
    """Trains to `config.steps`, from the newest checkpoint of `config.out` if it has one.

    SIGTERM and Ctrl-C, of any process, save a checkpoint within two steps and end the run with
    status 128 + the signal, which schedulers requeue.

    Raises:
      UserError: settings, data, model and folder do not go together, a checkpoint cannot be
        written, or the loss is not finite.
    """
    distributed.start(config.distributed, say=lambda line: tqdm.write(line))
    if not config.out:
        raise UserError("no folder for the run: give --out DIR")
    with held(config.out) as check_held:
        setup = set_up(config)  # until then there is nothing to save
        with Stop() as stop:
            step = _train(config, setup, stop, check_held)
        push(setup)
    if step < config.steps:
        distributed.say_first(
            f"stopped and saved at step {step}; the same command goes on from there"
        )
        raise SystemExit(128 + (stop.caught or signal.SIGTERM))
    distributed.say_first(
        f"done, saved at step {step}; to hear it: python -m launch.sample --checkpoint "
        f'{shlex.quote(config.out)} --prompt "TEXT" --out wavs'
    )


@contextlib.contextmanager
def held(out: str) -> Iterator[Callable[[], None]]:
    """Holds a run's folder for all processes of this run, and gives what checks that it still does.

    Raises `UserError`, in all processes, where another run has it; so does the check.
    """
    with contextlib.ExitStack() as stack:
        locks = []

        def take() -> None:
            if Path(out).exists() and not Path(out).is_dir():
                raise UserError(f"--out {out}: is a file, and a run needs a folder")
            run_folder.check_place(out)
            locks.append(stack.enter_context(lock.held(out, tqdm.write)))

        distributed.first_does(take)
        yield lambda: distributed.first_does(lambda: locks[0].check())


def _describe(setup: Setup, config: RunConfig, state: dict, step: int) -> list[str]:
    """What a run is, and what may surprise."""
    settings, rate = setup.settings, optimizer.learning_rate(config.optimizer)
    mesh = ", ".join(f"{name} {size}" for name, size in settings.mesh.shape.items() if size > 1)
    parts = f" in {settings.num_parts} parts" if settings.num_parts > 1 else ""
    trained = transformer.count_params(state["params"])
    lines = [
        f"{trained / 1e6:.3g} M trained parameters, {config.data.batch_size} clips of "
        f"{setup.frames} frames a step{parts}, {settings.dtype} on {settings.mesh.size} "
        f"{jax.devices()[0].device_kind} device(s){f' ({mesh})' if mesh else ''}"
        + (f", resumed at step {step}" if step else "")
    ]
    if rate(config.steps - 1) == 0 and config.steps > config.optimizer.schedule_steps:
        lines.append(
            f"note: the learning rate is 0 from step {config.optimizer.schedule_steps} on, and "
            "the run has more: see --optimizer.schedule-steps"
        )
    if config.steps < config.optimizer.ema_updates and not config.lora.rank:
        lines.append(
            "note: the averaged weights are the first ones until step "
            f"{config.optimizer.ema_updates}: sample this run with --weights raw, or train with "
            "--optimizer.ema-updates 1"
        )
    if step >= config.steps:
        lines.append(f"{config.out} is complete: --steps {config.steps} are done")
    return lines


def _train(config: RunConfig, setup: Setup, stop: Stop, check_held: Callable[[], None]) -> int:
    """`train`, until the last step or until any process is told to stop; that step, saved."""
    settings, data_set = setup.settings, records.digest(config.data.path)
    with contextlib.ExitStack() as stack:
        batches, held_out = distributed.all_do(lambda: open_data(config, setup))
        stack.callback(batches.close)
        decoder = distributed.all_do(lambda: evaluate.open_decoder(config, setup))
        frozen = frozen_params(setup)
        # Made on all devices: one process's key would not go with the others' arrays.
        replicated = sharding.replicated(settings.mesh)
        key = jax.jit(functools.partial(jax.random.key, config.seed), out_shardings=replicated)()
        evaluation = evaluate.Evaluation(config, setup, frozen, key, held_out, decoder)
        manager = run_folder.open_manager(config)
        stack.enter_context(run_folder.closing(manager))  # waits for the last save
        step = start = manager.latest_step() or 0
        if start:
            state, position = restored_state(config, setup, manager, start)
            batches.set_state(position)
        else:
            state = first_state(setup, key)
        for line in _describe(setup, config, state, start):
            distributed.say_first(line)
        report = stack.enter_context(contextlib.closing(watch.Report(config, setup, start)))
        stopped, last = False, start >= config.steps
        # Evaluate, save, next batch, step, report: the order matters. A checkpoint is judged by its
        # validation loss, and holds the data position of the last batch that was trained on.
        while True:
            if step > start:
                with report.paused():
                    loss = evaluation(step, state["ema"], report, may_sample=not stopped)
                    if last or manager.should_save(step):
                        report.check_finite(step)
                        report.flush()
                        check_held()
                        push(setup)  # first: a checkpoint's run is whole up to its step
                        position = batches.get_state() | {"data_set": data_set}
                        run_folder.save(manager, step, state, position, loss)
                        report.saved = step
            if last:
                return step
            with report.waiting():
                batch = to_devices(next(batches), settings.mesh)
            stage = objective.stage_of_step(
                config.seed, step, config.model.num_codebooks, config.stage_weights
            )
            report.profile.before(step + 1)
            state, metrics = steps.train_step(
                state, frozen, batch, key, stage, settings=settings, local=stage > 0
            )
            step, stopped = step + 1, stop.asked()
            last = stopped or step == config.steps
            report.after(step, stage, metrics, last)

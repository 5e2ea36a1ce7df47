"""Training in several real processes: killed, stopped, and resumed with other numbers of them."""

import dataclasses
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from several import begin, losses

from magnet_jax.config import LoraConfig, MeshConfig, to_json
from magnet_jax.train import loop


def finish(processes: list[subprocess.Popen], folder: Path) -> list[int]:
    """Their exit statuses, and an end to those that hang."""
    try:
        return [process.wait(timeout=240) for process in processes]
    except subprocess.TimeoutExpired:
        logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("log_*")))
        raise AssertionError(f"a process hangs:\n{logs}") from None
    finally:
        for process in processes:
            process.kill()


def wait_for_step(run: Path, step: int, processes: list[subprocess.Popen], folder: Path) -> None:
    deadline = time.monotonic() + 240
    while tiny.newest_step(run) < step:
        logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("log_*")))
        assert all(process.poll() is None for process in processes), logs
        assert time.monotonic() < deadline, logs
        time.sleep(0.02)


def test_two_processes_fine_tune_and_sample(tmp_path):
    """Adapters of a run, on a mesh over both processes; the first one samples."""
    tiny.write_noise(tmp_path / "tokens", {"train": 8, "validation": 3})
    base = tiny.run_config(tmp_path / "tokens", tmp_path / "base", steps=1)
    tuned = dataclasses.replace(
        base,
        out=str(tmp_path / "tuned"),
        init_from=base.out,
        text=dataclasses.replace(base.text, finetune=False),
        lora=LoraConfig(rank=2),
        mesh=MeshConfig(data=1, fsdp=2),
        steps=4,
        save_every=2,
        log_every=1,
        sample_every=4,
        sample_prompts=("noise",),
    )
    file = tmp_path / "config.json"
    file.write_text(to_json(tuned))
    with pytest.MonkeyPatch.context() as patch:
        tiny.use_one_device(patch)
        loop.train(base)
        assert finish(begin(file, 2), tmp_path) == [0, 0], (tmp_path / "log_0").read_text()
        alone = dataclasses.replace(
            tuned, out=str(tmp_path / "alone"), mesh=MeshConfig(), sample_every=0
        )
        loop.train(alone)
    assert (tmp_path / "tuned" / "samples" / "step_0000004" / "00.wav").exists()
    expected = losses(tmp_path / "alone")
    assert losses(tmp_path / "tuned") == pytest.approx(expected, rel=1e-5)


def test_stopped_killed_and_resumed_with_other_numbers_of_processes(tmp_path):
    """One process; two, of which one is stopped; two, of which one is killed; and one again."""
    tiny.write_noise(tmp_path / "tokens", {"train": 20, "validation": 5})
    run, file = tmp_path / "run", tmp_path / "config.json"
    config = tiny.run_config(
        tmp_path / "tokens", run, steps=3, log_every=1, save_every=3, eval_every=9,
        mesh=MeshConfig(data=-1),
    )  # fmt: skip
    seed = int.from_bytes(os.urandom(4))
    print("moments drawn with seed", seed)
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        tiny.use_one_device(patch)
        loop.train(config)

    file.write_text(to_json(dataclasses.replace(config, steps=400)))
    two = begin(file, 2)
    wait_for_step(run, 6, two, tmp_path)
    time.sleep(rng.uniform(0, 0.3))
    two[rng.integers(2)].send_signal(signal.SIGTERM)
    assert finish(two, tmp_path) == [128 + signal.SIGTERM] * 2
    stopped_at = tiny.newest_step(run)
    assert "the same command goes on" in (tmp_path / "log_0").read_text()
    assert "the same command" not in (tmp_path / "log_1").read_text()

    two = begin(file, 2)
    wait_for_step(run, stopped_at + 3, two, tmp_path)
    time.sleep(rng.uniform(0, 0.3))
    two[rng.integers(2)].send_signal(signal.SIGKILL)
    time.sleep(0.3)
    for process in two:  # as a scheduler does when one is gone
        process.kill()
        process.wait()

    config = dataclasses.replace(config, steps=tiny.newest_step(run) + 6)
    with pytest.MonkeyPatch.context() as patch:
        tiny.use_one_device(patch)
        loop.train(config)
        whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
        loop.train(whole)
    assert losses(run).keys() == set(range(1, config.steps + 1))
    expected = losses(tmp_path / "whole")
    for step, loss in losses(run).items():
        assert loss == pytest.approx(expected[step], rel=1e-5), step

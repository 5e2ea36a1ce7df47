"""A run's folder: what may change when it goes on, and who may write there."""

import dataclasses
import errno
from collections.abc import Iterator
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
import tiny

from magnet_jax.checkpoints import pretrained, run_folder
from magnet_jax.config import LoraConfig, RunConfig
from magnet_jax.errors import PassingError, UserError
from magnet_jax.io import lock
from magnet_jax.train import loop

# What decides the numbers of a training: where it begins, what it reads and what it computes.
FIXED = {
    "objective", "seed", "condition_dropout", "stage_weights", "compute_dtype", "init_from",
    "init_codes", "init_partial",
    *(f"model.{name}" for name in (
        "kind", "num_codebooks", "codebook_size", "width", "num_heads", "num_layers", "mlp_ratio",
        "text_width", "local_context", "first_context", "span_length", "delays", "attention_bias",
        "mlp_bias", "head_bias", "query_key_norm", "cross_query_key_norm",
    )),
    *(f"text.{name}" for name in ("source", "max_tokens", "finetune", "trained")),
    *(f"data.{name}" for name in (
        "segment_seconds", "batch_size", "merge_text_p", "drop_description_p", "drop_field_p",
        "word_dropout", "shuffle",
    )),
    *(f"optimizer.{name}" for name in (
        "name", "schedule", "peak_lr", "final_lr_ratio", "embed_lr_ratio", "head_lr_ratio",
        "warmup_steps", "schedule_steps", "b1", "b2", "eps", "weight_decay", "clip_norm",
        "ema_decay", "ema_updates", "d0", "growth_rate",
    )),
    *(f"lora.{name}" for name in ("rank", "alpha", "targets")),
}  # fmt: skip


def settings(config, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value) and name not in run_folder.MUTABLE:
            yield from settings(value, f"{name}.")
        else:
            yield name


def test_each_setting_may_change_or_not():
    """A new one has to be put into `MUTABLE`, or into `FIXED` above if it changes the training."""
    names = list(settings(RunConfig()))
    assert {name for name in names if name not in run_folder.MUTABLE} == FIXED
    assert set(names) >= run_folder.MUTABLE


def test_what_sampling_alone_reads_may_change():
    config = RunConfig()
    changed = dataclasses.replace(
        config,
        prompt_seconds=3.0,
        decode=dataclasses.replace(config.decode, greedy=True),
        autoregressive=dataclasses.replace(config.autoregressive, top_k=7),
    )
    assert run_folder.changed_settings(config, changed) == []
    changed = dataclasses.replace(changed, condition_dropout=0.5)
    assert run_folder.changed_settings(config, changed) == ["condition_dropout (was 0.3, now 0.5)"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data[1]") / "tokens*"
    tiny.write_noise(directory, {"train": 20})
    with pytest.MonkeyPatch.context() as patch:
        tiny.use_one_device(patch)
        yield directory


def test_runs_of_any_name_are_trained_resumed_tuned_and_read(tokens, tmp_path):
    run = tmp_path / "sweep[lr=1]" / "run[1]"
    (tmp_path / "sweepl").mkdir()  # (which the folder's name as a pattern would be)
    config = tiny.run_config(tokens, run, steps=2, save_every=1, keep_last=1)
    loop.train(config)
    config = dataclasses.replace(config, steps=3)
    loop.train(config)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["3"]
    assert pretrained.load(run).step == 3
    tuned = dataclasses.replace(
        config,
        out=str(tmp_path / "tuned?*"),
        init_from=str(run),
        text=dataclasses.replace(config.text, finetune=False),
        lora=LoraConfig(rank=2),
        steps=1,
    )
    loop.train(tuned)
    assert pretrained.load(Path(tuned.out)).step == 1
    assert lock.NAME not in {path.name for path in run.iterdir()}


def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(tokens, tmp_path, monkeypatch):
    config = tiny.run_config(tokens, tmp_path / "run", steps=3, save_every=1)
    saved = []

    def save(manager, step, *args) -> None:
        if step == 2:  # another terminal, in the middle of it
            refused = pytest.raises(PassingError, match=f"{config.out}: another process is at work")
            with refused:
                loop.train(config)
        saved.append(step)
        return real(manager, step, *args)

    real = run_folder.save
    monkeypatch.setattr(run_folder, "save", save)
    loop.train(config)
    assert saved == [1, 2, 3]


def test_a_run_that_was_taken_over_saves_no_more(tokens, tmp_path, monkeypatch):
    config = tiny.run_config(tokens, tmp_path / "run", steps=3, save_every=1)
    save = run_folder.save

    def taken(manager, step, *args) -> None:
        save(manager, step, *args)
        if step == 2:
            (tmp_path / "run" / lock.NAME).write_text("{}")
            (tmp_path / "run" / "checkpoints" / others).mkdir()

    others = f"9{run_folder.BEGUN}"  # what the other has begun
    monkeypatch.setattr(run_folder, "save", taken)
    with pytest.raises(UserError, match=f"{lock.NAME} is that of process"):
        loop.train(config)
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"1", "2", others}


def test_a_disk_that_fills_up_while_saving_keeps_the_older_step(tmp_path, monkeypatch, capfd):
    """In the thread that writes; nothing half-written stays, and the line names the cause."""
    config = tiny.run_config("x", tmp_path / "run", keep_last=1)
    state = {"params": {"w": tiny.jnp.zeros(3)}}
    manager = run_folder.open_manager(config)
    real = ocp.type_handlers.merge_ocdbt_per_process_files

    async def full(directory, **keywords) -> None:
        if "/4." in str(directory):
            raise OSError(errno.ENOSPC, "No space left on device")
        await real(directory, **keywords)

    monkeypatch.setattr(ocp.type_handlers, "merge_ocdbt_per_process_files", full)
    capfd.readouterr()
    message = "No space left on device; whole ones are of steps: 2; make room"
    with pytest.raises(UserError, match=message), run_folder.closing(manager):
        for step in (2, 4, 6):
            run_folder.save(manager, step, state, {})
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    assert capfd.readouterr().err == ""

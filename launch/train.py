"""Trains a model, or goes on with a run: the same command does both.

python -m launch.train --config demo --data DATA --out RUN
"""

import argparse
import dataclasses
import importlib
import pkgutil
import sys

import configs
from configs import ablations
from magnet_jax import cli, errors
from magnet_jax.config import RunConfig, with_hybrid_objective
from magnet_jax.io import machine


def config_names() -> list[str]:
    """The configs that have a file of their own in configs/."""
    names = {module.name for module in pkgutil.iter_modules(configs.__path__)}
    return sorted(names - {"ablations"})


def load_config(name: str) -> RunConfig:
    """The `config` of configs/NAME.py, or the variant NAME of configs/ablations.py."""
    if name in ablations.variants:
        return ablations.variants[name]
    if name not in config_names():
        known = [*config_names(), *ablations.variants]
        raise errors.UserError(
            f"--config {name}: no such config;{cli.did_you_mean(name, known)} there are "
            f"{', '.join(config_names())}, and {len(ablations.variants)} ablations such as "
            f"{[*ablations.variants][0]}: see configs/ablations.py"
        )
    return importlib.import_module(f"configs.{name}").config


def inherited(config: RunConfig, source: str, out: str) -> RunConfig:
    """A config with the model, text encoder, clip length and sampling of the one to begin with.

    Once the run has begun, its own folder tells, and `source` may be gone.
    """
    from magnet_jax.checkpoints import pretrained, run_folder

    begun = bool(out) and run_folder.has_begun(out)
    of = pretrained.read_settings(out if begun else source)
    weights = config.stage_weights
    return dataclasses.replace(
        config,
        init_from=source,
        init_codes="random",  # (a setting for new models)
        objective=of.objective,
        model=of.model,
        # It has learnt; a run that trains it further says so again.
        text=of.text
        if begun
        else dataclasses.replace(of.text, finetune=False, trained=of.text.changed),
        stage_weights=weights if len(weights) == of.model.num_codebooks else (),
        data=dataclasses.replace(config.data, segment_seconds=of.data.segment_seconds),
        decode=of.decode,
        autoregressive=of.autoregressive,
        prompt_seconds=of.prompt_seconds,
    )


def parse(args: list[str]) -> RunConfig:
    """The run that a command line asks for.

    Raises `UserError` for settings that there are not, or that do not go together.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default="demo")
    chosen, rest = first.parse_known_args(args)
    if not {"-h", "--help", "--help-all"} & set(rest) and not any(
        w.startswith("--config") for w in args
    ):
        print("--config demo, the default", flush=True)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--init-from", "--init_from", default="")
    early.add_argument("--out", default="")
    early.add_argument("--objective", default="")
    early.add_argument("--model.kind", dest="kind", default="")
    given, _ = early.parse_known_args(rest)
    if given.kind == "musicgen":
        raise errors.UserError(
            "--model.kind musicgen: a MusicGen is imported (launch.import_audiocraft), not trained "
            "here; train a hybrid with --objective hybrid, which with the whole clip as its prompt "
            "(--prompt-seconds) is autoregressive"
        )
    default = load_config(chosen.config)
    # (a config's objective holds for whatever it begins with)
    objective = given.objective or default.objective
    if given.init_from:
        default = inherited(default, given.init_from, given.out)
    if objective == "hybrid":
        default = with_hybrid_objective(default)
    if given.kind == "hybrid" != default.model.kind:
        raise errors.UserError(
            "--model.kind hybrid: give --objective hybrid instead, which sets the kind and the "
            "delays of its codebooks as well"
        )
    config = cli.parse(
        RunConfig,
        rest,
        default=default,
        prog="python -m launch.train [--config NAME]",
        description=f"{__doc__}\n--config NAME sets the defaults, from configs/NAME.py. "
        f"Those of {chosen.config!r} are shown.",
    )
    if given.init_from and config.text.source != default.text.source:
        raise errors.UserError(
            "--text.source goes with --init-from: the text encoder is that of the model begun with"
        )
    return config


def main(args: list[str]) -> None:
    machine.keep_freed()
    config = parse(args)
    # After the command line is known to be right: these are slow to load.
    from magnet_jax import programs
    from magnet_jax.train import loop

    programs.keep_on_disk()  # a run that goes on, and one that looked for its mesh, finds its own
    loop.train(config)


if __name__ == "__main__":
    with errors.reported():
        main(sys.argv[1:])

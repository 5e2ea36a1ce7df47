"""What a run makes of its averaged parameters between updates: validation losses and samples."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from magnet_jax.checkpoints import pretrained, run_folder
from magnet_jax.codec import encodec
from magnet_jax.config import RunConfig
from magnet_jax.decode import placement, sampling
from magnet_jax.errors import UserError
from magnet_jax.io import audio
from magnet_jax.io.files import replacing_file
from magnet_jax.train import distributed, steps, watch
from magnet_jax.train.setup import Setup
from magnet_jax.train.steps import StepSettings

_network_params = jax.jit(steps.network_params, static_argnames="adapters")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Validates and samples, each at its own steps."""

    config: RunConfig
    setup: Setup
    frozen: dict
    key: jax.Array  # of the noise that hides tokens, the run's
    held_out: list[dict]  # validation batches, on the devices
    decoder: encodec.Codec | None  # of the process that writes samples

    def __call__(
        self, step: int, ema: dict, report: watch.Report, *, may_sample: bool
    ) -> float | None:
        """Validates and samples the parameters `ema` if it is time.

        Returns what the checkpoint of this step is judged by: its validation loss, infinity if it
        has none, and None if the run does not keep its best checkpoints.
        """
        config, loss = self.config, np.inf
        if self.held_out and step % config.eval_every == 0:
            report.check_finite(step)
            values = validate(ema, self.frozen, self.held_out, self.key, self.setup.settings)
            loss = values["validation/loss"]
            if not np.isfinite(loss):
                what = f"the validation loss of step {step} is {loss}"
                raise UserError(watch.diverged(what, report.saved))
            report.log(step, values)
            distributed.say_first(f"step {step}: validation loss {loss:.4f}")
        sampling_is_on = config.sample_every and config.sample_prompts and may_sample
        if sampling_is_on and step % config.sample_every == 0:
            report.check_finite(step)
            self.sample(step, ema, report)
        return loss if config.keep_best else None

    def sample(self, step: int, ema: dict, report: watch.Report) -> None:
        """Writes samples; all processes take part, and one of them writes."""
        params = whole(_network_params(self.setup.settings.lora, ema, self.frozen))
        if self.decoder:
            wavs = write_samples(self.config, self.setup, self.decoder, params, step)
            report.log_audio(step, wavs)
            tqdm.write(f"step {step}: samples in {self.config.out}/samples/{wavs[0].parent.name}")


def validate(
    params: dict, frozen: dict, batches: list[dict], key: jax.Array, settings: StepSettings
) -> dict[str, float]:
    """Validation losses over the same batches and the same masks every time."""
    aux_K = []
    for stage in range(settings.model.num_codebooks):
        found = [
            steps.eval_step(params, frozen, b, key, stage, settings=settings, local=stage > 0)
            for b in batches
        ]
        aux_K.append(jax.tree.map(lambda *x: np.sum(x, axis=0), *jax.device_get(found)))
    return watch.validation_scalars(aux_K)


def open_decoder(config: RunConfig, setup: Setup) -> encodec.Codec | None:
    """The codec that makes sample audio, where samples are wanted and written."""
    if not (config.sample_every and config.sample_prompts and distributed.is_first()):
        return None
    spec = setup.spec
    decoder = encodec.load_codec(
        run_folder.codec_source(setup.run, spec),
        num_codebooks=spec.num_codebooks,
        interleaved=spec.interleaved,
    )
    encodec.check_same_codec(spec, decoder.spec, config.data.path)
    return decoder


def write_samples(
    config: RunConfig, setup: Setup, decoder: encodec.Codec, params: tuple[dict, dict], step: int
) -> list[Path]:
    """Samples the run's prompts, always with the same seed; `params` are lm's and text's."""
    model = pretrained.Loaded(
        config=config,
        codec=setup.spec,
        codec_source=setup.spec.source,
        params={"lm": params[0]},
        t5_config=setup.t5_config,
        t5_params=params[1],
        tokenizer=setup.tokenizer,
        step=step,
        lineage={},
    )
    generated = sampling.generate(
        placement.prepare(model),
        config.sample_prompts,
        num_frames=setup.frames,
        decoding=config.sampling,
        seed=config.seed,
    )
    folder, wavs = setup.run / "samples" / f"step_{step:07d}", []
    for i, wav_CN in enumerate(decoder.decode(generated.codes_BKT)):
        wav_CN, _ = audio.normalize_loudness(wav_CN, setup.spec.sample_rate, target_lufs=-14.0)
        wavs.append(folder / f"{i:02d}.wav")
        audio.write_wav(wavs[-1], wav_CN, setup.spec.sample_rate)
    with replacing_file(folder / "prompts.txt") as temporary:
        temporary.write_text("".join(f"{p}\n" for p in config.sample_prompts), encoding="utf-8")
    return wavs


def whole(tree: Any) -> Any:
    """Global arrays as NumPy arrays, in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)

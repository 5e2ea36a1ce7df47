"""Rescoring: a second model has a say in which spans decoding keeps (section 3.3, Appendix D).

At each step MAGNeT predicts what is hidden, and the candidate goes through the rescorer, which
gives its own probability to every token. Spans are scored by a convex combination of both, and the
worst are hidden again; equation 5 and Figure 4 of the paper, which disagree on whose weight w is
(`RescoreConfig.weight` is the rescorer's share, as in the figure).

Scores need the probabilities of the candidate's tokens alone, [B, T]: those of all tokens, [B, T,
V], which equation 5 speaks of, would be V times as many numbers for the same scores.

Two rescorers ship. MusicGen and AudioGen, and a hybrid, read the candidate in one causal pass,
teacher-forced. MAGNeT, another checkpoint, reads it with the tokens in question hidden, as it has
learnt to predict hidden tokens and no others. Both have their own text encoder, of any width; their
codec must be the model's. Others can be written: `sampler.Rescorer` says how.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from magnet_jax.checkpoints import pretrained
from magnet_jax.checkpoints.pretrained import Loaded
from magnet_jax.config import KernelConfig, ModelConfig, RescoreConfig
from magnet_jax.decode import magnet, placement, tokens_of_text
from magnet_jax.decode.choose import guide
from magnet_jax.decode.parallel import codebook, with_codebook
from magnet_jax.decode.sampler import Rescorer
from magnet_jax.decode.tokens_of_text import Text
from magnet_jax.errors import UserError
from magnet_jax.model import patterns, precision, t5, teacher_forcing, transformer
from magnet_jax.model.kernels import choose_kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reading:
    """What a program is made for, of a model as rescorer."""

    model: ModelConfig
    t5_config: t5.T5Config
    guided: bool
    dtype: jnp.dtype
    kernels: KernelConfig
    platform: str


def load(source: Path | str) -> Loaded:
    """`pretrained.load`, with errors that are a rescorer's."""
    folder = None
    try:
        folder = pretrained.locate(source)
        return pretrained.load(source)
    except UserError as error:
        if folder is None or not pretrained.is_audiocraft(folder):
            raise type(error)(f"rescorer: {error}") from error.__cause__
        # (options such as --text-encoder are the other model's)
        raise UserError(
            f"rescorer {source}: import it with launch.import_audiocraft, which takes the options "
            f"named here, and give that folder ({error})"
        ) from None


def from_model(
    loaded: Loaded,
    partner: Loaded,
    *,
    guidance: float = RescoreConfig.guidance,
    weight: float = RescoreConfig.weight,
    execution: placement.Execution = placement.Execution(),
    name: str = "this model",
) -> Rescorer:
    """A MusicGen, an AudioGen or a MAGNeT as the rescorer of `partner`, in its precision.

    Args:
      guidance: coefficient of the rescorer's own guidance; 1 is none, and half the work.
      weight: its share of the scores, see `Rescorer`.
      execution: how `partner` runs; a MAGNeT as rescorer has the same kernels.
      name: what messages call the model.

    Raises `UserError` where its tokens mean something else than the partner's.
    """
    check_partners(loaded, partner, name)
    config = dataclasses.replace(loaded.config, compute_dtype=partner.config.compute_dtype)
    loaded = loaded._replace(config=config)
    read = _musicgen_reader if config.model.autoregressive else _magnet_reader
    reading = _Reading(
        model=config.model,
        t5_config=loaded.t5_config,
        guided=guidance != 1,
        dtype=precision.compute_dtype(config),
        kernels=execution.kernels,
        platform=jax.default_backend(),
    )
    loaded = placement.on_devices(loaded, execution)
    params = {"lm": loaded.params["lm"], "text": loaded.t5_params}
    params["guidance"] = np.float32(guidance)
    tokenize = functools.partial(tokens_of_text.tokenize_texts, loaded)
    return Rescorer(read(reading), params, tokenize, weight)


def check_partners(loaded: Loaded, partner: Loaded, name: str) -> None:
    """Raises `UserError` unless `partner` can be rescored, and tokens mean the same to both."""
    if not partner.config.model.parallel:
        raise UserError(
            f"a model of kind {partner.config.model.kind} has no spans to score: leave out the "
            f"rescorer {name}"
        )
    (codec, model), (its_codec, its_model) = (
        (one.codec, one.config.model) for one in (partner, loaded)
    )
    if its_codec.sha256 != codec.sha256:
        called, its = (f"{one.source} ({one.sample_rate} Hz)" for one in (codec, its_codec))
        raise UserError(
            f"rescorer {name} learnt the tokens of codec {its}, the model those of {called}"
            f"{', whose weights differ' * (its == called)}: take a rescorer of the same codec"
        )
    if its_codec.interleaved != codec.interleaved:
        raise UserError(
            f"rescorer {name} learnt {its_codec.layout}, the model {codec.layout}: take a rescorer "
            "of the same"
        )
    for what, its, wanted in (
        ("frames a second", its_codec.frame_rate, codec.frame_rate),
        ("codebooks", its_model.num_codebooks, model.num_codebooks),
        ("tokens a codebook", its_model.codebook_size, model.codebook_size),
    ):
        if its != wanted:
            raise UserError(
                f"rescorer {name} has {its:g} {what}, the model {wanted:g}: take a rescorer with "
                "as many"
            )


@transformer.exact_products
def _read_text(
    params: dict, text: Text, num_frames: int, *, reading: _Reading, dtype: jnp.dtype
) -> tuple[transformer.TextKeys, transformer.TextKeys | None]:
    """`tokens_of_text.read` by the rescorer, through its own text encoder."""
    states = tokens_of_text.encode(params["text"], reading.t5_config, text, dtype=dtype)
    model = transformer.bind(reading.model, params["lm"])
    return tokens_of_text.read(model, states, num_frames, dtype=dtype)


def _probabilities(
    logits_BTV: jax.Array, without_BTV: jax.Array | None, guidance: jax.Array, token_BT: jax.Array
) -> jax.Array:
    """What logits, guided where there are some without text too, give for tokens; [B, T]."""
    logits_BTV = guide(logits_BTV, without_BTV, guidance)
    # (past the end of a clip stand mask ids, which have no logit, and do not count)
    chosen_BT1 = jnp.take_along_axis(logits_BTV, token_BT[..., None], axis=-1, mode="clip")
    return jnp.exp(chosen_BT1[..., 0] - jax.nn.logsumexp(logits_BTV, axis=-1))


# (cached: one function object for one reading, and so one program)
@functools.cache
def _musicgen_reader(reading: _Reading) -> Callable[..., Callable[..., jax.Array]]:
    """`Rescorer.read` of a model that predicts each step from those before it."""
    config = reading.model

    def read(params, text, *, num_frames, length):
        # Past `length` the candidate has mask ids, which is what steps without a code hold anyway.
        # As many as generation takes: up to the last frame of the most delayed codebook.
        num_steps = patterns.num_steps(num_frames, config.delays) - 1
        keys, negative = _read_text(params, text, num_steps, reading=reading, dtype=reading.dtype)
        if reading.guided and (negative is not None or not config.null_text_adds_nothing):
            keys = transformer.with_null_rows(keys, negative)
        positions_1SD = jnp.asarray(transformer.sinusoids(num_steps, config.width))[None]

        def probabilities(codes_BKT, hidden_BT, stage, *, local):
            steps_BKS = patterns.to_steps(codes_BKT, config.delays, config.mask_id, num_steps)
            if reading.guided:
                steps_BKS = jnp.concatenate([steps_BKS, steps_BKS])
            model = transformer.bind(config, params["lm"])
            attend = teacher_forcing.attend_causally
            states_BSD = model.trunk(
                steps_BKS, keys, local=False, attend=attend, positions_BTD=positions_1SD
            )
            # After step t + delay comes the code of frame t: of one codebook, a slice of steps.
            delay = jnp.asarray(config.delays)[stage]
            states_BTD = jax.lax.dynamic_slice_in_dim(states_BSD, delay, num_frames, axis=1)
            logits_BTV = model.head(states_BTD, stage)
            both = jnp.split(logits_BTV, 2) if reading.guided else (logits_BTV, None)
            return _probabilities(*both, params["guidance"], codebook(codes_BKT, stage))

        return probabilities

    return read


@functools.cache
def _magnet_reader(reading: _Reading) -> Callable[..., Callable[..., jax.Array]]:
    """`Rescorer.read` of a model that predicts hidden tokens from those that are kept."""
    config = reading.model

    def read(params, text, *, num_frames, length):
        kernels = choose_kernels(
            reading.kernels, reading.platform, config, num_frames, reading.dtype
        )
        keys, negative = _read_text(params, text, num_frames, reading=reading, dtype=reading.dtype)
        network = magnet.guided_network(
            config, params["lm"], keys, num_frames, kernels=kernels, length=length,
            negative=negative,
        )  # fmt: skip

        def probabilities(codes_BKT, hidden_BT, stage, *, local):
            token_BT = codebook(codes_BKT, stage)
            given_BT = jnp.where(hidden_BT, config.mask_id, token_BT)
            codes_BKT = with_codebook(codes_BKT, given_BT, stage)
            guided = reading.guided
            states_RTD = network.trunk(
                codes_BKT, stage=stage, local=local, guided=guided, first_B=None
            )
            both = network.head(states_RTD, stage, guided=guided)
            return _probabilities(*both, params["guidance"], token_BT)

        return probabilities

    return read

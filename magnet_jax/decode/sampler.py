"""The one program from the tokens of texts to the samples of audio: no host in between.

`Sampler` is what a program is made for, `Inputs` what it takes. On a mesh it is `jax.shard_map` of
itself: clips are split over 'data', the rows of guidance over 'guidance', the frames of a clip over
'frames'. A rescorer takes part in it. A MusicGen is to it a hybrid whose beginning is the
whole clip.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from magnet_jax.codec import decoding
from magnet_jax.config import KernelConfig, ModelConfig, RescoreConfig
from magnet_jax.convert.codec_rules import SeanetConfig
from magnet_jax.decode import autoregressive, hybrid, magnet, parallel, tokens_of_text
from magnet_jax.decode.canvas import Canvas
from magnet_jax.decode.schedule import OwnSteps, Schedule
from magnet_jax.decode.tokens_of_text import Text
from magnet_jax.model import t5
from magnet_jax.prompts import Description


class Rescorer(NamedTuple):
    """A second model that judges what MAGNeT is about to keep; rescore.py has those that ship.

    Any two functions will do, such as
    `Rescorer(read, {"table": table_V}, lambda texts, text_pad_len: np.zeros(len(texts)))`.
    """

    read: Callable[..., Callable[..., jax.Array]]
    """(params, texts, *, num_frames, length) -> probabilities, traced once a clip: prepares what
    all steps share, and gives the function that `parallel.Rescoring` describes. `length` is None or
    the frames that exist of `num_frames`. One function object, one program."""
    params: Any
    """Arrays, in trees; on a mesh every device has all of them."""
    tokenize: Callable[[Sequence[Description], int | Literal["batch"] | None], Any]
    """(texts, text_pad_len) -> texts as `read` takes them: arrays of a row a clip, in trees. For
    the arguments see `tokenize_texts`; a text that is more than one is a `prompts.Prompt`."""
    weight: float = RescoreConfig.weight
    """Its share of the scores, from 0 (as without it, bit for bit) to 1 (it alone)."""


class Inputs(NamedTuple):
    """What a program takes; on a mesh the fields of `SPLIT` by clips, the others whole."""

    lm: dict  # parameters of the transformer,
    t5: dict  # of the text encoder,
    codec: dict | None  # and of EnCodec's decoder, where the program ends in samples
    text: Text  # of no rows where no clip has a text
    canvas: Canvas
    keys_B: jax.Array  # from `choose.sample_keys`
    origin_B: jax.Array  # see `parallel.Task`
    schedule: tuple[Schedule, ...]
    limit: jax.Array  # see `choose.choose_token`; one for all clips, or [B]
    length: jax.Array | None  # frames in whole spans, where those are fewer than T
    audio_length: jax.Array | None  # frames of the audio, likewise
    beginning: autoregressive.Sampling | None  # of clips that begin one step after another
    rescorer: Any = None  # parameters
    rescorer_texts: Any = None
    rescorer_weight: jax.Array | None = None
    first_B: jax.Array | None = None  # of an edit, see `parallel.Task`
    min_guidance: jax.Array | None = None  # likewise
    replayed_BKT: jax.Array | None = None  # likewise
    own_steps: OwnSteps | None = None  # likewise


SPLIT = ("text", "canvas", "keys_B", "origin_B", "rescorer_texts", "first_B", "own_steps")
SPECS = Inputs(*(P("data") if name in SPLIT else P() for name in Inputs._fields))


class Sampled(NamedTuple):
    codes_BKT: jax.Array
    hidden_PBT: jax.Array  # True where step P of parallel decoding predicted
    wav_BCN: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """What a program is made for, beside the shapes of its inputs."""

    model: ModelConfig
    t5: t5.T5Config
    codec: SeanetConfig | None
    rules: parallel.Rules
    kernels: KernelConfig
    savings: magnet.Savings
    dtype: jnp.dtype
    audio_frames: int | None  # None where it is traced, as is the length of the clip
    platform: str
    mesh: Mesh | None
    beginning: autoregressive.Beginning | None
    read_rescorer: Callable[..., Callable[..., jax.Array]] | None

    def __call__(self, inputs: Inputs) -> Sampled:
        """From the tokens of texts to tokens of audio, and to audio; on one device of the mesh."""
        states = tokens_of_text.encode(inputs.t5, self.t5, inputs.text, dtype=self.dtype)
        task = self.task(inputs)
        how = {"config": self.model, "rules": self.rules, "savings": self.savings}
        how["dtype"] = self.dtype
        if self.beginning is None:
            decoded = magnet.generate(
                inputs.lm,
                states,
                task,
                inputs.schedule,
                kernels=self.kernels,
                guidance_axis="guidance" if self.splits_guidance else None,
                **how,
            )
        else:
            decoded = hybrid.generate(
                inputs.lm, states, task, inputs.schedule, inputs.beginning,
                beginning=self.beginning, **how,
            )  # fmt: skip
        wav_BCN = None
        if self.codec is not None:
            wav_BCN = decoding.audio(
                inputs.codec,
                decoded.codes_BKT[..., : self.audio_frames],
                inputs.audio_length,
                config=self.codec,
                platform=self.platform,
            )
        return Sampled(*decoded, wav_BCN)

    def task(self, inputs: Inputs) -> parallel.Task:
        """What is decoded."""
        return parallel.Task(
            canvas=inputs.canvas,
            keys_B=inputs.keys_B,
            origin_B=inputs.origin_B,
            limit=inputs.limit,
            length=inputs.length,
            end=self.audio_frames if inputs.audio_length is None else inputs.audio_length,
            rescoring=self._rescoring(inputs),
            first_B=inputs.first_B,
            min_guidance=inputs.min_guidance,
            replayed_BKT=inputs.replayed_BKT,
            own_steps=inputs.own_steps,
        )

    def _rescoring(self, inputs: Inputs) -> parallel.Rescoring | None:
        """The whole rescorer on every device: of its axes a mesh splits it by 'data' alone."""
        if self.read_rescorer is None:
            return None
        ring = self.rules.ring
        probabilities = self.read_rescorer(
            inputs.rescorer,
            inputs.rescorer_texts,
            num_frames=ring.window if ring else inputs.canvas.codes_BKT.shape[-1],
            length=None if ring else inputs.length,
        )
        return parallel.Rescoring(probabilities, inputs.rescorer_weight)

    @property
    def skips_null_text(self) -> bool:
        """Whether rows without text need no row of text."""
        return self.savings.null_text and self.model.null_text_adds_nothing

    @property
    def splits_guidance(self) -> bool:
        """Whether rows without text are on devices of their own."""
        return self.mesh is not None and self.mesh.shape["guidance"] > 1


@functools.partial(jax.jit, static_argnames="sampler")
def sample(inputs: Inputs, *, sampler: Sampler) -> Sampled:
    """What a sampler makes of its inputs, on its mesh."""
    if sampler.mesh is None:
        return sampler(inputs)
    run = jax.shard_map(
        sampler,
        mesh=sampler.mesh,
        in_specs=(SPECS,),
        out_specs=Sampled(P("data"), P(None, "data"), P("data")),
        check_vma=False,
    )
    return run(inputs)

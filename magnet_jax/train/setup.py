"""What a run needs before its first step: settings that go together, its folder, state and data."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from magnet_jax.checkpoints import matching, pretrained, run_folder
from magnet_jax.codec import encodec
from magnet_jax.config import CodecSpec, RunConfig, from_dict
from magnet_jax.convert import t5_files
from magnet_jax.data import pipeline, records
from magnet_jax.decode import sampling
from magnet_jax.errors import UserError
from magnet_jax.io import bucket
from magnet_jax.model import precision, sharding, t5, transformer
from magnet_jax.train import distributed, optimizer, plan, steps
from magnet_jax.train.steps import StepSettings


def check_data_fits(config: RunConfig, spec: CodecSpec) -> None:
    """Raises `UserError` where data set and model do not go together."""
    if not config.model.parallel:
        raise UserError(
            f"a model of kind {config.model.kind} can be sampled from, and trained further as a "
            "hybrid alone: give --objective hybrid"
        )
    model = config.model
    pipeline.check_codebooks(config.data.path, spec, model.num_codebooks)
    if spec.codebook_size != model.codebook_size:
        raise UserError(
            f"{config.data.path} holds {spec.num_codebooks} codebooks of {spec.codebook_size} "
            f"(codec {spec.source}), the model wants {model.num_codebooks} of "
            f"{model.codebook_size}: tokenize with the model's codec (tokenization.job --codec), "
            f"or set --model.codebook-size {spec.codebook_size}"
        )
    if sampling.segment_frames(config, spec) < model.span_length:
        raise UserError(
            f"data.segment_seconds {config.data.segment_seconds} is shorter than one span of "
            f"{model.span_length} frames at {spec.frame_rate} Hz"
        )


def check_fit(config: RunConfig, spec: CodecSpec, t5_config: t5.T5Config) -> None:
    """Raises `UserError` where data set, model and text encoder do not go together."""
    check_data_fits(config, spec)
    model = config.model
    if t5_config.d_model != model.text_width:
        raise UserError(
            f"text encoder {config.text.source} is {t5_config.d_model} wide, model.text_width is "
            f"{model.text_width}: set --model.text-width {t5_config.d_model}"
        )


class Setup(NamedTuple):
    """What a run works with, beside its config; parameters are NumPy arrays."""

    spec: CodecSpec
    t5_config: t5.T5Config
    t5_params: dict
    tokenizer: Tokenizer
    lm: dict | None  # transformer to begin with, or to train adapters for
    frames: int  # T of a batch
    settings: StepSettings
    run: Path = Path()  # the run's folder
    mirror: bucket.Mirror | None = None  # what brings `run` to a bucket, if it belongs there


def _text_and_lm(
    config: RunConfig, run: Path, spec: CodecSpec, begun: bool
) -> tuple[tuple, dict | None]:
    """The text encoder, its tokenizer, and the transformer that the run starts from."""
    if begun:
        base = run_folder.read_base(run) if config.lora.rank else None
        return t5_files.load(str(run / "text")), base
    if not config.init_from:
        return t5_files.load(config.text.source), None
    loaded = pretrained.load(config.init_from)
    if loaded.codec.interleaved != spec.interleaved and not config.init_partial:
        raise UserError(
            f"{config.data.path} holds {spec.layout}, but {config.init_from} learnt "
            f"{loaded.codec.layout}: tokenize in the same way (--stereo), or give --init-partial "
            "to learn new tokens"
        )
    given, same = loaded.params["lm"], loaded.codec.sha256 == spec.sha256
    if not same and encodec.extends(spec.source, loaded.codec_source):
        given, same = _with_tonal_stream(config, loaded, spec), True
    if not same and not config.init_partial:
        raise UserError(
            f"{config.data.path} was tokenized with {spec.source}, but {config.init_from} learnt "
            f"the tokens of {loaded.codec.source}: tokenize with that codec, or give "
            "--init-partial to learn new tokens"
        )
    for name in ("local_context", "first_context", "span_length"):
        here, there = (getattr(model, name) for model in (config.model, loaded.config.model))
        if here != there:
            distributed.say_first(f"model.{name} is {here}; {config.init_from} learnt with {there}")
    wanted = jax.eval_shape(
        functools.partial(transformer.init_params, config.model), jax.random.key(0)
    )
    matched, lines = matching.match_params(
        wanted, given, config.init_partial, where=config.init_from
    )
    for line in lines if config.init_partial else lines[:1]:
        distributed.say_first(line)
    if any(leaf is None for leaf in jax.tree.leaves(matched, is_leaf=lambda x: x is None)):
        fresh = transformer.init_params(config.model, jax.random.key(config.seed))
        matched = matching.fill_params(matched, fresh)
    lm = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), matched)
    return (loaded.t5_config, loaded.t5_params, loaded.tokenizer), lm


def _with_tonal_stream(config: RunConfig, loaded: pretrained.Loaded, spec: CodecSpec) -> dict:
    """A transformer that knows a codec's own codebooks, with new ones for its tonal stream."""
    own = loaded.config.model.num_codebooks
    own -= spec.sides * encodec.is_tonal(loaded.codec_source)
    count = own + spec.sides
    if config.model.num_codebooks != count:
        raise UserError(
            f"{config.data.path}: its codec is that of {config.init_from} behind a tonal stream: "
            f"give --model.num-codebooks {count}, and as many numbers in --decode.steps"
        )
    if config.lora.rank:
        raise UserError(
            f"--lora.rank: adapters cannot learn the new tonal stream of {config.data.path}; train "
            "the weights themselves"
        )
    check_data_fits(config, spec)
    distributed.say_first(f"{config.init_from}: its codebooks follow a new tonal stream")
    fresh = _begun_with_codec(config, spec)
    return transformer.with_first_codebooks(loaded.params["lm"], fresh, spec.sides, own)


def _begun_with_codec(config: RunConfig, spec: CodecSpec) -> dict:
    """A new transformer with the codec's vectors."""
    spec = dataclasses.replace(spec, num_codebooks=config.model.num_codebooks)
    found, vectors_KVE = encodec.codebook_vectors(spec.source, spec.num_codebooks, spec.interleaved)
    encodec.check_same_codec(spec, found, config.data.path)
    keys = jax.random.split(jax.random.key(config.seed))
    fresh = transformer.init_params(config.model, keys[0])
    return jax.tree.map(np.asarray, transformer.with_code_vectors(fresh, vectors_KVE, keys[1]))


def set_up(config: RunConfig) -> Setup:
    """Checks that settings, data, model and devices go together, and prepares the run's folder.

    Raises `UserError`, in all processes if in one.
    """
    if not config.data.path:
        raise UserError("no data: give --data DIR, a folder that tokenization.job wrote")
    if bucket.is_url(config.data.path):
        raise UserError(
            f"--data {config.data.path}: records cannot be read from a bucket; copy them to "
            f"every host (mkdir -p DIR && gcloud storage rsync -r {config.data.path} DIR) and give "
            "that folder"
        )
    mirror = distributed.all_do(lambda: open_mirror(config.out))
    run = mirror.folder if mirror else Path(config.out)
    begun = distributed.first_tells(lambda: run_folder.has_begun(config.out))

    def read() -> tuple[CodecSpec, tuple[t5.T5Config, dict, Tokenizer], dict | None]:
        spec = records.read_codec_spec(config.data.path)
        if not config.init_from:
            check_data_fits(config, spec)  # before a text encoder is fetched
        text, lm = _text_and_lm(config, run, spec, begun)
        check_fit(config, spec, text[0])
        if config.init_codes == "codec" and not begun:
            lm = _begun_with_codec(config, spec)
        # Codebooks beyond the model's are neither learnt nor decoded.
        spec = dataclasses.replace(spec, num_codebooks=config.model.num_codebooks)
        return spec, (text[0], jax.tree.map(np.asarray, text[1]), text[2]), lm

    spec, text, lm = distributed.all_do(read)
    if begun:  # before a step is compiled, which may take minutes
        distributed.first_does(lambda: run_folder.check_begun(run, config, spec))
    frames, dtype = sampling.segment_frames(config, spec), precision.compute_dtype(config)
    # All must choose the same mesh and parts; devices may differ in what is free on them.
    device = distributed.broadcast_json(plan.device_memory())
    # A run that goes on takes what it took last, and so has the same bits.
    before = distributed.first_tells(lambda: _kept_choice(run)) if begun else None
    before = before and from_dict(plan.Choice, before, run_folder.STEP)
    first = plan.as_before(config, before)
    say = distributed.say_first
    if (end := optimizer.ends_at(config.optimizer)) < config.steps:
        say(
            f"note: the learning rate is 0 from step {end} on, and --steps are {config.steps}: "
            "give --optimizer.schedule-steps as many"
        )
    settings, _ = plan.choose(config, text[0], dtype, frames, device, say=say, first=first)
    base = lm if config.lora.rank else None
    distributed.first_does(lambda: run_folder.prepare_run(run, config, spec, text, base))
    now = plan.choice(config, settings)
    if note := plan.changed(before, now):
        say(note)
    distributed.first_does(lambda: plan.write_choice(run, now))
    if jax.process_count() > 1 and mirror is None:
        distributed.check_shared(run)
    setup = Setup(spec, *text, lm, frames, settings, run, mirror)
    push(setup)
    return setup


def _kept_choice(run: Path) -> dict | None:
    found = plan.read_choice(run)
    return found and dataclasses.asdict(found)


def open_mirror(out: str) -> bucket.Mirror | None:
    """What stands for a run's folder in a bucket; None for one that is none.

    Raises `UserError` where the bucket cannot be read or written.
    """
    if not bucket.is_url(out):
        return None
    bucket.check(out, f"checkpoints/.check-{jax.process_index()}")
    return bucket.Mirror(out, run_folder.UNREAD)


def push(setup: Setup) -> None:
    """Brings what the first process has written to the run's bucket, if it has one.

    Raises `UserError`, in all processes, where the bucket cannot be written.
    """
    if setup.mirror:
        distributed.first_does(setup.mirror.push)


def to_devices(batch: dict, mesh: Mesh) -> dict:
    """This process's rows as global arrays, split over the mesh."""
    where, count = sharding.batch_sharding(mesh), jax.process_count()
    return {
        name: jax.make_array_from_process_local_data(
            where, batch[name], (count * len(batch[name]), *batch[name].shape[1:])
        )
        for name in steps.INPUTS
    }


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, as global ones."""
    return jax.tree.map(
        lambda x, where: jax.make_array_from_callback(x.shape, where, lambda part: x[part]),
        tree,
        shardings,
    )


def first_state(setup: Setup, key: jax.Array) -> dict:
    """The state at step 0, made where it lives."""
    settings = setup.settings
    given, where = {}, {}
    if settings.train_text:
        given["text"] = setup.t5_params
        where["text"] = sharding.text_shardings(setup.t5_params, settings.mesh)
    if setup.lm is not None and not settings.lora.rank:
        given["lm"] = setup.lm
        where["lm"] = sharding.model_shardings(settings.model, settings.mesh)
    init = functools.partial(steps.init_state, settings)
    shardings = steps.state_shardings(settings)[1]
    return jax.jit(init, out_shardings=shardings)(key, place(given, where))


def frozen_params(setup: Setup) -> dict:
    """The parameters that are not trained, where the steps want them."""
    given = {"text": setup.t5_params, "lm": setup.lm}
    where = steps.frozen_shardings(setup.settings)[1]
    return place({name: given[name] for name in where}, where)


def restored_state(config: RunConfig, setup: Setup, manager: Any, step: int) -> tuple[dict, dict]:
    """The state and the data position of a checkpoint."""
    abstract, _ = steps.state_shardings(setup.settings)
    state = run_folder.restore(manager, step, **abstract, data=None)
    position = state.pop("data")
    replicated = sharding.replicated(setup.settings.mesh)
    all_finite = functools.partial(jax.tree.map, lambda x: jnp.isfinite(x).all())
    flags = jax.device_get(jax.jit(all_finite, out_shardings=replicated)(state))
    for path, is_finite in jax.tree.leaves_with_path(flags):
        if not is_finite:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"{manager.directory / str(step)}: the tensor {name} holds NaN or infinity; move "
                "that folder away to go on from an earlier step, or begin anew"
            )
    run_folder.check_data_set(config, step, position.pop("data_set"))
    return state, position


def open_data(config: RunConfig, setup: Setup) -> tuple[Any, list[dict]]:
    """The endless training batches, and all validation batches, on the devices."""
    keywords = dict(
        frames=setup.frames,
        num_codebooks=config.model.num_codebooks,
        tokenizer=setup.tokenizer,
        max_tokens=config.text.max_tokens,
    )
    batches = pipeline.make_train_iterator(config.data, **keywords, seed=config.seed)
    if not config.eval_every:
        return batches, []
    if not records.has_split(config.data.path, "validation"):
        if config.keep_best:
            raise UserError(f"keep_best: {config.data.path} has no validation split to judge by")
        distributed.say_first(
            f"{config.data.path} has no validation split: no validation loss is computed"
        )
        return batches, []
    held_out = pipeline.validation_batches(config.data, **keywords, num_batches=config.eval_batches)
    return batches, [to_devices(batch, setup.settings.mesh) for batch in held_out]

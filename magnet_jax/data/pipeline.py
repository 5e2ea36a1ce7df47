"""Training and validation batches: records -> random crops with augmented, tokenized text.

The stream is a pure function of (records, config, seed): threads, hosts and interruptions change
nothing. A batch is a dict:

    codes_BKT int32, 0 where padded;    valid_BT bool, False where padded;
    text_ids_BS int32, text_mask_BS bool (all False: no text);
    offset_B float32, seconds from the start of the track to the start of the crop;
    seed_B int32, a random number of the example's own, for masks that depend on nothing else.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from tokenizers import Tokenizer

from magnet_jax.config import CodecSpec, DataConfig
from magnet_jax.data import records
from magnet_jax.errors import UserError
from magnet_jax.model import t5

MERGED_FIELDS = ("genre", "instrument", "bpm", "key", "moods", "keywords")
"""Metadata that a description is merged with, as in AudioCraft; titles and names stay out."""


def field_texts(info: dict[str, Any]) -> list[str]:
    """'name: value' for each of `MERGED_FIELDS` that a record's metadata has a value of."""
    texts = []
    for name in MERGED_FIELDS:
        value = info.get(name)
        words = [_word(item) for item in (value if isinstance(value, list) else [value])]
        if text := ", ".join(word for word in words if word):
            texts.append(f"{name}: {text}")
    return texts


def _word(value: Any) -> str:
    """A text or number in words; '' for all else, which says nothing that could be heard."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return ""
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else ""
    return str(value).strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What the rows of a batch are cut to."""

    frames: int
    """T of a batch."""
    num_codebooks: int
    """K of a batch; records may have more."""
    frame_rate: float
    """Frames a second of the records."""
    tokenizer: Tokenizer
    """T5's, see `t5_files.load`."""
    max_tokens: int
    """S of a batch."""


def merge_text(
    description: str, info: dict[str, Any], rng: np.random.Generator, config: DataConfig
) -> str:
    """The description, or with probability `config.merge_text_p` a mix of it and the metadata.

    A mix keeps each field with 1 - drop_field_p, in random order, after the description, kept with
    1 - drop_description_p; it may come out empty (MusicGen, arXiv 2306.05284, section 4.1).
    """
    if rng.random() >= config.merge_text_p:
        return description
    parts = [text for text in field_texts(info) if rng.random() >= config.drop_field_p]
    rng.shuffle(parts)
    if rng.random() >= config.drop_description_p and description.strip():
        parts.insert(0, description.strip().rstrip("."))
    return ". ".join(parts)


def drop_words(text: str, rng: np.random.Generator, probability: float) -> str:
    """The text without the words that chance takes, each with the same probability."""
    return " ".join(word for word in text.split() if rng.random() >= probability)


def make_train_iterator(
    config: DataConfig,
    *,
    seed: int,
    shard_options: grain.sharding.ShardOptions | None = None,
    **layout: Any,
) -> grain.experimental.ElasticIterator:
    """Endless training batches of this host's share; `get_state()` is one integer, all it takes.

    Args:
      config: `path` is the folder that tokenization wrote; `batch_size` counts all hosts.
      seed: of order, crops, text and `seed_B`; not negative.
      shard_options: this host's share; by default JAX's process index and count.
      layout: the fields of `Layout` but `frame_rate`, which the data set has.

    Raises:
      UserError: no data set there, too few codebooks, or a batch that the hosts cannot share.
    """
    cut = _layout(config, **layout)
    examples = _examples(config, "train")
    return train_iterator(examples, config, cut, seed=seed, shard_options=shard_options)


def train_iterator(
    examples: grain.MapDataset,
    config: DataConfig,
    layout: Layout,
    *,
    seed: int,
    shard_options: grain.sharding.ShardOptions | None = None,
) -> grain.experimental.ElasticIterator:
    """`make_train_iterator` of any random access to what `records.decode_example` gives."""
    shard_options = _checked_share(config, shard_options)
    if len(examples) == 0:
        raise UserError(f"data set {config.path}: no training records in it")
    if seed < 0:
        raise UserError(f"seed must not be negative, and is {seed}")
    # One seed a step of the pipeline: another step put in between shifts no other's numbers.
    order_seed, example_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
    if config.shuffle:
        examples = examples.shuffle(seed=order_seed)
    examples = examples.repeat().random_map(
        functools.partial(random_example, config=config, layout=layout), seed=example_seed
    )
    return grain.experimental.ElasticIterator(
        examples,
        config.batch_size,
        shard_options,
        read_options=grain.ReadOptions(
            num_threads=config.num_threads, prefetch_buffer_size=config.prefetch
        ),
    )


def validation_batches(
    config: DataConfig,
    *,
    num_batches: int | None = None,
    shard_options: grain.sharding.ShardOptions | None = None,
    **layout: Any,
) -> Iterator[dict[str, np.ndarray]]:
    """The validation split, always the same: the first crop of each record, its plain description.

    Args as in `make_train_iterator`; `num_batches` ends it early. The last batch is filled up with
    rows whose `valid_BT` and `text_mask_BS` are False. `seed_B` is the record's number. A data set
    too small to have a validation split gives no batch.
    """
    cut = _layout(config, **layout)
    if not records.has_split(config.path, "validation"):
        return iter(())
    examples = _examples(config, "validation")
    return first_crops(examples, config, cut, num_batches=num_batches, shard_options=shard_options)


def first_crops(
    examples: grain.MapDataset,
    config: DataConfig,
    layout: Layout,
    *,
    num_batches: int | None = None,
    shard_options: grain.sharding.ShardOptions | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """`validation_batches` of any random access to what `records.decode_example` gives."""
    shard_options = _checked_share(config, shard_options)
    total = math.ceil(len(examples) / config.batch_size)
    total = total if num_batches is None else min(total, num_batches)
    blank = {"codes_KT": np.zeros((layout.num_codebooks, 0), np.int16), "caption": "", "start": 0.0}

    def batch(first: int) -> dict[str, np.ndarray]:
        rows = []
        # every n-th row from this host's first, as ElasticIterator deals them
        for i in range(shard_options.shard_index, config.batch_size, shard_options.shard_count):
            example = examples[first + i] if first + i < len(examples) else blank
            rows.append(_example(example, example["caption"], layout, 0, first + i))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    return (batch(number * config.batch_size) for number in range(total))


def random_example(
    example: dict[str, Any], rng: np.random.Generator, *, config: DataConfig, layout: Layout
) -> dict[str, np.ndarray]:
    """One row of a training batch from a decoded record: a random crop, with augmented text."""
    # the crop first: settings of the text then leave seeds and crops as they are
    seed = int(rng.integers(0, 2**31))
    room = max(0, example["codes_KT"].shape[1] - layout.frames)
    first_frame = int(rng.integers(0, room + 1))
    captions = records.all_captions(example["caption"], example["info"])
    # No draw where there is no choice.
    number = int(rng.integers(len(captions))) if len(captions) > 1 else 0
    text = merge_text(captions[number], example["info"], rng, config)
    text = drop_words(text, rng, config.word_dropout)
    return _example(example, text, layout, first_frame, seed)


def _example(
    example: dict[str, Any], text: str, layout: Layout, first_frame: int, seed: int
) -> dict[str, np.ndarray]:
    """One row of a batch, under the names that the batch of rows has."""
    codes_KT, frames, num_codebooks = example["codes_KT"], layout.frames, layout.num_codebooks
    if codes_KT.shape[0] < num_codebooks:
        raise UserError(
            f"record of {example['track_id']!r}: {codes_KT.shape[0]} codebooks, and the model has "
            f"{num_codebooks}"
        )
    crop_KT = codes_KT[:num_codebooks, first_frame : first_frame + frames]
    padded_KT = np.zeros((num_codebooks, frames), np.int32)
    padded_KT[:, : crop_KT.shape[1]] = crop_KT
    text_ids_S, text_mask_S = t5.tokenize(layout.tokenizer, text, layout.max_tokens)
    return {
        "codes_BKT": padded_KT,
        "valid_BT": np.arange(frames) < crop_KT.shape[1],
        "text_ids_BS": text_ids_S,
        "text_mask_BS": text_mask_S,
        "offset_B": np.float32(example["start"] + first_frame / layout.frame_rate),
        "seed_B": np.int32(seed),
    }


def check_codebooks(path: str, spec: CodecSpec, num_codebooks: int) -> None:
    """Raises `UserError` where a model of so many codebooks cannot learn what a data set holds."""
    if spec.interleaved and spec.num_codebooks != num_codebooks:  # it takes all of them
        raise UserError(
            f"data set {path}: interleaved stereo of {spec.num_codebooks} codebooks, "
            f"{spec.num_codebooks // 2} of each side, and the model has {num_codebooks}: set "
            f"--model.num-codebooks {spec.num_codebooks} (and as many --decode.steps)"
        )
    if spec.num_codebooks < num_codebooks:
        raise UserError(
            f"data set {path}: {spec.num_codebooks} codebooks, and the model has {num_codebooks}: "
            f"set --model.num-codebooks to at most {spec.num_codebooks}, or tokenize with the "
            "model's codec"
        )


def _examples(config: DataConfig, split: str) -> grain.MapDataset:
    source = records.open_split(config.path, split)
    return grain.MapDataset.source(source).map(records.decode_example)


def _layout(config: DataConfig, *, num_codebooks: int, **others: Any) -> Layout:
    spec = records.read_codec_spec(config.path)
    check_codebooks(config.path, spec, num_codebooks)
    return Layout(num_codebooks=num_codebooks, frame_rate=spec.frame_rate, **others)


def _checked_share(
    config: DataConfig, shard_options: grain.sharding.ShardOptions | None
) -> grain.sharding.ShardOptions:
    if shard_options is None:
        shard_options = grain.sharding.ShardByJaxProcess(drop_remainder=True)
    if config.batch_size % shard_options.shard_count:
        raise UserError(
            f"data.batch_size {config.batch_size} must be a multiple of the "
            f"{shard_options.shard_count} hosts"
        )
    return shard_options

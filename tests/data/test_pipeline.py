import collections
import dataclasses
import itertools
import pickle

import grain
import numpy as np
import pytest

from magnet_jax.config import CodecSpec, DataConfig
from magnet_jax.convert import t5_files
from magnet_jax.data import pipeline, records
from magnet_jax.errors import UserError

FRAMES, RATE, TOKENS = 40, 50.0, 48
PLAIN = {"merge_text_p": 0.0, "word_dropout": 0.0}
LENGTHS = [100, 64, 41, 40, 39, 1, 90]
INFO = {
    "title": "Not for the text",
    "genre": "folk",
    "instrument": "harp",
    "bpm": 90,
    "key": None,
    "moods": [],
    "keywords": ["slow", "soft"],
}
FIELDS = {"genre: folk", "instrument: harp", "bpm: 90", "keywords: slow, soft"}


@pytest.fixture(scope="module")
def tokenizer():
    return t5_files.load("embedded")[2]


def example(index):
    """Codebook 0 tells the record, codebook 1 the frame."""
    length = LENGTHS[index]
    codes_KT = np.stack([np.full(length, index), np.arange(length), np.arange(length) % 3])
    return {
        "codes_KT": codes_KT.astype(np.int16),
        "caption": f"track {index}",
        "info": INFO,
        "track_id": f"folder/{index}",
        "source_path": f"folder/{index}.flac",
        "start": 120.0 * (index % 2),
        "duration": length / RATE,
    }


EXAMPLES = grain.MapDataset.source([example(i) for i in range(len(LENGTHS))])


def layout(tokenizer):
    return pipeline.Layout(
        frames=FRAMES, num_codebooks=2, frame_rate=RATE, tokenizer=tokenizer, max_tokens=TOKENS
    )


def train(tokenizer, *, seed=0, host=0, hosts=1, examples=EXAMPLES, **changes):
    values = {"path": "memory", "batch_size": 4, "num_threads": 1, "prefetch": 2}
    return pipeline.train_iterator(
        examples,
        DataConfig(**(values | changes)),
        layout(tokenizer),
        seed=seed,
        shard_options=grain.sharding.ShardOptions(host, hosts, drop_remainder=True),
    )


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def rows(batches):
    """All rows of batches, one dict each."""
    return [
        {name: array[i] for name, array in batch.items()}
        for batch in batches
        for i in range(len(batch["offset_B"]))
    ]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def record_of(row):
    return int(row["codes_BKT"][0, 0])


def test_batches_have_the_shapes_and_types_they_promise(tokenizer):
    batch = next(train(tokenizer))
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "codes_BKT": ((4, 2, FRAMES), "int32"),
        "valid_BT": ((4, FRAMES), "bool"),
        "text_ids_BS": ((4, TOKENS), "int32"),
        "text_mask_BS": ((4, TOKENS), "bool"),
        "offset_B": ((4,), "float32"),
        "seed_B": ((4,), "int32"),
    }


def test_crops_are_the_record_at_their_offset(tokenizer):
    firsts = collections.defaultdict(set)
    for row in rows(take(train(tokenizer, **PLAIN), 100)):
        i = record_of(row)
        first, length = int(row["codes_BKT"][1, 0]), min(LENGTHS[i], FRAMES)
        firsts[i].add(first)
        expected = example(i)["codes_KT"][:2, first : first + length]
        assert expected.shape[1] == length  # a long record is never cropped into its padding
        np.testing.assert_array_equal(row["codes_BKT"][:, :length], expected)
        assert not row["codes_BKT"][:, length:].any()
        np.testing.assert_array_equal(row["valid_BT"], np.arange(FRAMES) < length)
        assert row["offset_B"] == pytest.approx(120.0 * (i % 2) + first / RATE, abs=1e-4)
        text = tokenizer.decode(row["text_ids_BS"][row["text_mask_BS"]])
        assert text == f"track {i}"
    # crops differ between epochs, and reach both ends
    assert firsts[3] == firsts[4] == firsts[5] == {0}
    assert firsts[2] == {0, 1}
    assert len(firsts[1]) > 12 and firsts[1] <= set(range(25))


def test_each_epoch_is_a_permutation_of_its_own(tokenizer):
    order = [record_of(row) for row in rows(take(train(tokenizer, batch_size=7), 6))]
    epochs = [tuple(order[i : i + 7]) for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 3
    other = [record_of(row) for row in rows(take(train(tokenizer, batch_size=7, seed=1), 6))]
    assert other != order and other[:35] != order[7:]  # nor is it the next epoch of another seed
    plain = [record_of(row) for row in rows(take(train(tokenizer, shuffle=False), 7))]
    assert plain == [i % 7 for i in range(28)]


def test_threads_change_nothing(tokenizer):
    expected = take(train(tokenizer), 12)
    for threads, prefetch in [(0, 0), (2, 3), (8, 16)]:
        iterator = train(tokenizer, num_threads=threads, prefetch=prefetch)
        assert_same(take(iterator, 12), expected)


def test_resuming_changes_nothing(tokenizer):
    expected = take(train(tokenizer), 12)
    for done in (0, 1, 5):
        first = train(tokenizer, num_threads=2, prefetch=4)
        take(first, done)
        state = first.get_state()
        assert all(isinstance(value, int) for value in state.values()) and len(state) == 1
        second = train(tokenizer)
        second.set_state(state)
        assert_same(take(second, 12 - done), expected[done:])


def test_two_hosts_interleaved_are_one(tokenizer):
    whole = rows(take(train(tokenizer), 8))
    halves = [rows(take(train(tokenizer, host=h, hosts=2), 8)) for h in range(2)]
    assert_same(whole, list(itertools.chain.from_iterable(zip(*halves))))
    # and a run of one host goes on as one of two
    first = train(tokenizer)
    take(first, 3)
    resumed = []
    for host in range(2):
        iterator = train(tokenizer, host=host, hosts=2)
        iterator.set_state(first.get_state())
        resumed.append(rows(take(iterator, 5)))
    assert_same(whole[12:], list(itertools.chain.from_iterable(zip(*resumed))))


def test_text_settings_leave_order_crops_and_seeds_alone(tokenizer):
    left = take(train(tokenizer, **PLAIN), 10)
    right = take(train(tokenizer, merge_text_p=1.0, word_dropout=0.5), 10)
    for a, b in zip(left, right):
        for name in ("codes_BKT", "offset_B", "seed_B"):
            np.testing.assert_array_equal(a[name], b[name])
    assert any((a["text_ids_BS"] != b["text_ids_BS"]).any() for a, b in zip(left, right))


def test_seeds_are_the_examples_own(tokenizer):
    seeds = [int(row["seed_B"]) for row in rows(take(train(tokenizer), 50))]
    assert len(set(seeds)) == 200 and min(seeds) >= 0


def test_a_batch_may_be_larger_than_the_data_set(tokenizer):
    counts = collections.Counter(
        record_of(row) for row in rows(take(train(tokenizer, batch_size=28), 2))
    )
    assert counts == dict.fromkeys(range(7), 8)


def test_pipeline_can_be_pickled(tokenizer):
    iterator = train(tokenizer)
    copy = pickle.loads(pickle.dumps(iterator))
    assert_same(take(copy, 3), take(iterator, 3))


def merged(count=4000, description="An Irish tune.", info=INFO, **probabilities):
    rng, config = np.random.default_rng(0), DataConfig(**probabilities)
    return [pipeline.merge_text(description, info, rng, config) for _ in range(count)]


def test_one_of_several_captions_is_drawn_at_each_visit(tokenizer):
    config = dataclasses.replace(DataConfig(), merge_text_p=0.0, word_dropout=0.0)
    layout = pipeline.Layout(
        frames=20, num_codebooks=4, frame_rate=50.0, tokenizer=tokenizer, max_tokens=32
    )
    example = {"codes_KT": np.zeros((4, 30), np.int16), "caption": "an old fiddle", "track_id": "a",
               "start": 0.0, "duration": 0.6}  # fmt: skip

    def ids(caption, info, seed):
        rng = np.random.default_rng(seed)
        row = example | {"caption": caption, "info": info}
        drawn = pipeline.random_example(row, rng, config=config, layout=layout)
        return tuple(drawn["text_ids_BS"])

    several = {"captions": ["a slow waltz", "", 3, "drums"]}
    counts = collections.Counter(ids("an old fiddle", several, seed) for seed in range(600))
    assert set(counts) == {ids(text, {}, 0) for text in ("an old fiddle", "a slow waltz", "drums")}
    assert min(counts.values()) > 150
    for nothing in ({"captions": "drums"}, {"captions": {"a": 1}}, {"captions": []}):
        assert records.all_captions("an old fiddle", nothing) == ["an old fiddle"]


def test_field_texts_take_the_known_fields_that_have_a_value():
    assert set(pipeline.field_texts(INFO)) == FIELDS
    assert pipeline.field_texts({"bpm": 92.5, "genre": "  ", "unknown": "x"}) == ["bpm: 92.5"]
    assert pipeline.field_texts({"bpm": 90.0, "moods": "calm", "key": {}}) == [
        "bpm: 90",
        "moods: calm",
    ]


def test_field_texts_leave_out_what_cannot_be_heard():
    odd = {"bpm": True, "moods": ["", " ", None], "keywords": {"a": 1}, "key": float("nan")}
    assert pipeline.field_texts(odd) == []
    mixed = {"moods": ["calm", " ", False, ["x"], 3, 2.5], "bpm": float("inf"), "genre": " folk "}
    assert pipeline.field_texts(mixed) == ["genre: folk", "moods: calm, 3, 2.5"]


def test_merging_at_probabilities_zero_and_one():
    def texts(merge, description, field):
        return set(
            merged(300, merge_text_p=merge, drop_description_p=description, drop_field_p=field)
        )

    assert texts(0, 1, 0) == {"An Irish tune."}
    assert texts(1, 0, 1) == {"An Irish tune"}
    assert texts(1, 1, 1) == {""}
    everything = texts(1, 0, 0)
    assert len(everything) == 24  # every order of the four fields, the description always first
    for text in everything:
        first, *fields = text.split(". ")
        assert first == "An Irish tune" and set(fields) == FIELDS
    for text in texts(1, 1, 0):
        assert set(text.split(". ")) == FIELDS
    no_fields = merged(9, info={}, merge_text_p=1, drop_description_p=0, drop_field_p=0)
    assert set(no_fields) == {"An Irish tune"}
    only_fields = merged(9, description="", merge_text_p=1, drop_description_p=0, drop_field_p=0)
    assert all(set(text.split(". ")) == FIELDS for text in only_fields)


def test_merging_keeps_to_its_probabilities():
    texts = merged(merge_text_p=0.25, drop_description_p=0.4, drop_field_p=0.3)
    mixes = [text for text in texts if text != "An Irish tune."]
    # (4000 draws: three standard errors are 0.02; 1000 mixes: 0.05)
    assert len(mixes) / len(texts) == pytest.approx(0.25, abs=0.025)
    parts = [set(text.split(". ")) for text in mixes]
    described = sum("An Irish tune" in part for part in parts) / len(mixes)
    assert described == pytest.approx(0.6, abs=0.05)
    for field in FIELDS:
        kept = sum(field in part for part in parts) / len(mixes)
        assert kept == pytest.approx(0.7, abs=0.05), field
    pairs = sum({"bpm: 90", "genre: folk"} <= part for part in parts) / len(mixes)
    assert pairs == pytest.approx(0.49, abs=0.05)  # each on its own


def test_word_dropout_keeps_to_its_probability():
    rng = np.random.default_rng(0)
    text = " ".join(f"w{i}" for i in range(5000))
    assert pipeline.drop_words(text, rng, 0.0) == text
    assert pipeline.drop_words(text, rng, 1.0) == ""
    left = pipeline.drop_words(text, rng, 0.3).split()
    assert len(left) / 5000 == pytest.approx(0.7, abs=0.02)
    assert [int(word[1:]) for word in left] == sorted(int(word[1:]) for word in left)


def test_text_that_is_all_dropped_is_no_text(tokenizer):
    batch = next(train(tokenizer, word_dropout=1.0))
    assert not batch["text_mask_BS"].any()


def first_crops(tokenizer, host=0, hosts=1, num_batches=None, **changes):
    values = {"path": "memory", "batch_size": 4, "merge_text_p": 1.0, "word_dropout": 0.9}
    return list(
        pipeline.first_crops(
            EXAMPLES,
            DataConfig(**(values | changes)),
            layout(tokenizer),
            num_batches=num_batches,
            shard_options=grain.sharding.ShardOptions(host, hosts, drop_remainder=True),
        )
    )


def test_validation_is_fixed_plain_and_filled_up(tokenizer):
    batches = first_crops(tokenizer)
    assert_same(first_crops(tokenizer), batches)
    assert len(batches) == 2 and all(len(batch["seed_B"]) == 4 for batch in batches)
    assert next(train(tokenizer)).keys() == batches[0].keys()
    for name, array in next(train(tokenizer)).items():
        assert batches[0][name].dtype == array.dtype and batches[0][name].shape == array.shape
    *real, filler = rows(batches)
    for i, row in enumerate(real):
        length = min(LENGTHS[i], FRAMES)
        np.testing.assert_array_equal(
            row["codes_BKT"][:, :length], example(i)["codes_KT"][:2, :length]
        )
        assert row["valid_BT"].sum() == length
        assert row["offset_B"] == 120.0 * (i % 2)
        text = tokenizer.decode(row["text_ids_BS"][row["text_mask_BS"]])
        assert text == f"track {i}"  # neither merged nor thinned out
    assert not filler["valid_BT"].any() and not filler["text_mask_BS"].any()
    assert len({int(row["seed_B"]) for row in rows(batches)}) == 8

    assert_same(first_crops(tokenizer, num_batches=1), batches[:1])
    halves = [rows(first_crops(tokenizer, host=h, hosts=2)) for h in range(2)]
    assert_same(rows(batches), list(itertools.chain.from_iterable(zip(*halves))))


def test_bad_requests_are_told_in_one_line(tokenizer):
    with pytest.raises(UserError, match="batch_size 4 must be a multiple of the 3 hosts"):
        train(tokenizer, hosts=3)
    with pytest.raises(UserError, match="no training records"):
        train(tokenizer, examples=grain.MapDataset.source([]))
    with pytest.raises(UserError, match="seed must not be negative"):
        train(tokenizer, seed=-1)


SPEC = CodecSpec(
    source="embedded",
    sha256="0" * 64,
    sample_rate=16000,
    channels=1,
    frame_rate=RATE,
    num_codebooks=3,
    codebook_size=1024,
)


def on_disk(index):
    decoded = example(index)
    return {
        "codes": decoded["codes_KT"],
        "info": '{"genre": "folk"}',
        **{k: decoded[k] for k in ("caption", "track_id", "source_path", "start", "duration")},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set as tokenization writes it: five records to train on, two to validate with."""
    directory = tmp_path_factory.mktemp("tokens")
    shards = {
        split: [records.write_shard(directory / f"{split}.part", 3, map(on_disk, indices))]
        for split, indices in {"train": range(5), "validation": range(5, 7)}.items()
    }
    records.finalise(directory, shards, SPEC, {})
    return directory


def test_batches_of_a_data_set_on_disk(folder, tokenizer, tmp_path):
    settings = {"frames": FRAMES, "num_codebooks": 2, "tokenizer": tokenizer, "max_tokens": TOKENS}
    cfg = DataConfig(path=str(folder), batch_size=4, **PLAIN)
    iterator = pipeline.make_train_iterator(cfg, seed=3, **settings)
    copy = pickle.loads(pickle.dumps(iterator))
    batches = take(iterator, 5)
    assert_same(take(copy, 5), batches)
    counts = collections.Counter(record_of(row) for row in rows(batches))
    assert counts == dict.fromkeys(range(5), 4)
    for row in rows(batches):
        i, first = record_of(row), int(row["codes_BKT"][1, 0])
        assert row["offset_B"] == pytest.approx(120.0 * (i % 2) + first / RATE, abs=1e-4)

    validation = rows(pipeline.validation_batches(cfg, **settings))
    assert [record_of(row) for row in validation[:2]] == [5, 6] and len(validation) == 4

    small = tmp_path / "small"
    small.mkdir()
    shard = records.write_shard(small / "part", 3, [on_disk(0)])
    records.finalise(small, {"train": [shard], "validation": []}, SPEC, {})
    cfg_of_small = dataclasses.replace(cfg, path=str(small))
    assert list(pipeline.validation_batches(cfg_of_small, **settings)) == []

    with pytest.raises(UserError, match="3 codebooks, and the model has 4"):
        pipeline.make_train_iterator(cfg, seed=3, **(settings | {"num_codebooks": 4}))
    with pytest.raises(UserError, match="no such folder"):
        nowhere = dataclasses.replace(cfg, path=str(folder / "nowhere"))
        pipeline.make_train_iterator(nowhere, seed=3, **settings)

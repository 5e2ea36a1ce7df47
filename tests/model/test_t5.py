import dataclasses
import io
import json
import os
import re
import resource
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from launch import make_text_encoder
from magnet_jax import config
from magnet_jax.convert import t5_files
from magnet_jax.errors import UserError
from magnet_jax.io import trees
from magnet_jax.io.torch_env import import_torch
from magnet_jax.model import t5

CLIPS = config.ASSETS / "clips"
TEXTS = ["A Bach chorale on church organ, slow", "jazz", "", "Zither & kazoo: 7/8 at 133 BPM!"]


@pytest.fixture(scope="module")
def embedded():
    return t5_files.load("embedded")


def tiny_config(kind="relu", **changes):
    # a vocabulary above the tokenizer's, as in the published checkpoints
    values = {
        "d_model": 24,
        "d_kv": 5,
        "d_ff": 40,
        "num_layers": 3,
        "num_heads": 3,
        "vocab_size": 140,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "feed_forward_proj": kind,
    }
    return t5.T5Config(**(values | changes))


def random_params(cfg, seed=0):
    """`init`, with norm scales other than 1 so that leaving one out shows."""
    params = t5.init(cfg, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    for norm in (params["blocks"]["norm_attn"], params["blocks"]["norm_mlp"], params["norm_final"]):
        norm["scale"] = jnp.asarray(rng.uniform(0.5, 1.5, norm["scale"].shape), jnp.float32)
    return params


def random_batch(rows, length, lengths, seed=0):
    ids_BS = np.random.default_rng(seed).integers(2, 133, (rows, length)).astype(np.int32)
    mask_BS = np.arange(length)[None] < np.asarray(lengths)[:, None]
    return np.where(mask_BS, ids_BS, 0), mask_BS


def assert_same_tree(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def transformers_states(model, ids_BS, mask_BS):
    torch = import_torch()
    with torch.no_grad():
        states = model(
            input_ids=torch.tensor(ids_BS, dtype=torch.long),
            attention_mask=torch.tensor(mask_BS, dtype=torch.long),
        )
    return states.last_hidden_state.numpy()


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_equals_transformers_both_ways(kind, tmp_path, embedded):
    """Their checkpoint here, ours there: same states; a decoder in the file is left out."""
    torch = import_torch()
    import transformers

    torch.manual_seed(1)
    cfg = tiny_config(kind)
    whole = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**dataclasses.asdict(cfg), num_decoder_layers=1)
    ).eval()
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            if "layer_norm" in name:
                weight.uniform_(0.5, 1.5)
    whole.save_pretrained(tmp_path / "theirs")
    shutil.copy(config.ASSETS / "text" / "tokenizer.json", tmp_path / "theirs")
    found, params, _ = t5_files.load(str(tmp_path / "theirs"))
    assert found == cfg

    ids_BS, mask_BS = random_batch(4, 33, [33, 17, 1, 32])
    expected = transformers_states(whole.encoder, ids_BS, mask_BS)
    states = jax.jit(t5.encode, static_argnums=1)(params, cfg, ids_BS, mask_BS)
    assert np.abs(expected[mask_BS]).max() > 1
    np.testing.assert_allclose(states[mask_BS], expected[mask_BS], atol=1e-4, rtol=0)
    assert not np.any(np.asarray(states)[~mask_BS])

    ours = random_params(cfg, seed=2)
    t5_files.save(tmp_path / "ours", cfg, ours, embedded[2])
    model, report = transformers.T5EncoderModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    states = t5.encode(ours, cfg, ids_BS, mask_BS)
    expected = transformers_states(model.eval(), ids_BS, mask_BS)
    np.testing.assert_allclose(states[mask_BS], expected[mask_BS], atol=1e-4, rtol=0)

    again = t5_files.load(str(tmp_path / "ours"))
    assert again[0] == cfg
    assert_same_tree(again[1], ours)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    for text in filter(None, TEXTS):
        ids_S, mask_S = t5.tokenize(again[2], text, 64)
        assert tokenizer(text).input_ids == ids_S[mask_S].tolist()


def test_distance_buckets_equal_transformers():
    torch = import_torch()
    from transformers.models.t5.modeling_t5 import T5Attention

    distance_SS = torch.arange(700)[None, :] - torch.arange(700)[:, None]
    for buckets, reach in [(32, 128), (8, 20), (64, 300)]:
        expected = T5Attention._relative_position_bucket(distance_SS, True, buckets, reach)
        cfg = tiny_config(
            relative_attention_num_buckets=buckets, relative_attention_max_distance=reach
        )
        np.testing.assert_array_equal(t5._relative_buckets(cfg, 700), expected.numpy())


def test_initial_scales_are_t5s():
    import_torch()
    import transformers

    cfg = tiny_config("gated-gelu", d_model=96, d_kv=16, d_ff=192, vocab_size=300)
    theirs = transformers.T5EncoderModel(transformers.T5Config(**dataclasses.asdict(cfg)))
    state = {name: weight.detach().numpy() for name, weight in theirs.state_dict().items()}
    params = t5.init(cfg, jax.random.key(0))
    for weight in t5.weights(cfg):
        ours = np.asarray(trees.flatten(params)[weight.path])
        expected = np.stack([state[name] for name in t5_files._file_names(weight, cfg)])
        few = ours.size < 1000  # the 24 numbers of relative_bias have a wide spread
        assert ours.std() == pytest.approx(expected.std(), rel=0.6 if few else 0.05), weight.path


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_padding_changes_no_row(kind):
    cfg = tiny_config(kind)
    params = random_params(cfg)
    ids_BS, mask_BS = random_batch(3, 12, [12, 5, 0])
    ids_BS[~mask_BS] = 7  # whatever stands in the padding
    states = np.asarray(t5.encode(params, cfg, ids_BS, mask_BS))
    wide = [np.pad(array, ((0, 0), (0, 30))) for array in (ids_BS, mask_BS)]
    wide_states = np.asarray(t5.encode(params, cfg, *wide))
    np.testing.assert_allclose(wide_states[:, :12], states, atol=2e-5)
    assert not wide_states[:, 12:].any()
    assert not states[2].any()  # no text gives zeros, not NaN
    alone = t5.encode(params, cfg, ids_BS[1:2, :5], mask_BS[1:2, :5])
    np.testing.assert_allclose(states[1, :5], alone[0], atol=2e-5)


def test_gradients_are_finite_and_reach_every_weight():
    cfg = tiny_config("gated-gelu")
    ids_BS, mask_BS = random_batch(2, 12, [12, 0])

    def total(params):
        return jnp.sum(jnp.sin(t5.encode(params, cfg, ids_BS, mask_BS)))

    for path, gradient in jax.tree.leaves_with_path(jax.grad(total)(random_params(cfg))):
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 0, path


def test_bfloat16_products_stay_near():
    cfg = tiny_config("gated-gelu")
    params = random_params(cfg)
    ids_BS, mask_BS = random_batch(2, 12, [12, 6])
    exact = np.asarray(t5.encode(params, cfg, ids_BS, mask_BS))
    rough = t5.encode(params, cfg, ids_BS, mask_BS, dtype=jnp.bfloat16)
    assert rough.dtype == jnp.float32
    error = np.abs(exact - np.asarray(rough)).max()
    assert 0 < error < 0.1 * np.abs(exact).max()


def test_other_weight_files(tmp_path, embedded):
    """pytorch_model.bin, shards, bfloat16, and the embedding under its other name."""
    torch = import_torch()
    _, params, tokenizer = embedded
    t5_files.save(tmp_path, embedded[0], params, tokenizer)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    file.unlink()

    as_torch = {name: torch.tensor(array) for name, array in tensors.items()}
    torch.save(as_torch, tmp_path / "pytorch_model.bin")
    assert_same_tree(t5_files.load(str(tmp_path))[1], params)

    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for part, held in parts.items():
        held_tensors = {name: tensors[name].astype(jnp.bfloat16) for name in held}
        safetensors.numpy.save_file(held_tensors, tmp_path / part)
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert_same_tree(t5_files.load(str(tmp_path))[1], rounded)

    index_path = tmp_path / "model.safetensors.index.json"
    good_index = index_path.read_text()
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "model-2.safetensors", tmp_path / "sub")
    for name in ("sub/model-2.safetensors", "..", "../x.safetensors", "/x.safetensors", "", 3):
        index_path.write_text(json.dumps({"weight_map": index["weight_map"] | {names[1]: name}}))
        with pytest.raises(UserError, match=r"is not the plain name of a file beside it"):
            t5_files.load(str(tmp_path))
    for bad in ({}, {"weight_map": ["model-1.safetensors"]}, {"weight_map": {}}):
        index_path.write_text(json.dumps(bad))
        with pytest.raises(UserError, match=r"index.json: no 'weight_map'"):
            t5_files.load(str(tmp_path))
    index_path.write_text(good_index)

    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2.safetensors: no such file"):
        t5_files.load(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"pytorch_model.bin: not readable"):
        t5_files.load(str(tmp_path))
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        t5_files.load(str(tmp_path))


def test_bad_folders_are_told_in_one_line(tmp_path, embedded):
    def broken(**files):
        shutil.rmtree(tmp_path, ignore_errors=True)
        t5_files.save(tmp_path, *embedded)
        for name, content in files.items():
            path = tmp_path / name.replace("__", ".")
            path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            t5_files.load(str(tmp_path))
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
        return str(caught.value)

    good = json.loads((config.ASSETS / "text" / "config.json").read_text())

    def changed(**changes):
        return json.dumps(good | changes).encode()

    assert "no such file" in broken(config__json=None)
    assert "not valid JSON" in broken(config__json=b"{")
    assert "model_type is 'bert'" in broken(config__json=changed(model_type="bert"))
    no_width = json.dumps({k: v for k, v in good.items() if k not in ("d_model", "d_ff")}).encode()
    assert "missing settings: d_model, d_ff" in broken(config__json=no_width)
    assert "'gated-silu'" in broken(config__json=changed(feed_forward_proj="gated-silu"))
    assert "d_ff must be" in broken(config__json=changed(d_ff=-1))
    for epsilon in ("x", None, 0, -1e-6, True, float("nan")):
        message = broken(config__json=changed(layer_norm_epsilon=epsilon))
        assert "layer_norm_epsilon must be a positive number" in message
    near = {"relative_attention_max_distance": 8, "relative_attention_num_buckets": 32}
    assert "max_distance must be above 8" in broken(config__json=changed(**near))
    assert "AutoTokenizer" in broken(tokenizer__json=None)
    assert "not a tokenizer" in broken(tokenizer__json=b"{}")
    assert "vocab_size 9" in broken(config__json=changed(vocab_size=9))
    assert "damaged" in broken(model__safetensors=b"nonsense")

    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    tensors = safetensors.numpy.load_file(config.ASSETS / "text" / "model.safetensors")
    poisoned = tensors[name].copy()
    poisoned[3, 4] = np.nan
    found = broken(model__safetensors=safetensors.numpy.save(tensors | {name: poisoned}))
    assert f"model.safetensors: the tensor {name} holds NaN" in found
    quantised = np.zeros(poisoned.shape, np.int8)
    found = broken(model__safetensors=safetensors.numpy.save(tensors | {name: quantised}))
    assert f"{name} is int8, not floating point" in found
    buffer, torch = io.BytesIO(), import_torch()
    state = {n: torch.from_numpy(x.copy()) for n, x in (tensors | {name: poisoned}).items()}
    torch.save(state, buffer)
    found = broken(model__safetensors=None, pytorch_model__bin=buffer.getvalue())
    assert f"pytorch_model.bin: the tensor {name} holds NaN" in found

    message = broken(config__json=changed(num_layers=3, d_ff=64))
    assert re.search(r"encoder.block.2.layer.0.SelfAttention.q.weight \[.*?\] is missing", message)
    assert (
        "encoder.block.1.layer.1.DenseReluDense.wo.weight is [128, 256], not [128, 64]" in message
    )
    assert message.count("missing") == 8 and message.count(", not [") == 4


def test_sources_that_are_nowhere(monkeypatch):
    with pytest.raises(UserError, match="no such folder"):
        t5_files.load("./nowhere")

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("not cached\nand no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="'t5-base'.*not cached.*offline, name a folder") as caught:
        t5_files.load("t5-base")
    assert "\n" not in str(caught.value)


def test_hub_download_takes_torch_weights_only_for_want_of_others(monkeypatch, tmp_path, embedded):
    t5_files.save(tmp_path, *embedded)
    asked = []

    def download(source, allow_patterns):
        asked.append(list(allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same_tree(t5_files.load("google/flan-t5-small")[1], embedded[1])
    assert len(asked) == 1 and "pytorch_model.bin" not in asked[0]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        t5_files.load("google/flan-t5-small")
    assert len(asked) == 3 and "pytorch_model.bin" in asked[2]


def test_tokenize(embedded):
    tokenizer = embedded[2]
    for text in filter(None, TEXTS):
        ids_S, mask_S = t5.tokenize(tokenizer, text, 64)
        assert ids_S.dtype == np.int32 and mask_S.dtype == bool and ids_S.shape == mask_S.shape
        length = mask_S.sum()
        assert 1 < length < 64 and mask_S[:length].all()
        assert ids_S[length - 1] == 1 and not ids_S[length:].any()
        assert tokenizer.decode(ids_S[mask_S]) == text.lower()
        cut_ids_S, cut_mask_S = t5.tokenize(tokenizer, text, 2)
        assert cut_mask_S.all() and cut_ids_S.tolist() == [ids_S[0], 1]
    for nothing in ("", "  \n"):
        ids_S, mask_S = t5.tokenize(tokenizer, nothing, 8)
        assert not mask_S.any() and not ids_S.any()


def test_any_english_text_can_be_spelled(embedded):
    signs = "".join(chr(c) for c in range(32, 127))
    text = f"{signs} “Café” — it’s naïve…\tThe quick brown fox jumps over 1234567890 lazy DOGS"
    ids_S, mask_S = t5.tokenize(embedded[2], text, 400)
    assert 2 not in ids_S[mask_S]


def test_shipped_encoder_is_what_its_command_makes(tmp_path, embedded):
    make_text_encoder.main(["--captions", str(CLIPS), "--out", str(tmp_path)])
    shipped = config.ASSETS / "text"
    assert (tmp_path / "tokenizer.json").read_bytes() == (shipped / "tokenizer.json").read_bytes()
    cfg, params, _ = t5_files.load(str(tmp_path))
    assert cfg == embedded[0]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), params, embedded[1])
    size = sum(path.stat().st_size for path in shipped.iterdir())
    assert size < 2_000_000
    # the words of the captions are whole pieces, and the size asked for is kept to
    ids = embedded[2].encode("A Bach chorale played on church organ").tokens
    assert ids == ["▁a", "▁bach", "▁chorale", "▁played", "▁on", "▁church", "▁organ", "</s>"]
    small = make_text_encoder.train_tokenizer(make_text_encoder.read_texts(CLIPS), 100)
    assert small.get_vocab_size() == 100
    with pytest.raises(UserError, match="--vocab-size 20"):
        make_text_encoder.train_tokenizer(["a"], 20)
    with pytest.raises(UserError, match="no such folder"):
        make_text_encoder.read_texts(tmp_path / "nowhere")
    several = {"description": ["A reel", "A fast reel"], "genre": "folk"}
    (tmp_path / "sidecars").mkdir()
    (tmp_path / "sidecars" / "a.json").write_text(json.dumps(several))
    texts = make_text_encoder.read_texts(tmp_path / "sidecars")
    assert texts == ["A reel", "A fast reel", "genre: folk"]


def test_a_full_disk_under_the_tokenizer_is_an_oserror(embedded, tmp_path):
    sizes = tiny_config(d_model=2, d_kv=2, d_ff=2, num_layers=1, num_heads=1)
    written = (sizes, random_params(sizes), embedded[2])
    t5_files.save(tmp_path / "a", *written)
    size = (tmp_path / "a" / "tokenizer.json").stat().st_size
    assert size > (tmp_path / "a" / "model.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            t5_files.save(tmp_path / "b", *written)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_text_encoder_takes_no_others_place(tmp_path):
    captions = tmp_path / "captions"
    captions.mkdir()
    (captions / "a.json").write_text('{"description": "drums"}')

    def make(out, *more):
        sizes = ["--width", "8", "--layers", "1", "--heads", "1", "--mlp-width", "8"]
        words = ["--captions", str(captions), "--out", str(out), *sizes, *more]
        make_text_encoder.main(words)

    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "config.json").write_text("mine")
    for out in (taken, taken / "config.json"):
        with pytest.raises(UserError, match="is there already; name a new folder"):
            make(out)
    assert (taken / "config.json").read_text() == "mine" and len(list(taken.iterdir())) == 1
    with pytest.raises(UserError, match="cannot be written"):
        make(taken / "config.json" / "below")
    with pytest.raises(UserError, match="unknown setting --widht: did you mean --width"):
        make(tmp_path / "new", "--widht", "3")
    for option, value in (("--width", "0"), ("--layers", "-1"), ("--heads", "0"), ("--seed", "-1")):
        with pytest.raises(UserError, match=option):
            make(tmp_path / "new", option, value)
    assert not (tmp_path / "new").exists()
    make(tmp_path / "deep" / "new")
    assert t5_files.load(str(tmp_path / "deep" / "new"))[0].d_model == 8
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["new"]
    assert (tmp_path / "deep" / "new").stat().st_mode & 0o055 == 0o055 & ~_umask()


def _umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask

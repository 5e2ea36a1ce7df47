"""The networks that listen, and what is said where one cannot be had."""

import json
import shutil
import sys
import types

import numpy as np
import pytest

from magnet_jax.errors import UserError
from magnet_jax.evaluation import embedders
from magnet_jax.io.torch_env import import_torch


@pytest.fixture(scope="module")
def clap_folder(tmp_path_factory):
    import_torch()
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clap")
    words = ["<s>", "<pad>", "</s>", "<unk>", "slow", "piano"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    text = dict(
        vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=90,
    )  # fmt: skip
    sound = dict(
        hidden_size=16, patch_embeds_hidden_size=8, depths=[1, 1], num_attention_heads=[1, 1],
        num_hidden_layers=2, enable_fusion=False,
    )  # fmt: skip
    config = ClapConfig(text_config=text, audio_config=sound, projection_dim=8)
    ClapModel(config).save_pretrained(folder)
    ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(folder)
    return folder


def test_clap_of_transformers(clap_folder):
    embedder = embedders.load("clap", str(clap_folder))
    wav_N = np.random.default_rng(0).normal(0, 0.1, 48_000 * 12).astype(np.float32)
    found = embedder.embed(wav_N)
    assert found.embeddings_PE.shape == (2, 8) and found.logits_PL is None
    # Nothing is drawn at random, and a piece is what it would be alone.
    np.testing.assert_array_equal(embedder.embed(wav_N).embeddings_PE, found.embeddings_PE)
    alone = embedder.embed(wav_N[: 48_000 * 10]).embeddings_PE[0]
    np.testing.assert_allclose(alone, found.embeddings_PE[0], atol=1e-5)
    texts_NE = embedder.embed_texts(["slow piano", "slow"])
    np.testing.assert_allclose(texts_NE[1], embedder.embed_texts(["slow"])[0], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(texts_NE, axis=1), 1, atol=1e-5)
    config = json.loads((clap_folder / "config.json").read_text())
    config["audio_config"]["enable_fusion"] = True
    broken = shutil.copytree(clap_folder, clap_folder.parent / "fused")
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="with fusion draws parts of a clip at random"):
        embedders.load("clap", str(broken))


def test_vggish_is_taken_before_its_last_relu(tmp_path, monkeypatch):
    torch = import_torch()

    class VGG(torch.nn.Module):
        def __init__(self, features, postprocess):
            super().__init__()
            self.embeddings = torch.nn.Sequential(torch.nn.Linear(1, 128), torch.nn.ReLU())

        def forward(self, x):
            return self.embeddings(x)

    def waveform_to_examples(wav_N, rate):
        assert rate == 16_000 and len(wav_N) >= 15_600
        return torch.from_numpy(wav_N[:3, None])

    package = types.SimpleNamespace(
        VGG=VGG, make_layers=lambda: None, waveform_to_examples=waveform_to_examples
    )
    monkeypatch.setitem(sys.modules, "torchvggish", package)
    torch.save(VGG(None, False).state_dict(), tmp_path / "vggish.pth")
    embedder = embedders.load("vggish", str(tmp_path / "vggish.pth"))
    found = embedder.embed(np.ones(100, np.float32))
    assert found.embeddings_PE.shape == (3, 128) and (found.embeddings_PE < 0).any()
    torch.save({"other": torch.zeros(1)}, tmp_path / "vggish.pth")
    with pytest.raises(UserError, match="other weights than the network's"):
        embedders.load("vggish", str(tmp_path / "vggish.pth"))


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("vggish", None, "torchvggish: pip install --no-deps -r requirements-eval.txt"),
        ("passt", None, "needs the package hear21passt"),
        ("clap", None, "offline, name a folder with .*tokenizer.json: --weights.clap DIR"),
        ("clap", "owner/none", "not to be had from the Hugging Face hub"),
        ("clap", "no/such/folder", "no such folder, and not a hub id"),
        ("musicnn", "nowhere", "nowhere/model.safetensors: no such file"),
    ],
)
def test_what_an_embedder_lacks_is_one_line(name, weights, message, monkeypatch):
    for package in ("torchvggish", "hear21passt", "hear21passt.base"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=message):
        embedders.load(name, weights)


def test_weights_that_cannot_be_fetched_say_where_to_put_them(tmp_path, monkeypatch):
    torch = import_torch()
    monkeypatch.setitem(sys.modules, "torchvggish", types.SimpleNamespace())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def fail(url, path, progress):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(UserError, match=f"put vggish-10086976.pth, .* in {tmp_path}/checkpoints"):
        embedders.load("vggish")

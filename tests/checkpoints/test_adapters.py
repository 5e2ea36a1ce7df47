"""The folder of an adapter: written whole, read back, and refused where it does not fit."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import TINY, assert_same_bits, random_adapters

from magnet_jax.checkpoints import adapters as module
from magnet_jax.config import LoraConfig
from magnet_jax.errors import UserError
from magnet_jax.io import trees
from magnet_jax.model import lora

LORA = LoraConfig(rank=2, alpha=3.0)
LINEAGE = {"base": "facebook/magnet-small-10secs", "run": "r", "step": 7}


def test_round_trip(tmp_path):
    folder = tmp_path / "runs" / "adapter"
    for config in (LORA, LoraConfig(rank=3, alpha=16.0, targets=("cross", "mlp"))):
        adapters = random_adapters(config)
        module.save_adapter(folder, adapters, config, TINY, LINEAGE, overwrite=True)
        found = module.load_adapter(folder, TINY)
        assert (found.config, found.lineage) == (config, LINEAGE)
        assert_same_bits(trees.flatten(found.adapters), trees.flatten(adapters))
        assert {path.name for path in (tmp_path / "runs").iterdir()} == {"adapter"}
    assert_same_bits(load_file(folder / "adapter.safetensors"), trees.flatten(adapters))
    assert {path.name for path in folder.iterdir()} == {"adapter.json", "adapter.safetensors"}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_folders_that_cannot_be_read(tmp_path):
    folder = tmp_path / "a"
    with pytest.raises(UserError, match="a/adapter.json: no such file"):
        module.load_adapter(folder, TINY)
    module.save_adapter(folder, random_adapters(LORA), LORA, TINY, LINEAGE)
    weights, path = folder / "adapter.safetensors", folder / "adapter.json"
    tensors, settings = load_file(weights), json.loads(path.read_text())

    def refused(complaint, model=TINY):
        with pytest.raises(UserError, match=complaint) as caught:
            module.load_adapter(folder, model)
        assert len(str(caught.value)) < 600

    for change, complaint in (
        ({"format": "other"}, "adapter.json: not of format"),
        ({"format_version": 1}, "adapter.json: not of format"),
        ({"model": None}, "model and lineage"),
        ({"lineage": []}, "model and lineage"),
        ({"lora": settings["lora"] | {"alpha": "8"}}, "adapter.json: lora: alpha"),
        ({"lora": settings["lora"] | {"dropout": 0.1}}, "adapter.json: lora: .*dropout"),
        ({"lora": settings["lora"] | {"rank": 5}}, "misshapen"),
        ({"lora": settings["lora"] | {"targets": ["mlp"]}}, "16 unexpected: .* and 12 more"),
    ):
        path.write_text(json.dumps(settings | change))
        refused(complaint)
    path.write_text("{")
    refused("adapter.json: not valid JSON")
    path.write_text(json.dumps(settings))

    for name, own, other in (("num_heads", 3, 2), ("first_context", 0, 7), ("num_layers", 2, 3)):
        near = dataclasses.replace(TINY, **{name: other})
        refused(f"adapter.json: the adapter is for another model: {name} {own}, not {other}", near)

    name = next(iter(lora.adapter_shapes(LORA, TINY)))
    save_file(tensors | {"extra": tensors[name]}, weights)
    refused("1 unexpected: extra")
    save_file({n: x for n, x in tensors.items() if n != name}, weights)
    refused(f"1 missing: {name}")
    save_file(tensors | {name: np.zeros(tensors[name].shape, np.int32)}, weights)
    refused(f"not float32: {name}")
    save_file(tensors | {name: np.full(tensors[name].shape, np.inf, np.float32)}, weights)
    refused(f"adapter.safetensors: the tensor {name} holds infinity")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    refused("adapter.safetensors: damaged")
    weights.unlink()
    refused("adapter.safetensors: no such file")


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    save = functools.partial(module.save_adapter, lineage=LINEAGE, model=TINY)
    folder, adapters = tmp_path / "a", random_adapters(LORA)
    name = next(iter(lora.adapter_shapes(LORA, TINY)))
    with pytest.raises(UserError, match="lora.rank is 0"):
        save(folder, {}, LoraConfig())
    with pytest.raises(UserError, match=f"misshapen: {name} \\[2, 12, 2\\], not"):
        save(folder, adapters, LoraConfig(rank=3))
    del (part := random_adapters(LORA))["blocks"]["mlp"]
    with pytest.raises(UserError, match="4 missing: blocks/mlp/up/a"):
        save(folder, part, LORA)
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="exists and is no adapter"):
        save(folder, adapters, LORA, overwrite=True)
    (folder / "thesis.txt").unlink()
    save(folder, adapters, LORA)
    with pytest.raises(UserError, match="holds an adapter"):
        save(folder, adapters, LORA)
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds other files as well .thesis.txt."):
        save(folder, adapters, LORA, overwrite=True)
    (folder / "thesis.txt").unlink()

    # Neither a full disk nor a kill between the renames loses the earlier adapter.
    whole = (folder / "adapter.safetensors").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        with pytest.raises(UserError, match="a: cannot be written .*No space left"):
            save(folder, random_adapters(LORA, seed=5), LORA, overwrite=True)
    assert (folder / "adapter.safetensors").read_bytes() == whole
    folder.rename(tmp_path / ".a.old")
    with pytest.raises(UserError, match="holds an adapter"):
        save(folder, adapters, LORA)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}

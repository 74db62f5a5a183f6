"""The identity of weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safeft.cache import cache_root
from safeft.errors import ModelError
from safeft.models import adapter_hash, weights_hash
from safeft.models import hashes as hashes_module
from tests.tiny import tiny_model


@pytest.fixture
def model(tiny_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


def age(directory: Path) -> None:
    """As if the files had been written long ago."""
    for file in directory.iterdir():
        os.utime(file, ns=(10**18, 10**18))


def test_splitting_the_weights_into_shards_keeps_their_identity(
    tiny_dir: Path, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert weights_hash(tmp_path) == weights_hash(tiny_dir)


def test_the_order_and_metadata_of_the_file_do_not_matter(model: Path) -> None:
    before = weights_hash(model)
    tensors = load_file(model / "model.safetensors")
    backwards = dict(reversed(tensors.items()))
    save_file(backwards, model / "model.safetensors", metadata={"note": "the same"})
    assert weights_hash(model) == before


def changed(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    name = "model.norm.weight"
    tensor = tensors.pop(name)
    if how == "value":
        tensor[0] = torch.nextafter(tensor[0], torch.tensor(9.0))
    if how == "dtype":
        tensor = tensor.view(torch.int32)
    if how == "shape":
        tensor = tensor.reshape(2, -1)
    return tensors | {name + "s" * (how == "name"): tensor}


@pytest.mark.parametrize("how", ["value", "dtype", "shape", "name"])
def test_one_bit_of_difference_is_another_identity(model: Path, how: str) -> None:
    before = weights_hash(model)
    tensors = load_file(model / "model.safetensors")
    save_file(changed(tensors, how), model / "model.safetensors")
    assert weights_hash(model) != before


def test_the_hash_agrees_with_an_independent_computation(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    oracle = hashlib.sha256(b"{}")
    for name in sorted(tensors):
        data = tensors[name].numpy().tobytes()
        oracle.update(json.dumps([name, "F32", list(tensors[name].shape), len(data)]).encode())
        oracle.update(data)
    assert weights_hash(model) == oracle.hexdigest()


def test_weights_are_hashed_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"w": torch.zeros(4_000_000)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(hashes_module, "_BLOCK", 1 << 16)
    tracemalloc.start()
    weights_hash(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


def test_a_known_hash_is_not_computed_again_until_a_file_changes(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes_module.time, "time_ns", lambda: 2 * 10**18)
    age(model)
    first = weights_hash(model)
    with monkeypatch.context() as patch:
        patch.setattr(hashes_module, "_digest", lambda files, extra: pytest.fail("read again"))
        assert weights_hash(model) == first
    file = model / "model.safetensors"
    size = file.stat().st_size
    save_file(changed(load_file(file), "value"), file, metadata={"format": "pt"})
    age(model)
    assert file.stat().st_size == size  # and the same modification time: only the change time moved
    assert weights_hash(model) != first


def test_a_file_written_a_moment_ago_is_not_remembered(model: Path) -> None:
    (model / "model.safetensors").touch()
    weights_hash(model)
    assert not (cache_root() / "hashes").exists()


def test_a_cache_that_cannot_be_written_to_only_costs_time(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes_module.time, "time_ns", lambda: 2 * 10**18)
    expected = weights_hash(model)
    monkeypatch.setenv("SAFEFT_CACHE", str(model / "config.json"))  # a file: no room for more
    assert weights_hash(model) == expected


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    names = ["a.safetensors", "b.safetensors"]
    for name in names:
        save_file({"w": torch.zeros(2)}, tmp_path / name)
    index = {"weight_map": {"w": names[0], "v": names[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"tensor w is in .*a\.safetensors too"):
        weights_hash(tmp_path)


def save_adapter(directory: Path, alpha: int, base: str = "base") -> Path:
    directory.mkdir()
    tensors = {"base_model.model.q.lora_A.weight": torch.ones(2, 4)}
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "base_model_name_or_path": base}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def test_an_adapters_identity_is_its_tensors_and_their_scale(tmp_path: Path) -> None:
    first = adapter_hash(save_adapter(tmp_path / "a", alpha=4))
    assert adapter_hash(save_adapter(tmp_path / "b", alpha=4, base="/elsewhere")) == first
    assert adapter_hash(save_adapter(tmp_path / "c", alpha=400)) != first


def test_an_adapter_without_safetensors_has_no_identity(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", alpha=4)
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: there is no such file"):
        adapter_hash(tmp_path / "a")

"""Adapters are checked before they touch the base model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from safeft.errors import ModelError
from safeft.models import adapter_hash, load_adapter, load_merged, tuned_hash, weights_hash
from tests.tiny import save_tiny, tiny_model

IDS = torch.arange(3, 40)[None]
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA on q_proj and v_proj of the tiny model, with B away from zero."""
    adapted = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.save(adapted.eval()(IDS).logits, tmp_path / "expected.pt")
    return tmp_path


def edit_tensors(adapter: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in changes.items():
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, adapter / "adapter_model.safetensors")


def edit_config(adapter: Path, **fields: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refused(adapter: Path, match: str, **shape: int) -> None:
    """The adapter is refused in one line, and the base model is as it was."""
    model = tiny_model(**shape)
    names = list(model.state_dict())
    with pytest.raises(ModelError, match=match) as error:
        load_adapter(model, adapter)
    assert "\n" not in str(error.value)
    assert list(model.state_dict()) == names


def test_an_adapter_comes_back_as_it_was_saved(adapter: Path) -> None:
    adapted = load_adapter(tiny_model(), adapter)
    assert not adapted.training
    assert not any(parameter.requires_grad for parameter in adapted.parameters())
    expected = torch.load(adapter / "expected.pt", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(adapted(IDS).logits, expected)
        assert (adapted.base_model.model(IDS).logits - tiny_model()(IDS).logits).abs().max() > 0.01


def test_what_fine_tuning_left_may_be_an_adapter_or_a_model_in_the_bases_place(
    adapter: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = save_tiny(tmp_path_factory.mktemp("whole"), seed=3)
    with torch.no_grad():
        assert torch.equal(load_merged(tiny_dir, whole)(IDS).logits, tiny_model(3)(IDS).logits)
        base, merged = load_merged(tiny_dir, None)(IDS).logits, load_merged(tiny_dir, adapter)(IDS)
    assert not torch.allclose(base, merged.logits, atol=1e-3)
    assert tuned_hash(whole) == weights_hash(whole)
    assert tuned_hash(adapter) == adapter_hash(adapter)


def test_an_adapter_with_ranks_of_its_own_for_some_modules_is_loaded(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path)
    load_adapter(tiny_model(), tmp_path)


def test_a_pickled_adapter_is_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(adapter, r"adapter_model\.bin is a pickle")


def test_an_adapter_without_weights_is_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter, r"holds no adapter_model\.safetensors")


def test_a_directory_without_an_adapter_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", r"nowhere/adapter_config\.json: there is no such file")


def test_a_truncated_adapter_is_refused(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    refused(adapter, r"adapter_model\.safetensors: is truncated")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(adapter: Path, value: float) -> None:
    broken = torch.zeros(32, 4)
    broken[3, 1] = value
    edit_tensors(adapter, **{B: broken})
    refused(adapter, "layers.0.self_attn.q_proj.lora_B.weight holds values that are not finite")


def test_the_adapter_of_a_wider_model_is_refused(adapter: Path) -> None:
    refused(adapter, r"has shape \(4, 32\), .* ask for \(4, 64\)", hidden=64)


def test_the_adapter_of_a_deeper_model_is_refused(adapter: Path) -> None:
    refused(adapter, r"has no module 'model\.layers\.1\.self_attn\.q_proj'", layers=1)


def test_a_target_that_the_base_model_lacks_is_named(adapter: Path) -> None:
    edit_config(adapter, target_modules=["q_proj", "v_proj", "c_attn"])
    refused(adapter, "the base model has no module 'c_attn'")


def test_a_rank_other_than_the_configurations_is_refused(adapter: Path) -> None:
    edit_config(adapter, r=8)
    refused(adapter, r"has shape \(4, 32\), .* ask for \(8, 32\)")


def test_an_adapter_that_lacks_a_tensor_is_refused(adapter: Path) -> None:
    edit_tensors(adapter, **{B: None})
    refused(adapter, "lacks .*q_proj.lora_B.weight")


def test_a_tensor_that_is_no_lora_is_refused(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = torch.zeros(259, 32)
    save_file(tensors, adapter / "adapter_model.safetensors")
    refused(adapter, "lm_head.weight is not the A or B of a LoRA")


def test_another_kind_of_adapter_is_refused(adapter: Path) -> None:
    edit_config(adapter, peft_type="IA3")
    refused(adapter, "peft_type is 'IA3'; only LORA")

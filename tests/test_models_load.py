"""Loading models and tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safeft import models
from safeft.errors import ModelError
from safeft.models import load_model, load_tokenizer
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def model(tiny_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


def edit(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_the_public_names_are_these() -> None:
    assert models.__all__ == [
        "Source",
        "adapter_hash",
        "load_adapter",
        "load_architecture",
        "load_merged",
        "load_model",
        "load_tokenizer",
        "parse_source",
        "read_lora",
        "resolve",
        "tuned_hash",
        "weights_hash",
    ]
    assert all(getattr(models, name) for name in models.__all__)


def test_a_model_is_loaded_whole_and_in_evaluation_mode(tiny_dir: Path) -> None:
    model = load_model(str(tiny_dir))
    assert not model.training
    for (name, loaded), saved in zip(
        model.named_parameters(), tiny_model().parameters(), strict=True
    ):
        assert torch.equal(loaded, saved), name


def test_a_model_is_loaded_in_the_dtype_asked_for(tiny_dir: Path) -> None:
    model = load_model(tiny_dir, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_weights_that_lack_a_tensor_are_refused_rather_than_made_up(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 .* model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(model)


def test_weights_of_another_shape_are_one_clear_line(model: Path) -> None:
    edit(model / "config.json", intermediate_size=32)
    with pytest.raises(
        ModelError, match=r"mlp\.\w+\.weight has shape .*64.* asks for .*32"
    ) as error:
        load_model(model)
    assert "\n" not in str(error.value)


def test_an_unknown_model_type_is_named(model: Path) -> None:
    edit(model / "config.json", model_type="made-up")
    with pytest.raises(ModelError, match="made-up"):
        load_model(model)


def test_code_that_comes_with_a_model_is_never_run(model: Path) -> None:
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (model / "modeling_evil.py").write_text("raise SystemExit('code of the model was run')\n")
    assert type(load_model(model)) is type(tiny_model())


def test_a_device_that_is_not_there_is_a_clear_error(tiny_dir: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tiny_dir, device="cuda:99")


def test_a_tokenizer_reads_and_writes_what_it_did_before(tiny_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_dir))
    assert tokenizer("héllo").input_ids == tiny_tokenizer()("héllo").input_ids
    assert tokenizer.pad_token == "<|pad|>"


def test_a_tokenizer_without_padding_pads_with_its_end_token(model: Path) -> None:
    edit(model / "tokenizer_config.json", pad_token=None)
    assert load_tokenizer(model).pad_token == "<|im_end|>"
    edit(model / "tokenizer_config.json", pad_token=None, eos_token=None)
    with pytest.raises(ModelError, match="neither a padding nor an end token"):
        load_tokenizer(model)


def test_a_tokenizer_without_chat_template_is_refused(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load_tokenizer(model)


def test_a_broken_tokenizer_is_one_clear_line(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded") as error:
        load_tokenizer(model)
    assert "\n" not in str(error.value)

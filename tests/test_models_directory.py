"""Model directories: what is refused, and that the message names it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from safeft.errors import ModelError
from safeft.models import resolve
from safeft.models.source import BUILDERS
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def model(tiny_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


def edit_config(directory: Path, **fields: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


def save_sharded(directory: Path) -> Path:
    tiny_model().save_pretrained(directory, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_a_good_directory_is_returned_as_it_is(model: Path) -> None:
    assert resolve(str(model)) == model
    assert resolve(model) == model


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: there is no such model directory"):
        resolve(tmp_path / "nowhere")


def test_a_file_is_not_a_model_directory(model: Path) -> None:
    with pytest.raises(ModelError, match="name the directory"):
        resolve(model / "config.json")


def test_a_directory_without_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        resolve(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\x80"])
def test_a_broken_configuration_is_named(model: Path, content: str) -> None:
    (model / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json: "):
        resolve(model)


def test_pickle_weights_are_refused_with_the_way_out(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickle weights.*pytorch_model\.bin.*convert to safet"):
        resolve(model)


def test_a_directory_without_weights_is_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="it has no weights"):
        resolve(model)


def test_a_directory_without_tokenizer_is_refused(model: Path) -> None:
    for file in model.glob("token*"):
        file.unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        resolve(model)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards = sorted(save_sharded(tmp_path).glob("*.safetensors"))
    assert len(shards) > 2
    assert resolve(tmp_path) == tmp_path
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"shard {shards[1].name} .* is missing"):
        resolve(tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    shard = sorted(save_sharded(tmp_path).glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ModelError, match=f"{shard.name}: is truncated"):
        resolve(tmp_path)


def test_a_placeholder_of_large_file_storage_is_not_taken_for_weights(model: Path) -> None:
    (model / "model.safetensors").write_text("version 1\noid sha256:0123456789abcdef\nsize 42\n")
    with pytest.raises(ModelError, match="not a safetensors file"):
        resolve(model)


@pytest.mark.parametrize(
    "weight_map", [None, {}, {"w": "../outside.safetensors"}, {"w": "model.bin"}]
)
def test_an_index_that_points_elsewhere_is_refused(model: Path, weight_map: object) -> None:
    (model / "model.safetensors").unlink()
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        resolve(model)


def test_a_model_with_code_of_its_own_is_fine_if_transformers_knows_its_type(model: Path) -> None:
    edit_config(model, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert resolve(model) == model


def test_a_model_that_needs_its_own_code_is_refused(model: Path) -> None:
    edit_config(model, auto_map={"AutoConfig": "configuration_x.X"}, model_type="made-up")
    with pytest.raises(ModelError, match=r"'made-up' needs the code .* never run"):
        resolve(model)


def test_an_adapter_is_not_a_base_model(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "another/model"}')
    with pytest.raises(ModelError, match="it is an adapter"):
        resolve(model)


def test_a_built_model_is_made_by_its_function_and_checked(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUILDERS, "demo:made", f"{__name__}:build")
    monkeypatch.setattr(sys.modules[__name__], "build", lambda progress: model, raising=False)
    assert resolve("demo:made") == model
    (model / "config.json").unlink()
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        resolve("demo:made")


def test_resolving_a_directory_imports_neither_torch_nor_transformers(tiny_dir: Path) -> None:
    program = (
        "import sys; from safeft.models import resolve; resolve(sys.argv[1])\n"
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", program, str(tiny_dir)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        check=True,
    )
    assert output.stdout == b"[]\n"

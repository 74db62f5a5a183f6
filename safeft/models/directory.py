"""What a usable model directory is: configuration, tokenizer, whole safetensors. No pickles."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from safeft.errors import ModelError
from safeft.models.explain import one_line

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def check_directory(directory: Path) -> None:
    """Check that `directory` can be loaded, as far as that is known without loading it.

    Reads the headers of the weights, not the weights: milliseconds, and transformers is imported
    only for a configuration that asks for code of its own.

    Raises:
        ModelError: names the missing, broken or unsafe file.
    """
    if not directory.exists():
        raise ModelError(f"{directory}: there is no such model directory")
    if not directory.is_dir():
        raise ModelError(f"{directory}: is a file; name the directory that holds config.json")
    if (directory / "adapter_config.json").exists():
        # transformers would go and load the base model that this file names instead.
        raise ModelError(
            f"{directory}: holds adapter_config.json, so it is an adapter; name a directory that "
            "holds the base model alone"
        )
    if not (directory / "config.json").exists():
        raise ModelError(f"{directory}: holds no config.json, so it is not a model directory")
    config = read_json(directory / "config.json")
    if "auto_map" in config:
        _check_known(directory, config)
    for file in weight_files(directory):
        check_safetensors(file)
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{directory}: holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}); "
            "save the tokenizer into the same directory"
        )


def is_whole_model(directory: Path) -> bool:
    """Whether a directory of tuned weights holds a model that stands alone, not an adapter."""
    return (directory / "config.json").exists() and not (directory / "adapter_config.json").exists()


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that transformers reads from `directory`, sorted by name.

    Raises:
        ModelError: there are none (pickles do not count), or a shard of the index is missing.
    """
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    if (directory / INDEX).exists():
        return _shards(directory)
    names = [path.name for path in directory.iterdir()]
    raise no_safetensors(str(directory), names)


def no_safetensors(what: str, names: Iterable[str]) -> ModelError:
    """The error for a model without safetensors weights, given the names of its files."""
    pickles = sorted(name for name in names if Path(name).suffix in PICKLES)
    if pickles:
        return ModelError(
            f"{what}: holds pickle weights only ({pickles[0]}), which can run code when loaded; "
            "convert to safetensors (load it and save_pretrained) where you trust it"
        )
    return ModelError(f"{what}: holds neither {SINGLE} nor {INDEX}, so it has no weights")


def check_safetensors(file: Path) -> None:
    """Check the header of a safetensors file against the file's size.

    Raises:
        ModelError: it is truncated, a placeholder of large-file storage, or something else.
    """
    try:
        with safe_open(file, framework="numpy"):
            pass
    except FileNotFoundError:
        raise ModelError(f"{file}: there is no such file") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file}: is truncated or not a safetensors file ({one_line(str(error))}); "
            "fetch it again"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; a ModelError names the file and what is wrong with it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON ({one_line(str(error))})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds a JSON {type(content).__name__}, not an object")
    return content


def _shards(directory: Path) -> list[Path]:
    index = read_json(directory / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{directory / INDEX}: has no weight_map that names the shards")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{directory / INDEX}: shard {name!r} is not a safetensors file here")
        if not (directory / name).exists():
            raise ModelError(f"{directory}: shard {name} of {INDEX} is missing; fetch it again")
    return [directory / name for name in names]


def _check_known(directory: Path, config: dict[str, Any]) -> None:
    """A model that brings its own code is fine if transformers knows it without that code."""
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        raise ModelError(
            f"{directory}: model_type {config.get('model_type')!r} needs the code that the model "
            "brings with it (auto_map), which is never run, and transformers does not know it"
        )

"""Models and tokenizers in memory, from a source string."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from safeft.errors import ModelError
from safeft.models.explain import explain
from safeft.models.fetch import resolve


def load_model(
    source: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """The causal language model of `source` in `dtype` on `device`, in evaluation mode.

    Every parameter comes out of the safetensors files: nothing is left at random values, no
    pickle is read, and no code that comes with the model is run.

    Raises:
        ModelError: see resolve(); or the weights do not fit the configuration, transformers does
            not know the model type, or the device is not there or too small.
    """
    directory = resolve(source)
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
        model = model.to(device)
    except Exception as error:  # foreign files through a foreign loader: any kind
        raise explain(f"{source}: cannot be loaded", error) from error
    for name, found, expected in sorted(loaded["mismatched_keys"]):
        raise ModelError(
            f"{source}: {name} has shape {tuple(found)} in the weights, but config.json asks for "
            f"{tuple(expected)}"
        )
    if missing := sorted(loaded["missing_keys"]):
        raise ModelError(
            f"{source}: the weights lack {len(missing)} of the tensors that config.json asks for, "
            f"the first is {missing[0]}"
        )
    return model.eval()


def load_architecture(source: str | Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of `source` without its weights (on the meta device): its layers and their shapes.

    Raises:
        ModelError: see resolve(); or transformers does not know the model type.
    """
    directory = resolve(source)
    try:
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if (directory / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(directory)
    except Exception as error:  # foreign files through a foreign loader: any kind
        raise explain(f"{source}: cannot be loaded", error) from error
    return model.eval()


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `source`, with a chat template and a padding token (else: the end token).

    Raises:
        ModelError: see resolve(); or there is no chat template, or no token to pad with.
    """
    directory = resolve(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # foreign files through a foreign loader: any kind
        raise explain(f"{source}: the tokenizer cannot be loaded", error) from error
    if not tokenizer.chat_template:
        raise ModelError(
            f"{source}: the tokenizer has no chat template, so this is not a chat model; use the "
            "instruction-tuned version or add chat_template.jinja to the directory"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"{source}: the tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer

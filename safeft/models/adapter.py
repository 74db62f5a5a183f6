"""LoRA adapters: checked against the base model before they touch it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from safeft.errors import ModelError
from safeft.models.directory import check_safetensors, is_whole_model, read_json
from safeft.models.explain import explain
from safeft.models.load import load_model

WEIGHTS = "adapter_model.safetensors"
#: Settings with which B @ A is not all that the adapter does.
_MORE_THAN_LORA = ("use_dora", "lora_bias", "alora_invocation_tokens", "arrow_config", "use_bdlora")
_LORA = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")


def load_adapter(model: PreTrainedModel, directory: str | Path) -> PeftModel:
    """Put the LoRA adapter in `directory` on `model`, in evaluation mode.

    A (r × d_in) and B (d_out × r) of every module are compared with the base model first, so that
    an adapter of another model leaves `model` as it was.

    Raises:
        ModelError: names the file, module or tensor that is missing, foreign, of a wrong shape or
            not finite; or the adapter is no LoRA, or holds pickles.
    """
    directory = Path(directory)
    config = _config(directory)
    tensors = _tensors(directory)
    _check_against(model, directory, config, tensors)
    try:
        adapted = PeftModel.from_pretrained(
            model, str(directory), config=config, torch_device=str(model.device)
        )
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise explain(f"{directory}: peft cannot load the adapter", error) from error
    # Unlike us, peft leaves a module without tensors at its initial values and says nothing.
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if absent := sorted(expected.keys() - tensors.keys()):
        adapted.unload()
        raise ModelError(f"{directory / WEIGHTS}: lacks {absent[0]}, which its configuration adds")
    return adapted


def read_lora(
    model: torch.nn.Module, directory: str | Path
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The matrices of the LoRA adapter in `directory`, by the name of the layer they belong to.

    `model` is what they are checked against, as in load_adapter(), and is left as it is.

    Returns:
        A (r × d_in) and B (d_out × r) of each layer, on the processor; LoRA's scale is in B.

    Raises:
        ModelError: see load_adapter().
    """
    directory = Path(directory)
    config = _config(directory)
    if setting := next((name for name in _MORE_THAN_LORA if getattr(config, name, None)), None):
        raise ModelError(f"{directory / 'adapter_config.json'}: {setting} is not supported")
    tensors = _tensors(directory)
    _check_against(model, directory, config, tensors)
    targets = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and check_target_module_exists(config, name)
    }
    named = {match["module"] for name in tensors if (match := _LORA.fullmatch(name))}
    matrices = {}
    for module in sorted(targets | named):
        names = [f"base_model.model.{module}.lora_{matrix}.weight" for matrix in "AB"]
        if absent := [name for name in names if name not in tensors]:
            raise ModelError(
                f"{directory / WEIGHTS}: lacks {absent[0]}, which its configuration adds"
            )
        a, b = (tensors[name] for name in names)
        alpha = config.alpha_pattern.get(
            get_pattern_key(list(config.alpha_pattern), module), config.lora_alpha
        )
        rank = a.shape[0]
        matrices[module] = a, b * (alpha / (rank**0.5 if config.use_rslora else rank))
    if not matrices:
        raise ModelError(f"{directory / WEIGHTS}: holds no tensors")
    return matrices


def load_merged(source: str | Path, tuned: Path | None) -> Any:
    """The model of `source` as fine-tuning left it.

    Args:
        tuned: a LoRA adapter, which is merged into the weights (generation through separate layers
            costs a third more on a small model), or a whole model, which takes the base's place;
            None: the base as it is.

    Raises:
        ModelError: see load_model() and load_adapter().
    """
    if tuned is not None and is_whole_model(tuned):
        return load_model(tuned)
    model = load_model(source)
    return model if tuned is None else load_adapter(model, tuned).merge_and_unload()


def _config(directory: Path) -> LoraConfig:
    raw = read_json(directory / "adapter_config.json")
    if raw.get("peft_type") != "LORA":
        raise ModelError(
            f"{directory / 'adapter_config.json'}: peft_type is {raw.get('peft_type')!r}; only "
            "LORA adapters are supported"
        )
    try:
        return LoraConfig.from_pretrained(str(directory))
    except (ValueError, TypeError) as error:
        raise explain(
            f"{directory / 'adapter_config.json'}: not a LoRA configuration", error
        ) from error


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    file = directory / WEIGHTS
    if not file.exists():
        if (directory / "adapter_model.bin").exists():
            raise ModelError(
                f"{directory}: adapter_model.bin is a pickle, which can run code when loaded; "
                f"save the adapter as {WEIGHTS}"
            )
        raise ModelError(f"{directory}: holds no {WEIGHTS}")
    check_safetensors(file)
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{file}: {name} holds values that are not finite")
    return tensors


def _check_against(
    model: PreTrainedModel, directory: Path, config: LoraConfig, tensors: dict[str, torch.Tensor]
) -> None:
    modules = dict(model.named_modules())
    if isinstance(config.target_modules, set | list):
        for target in sorted(config.target_modules):
            if not any(name == target or name.endswith(f".{target}") for name in modules):
                raise ModelError(f"{directory}: the base model has no module {target!r}")
    for name, tensor in sorted(tensors.items()):
        match = _LORA.fullmatch(name)
        if match is None:
            raise ModelError(
                f"{directory / WEIGHTS}: {name} is not the A or B of a LoRA (modules_to_save, "
                "biases, embeddings and DoRA are not supported)"
            )
        module = modules.get(match["module"])
        if module is None:
            raise ModelError(f"{directory}: the base model has no module {match['module']!r}")
        pattern = get_pattern_key(list(config.rank_pattern), match["module"])
        rank = config.rank_pattern.get(pattern, config.r)
        expected = _shape(module, match["matrix"], rank)
        if expected is None:
            raise ModelError(f"{directory}: module {match['module']!r} is not a linear layer")
        if tuple(tensor.shape) != expected:
            raise ModelError(
                f"{directory / WEIGHTS}: {name} has shape {tuple(tensor.shape)}, the base model "
                f"and adapter_config.json ask for {expected}; is it another model's adapter?"
            )


def _shape(module: torch.nn.Module, matrix: str, rank: int) -> tuple[int, int] | None:
    if isinstance(module, torch.nn.Linear):
        d_in, d_out = module.in_features, module.out_features
    elif isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
    else:
        return None
    return (rank, d_in) if matrix == "A" else (d_out, rank)

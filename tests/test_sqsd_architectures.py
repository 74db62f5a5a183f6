"""SQSD on models that are built differently from Llama, against the dense fp64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from safeft.errors import ModelError, ProfileError
from safeft.sqsd import Projection, SqsdScorer
from tests.test_sqsd import ROUNDING, dense_cosines, random_factors, random_rows, sides
from tests.tiny import tiny_model

SHAPE: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {"intermediate_size": 64}
GROUPED = {**WIDE, "num_key_value_heads": 2}
#: What each adds: biases on q, k, v; fused qkv, parallel residual and LayerNorm; a bias on the head
#: and partial rotation; learned positions and layers that flatten rows; a sliding window.
MODELS: dict[str, tuple[Any, Any]] = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, **GROUPED)),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SHAPE, **WIDE)),
    "phi": (PhiForCausalLM, PhiConfig(**SHAPE, **WIDE)),
    "opt": (OPTForCausalLM, OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32)),
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, **GROUPED, sliding_window=6)),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    kind, config = MODELS[name]
    return kind(config).eval()


@pytest.mark.parametrize("covered", [".layers.", ".layers.1."])
@pytest.mark.parametrize("name", MODELS)
def test_other_architectures_agree_with_the_oracle(name: str, covered: str) -> None:
    blocks = [
        path
        for path, module in build(name).named_modules()
        if isinstance(module, torch.nn.Linear) and covered in path
    ]
    danger, safety = (
        Projection(*(random_factors(s, 3, blocks, build(name)) for s in seeds))
        for seeds in ((1, 2), (3, 4))
    )
    rows = random_rows(5, [(3, 12), (9, 2), (4, 5)])
    scorer = SqsdScorer(build(name).double(), danger, safety, pad_token_id=0)
    scores, modules = scorer.score_by_module(rows)
    for i, row in enumerate(rows):
        assert scores[i].error is None
        for found, side in ((modules.danger, danger), (modules.safety, safety)):
            expected = dense_cosines(build(name), row, *sides(side))
            assert found[i].tolist() == pytest.approx(expected.tolist(), abs=ROUNDING)


def projection(model: Any, names: list[str]) -> Projection:
    return Projection(random_factors(1, 2, names, model), random_factors(2, 2, names, model))


def test_a_direction_on_gpt2s_transposed_layers_is_refused_by_name() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4))
    names = ["transformer.h.1.mlp.c_fc"]
    one = Projection(*(random_factors(s, 2, ["model.layers.0.mlp.up_proj"]) for s in (1, 2)))
    for factors in (one.state.factors, one.direction.factors):
        factors[names[0]] = factors.pop("model.layers.0.mlp.up_proj")
    with pytest.raises(ModelError, match=r"transformer\.h\.1\.mlp\.c_fc is a Conv1D"):
        SqsdScorer(model, one, one, pad_token_id=0)


def test_a_model_that_caps_its_logits_is_refused() -> None:
    config = Gemma2Config(**SHAPE, **GROUPED, head_dim=8)  # final_logit_softcapping is 30
    model = Gemma2ForCausalLM(config).eval()
    one = projection(model, ["model.layers.1.mlp.up_proj"])
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        SqsdScorer(model, one, one, pad_token_id=0)


class ScaledLogits(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 8
        return output


def test_a_model_that_changes_its_logits_without_saying_so_in_its_config_is_refused() -> None:
    model = ScaledLogits(tiny_model().config).eval()
    one = projection(model, ["model.layers.1.mlp.up_proj"])
    with pytest.raises(ModelError, match="after the output head"):
        SqsdScorer(model, one, one, pad_token_id=0)


def test_a_layer_that_is_used_twice_is_refused() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    one = projection(model, ["model.layers.0.mlp.down_proj"])
    with pytest.raises(ModelError, match="used twice"):
        SqsdScorer(model, one, one, pad_token_id=0).score(random_rows(0, [(3, 3)]))


def test_a_layer_that_reads_a_selection_of_tokens_is_refused() -> None:
    model = tiny_model()
    mlp = model.model.layers[1].mlp
    whole = mlp.forward
    mlp.forward = lambda x: torch.cat([x[:, :1], whole(x[:, 1:])], dim=1)
    one = projection(model, ["model.layers.1.mlp.down_proj"])
    with pytest.raises(ModelError, match="cannot tell rows apart"):
        SqsdScorer(model, one, one, pad_token_id=0).score(random_rows(0, [(3, 3)]))


def test_a_direction_on_the_head_alone_is_refused() -> None:
    model = tiny_model()
    one = projection(model, ["lm_head"])
    with pytest.raises(ProfileError, match="no layer of the model's decoder"):
        SqsdScorer(model, one, one, pad_token_id=0)

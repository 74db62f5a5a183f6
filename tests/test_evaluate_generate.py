from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from safeft.data import encode_prompt
from safeft.errors import MeasurementError
from safeft.evaluate import generate_greedy
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS: list[Any] = [
    "hi",
    "A rather long question, so that the short ones need much padding. " * 2,
    *(f"Question {i}: {'y' * (3 * i)}" for i in range(10)),
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
]
TOKENIZER = tiny_tokenizer()


def lively_model(seed: int = 0) -> LlamaForCausalLM:
    """Large random weights: each prompt gets its own answer, a different token at each step."""
    model = tiny_model(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.6, generator=generator)
    return model


def answers(model: Any, prompts: list[Any] = PROMPTS, **options: Any) -> list[str]:
    return generate_greedy(model, TOKENIZER, prompts, **{"max_new_tokens": 12, **options})


def test_batched_answers_equal_those_given_one_by_one() -> None:
    model = lively_model()
    batched = answers(model, batch_size=5)
    assert batched == [answers(model, [prompt])[0] for prompt in PROMPTS]
    assert len(set(batched)) > 10


def test_answers_equal_plain_greedy_decoding_without_a_cache() -> None:
    model = lively_model()
    for prompt, answer in zip(PROMPTS, answers(model), strict=True):
        ids = encode_prompt(prompt, TOKENIZER)
        new: list[int] = []
        while len(new) < 12:
            token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == TOKENIZER.eos_token_id:
                break
            new.append(token)
        assert answer == TOKENIZER.decode(new, skip_special_tokens=True)


def test_what_all_prompts_begin_with_goes_through_the_model_once() -> None:
    model = lively_model()
    seen: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    prompts = ["why is it so?", "who is it then?", "what is it?"]
    lengths = [len(encode_prompt(prompt, TOKENIZER)) for prompt in prompts]
    answers(model, prompts, max_new_tokens=1)
    assert sum(seen) < max(lengths) * len(prompts)
    assert seen[0] + seen[1] // len(prompts) == max(lengths)


def test_a_model_with_a_window_of_attention_answers_a_batch_as_one_by_one() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=16,
        initializer_range=0.6,
    )
    model = MistralForCausalLM(config).eval()
    assert answers(model) == [answers(model, [prompt])[0] for prompt in PROMPTS]


def test_answers_equal_those_of_transformers() -> None:
    model = lively_model()
    ids = torch.tensor([encode_prompt("hi", TOKENIZER)])
    theirs = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert answers(model, ["hi"]) == [TOKENIZER.decode(theirs, skip_special_tokens=True)]


def test_a_sampling_generation_config_changes_nothing_and_warns_of_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively_model()
    plain = answers(model)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        repetition_penalty=9.0,
        max_length=4,
        eos_token_id=2,
        pad_token_id=0,
    )
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answers(model) == plain
    assert caplog.records == []


def test_an_answer_ends_at_any_end_token_of_the_generation_config() -> None:
    model = lively_model()
    ids = torch.tensor([encode_prompt("hi", TOKENIZER)])
    whole = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    model.generation_config.eos_token_id = [2, whole[6]]
    cut = TOKENIZER.decode(whole[: whole.index(whole[6])])
    assert answers(model, ["hi"]) == [cut]
    # Beside longer answers it stays the same: what follows an end token is not part of it.
    assert answers(model, batch_size=16)[0] == cut


def test_a_lora_model_answers_as_its_merged_weights_do() -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    tuned = get_peft_model(lively_model(), config)
    with_adapter = answers(tuned)
    assert with_adapter != answers(lively_model())
    assert answers(tuned.merge_and_unload()) == with_adapter


def test_the_model_keeps_its_mode_and_no_gradient() -> None:
    model = lively_model().train()
    answers(model, ["hi"])
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_dropout_does_not_touch_the_answers_of_a_model_in_training_mode() -> None:
    model = lively_model()
    plain = answers(model)
    model.config.attention_dropout = 0.5
    assert answers(model.train()) == plain


def test_answers_do_not_depend_on_the_random_state() -> None:
    model = lively_model()
    torch.manual_seed(1)
    first = answers(model)
    torch.manual_seed(2)
    assert answers(model) == first


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_logits_are_an_error_never_an_answer(value: float) -> None:
    model = lively_model()
    with torch.no_grad():
        model.model.norm.weight[0] = value
    with pytest.raises(MeasurementError, match="not finite"):
        answers(model, ["hi"])


def test_a_prompt_that_does_not_fit_is_named() -> None:
    with pytest.raises(MeasurementError, match=r"prompt 2: .* 512 positions"):
        answers(lively_model(), ["hi", "x" * 520])


def test_progress_counts_prompts_after_each_batch() -> None:
    seen: list[tuple[int, int | None]] = []
    answers(
        lively_model(),
        ["a", "b", "c"],
        batch_size=2,
        progress=lambda _, done, total: seen.append((done, total)),
    )
    assert seen == [(0, 3), (2, 3), (3, 3)]


def test_no_prompts_give_no_answers() -> None:
    assert answers(lively_model(), []) == []


def test_a_tokenizer_without_padding_token_is_no_obstacle() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    model = lively_model()
    assert generate_greedy(model, tokenizer, PROMPTS, max_new_tokens=12) == answers(model)

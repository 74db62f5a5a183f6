"""Greedy answers to many prompts: batched, left-padded, the same as one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from safeft.data import encode_prompt
from safeft.errors import MeasurementError
from safeft.progress import Progress, silent

Prompt = str | Sequence[Mapping[str, str]]


def generate_greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    progress: Progress = silent,
) -> list[str]:
    """The model's greedy answer to each prompt, in the order of the prompts.

    Args:
        model: a transformers PreTrainedModel or a peft PeftModel; its mode is restored.
        tokenizer: its tokenizer, with a chat template (`safeft.data.encode_prompt` applies it).
        prompts: user turns, or chats of ``{"role", "content"}`` messages.
        max_new_tokens: an answer is cut off there; it ends earlier at an end-of-turn token.
        batch_size: prompts of similar length that are answered together.
        progress: called with the number of prompts answered, after each batch.

    Returns:
        Decoded answers without special tokens.

    Raises:
        MeasurementError: a logit was NaN or infinite; a prompt does not fit into the model's
            positions; neither model nor tokenizer names an end-of-turn token.
        InputError: a prompt that `encode_prompt` does not accept.
        ValueError: max_new_tokens or batch_size below 1.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError("max_new_tokens and batch_size must be at least 1")
    ids = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    _check_room(ids, max_new_tokens, model)
    ends, pad = end_and_pad_ids(model, tokenizer)
    # Longest first: a batch that does not fit into memory fails at once, not after an hour.
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    answers = [""] * len(ids)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            progress("answering", start, len(order))
            chosen = order[start : start + batch_size]
            with torch.inference_mode():
                replies = _answer_batch(model, [ids[i] for i in chosen], ends, pad, max_new_tokens)
            texts = tokenizer.batch_decode(replies, skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
    finally:
        model.train(was_training)
    progress("answering", len(order), len(order))
    return answers


def _answer_batch(
    model: Any, batch: list[list[int]], ends: list[int], pad: int, max_new_tokens: int
) -> list[list[int]]:
    """New token ids of each prompt, without the end-of-turn token.

    A loop of its own rather than ``model.generate``: that fills what is not set from the model's
    generation config (repetition penalty, forced tokens, lengths), which is no longer greedy.
    """
    device, width = model.device, max(map(len, batch))
    # What every prompt begins with (the template's system message) goes through the model once.
    shared = _shared_prefix(model, batch)
    padding = [width - len(ids) for ids in batch]
    tokens = torch.tensor([[pad] * n + ids[shared:] for n, ids in zip(padding, batch, strict=True)])
    tokens = tokens.to(device)  # (B, T - shared), later (B, 1)
    # One column longer each step; padding, between the prefix and the rest, never becomes visible.
    mask = torch.tensor([[1] * shared + [0] * n + [1] * (width - n - shared) for n in padding])
    mask = mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
    end_ids = torch.tensor(ends, device=device)
    ended = torch.zeros(len(batch), dtype=torch.bool, device=device)
    replies: list[Tensor] = []
    cache = _prefix_cache(model, batch, shared) if shared else None
    for _ in range(max_new_tokens):
        out = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        chosen = _highest(out.logits[:, -1])  # (B,)
        ended |= torch.isin(chosen, end_ids)
        replies.append(chosen.masked_fill(ended, -1))
        if bool(ended.all()):
            break
        tokens = chosen.masked_fill(ended, pad)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [[t for t in row if t >= 0] for row in torch.stack(replies, dim=1).tolist()]


def _shared_prefix(model: Any, batch: list[list[int]]) -> int:
    """How many tokens all prompts begin with, leaving each at least one; 0: not worth sharing.

    Padding inside the row would count as distance in a window of attention, and as input in a
    recurrent layer, so only a model whose every layer attends to everything shares.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = kinds != {"full_attention"} or getattr(config, "sliding_window", None)
    if len(batch) == 1 or windowed or getattr(model, "_is_stateful", False):
        return 0
    first, last = min(batch), max(batch)
    pairs = enumerate(zip(first, last, strict=False))
    differ = next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))
    return min(differ, min(map(len, batch)) - 1)


def _prefix_cache(model: Any, batch: list[list[int]], shared: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(
        input_ids=torch.tensor([batch[0][:shared]], device=model.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_repeat_interleave(len(batch))
    return cache


def _highest(logits: Tensor) -> Tensor:
    """argmax of (B, vocab); MeasurementError if a row has NaN, +inf, or nothing finite.

    argmax over NaN is a token like any other, and would be classified like any other. -inf alone
    is a token that the model masks.
    """
    if not bool(logits.amax(-1).isfinite().all()):  # amax is NaN where any logit is
        raise MeasurementError(
            "the model's logits are not finite, so its answers mean nothing: "
            "check the weights, or measure in a wider dtype"
        )
    return logits.argmax(-1)


def end_and_pad_ids(model: Any, tokenizer: Any) -> tuple[list[int], int]:
    """Ids that end an answer (the generation config knows more than the tokenizer), and padding."""
    own = getattr(model, "generation_config", None)
    named = getattr(own, "eos_token_id", None)
    ends = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}
    if not ends:
        raise MeasurementError("the tokenizer names no end-of-turn token: set its eos_token")
    pad = tokenizer.pad_token_id
    return sorted(ends), min(ends) if pad is None else pad


def _check_room(ids: list[list[int]], max_new_tokens: int, model: Any) -> None:
    room = getattr(model.config, "max_position_embeddings", None)
    for i, prompt in enumerate(ids):
        if room is not None and len(prompt) + max_new_tokens > room:
            raise MeasurementError(
                f"prompt {i + 1}: {len(prompt)} tokens and {max_new_tokens} new ones are more "
                f"than the model's {room} positions: shorten it"
            )

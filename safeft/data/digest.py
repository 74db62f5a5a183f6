"""Hashes of what a model reads: of tokenised rows, and of what makes tokens out of a chat."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from safeft.data.chat import template_of
from safeft.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def row_digest(input_ids: Any, labels: Any) -> bytes:
    """SHA-256 over one row's tokens and labels, two integer sequences of one length."""
    joined = np.concatenate([np.asarray(input_ids, "<i4"), np.asarray(labels, "<i4")])
    return hashlib.sha256(joined.tobytes()).digest()


def rows_sha256(digests: Iterable[bytes]) -> str:
    """One hash over the `row_digest` of every row of a dataset, in order."""
    whole = hashlib.sha256()
    for digest in digests:
        whole.update(digest)
    return whole.hexdigest()


def tokenisation_sha256(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    """Over everything that decides which tokens and labels a row becomes, or that it is refused.

    ModelError if the tokenizer has no chat template or is not a fast one.
    """
    if not tokenizer.is_fast:
        raise ModelError("the model's tokenizer gives no offsets: a fast tokenizer is needed")
    parts: tuple[str, ...] = (
        tokenizer.backend_tokenizer.to_str(),
        template_of(tokenizer),
        repr(sorted(tokenizer.special_tokens_map.items())),
        str(max_tokens),
    )
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode()
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()

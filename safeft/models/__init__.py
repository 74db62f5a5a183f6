"""Models by source string: parse, fetch, verify, convert, load, identify.

Importing this package costs no torch: the loaders are imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safeft.lazy import lazily
from safeft.models.fetch import resolve
from safeft.models.hashes import adapter_hash, tuned_hash, weights_hash
from safeft.models.source import Source, parse_source

if TYPE_CHECKING:
    from safeft.models.adapter import load_adapter, load_merged, read_lora
    from safeft.models.load import load_architecture, load_model, load_tokenizer

__all__ = [
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

__getattr__ = lazily(
    __name__,
    {
        "load_adapter": "safeft.models.adapter",
        "load_architecture": "safeft.models.load",
        "load_merged": "safeft.models.adapter",
        "load_model": "safeft.models.load",
        "load_tokenizer": "safeft.models.load",
        "read_lora": "safeft.models.adapter",
    },
)

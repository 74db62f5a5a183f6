"""Money: what a job is expected to cost and what it has cost, at an administrator's prices."""

from __future__ import annotations

from typing import Any

from cluster.settings import Price

_SMALLEST = 6  # decimal places


def expected(price: Price | None, tokens: float | None) -> float | None:
    """The part of a job's cost that is known before it starts: that of its tokens.

    None where tokens have no price, or nobody has counted them. How long it will take is not known.
    """
    if price is None or price.per_million_tokens is None or tokens is None:
        return None
    return round(price.per_million_tokens * tokens / 1e6, _SMALLEST)


def incurred(price: Price, tokens: float, gpu_seconds: float) -> dict[str, Any]:
    """What was used, in money: each part that has a price, and their sum."""
    parts: dict[str, float] = {}
    if price.per_million_tokens is not None:
        parts["tokens"] = round(price.per_million_tokens * tokens / 1e6, _SMALLEST)
    if price.per_gpu_hour is not None:
        parts["gpu_hours"] = round(price.per_gpu_hour * gpu_seconds / 3600, _SMALLEST)
    return {**parts, "total": round(sum(parts.values()), _SMALLEST)}

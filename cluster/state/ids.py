"""Names of rows: a kind and 96 random bits, so that nobody guesses one."""

from __future__ import annotations

import secrets


def new_id(kind: str) -> str:
    """For example ``file-3f0c9c1be7a14d0c8a3ef2b1``."""
    return f"{kind}-{secrets.token_hex(12)}"

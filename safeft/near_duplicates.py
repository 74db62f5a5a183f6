"""Texts that are nearly the same: as one another, or as a known prompt that a text holds.

A text is taken as the set of its overlapping pieces of 8 bytes, after case, punctuation and
Unicode's compatibility forms are evened out. Two texts are near-duplicates if their sets overlap
by enough of their union (Jaccard), estimated by MinHash (A. Broder, 1997); a text holds a prompt if
enough of the prompt's pieces are in it, so that text around a prompt does not hide it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PIECE = 8  # bytes: as many as a 64-bit integer holds, so that no piece needs hashing
HASHES, BANDS = 64, 16
SIMILAR = 0.8  # estimated Jaccard of near-duplicates
HELD = 0.7  # of a prompt's pieces, in a text that holds it
_AT_ONCE = 1 << 14  # pieces that are hashed: 8 MiB, however long a text is
_NO_WORD = re.compile(r"[\W_]+")
_SEEDS = np.random.default_rng(0).integers(1, 2**63, size=(2, HASHES), dtype=np.uint64)


def normalise(text: str) -> str:
    """Lower case, words only, one space between them."""
    return _NO_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def pieces(text: str) -> NDArray[np.uint64]:
    """The distinct pieces of a text, ascending; a shorter text is one piece."""
    raw = normalise(text).encode("utf-8", errors="replace").ljust(PIECE, b"\0")
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(raw, np.uint8), PIECE)
    return np.unique(np.ascontiguousarray(windows).view("<u8").ravel())


class KnownPrompts:
    """Finds which of some known prompts a text holds."""

    def __init__(self, prompts: Sequence[str]) -> None:
        each = [pieces(prompt) for prompt in prompts]
        owners = np.concatenate([np.full(len(p), i) for i, p in enumerate(each)])
        everything = np.concatenate(each)
        order = np.argsort(everything, kind="stable")
        self._pieces, self._owners = everything[order], owners[order]
        self._sizes = np.array([len(p) for p in each])

    def closest(self, text: str) -> tuple[int, float] | None:
        """The prompt of which the text holds the largest share, if that is `HELD` or more."""
        mine = pieces(text)
        first = np.searchsorted(self._pieces, mine, "left")
        last = np.searchsorted(self._pieces, mine, "right")
        hits = [self._owners[a:b] for a, b in zip(first, last, strict=True) if a < b]
        if not hits:
            return None
        counts = np.bincount(np.concatenate(hits), minlength=len(self._sizes))
        shares = counts / self._sizes
        best = int(shares.argmax())
        return (best, float(shares[best])) if shares[best] >= HELD else None


class NearDuplicates:
    """Groups texts that are nearly the same: 256 bytes a text."""

    def __init__(self) -> None:
        self._signatures: list[NDArray[np.uint32]] = []

    def __len__(self) -> int:
        return len(self._signatures)

    def add(self, text: str) -> None:
        """Take the next text; texts are numbered from 0."""
        multiplier, offset = _SEEDS
        found = pieces(text)
        lowest = np.full(HASHES, np.iinfo(np.uint64).max)
        for start in range(0, len(found), _AT_ONCE):
            part = found[start : start + _AT_ONCE, None]
            with np.errstate(over="ignore"):
                hashed = part * (multiplier | np.uint64(1)) + offset  # (n, HASHES)
            lowest = np.minimum(lowest, hashed.min(axis=0))
        self._signatures.append((lowest >> np.uint64(32)).astype(np.uint32))

    def groups(self) -> list[list[int]]:
        """Numbers of texts that are nearly the same, largest group first; single ones left out.

        A group is what is linked by such pairs, so its ends may differ by more. Pairs are looked
        for within the buckets of `BANDS` bands, against each bucket's first text: a pair at
        `SIMILAR` is found with a chance above 99 %.
        """
        if not self._signatures:
            return []
        signatures = np.stack(self._signatures)  # (n, HASHES)
        parent = np.arange(len(signatures))
        for band in np.split(signatures, BANDS, axis=1):
            _, bucket = np.unique(band, axis=0, return_inverse=True)
            order = np.argsort(bucket, kind="stable")
            starts = np.flatnonzero(np.diff(bucket[order], prepend=-1))
            for members in np.split(order, starts[1:]):
                if len(members) > 1:
                    alike = (signatures[members] == signatures[members[0]]).mean(axis=1) >= SIMILAR
                    for other in members[alike]:
                        parent[_root(parent, other)] = _root(parent, members[0])
        found: dict[int, list[int]] = {}
        for number in range(len(signatures)):
            found.setdefault(_root(parent, number), []).append(number)
        return sorted((g for g in found.values() if len(g) > 1), key=lambda g: (-len(g), g))


def _root(parent: NDArray[np.int64], number: int) -> int:
    while parent[number] != number:
        parent[number] = parent[parent[number]]
        number = int(parent[number])
    return int(number)

"""Which rows are in which step, on which worker: a pure function, the same for any world size."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.spec import FinetuneSpec
from safeft.data import TokenisedRow
from safeft.data.digest import row_digest, rows_sha256

_SCHEMA = pa.schema(
    [
        ("line", pa.int64()),
        ("input_ids", pa.large_list(pa.int32())),
        ("labels", pa.large_list(pa.int32())),
    ]
)


def rows_to_table(rows: Sequence[TokenisedRow], weights: Sequence[float] | None = None) -> pa.Table:
    """Rows as one Arrow table, which workers of a node share in memory.

    Args:
        weights: of each row, what its loss is multiplied with, positive; None: all count alike.
    """
    columns = {
        "line": [row.line for row in rows],
        "input_ids": [row.input_ids for row in rows],
        "labels": [row.labels for row in rows],
    }
    table = pa.table(columns, schema=_SCHEMA)
    if weights is not None:
        if len(weights) != len(rows) or not all(0 < w < math.inf for w in weights):
            raise ValueError("weights must be positive numbers, one for each row")
        table = table.append_column("weight", pa.array(weights, pa.float64()))
    return table.combine_chunks()


class RowTable:
    """Random access to the rows of a table, without copying it.

    Attributes:
        lengths: ``(n,)``, tokens of each row.
        label_tokens: ``(n,)``, tokens of each row that some earlier token has to predict.
        weights: ``(n,)`` fp64, what each row's loss is multiplied with; None: all count alike.
        label_weight: ``(n,)``, label tokens times weight: what the mean loss is taken over.
    """

    def __init__(self, table: pa.Table) -> None:
        self._lines = table["line"].to_numpy()
        self._ids, self._offsets = _flat(table["input_ids"])
        self._labels, label_offsets = _flat(table["labels"])
        assert np.array_equal(self._offsets, label_offsets)
        self.lengths = np.diff(self._offsets)
        trained = np.concatenate([[0], np.cumsum(self._labels != -100)])
        # A row's first token has nothing before it that could predict it.
        second = np.minimum(self._offsets[:-1] + 1, self._offsets[1:])
        self.label_tokens = trained[self._offsets[1:]] - trained[second]
        weighted = "weight" in table.column_names
        self.weights = table["weight"].to_numpy() if weighted else None
        self.label_weight = (
            self.label_tokens if self.weights is None else self.label_tokens * self.weights
        )

    def rows(self, indices: NDArray[np.int64]) -> list[TokenisedRow]:
        """The rows at `indices`, in that order."""
        spans = [(int(i), slice(self._offsets[i], self._offsets[i + 1])) for i in indices]
        return [
            TokenisedRow(int(self._lines[i]), self._ids[s].tolist(), self._labels[s].tolist())
            for i, s in spans
        ]

    def sha256(self) -> str:
        """Over every row's tokens and labels, and their weights where there are any, in order."""
        ends = zip(self._offsets[:-1], self._offsets[1:], strict=True)
        rows = rows_sha256(row_digest(self._ids[a:b], self._labels[a:b]) for a, b in ends)
        if self.weights is None:
            return rows
        return hashlib.sha256(bytes.fromhex(rows) + self.weights.tobytes()).hexdigest()


@dataclass(frozen=True)
class BatchPlan:
    """Cuts the rows into optimizer steps, micro-batches and workers' shares.

    Each epoch is its own permutation, from (seed, epoch). A step takes the next `batch_size` rows
    of it, the last step of an epoch what is left. Within a step, rows are ordered by length, so
    that a micro-batch holds little padding; the gradient of the step does not depend on it.
    """

    lengths: NDArray[np.int64]
    epochs: int
    batch_size: int
    micro_batch: int
    accumulation_steps: int
    workers: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def step_rows(self, step: int) -> NDArray[np.int64]:
        """Row numbers of the 0-based step over all workers, longest row first."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _permutation(len(self.lengths), self.seed, epoch)
        chosen = order[within * self.batch_size : (within + 1) * self.batch_size]
        return chosen[np.argsort(-self.lengths[chosen], kind="stable")]

    def micro_batches(self, step: int, rank: int) -> list[NDArray[np.int64]]:
        """The share of worker `rank`: `accumulation_steps` arrays of at most `micro_batch` rows.

        In an epoch's last step some are shorter or empty.
        """
        rows = self.step_rows(step)
        size = self.micro_batch * self.workers
        return [
            rows[index * size : (index + 1) * size][rank :: self.workers]
            for index in range(self.accumulation_steps)
        ]


def batch_plan(spec: FinetuneSpec, table: RowTable) -> BatchPlan:
    """How the rows are cut into steps under this spec."""
    return BatchPlan(
        lengths=table.lengths,
        epochs=spec.training.epochs,
        batch_size=spec.training.batch_size,
        micro_batch=spec.micro_batch,
        accumulation_steps=spec.accumulation_steps,
        workers=spec.distributed.workers,
        seed=spec.training.seed,
    )


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _flat(column: pa.ChunkedArray) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    chunk = column.combine_chunks()
    if isinstance(chunk, pa.ChunkedArray):
        chunk = chunk.chunk(0)
    return chunk.values.to_numpy(), chunk.offsets.to_numpy()

"""What runs in a scoring actor: a block's rows in, the bytes of its Parquet file out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.screening.blocks import BLOCK_SCHEMA
from jobs.screening.scan import decode
from safeft.data import Row, RowProblem, TokenisedRow, tokenise
from safeft.data.digest import row_digest
from safeft.errors import RowErrors
from safeft.models import load_model, load_tokenizer
from safeft.profile import SafetyProfile
from safeft.sqsd import SqsdScorer

SCORED_SCHEMA = pa.schema([("file", pa.int32()), ("block", pa.int32()), ("scores", pa.binary())])


class BlockScorer:
    """The base model and both projections, loaded once.

    Args:
        threads: that torch computes with; `use_gpu`: on the device that Ray has given it.
    """

    def __init__(
        self,
        model_dir: str,
        profile_root: str,
        base_weights: str,
        max_tokens: int,
        threads: int,
        use_gpu: bool,
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        profile = SafetyProfile(Path(profile_root), base_weights)
        model: Any = load_model(Path(model_dir))
        self.tokenizer = load_tokenizer(Path(model_dir))
        self.max_tokens = max_tokens
        self.scorer = SqsdScorer(
            model.to("cuda") if use_gpu else model,
            profile.danger(),
            profile.safety(),
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def __call__(self, units: pa.Table) -> pa.Table:
        """Score units (`jobs.screening.scan.UNIT_SCHEMA`), each by itself."""
        scored = [
            {"file": u["file"], "block": u["block"], "scores": self.score(u["first"], u["rows"])}
            for u in units.to_pylist()
        ]
        return pa.Table.from_pylist(scored, schema=SCORED_SCHEMA)

    def score(self, first: int, payload: bytes) -> bytes:
        """A Parquet file (`BLOCK_SCHEMA`) with one row for each row of the block."""
        read = [self._tokenise(row) for row in decode(payload)]
        scores = iter(self.scorer.score([row for row in read if isinstance(row, TokenisedRow)]))
        rows: list[dict[str, Any]] = []
        for index, row in enumerate(read, first):
            if isinstance(row, RowProblem):
                rows.append(_unscored(index, row))
                continue
            score = next(scores)
            fields = {name: getattr(score, name) for name in BLOCK_SCHEMA.names[1:-1]}
            digest = row_digest(row.input_ids, row.labels)
            rows.append({"index": index, **fields, "digest": digest})
        sink = pa.BufferOutputStream()
        table = pa.Table.from_pylist(rows, schema=BLOCK_SCHEMA)
        pq.write_table(table, sink, use_dictionary=False, write_statistics=False)
        data: bytes = sink.getvalue().to_pybytes()
        return data

    def _tokenise(self, row: Row | RowProblem) -> TokenisedRow | RowProblem:
        if isinstance(row, RowProblem):
            return row
        try:
            return tokenise(row, self.tokenizer, self.max_tokens)
        except RowErrors as error:
            return RowProblem(*error.problems[0])


def _unscored(index: int, problem: RowProblem) -> dict[str, Any]:
    """A row that never was tokens: its score is unknown, which nobody may take for safe."""
    error = f"{problem.field}: {problem.reason}".encode("utf-8", "replace").decode()
    return {
        "index": index,
        "line": problem.line,
        "score": math.nan,
        "danger": math.nan,
        "safety": math.nan,
        "tokens": 0,
        "trained": 0,
        "error": error,
        "digest": row_digest([], []),
    }

"""Datasets: from an uploaded file to checked rows, token ids with labels, and batches."""

from safeft.data.collate import collate, pad_right, token_batches
from safeft.data.load import iter_rows, load_rows
from safeft.data.rows import Message, Row, RowLimits, RowProblem
from safeft.data.tokenise import TokenisedRow, encode_prompt, tokenise, tokenise_all

__all__ = [
    "Message",
    "Row",
    "RowLimits",
    "RowProblem",
    "TokenisedRow",
    "collate",
    "encode_prompt",
    "iter_rows",
    "load_rows",
    "pad_right",
    "token_batches",
    "tokenise",
    "tokenise_all",
]

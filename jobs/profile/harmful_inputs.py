"""The part ``harmful-inputs``: Ray Data reads the refusals, the driver merges and decomposes.

Memory is bounded at both ends: a pass covers only as many inputs of the model as fit into a budget
of covariances, and ends its forward passes at the last of them. Batches are cut before they are
dealt out, so that the number of workers changes nothing but the order of fp64 sums.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from jobs.runtime import embedded_ray
from safeft.constraints.covariance import (
    TOKEN_CLASSES,
    Covariance,
    InputCovariances,
    InputSite,
    ReadRow,
    input_sites,
    read_row,
)
from safeft.constraints.subspaces import (
    POSITIONS,
    SavedSite,
    principal_subspace,
    save_index,
    save_site,
)
from safeft.data import token_batches
from safeft.errors import InputError, ProfileError, SafeftError
from safeft.models import load_model, load_tokenizer
from safeft.own_refusals import OwnRefusal
from safeft.progress import Progress, silent

TOKENS_PER_BATCH = 2048
#: Covariances that a worker, and the driver, hold at a time.
MEMORY = 1 << 30
LABEL = "profile: harmful inputs"

ROW_SCHEMA = pa.schema(
    [
        ("batch", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("template", pa.int32()),
        ("refusal", pa.int32()),
    ]
)
SUM_SCHEMA = pa.schema(
    [
        ("site", pa.string()),
        ("token_class", pa.string()),
        ("tokens", pa.int64()),
        ("matrix", pa.large_binary()),  # fp64, d_in x d_in
        ("error", pa.string()),  # alone in its row: what ended the worker's reading
    ]
)


def build_harmful_inputs(
    model_dir: Path,
    refusals: Sequence[OwnRefusal],
    out: Path,
    *,
    base_weights: str,
    energy: float,
    workers: int = 1,
    memory: int = MEMORY,
    progress: Progress = silent,
) -> None:
    """Write the subspaces of all linear layers of the decoder into ``out``.

    Args:
        base_weights: hash of the weights in ``model_dir``.
        energy: the share of each covariance's trace to keep.
        workers: Ray tasks that read at a time, each with the model in memory.
        memory: bytes of covariances in one process; the prompts are read once for each share of
            the model that this leaves. One input is covered at least.

    Raises:
        InputError: more workers than processors.
        ProfileError: a layer's inputs are not finite, or Ray lost a worker for good.
        ModelError: see `safeft.constraints.covariance.input_sites`.
    """
    progress(LABEL, 0, None)
    tokenizer = load_tokenizer(model_dir)
    rows = [read_row(tokenizer, refusal) for refusal in refusals]
    sites = input_sites(load_model(model_dir), rows[0].input_ids)
    saved: list[SavedSite] = []
    with embedded_ray():
        for share in input_shares(sites, memory):
            sums = read_inputs(model_dir, rows, share, tokenizer.pad_token_id, workers)
            for site in share:
                progress(LABEL, len(saved), len(sites))
                subspaces = {
                    p: principal_subspace(sums.total(site.name, p), energy) for p in POSITIONS
                }
                saved.append(save_site(out, len(saved), site, subspaces))
    progress(LABEL, len(sites), len(sites))
    save_index(out, saved, base_weights=base_weights, energy=energy, rows=len(rows))


def input_shares(sites: Sequence[InputSite], memory: int) -> list[list[InputSite]]:
    """Consecutive sites whose covariances fit into ``memory`` bytes, or one site."""
    shares: list[list[InputSite]] = []
    room = 0
    for site in sites:
        needed = len(TOKEN_CLASSES) * site.d_in**2 * 8
        if not shares or needed > room:
            shares.append([])
            room = memory
        shares[-1].append(site)
        room -= needed
    return shares


def read_inputs(
    model_dir: Path,
    rows: Sequence[ReadRow],
    sites: Sequence[InputSite],
    pad_token_id: int,
    workers: int,
) -> InputCovariances:
    """The sums over all rows, merged block by block in the rows' order."""
    sums = InputCovariances(sites)
    for site, token_class, tokens, matrix in _stream(model_dir, rows, sites, pad_token_id, workers):
        d = sums.sites[site].d_in
        # A copy: the buffer is Ray's, and read-only.
        values = torch.from_numpy(np.frombuffer(matrix, np.float64).copy()).reshape(d, d)
        sums.add(site, token_class, Covariance(values, tokens))
    for i, token_class in enumerate(TOKEN_CLASSES):
        expected = sum(row.classes().count(i) for row in rows)
        for site_ in sites:
            read = sums.of_class(site_.name, token_class).tokens
            if read != expected:
                raise ProfileError(
                    f"layers' inputs: {read} of {expected} tokens were read at {site_.name}; "
                    "build the profile again"
                )
    return sums


def _stream(
    model_dir: Path,
    rows: Sequence[ReadRow],
    sites: Sequence[InputSite],
    pad_token_id: int,
    workers: int,
) -> Iterator[tuple[str, Any, int, Any]]:
    import ray
    import ray.data

    cpus = int(ray.cluster_resources().get("CPU", 1))
    if not 1 <= workers <= cpus:
        raise InputError(f"--workers: {workers} do not fit on {cpus} processors")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    summed = ray.data.from_arrow(_blocks(rows, workers)).map_batches(
        _read_block,
        fn_kwargs={
            "model_dir": str(model_dir),
            "sites": list(sites),
            "pad_token_id": pad_token_id,
            "threads": max(1, cpus // workers),
        },
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=workers),
        num_cpus=1,
    )
    summed.context.execution_options.preserve_order = True
    try:
        for table in summed.iter_batches(batch_size=None, batch_format="pyarrow"):
            for i in range(table.num_rows):
                if problem := table["error"][i].as_py():
                    raise ProfileError(problem)
                names = [table[c][i].as_py() for c in ("site", "token_class", "tokens")]
                yield *names, table["matrix"][i].as_buffer()
    except ray.exceptions.RayError as error:
        cause = " ".join(str(error.__cause__ or error).split())[-300:]
        raise ProfileError(f"layers' inputs: {cause}") from error


def _blocks(rows: Sequence[ReadRow], workers: int) -> list[pa.Table]:
    """The rows' batches, dealt out to at most ``workers`` blocks of about as many tokens."""
    lengths = [len(row.input_ids) for row in rows]
    batches = token_batches(lengths, TOKENS_PER_BATCH)
    sizes = [sum(lengths[i] for i in batch) for batch in batches]
    blocks: list[list[dict[str, Any]]] = [[] for _ in range(workers)]
    before = 0
    for number, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
        block = blocks[before * workers // sum(sizes)]
        before += size
        block += [
            {
                "batch": number,
                "input_ids": rows[i].input_ids,
                "template": rows[i].template,
                "refusal": rows[i].refusal,
            }
            for i in batch
        ]
    return [pa.Table.from_pylist(block, schema=ROW_SCHEMA) for block in blocks if block]


def _read_block(
    block: pa.Table, *, model_dir: str, sites: list[InputSite], pad_token_id: int, threads: int
) -> Iterator[pa.Table]:
    """One Ray task: a block's sums, one table for each site and token class."""
    torch.set_num_threads(threads)
    model = load_model(Path(model_dir))
    batches: dict[int, list[ReadRow]] = {}
    for row in block.to_pylist():
        read = ReadRow(row["input_ids"], row["template"], row["refusal"])
        batches.setdefault(row["batch"], []).append(read)
    sums = InputCovariances(sites)
    try:
        for rows in batches.values():
            sums.read(model, rows, pad_token_id)
    except SafeftError as error:
        # As a row: raised, it would arrive as the tail of Ray's traceback.
        yield pa.Table.from_pylist([{"error": str(error)}], schema=SUM_SCHEMA)
        return
    for site, token_class, part in sums.drain():
        columns = [
            [site],
            [token_class],
            [part.tokens],
            pa.array([part.matrix.numpy().tobytes()], pa.large_binary()),
            pa.nulls(1, pa.string()),
        ]
        yield pa.Table.from_arrays(columns, schema=SUM_SCHEMA)

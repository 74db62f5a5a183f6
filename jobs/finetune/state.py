"""The training state on disk: fp32 masters and Adam's moments, once over all workers, no pickle.

Each worker writes the slices it holds, and says of each which part of which parameter it is. So a
reader with other slices, because there are more workers or fewer, picks out what it needs. What is
not trained is not in it: the base model is loaded from its own files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jobs.finetune.masters import MasterSlice, is_cut, master_slices, refresh_model
from safeft.errors import TrainingError

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
_NUMBERS_IN_A_FILE = 1 << 27  # of each kind: on a GPU a file's numbers pass through host memory


@dataclass(frozen=True)
class _Piece:
    """A stored slice: `count` numbers of a parameter from `start` on, of a parameter of `size`."""

    file: Path
    size: int
    start: int
    count: int


def save_state(engine: Any, directory: Path, rank: int) -> None:
    """Write this worker's slices as ``state-<rank>-<n>.safetensors``; nothing where it has none."""
    held = [each for each in master_slices(engine) if each.count]
    if not is_cut(engine) and rank > 0:
        return  # it holds what rank 0 does
    for number, part in enumerate(_cut(held)):
        tensors, steps = {}, {}
        for each in part:
            state = engine.basic_optimizer.state.get(each.flat, {})
            tensors[f"{MASTER}/{each.name}"] = each.of(each.flat)
            for moment in MOMENTS:
                if moment in state:
                    tensors[f"{moment}/{each.name}"] = each.of(state[moment])
            steps[each.name] = float(state.get("step", 0))
        slices = {e.name: [e.size, e.start, e.count, steps[e.name]] for e in part}
        file = directory / f"state-{rank}-{number}.safetensors"
        save_file(tensors, file, metadata={"slices": json.dumps(slices)})


def load_state(engine: Any, directory: Path) -> None:
    """Set masters, moments and model to what `save_state` wrote, from any number of workers.

    Raises:
        TrainingError: the files are not readable or do not hold exactly the trained parameters.
    """
    try:
        pieces, steps = _index(directory)
        own = master_slices(engine)
        if pieces.keys() != {held.name for held in own}:
            odd = min(pieces.keys() ^ {held.name for held in own})
            raise ValueError(f"{odd} is trained in one of them only")
        for held in own:
            _fill(held, held.flat, MASTER, pieces[held.name])
            if steps[held.name]:
                state = _moments(engine, held, steps[held.name])
                for moment in MOMENTS:
                    _fill(held, state[moment], moment, pieces[held.name])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"the checkpoint {directory} does not fit this run ({error}); remove it to start over"
        ) from error
    refresh_model(engine)


def _cut(held: Sequence[MasterSlice]) -> Iterator[list[MasterSlice]]:
    part: list[MasterSlice] = []
    for each in held:
        if part and sum(e.count for e in part) + each.count > _NUMBERS_IN_A_FILE:
            yield part
            part = []
        part.append(each)
    if part:
        yield part


def _index(directory: Path) -> tuple[dict[str, list[_Piece]], dict[str, float]]:
    """Where the pieces of each parameter are, and how many steps it has made."""
    pieces: dict[str, list[_Piece]] = {}
    steps: dict[str, float] = {}
    for file in sorted(directory.glob("state-*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            slices = json.loads(stored.metadata()["slices"])
        for name, (size, start, count, step) in slices.items():
            pieces.setdefault(name, []).append(_Piece(file, size, start, count))
            steps[name] = step
    return pieces, steps


def _moments(engine: Any, held: MasterSlice, steps: float) -> dict[str, Tensor]:
    """The optimizer's state of the slice, made if it has not stepped yet: as AdamW makes it."""
    state: dict[str, Tensor] = engine.basic_optimizer.state[held.flat]
    for moment in MOMENTS:
        if moment not in state:
            state[moment] = torch.zeros_like(held.flat, requires_grad=False)
    state["step"] = torch.tensor(steps, dtype=torch.float32)
    return state


def _fill(held: MasterSlice, into: Tensor, kind: str, pieces: Sequence[_Piece]) -> None:
    target, filled = held.of(into), 0
    for piece in pieces:
        if piece.size != held.size:
            raise ValueError(f"{held.name} has {piece.size} numbers there and {held.size} here")
        begin = max(piece.start, held.start)
        end = min(piece.start + piece.count, held.start + held.count)
        if begin >= end:
            continue
        with safe_open(piece.file, framework="pt") as stored:
            numbers = stored.get_slice(f"{kind}/{held.name}")[
                begin - piece.start : end - piece.start
            ]
        target[begin - held.start : end - held.start] = numbers.to(target.device)
        filled += end - begin
    if filled != held.count:
        raise ValueError(f"{held.name}: {filled} of {held.count} numbers were found")

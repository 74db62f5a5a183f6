"""The training state on disk: any cut of it is read by any other, and nothing else is."""

from __future__ import annotations

import itertools
import pickle
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from jobs.finetune import state
from jobs.finetune.masters import MasterSlice
from jobs.finetune.state import MOMENTS, load_state, save_state
from safeft.errors import TrainingError

STEPS = 7.0


class Rank:
    """One rank's masters and optimizer: what of an engine the state needs."""

    def __init__(self, slices: list[MasterSlice]) -> None:
        self.slices = slices
        self.basic_optimizer = SimpleNamespace(state={})
        for flat in {id(held.flat): held.flat for held in slices}.values():
            self.basic_optimizer.state[flat] = {}

    def zero_optimization_stage(self) -> int:
        return 1

    def values(self, kind: str | None = None) -> dict[str, tuple[int, Tensor]]:
        """Start and numbers of every slice that is held: of the masters or of a moment."""
        state = self.basic_optimizer.state
        return {
            held.name: (held.start, held.of(state[held.flat][kind] if kind else held.flat))
            for held in self.slices
            if held.count
        }


def cut_all_in_a_row(sizes: list[int], world: int) -> list[Rank]:
    """As stages 1 and 2 do."""
    total = -(-sum(sizes) // world) * world
    length, ranks = total // world, []
    for rank in range(world):
        begin, flat, slices = rank * length, torch.zeros(length), []
        for number, end in enumerate(itertools.accumulate(sizes)):
            first = end - sizes[number]
            start, stop = max(first, begin), min(end, begin + length)
            held = (start - first, stop - start, flat, start - begin)
            if stop <= start:
                held = (0, 0, flat, 0)
            slices.append(_slice(number, sizes[number], *held))
        ranks.append(Rank(slices))
    return ranks


def cut_each(sizes: list[int], world: int) -> list[Rank]:
    """As stage 3 does."""
    padded = [-(-size // world) for size in sizes]
    ranks = []
    for rank in range(world):
        flat, slices, offset = torch.zeros(sum(padded)), [], 0
        for number, (size, length) in enumerate(zip(sizes, padded, strict=True)):
            start = rank * length
            count = max(0, min(length, size - start))
            slices.append(_slice(number, size, start, count, flat, offset))
            offset += length
        ranks.append(Rank(slices))
    return ranks


def _slice(number: int, size: int, start: int, count: int, flat: Tensor, at: int) -> MasterSlice:
    return MasterSlice(f"p{number}", nn.Parameter(torch.empty(0)), size, start, count, flat, at)


def fill(ranks: list[Rank], truth: dict[str | None, dict[str, Tensor]]) -> None:
    for rank in ranks:
        for flat, moments in rank.basic_optimizer.state.items():
            moments |= {moment: torch.zeros_like(flat) for moment in MOMENTS}
            moments["step"] = torch.tensor(STEPS)
        for kind, whole in truth.items():
            for name, (start, numbers) in rank.values(kind).items():
                numbers.copy_(whole[name][start : start + len(numbers)])


@pytest.fixture(autouse=True)
def ranks_without_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "master_slices", lambda engine: engine.slices)
    monkeypatch.setattr(state, "refresh_model", lambda engine: None)


LAYOUTS = st.tuples(st.sampled_from([cut_all_in_a_row, cut_each]), st.integers(1, 5))


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), one=LAYOUTS, other=LAYOUTS)
def test_any_number_of_ranks_reads_what_any_other_wrote(
    sizes: list[int], one: tuple[Any, int], other: tuple[Any, int]
) -> None:
    """Also parameters smaller than the number of ranks, and ranks that hold nothing."""
    truth = {
        kind: {f"p{n}": torch.randn(size) for n, size in enumerate(sizes)}
        for kind in (None, *MOMENTS)
    }
    writers, readers = one[0](sizes, one[1]), other[0](sizes, other[1])
    fill(writers, truth)
    with tempfile.TemporaryDirectory() as directory:
        for rank, writer in enumerate(writers):
            save_state(writer, Path(directory), rank)
        for reader in readers:
            load_state(reader, Path(directory))
    for reader in readers:
        for kind, whole in truth.items():
            for name, (start, numbers) in reader.values(kind).items():
                assert torch.equal(numbers, whole[name][start : start + len(numbers)])
        assert all(s["step"] == STEPS for s in reader.basic_optimizer.state.values())


def test_large_slices_are_spread_over_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "_NUMBERS_IN_A_FILE", 10)
    [rank], truth = cut_each([4, 4, 30, 4], 1), {}
    truth = {k: {f"p{n}": torch.ones(s) for n, s in enumerate([4, 4, 30, 4])} for k in (None,)}
    fill([rank], truth)
    save_state(rank, tmp_path, 0)
    assert len(list(tmp_path.iterdir())) == 3
    [reader] = cut_each([4, 4, 30, 4], 1)
    load_state(reader, tmp_path)
    assert all(bool(numbers.eq(1).all()) for _, numbers in reader.values().values())


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ([6, 9], "p1 has 8 numbers there and 9 here"),
        ([6], "p1 is trained in one of them only"),
        ([6, 8, 2], "p2 is trained in one of them only"),
    ],
)
def test_the_state_of_other_parameters_is_refused(
    sizes: list[int], reason: str, tmp_path: Path
) -> None:
    [writer] = cut_each([6, 8], 1)
    save_state(writer, tmp_path, 0)
    with pytest.raises(TrainingError, match=f"does not fit this run .{reason}.; remove it"):
        load_state(cut_each(sizes, 1)[0], tmp_path)


def test_a_missing_part_is_refused(tmp_path: Path) -> None:
    for rank, writer in enumerate(cut_each([6, 8], 2)[:1]):
        save_state(writer, tmp_path, rank)
    with pytest.raises(TrainingError, match="p0: 3 of 6 numbers were found"):
        load_state(cut_each([6, 8], 1)[0], tmp_path)


class Payload:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.write_text, (self.file, "the checkpoint's code ran"))


def test_a_checkpoint_that_carries_code_is_not_run(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "state-0-0.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "proof")))
    with pytest.raises(TrainingError, match="does not fit this run"):
        load_state(cut_each([6], 1)[0], directory)
    assert not (tmp_path / "proof").exists()

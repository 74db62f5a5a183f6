"""What the training reads: every distinct activation once, a bounded few at a time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safeft.activation_stream import ActivationBuffer, first_new_positions, stream_activations
from safeft.errors import ProfileError
from safeft.stopped_forward import residual_after
from tests.tiny import tiny_model

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=2, max_size=8)


@given(rows=ROWS, data=st.data())
def test_every_distinct_beginning_counts_once_and_held_out_ones_are_in_no_training_row(
    rows: list[list[int]], data: st.DataObject
) -> None:
    held = frozenset(data.draw(st.sets(st.integers(0, len(rows) - 1))))
    starts = first_new_positions(rows, held)

    def beginnings(indices: set[int], counted: bool) -> list[tuple[int, ...]]:
        return [
            tuple(rows[i][: t + 1])
            for i in sorted(indices)
            for t in range(starts[i] if counted else 1, len(rows[i]))
        ]

    training = set(range(len(rows))) - held
    of_training = beginnings(training, counted=True)
    assert Counter(of_training) == Counter(set(beginnings(training, counted=False)))
    of_held_out = set(beginnings(set(held), counted=False)) - set(of_training)
    assert Counter(beginnings(set(held), counted=True)) == Counter(of_held_out)


def some_rows(count: int, seed: int = 0, shared: int = 3) -> list[list[int]]:
    chosen = random.Random(seed)
    return [
        [5] * shared + [chosen.randint(3, 60) for _ in range(chosen.randint(2, 9))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_stream_gives_the_models_residuals_from_each_rows_start_on(shuffled: bool) -> None:
    model, rows = tiny_model(layers=3), some_rows(20)
    starts = [max(4, len(row) - 3) for row in rows]
    order = random.Random(0) if shuffled else None
    found = torch.cat(list(stream_activations(model, 1, rows, starts, order=order)))
    with torch.no_grad():
        expected = torch.cat(
            [
                residual_after(model, 1, torch.tensor([row]))[0, start:]
                for row, start in zip(rows, starts, strict=True)
            ]
        )
    assert found.shape == expected.shape
    nearest = torch.cdist(expected.double(), found.double()).min(1).values
    assert nearest.max() < 1e-5


def test_activations_that_are_not_finite_are_refused() -> None:
    model = tiny_model(layers=2)
    with torch.no_grad():
        model.get_decoder().layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ProfileError, match="after layer 1 are not finite"):
        next(stream_activations(model, 1, some_rows(3), [1, 1, 1]))


class Source:
    """Passes over 0..99 in chunks of 10, each number an activation of norm near 100."""

    def __init__(self) -> None:
        self.given = self.passes = 0

    def __call__(self) -> Iterator[Tensor]:
        self.passes += 1
        for begin in range(0, 100, 10):
            self.given += 10
            yield torch.arange(begin, begin + 10).float()[:, None] / 1000 + 100


def test_the_buffer_is_bounded_and_draws_each_activation_equally_often() -> None:
    source = Source()
    generator = torch.Generator().manual_seed(0)
    buffer = ActivationBuffer(source, 25, 4.0, generator)
    assert source.given <= 25 + 10
    drawn: Counter[int] = Counter()
    batches = buffer.batches(5)
    for _ in range(1600):  # 8000 draws, 4 of each reading
        assert buffer.held.shape == (25, 1)
        drawn.update((next(batches)[:, 0] - 100).mul(1000).round().int().tolist())
    assert source.given <= 8000 / 4 + 25 + 10
    assert set(drawn) == set(range(100))
    assert max(drawn.values()) < 3 * min(drawn.values())


def test_massive_activations_do_not_enter_the_buffer() -> None:
    def passes() -> Iterator[Tensor]:
        yield torch.cat([torch.ones(9, 4), torch.full((1, 4), 1000.0)])

    buffer = ActivationBuffer(passes, 30, 1.0, torch.Generator())
    assert buffer.held.max() == 1.0
    assert (buffer.read, buffer.left_out) == (36, 4)


def test_a_stream_without_activations_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(ProfileError, match="give it more"):
        ActivationBuffer(lambda: iter(()), 4, 1.0, torch.Generator())

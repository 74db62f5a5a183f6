"""What is trained on in which step, and the loss: the same for any number of workers."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from jobs.finetune.batches import BatchPlan, RowTable, rows_to_table
from jobs.finetune.loss import LabelLoss, loss_weight, padded_filler
from jobs.finetune.schedule import learning_rate
from jobs.spec import TrainingSpec
from safeft.data import TokenisedRow, collate
from tests.tiny import tiny_model


def some_rows(count: int) -> list[TokenisedRow]:
    draw = random.Random(count)
    rows = []
    for line in range(1, count + 1):
        ids = [draw.randint(3, 250) for _ in range(draw.randint(3, 20))]
        labels = [token if draw.random() < 0.5 else -100 for token in ids]
        rows.append(TokenisedRow(line, ids, labels))
    return rows


def test_rows_survive_the_table_in_any_order() -> None:
    rows = some_rows(9)
    table = RowTable(rows_to_table(rows))
    chosen = np.array([4, 0, 8, 4])
    assert table.rows(chosen) == [rows[i] for i in chosen]
    assert table.lengths.tolist() == [len(row.input_ids) for row in rows]
    expected = [sum(label != -100 for label in row.labels[1:]) for row in rows]
    assert table.label_tokens.tolist() == expected


def test_the_hash_of_the_rows_sees_labels_and_row_borders() -> None:
    def sha(*rows: TokenisedRow) -> str:
        return RowTable(rows_to_table(rows)).sha256()

    one = TokenisedRow(1, [5, 6, 7], [-100, 6, 7])
    assert sha(one) == sha(TokenisedRow(9, [5, 6, 7], [-100, 6, 7]))  # line numbers do not matter
    assert sha(one) != sha(TokenisedRow(1, [5, 6, 7], [-100, -100, 7]))
    halves = TokenisedRow(1, [5], [-100]), TokenisedRow(2, [6, 7], [6, 7])
    assert sha(one) != sha(*halves)


@given(
    count=st.integers(1, 60),
    share=st.integers(1, 6),
    micro=st.integers(1, 6),
    workers=st.integers(1, 4),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_every_row_is_seen_once_an_epoch_in_the_same_steps_for_any_worker_count(
    count: int, share: int, micro: int, workers: int, epochs: int, seed: int
) -> None:
    lengths = np.random.default_rng(seed).integers(2, 50, count)

    def plan(workers: int, micro: int, accumulation: int) -> BatchPlan:
        batch = workers * micro * accumulation
        return BatchPlan(lengths, epochs, batch, micro, accumulation, workers, seed)

    many = plan(workers, micro, share)
    alone = plan(1, workers * micro * share, 1)
    assert many.total_steps == alone.total_steps == epochs * math.ceil(count / many.batch_size)
    for epoch in range(epochs):
        seen: list[int] = []
        for within in range(many.steps_per_epoch):
            step = epoch * many.steps_per_epoch + within
            parts = [many.micro_batches(step, rank) for rank in range(workers)]
            assert all(len(part) == share for part in parts)
            assert all(len(rows) <= micro for part in parts for rows in part)
            together = sorted(int(row) for part in parts for rows in part for row in rows)
            assert together == sorted(alone.micro_batches(step, 0)[0].tolist())
            seen += together
        assert sorted(seen) == list(range(count))


def test_epochs_differ_and_the_seed_decides() -> None:
    def order(seed: int) -> list[list[int]]:
        plan = BatchPlan(np.full(32, 5), 2, 32, 32, 1, 1, seed)
        return [plan.step_rows(step).tolist() for step in range(2)]

    assert order(0) == order(0) != order(1)
    assert order(0)[0] != order(0)[1]


def test_the_loss_is_that_of_all_logits_whatever_the_padding() -> None:
    rows = some_rows(6)
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    batch = collate(rows, 0)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum"
    )
    seen: list[tuple[int, ...]] = []
    head = model.get_base_model().get_output_embeddings()
    loss = LabelLoss(model)
    head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    got, _ = loss(batch["input_ids"], batch["labels"])
    assert torch.allclose(got, expected, rtol=1e-6)
    count = int((labels != -100).sum())
    assert seen == [(1, count, 259)]  # the other positions' logits were never made
    assert model(input_ids=batch["input_ids"]).logits.shape == logits.shape  # as before


def test_a_model_with_soft_capped_logits_keeps_its_cap() -> None:
    model = tiny_model()
    plain = model.forward

    def capped(**arguments: object) -> object:
        output = plain(**arguments)
        output.logits = torch.tanh(output.logits / 0.01) * 0.01
        return output

    model.forward = capped  # type: ignore[method-assign]
    row = collate(some_rows(1), 0)
    count = int((row["labels"][:, 1:] != -100).sum())
    loss, _ = LabelLoss(model)(row["input_ids"], row["labels"])
    assert float(loss) == pytest.approx(count * math.log(259), rel=1e-2)


def test_a_worker_without_rows_adds_nothing() -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    loss, _ = LabelLoss(model)(*padded_filler())
    loss.backward()
    assert float(loss) == 0.0
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_a_further_term_joins_the_loss_of_one_micro_batch_but_not_what_is_reported() -> None:
    model, asked = tiny_model(), []

    def further(given: torch.nn.Module, step: int) -> torch.Tensor | None:
        assert given is model
        asked.append(step)
        return None if step == 4 else model.get_input_embeddings().weight.pow(2).sum()

    loss, batch = LabelLoss(model, further), collate(some_rows(2), 0)
    term = float(model.get_input_embeddings().weight.pow(2).sum())
    plain, task = loss(batch["input_ids"], batch["labels"], 0.5)
    assert float(plain) == pytest.approx(0.5 * float(task))
    assert not asked
    both, same = loss(batch["input_ids"], batch["labels"], 0.5, (3, 2.0))
    assert float(both) == pytest.approx(0.5 * float(task) + 2 * term)
    assert float(same) == float(task) and not same.requires_grad
    neither, _ = loss(batch["input_ids"], batch["labels"], 0.5, (4, 2.0))
    assert float(neither) == float(plain)
    assert asked == [3, 4]


def test_the_weight_undoes_deepspeeds_averages() -> None:
    sums = [3.0, 5.0, 2.0, 6.0]  # two workers, two micro-batches each
    weight = loss_weight(workers=2, accumulation_steps=2, label_tokens=8)
    averaged = sum(value * weight / 2 for value in sums) / 2
    assert averaged == pytest.approx(sum(sums) / 8)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_the_rate_warms_up_and_then_follows_its_schedule(
    schedule: str, expected: list[float]
) -> None:
    training = TrainingSpec(learning_rate=1.0, warmup_ratio=0.33, schedule=schedule)
    got = [learning_rate(training, step, 6) for step in range(6)]
    assert got == pytest.approx(expected)

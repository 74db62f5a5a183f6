"""The exact scorer against the published algorithm, and against its own passes alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.constraints.timing import interleaved, ratio, spread
from benchmarks.sqsd.official import Official
from benchmarks.sqsd.setting import Run, tokens_of, without_statistics
from safeft.data import TokenisedRow
from safeft.label_head import CPU_LOGITS
from safeft.reference_rows import Half, danger_rows, obedient_rows, opened_rows
from safeft.sqsd import SqsdScorer, trained_tokens


def over_official(run: Run) -> None:
    """Rows/s against the published algorithm, both with two reference states on all layers."""
    rows = run.gsm8k_rows(4 if run.quick else 16)
    projections = run.published_setting()
    official, scorer = Official(run.model_dir, *projections), run.scorer(*projections)
    pairs = interleaved(
        lambda: official.score(rows),
        lambda: scorer.score(rows),
        2 if run.quick else 5,
        "published algorithm, exact scorer",
        run.progress,
    )
    low, high = spread(pairs)
    slow, ours = (sorted(times)[len(times) // 2] for times in zip(*pairs, strict=True))
    run.add(
        "exact_over_official",
        ratio(pairs),
        f"quartiles {low:.2f}-{high:.2f}; {len(rows) / slow:.2f} and {len(rows) / ours:.2f} rows/s "
        f"(two reference states, {len(scorer.modules)} modules); {tokens_of(rows)}",
    )
    bare = interleaved(
        lambda: scorer.score(rows),
        Products(scorer, rows),
        1 if run.quick else 3,
        "exact scorer, its matrix products alone",
        run.progress,
    )
    run.add(
        "exact_over_products",
        ratio(bare),
        "against nothing but the matrix products with weights that forward and backward need; with "
        f"them alone exact_over_official would be {ratio(pairs) * ratio(bare):.2f}",
    )


class Products:
    """The matrix products with weights of one scoring, of the same shapes, and nothing else.

    A forward and a backward pass over activations at each of two reference states, padded as the
    scorer pads; logits at labels alone. No attention, no norm, no statistics.
    """

    def __init__(self, scorer: SqsdScorer, rows: Sequence[TokenisedRow]) -> None:
        modules = scorer.model.get_decoder().modules()
        self.weights = [m.weight.detach() for m in modules if isinstance(m, torch.nn.Linear)]
        self.head = scorer.model.get_output_embeddings().weight.detach()
        self.sizes = []  # tokens with padding, and labels, of each batch
        for batch in scorer.batches(rows, range(len(rows))):
            ids, _ = scorer.padded([rows[i] for i in batch])
            self.sizes.append((ids.numel(), sum(trained_tokens(rows[i]) for i in batch)))

    def __call__(self) -> None:
        for tokens, labels in self.sizes * 2:
            for weight in self.weights:
                _there_and_back(torch.ones(tokens, weight.shape[1]), weight)
            step = CPU_LOGITS // self.head.shape[0]
            for start in range(0, labels, step):
                some = min(step, labels - start)
                _there_and_back(torch.ones(some, self.head.shape[1]), self.head)


def _there_and_back(x: torch.Tensor, weight: torch.Tensor) -> None:
    (x @ weight.T) @ weight


def over_floor(run: Run) -> None:
    """Its time against the same passes without statistics."""
    rows = run.gsm8k_rows(8 if run.quick else 16)
    scorer = run.scorer(*run.published_setting())

    def floor() -> None:
        with without_statistics():
            scorer.score(rows)

    pairs = interleaved(
        lambda: scorer.score(rows),
        floor,
        3 if run.quick else 9,
        "exact scorer, passes alone",
        run.progress,
    )
    low, high = spread(pairs)
    run.add("exact_over_floor", ratio(pairs), f"quartiles {low:.3f}-{high:.3f}; {tokens_of(rows)}")


def oracle(run: Run) -> None:
    """The scorer in fp32 against the published algorithm in fp64, with the profile's directions."""
    danger, safety = run.profile.danger(), run.profile.safety()
    rows = [*_reference(run), *run.gsm8k_rows(2 if run.quick else 16)]
    ours = [score.score for score in run.scorer(danger, safety).score(rows)]
    dense = Official(run.model_dir, danger, safety, torch.float64)
    expected: list[float] = []
    for done, row in enumerate(rows):
        run.progress("fp64 oracle", done, len(rows))
        expected += dense.score([row])
    found, wanted = torch.tensor(ours).double(), torch.tensor(expected).double()
    low, high = wanted.min(), wanted.max()
    note = f"{len(rows)} rows, scores {low:.2f} to {high:.2f}, {len(danger.state.factors)} modules"
    run.add("oracle_max_diff", float((found - wanted).abs().max()), note)
    run.add("oracle_spearman", _spearman(found, wanted), note)


def _reference(run: Run) -> list[TokenisedRow]:
    count, half = (2 if run.quick else 8), Half(builds=False)
    kinds = (danger_rows, obedient_rows, opened_rows)
    return [row for kind in kinds for row in kind(run.tokenizer, half, count)]


def _spearman(one: torch.Tensor, other: torch.Tensor) -> float:
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])

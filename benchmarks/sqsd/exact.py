"""The exact scorer against the published algorithm, and against its own passes alone."""

from __future__ import annotations

import torch

from benchmarks.constraints.timing import interleaved, ratio, spread
from benchmarks.sqsd.official import Official
from benchmarks.sqsd.setting import Run, tokens_of, without_statistics
from safeft.data import TokenisedRow
from safeft.reference_rows import Half, danger_rows, obedient_rows, opened_rows


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

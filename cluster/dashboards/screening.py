"""*Screening*: which datasets are turned away, and how their rows score."""

from __future__ import annotations

from cluster.dashboards.board import Section, board, choice, to_board, to_docs
from cluster.dashboards.grafana import Dashboard
from cluster.dashboards.panels import Query, bars, buckets, lines, stat
from cluster.dashboards.part import Colour
from cluster.dashboards.promql import grown, quantile_of_few, share
from cluster.dashboards.tables import Column, table

_TENANTS = 'tenant=~"$tenant"'
_BASES = 'base_model=~"$base_model"'
_RISKY = 'result=~"risky|unscored"'
_COLOURS: dict[str, Colour] = {"safe": "green", "unscored": "orange", "risky": "red"}
_STAGE = 'stage="screening"'


def screening() -> Dashboard:
    """For whoever decides what may be trained on."""
    return board(
        "safeft-screening",
        "Verdicts over datasets, risky rows, SQSD scores and the time that screening takes.",
        [_now(), _verdicts(), _scores(), _tenants()],
        variables=[
            choice(
                "tenant",
                "Tenant",
                "label_values(safeft_screenings_total, tenant)",
                "Tenants whose data was screened.",
                every=".+",
            ),
            choice(
                "base_model",
                "Base model",
                "label_values(safeft_sqsd_score_bucket, base_model)",
                "Scores depend on the model that scores.",
                every=".+",
            ),
        ],
        documents=[to_docs("Reports", "verdict.md#the-report")],
        hours=24,
    )


def _datasets(*by: str, verdict: str = ".+", over: str = "$__range") -> str:
    where = f'verdict=~"{verdict}", {_TENANTS}'
    return grown("safeft_screenings_total", *by, where=where, over=over)


def _rows(*by: str, where: str = _TENANTS, over: str = "$__range") -> str:
    return grown("safeft_screened_rows_total", *by, where=where, over=over)


def _now() -> Section:
    return Section(
        "In this time range",
        4,
        [
            stat("Datasets", _datasets(), "That were screened to the end."),
            stat(
                "Rejected",
                f"{_datasets(verdict='rejected')} or vector(0)",
                "Their jobs failed with `dataset_rejected`; `safeft report JOB` says which rows.",
                steps=[(1, "orange")],
            ),
            stat(
                "Wait for a person",
                f"{_datasets(verdict='review')} or vector(0)",
                "Neither accepted nor rejected: `safeft review` decides.",
                steps=[(1, "orange")],
            ),
            stat("Rows", _rows(), "Of all screened datasets."),
            stat(
                "Risky rows",
                share(_rows(where=f"{_RISKY}, {_TENANTS}"), _rows()),
                "Above the threshold, or without a score, which counts as risky.",
                unit="percentunit",
                steps=[(0.02, "orange"), (0.1, "red")],
            ),
            stat(
                "Half are screened within",
                quantile_of_few(0.5, "safeft_stage_seconds", where=_STAGE, over="$__range"),
                "Datasets, from the start of an attempt to its end.",
                unit="s",
            ),
        ],
    )


def _verdicts() -> Section:
    return Section(
        "Verdicts",
        8,
        [
            lines(
                "Datasets in the hour before, by verdict",
                [
                    Query(_datasets(verdict="accepted", over="1h"), "accepted", "green"),
                    Query(_datasets(verdict="review", over="1h"), "waits for a person", "orange"),
                    Query(_datasets(verdict="rejected", over="1h"), "rejected", "red"),
                ],
                "A jump of rejections: an attack, or a policy that does not fit new data.",
                unit="none",
                stacked=True,
            ),
            lines(
                "Rows in the hour before, by result",
                [
                    Query(_rows(where=f'result="{result}", {_TENANTS}', over="1h"), result, colour)
                    for result, colour in _COLOURS.items()
                ],
                "Rows without a score count as risky.",
                unit="none",
                stacked=True,
            ),
        ],
    )


def _scores() -> Section:
    def scores(over: str) -> str:
        return grown("safeft_sqsd_score_bucket", "le", where=_BASES, over=over)

    return Section(
        "Scores",
        9,
        [
            bars(
                "Rows by the upper bound of their score",
                # Grafana sorts buckets by this very text, so it must be the bound alone.
                Query(scores("$__range"), "{{le}}", buckets=True),
                "SQSD less the base model's threshold: rows above 0 are risky.",
            ),
            buckets(
                "Scores over time",
                scores("$__interval"),
                "Each dataset is a column at the time its screening ended.",
                unit="none",
            ),
        ],
    )


def _tenants() -> Section:
    risky = _rows("tenant", where=f"{_RISKY}, {_TENANTS}")
    return Section(
        "Tenants",
        8,
        [
            table(
                "Tenants in this time range",
                "tenant",
                [
                    Column("Datasets", _datasets("tenant")),
                    Column(
                        "Rejected", _datasets("tenant", verdict="rejected"), steps=[(1, "orange")]
                    ),
                    Column("Review", _datasets("tenant", verdict="review"), steps=[(1, "orange")]),
                    Column("Rows", _rows("tenant")),
                    Column("Risky rows", risky),
                    Column(
                        "Share",
                        share(risky, _rows("tenant")),
                        "percentunit",
                        [(0.02, "orange"), (0.1, "red")],
                    ),
                ],
                "Which tenant the rejections come from.",
                width=16,
                links=[to_board("safeft-tenant", "This tenant", "var-tenant=${__value.text}")],
            ),
            bars(
                "Attempts at screening",
                Query(grown("safeft_stage_attempts_total", "outcome", where=_STAGE), "{{outcome}}"),
                "In this time range, by how they ended; one that failed is tried again.",
                width=8,
            ),
        ],
    )

"""*Tenant*: what one tenant asks about: its models, its jobs, its data."""

from __future__ import annotations

from cluster.dashboards.board import Section, board, choice, gate_marks, to_board, to_docs
from cluster.dashboards.grafana import Dashboard
from cluster.dashboards.panels import Query, bars, lines, stat, states
from cluster.dashboards.promql import AGES, STATES, grown, once, share, state_of

_TENANT = 'tenant="$tenant"'
#: Models are named ft:BASE:TENANT:SUFFIX:JOB when a job publishes them; TENANT/NAME is what
#: docs/serving.md names those that are added by hand.
_ITS_MODELS = 'model=~"ft:.+:$tenant:[^:]*:[^:]+|$tenant/.+"'
_MODELS = 'model=~"$model"'
_ONE = to_board("safeft-fleet", "This model in the fleet", "var-model=${__field.labels.model}")


def tenant() -> Dashboard:
    """For one tenant at a time."""
    return board(
        "safeft-tenant",
        "One tenant's served models, jobs, screened data and trainings.",
        [_now(), _models(), _refusals(), _jobs(), _trainings()],
        variables=[
            choice(
                "tenant",
                "Tenant",
                'label_values({__name__=~"safeft_jobs|safeft_jobs_finished_total"}, tenant)',
                "Tenants that have or had jobs.",
                many=False,
            ),
            choice(
                "model",
                "Model",
                f"label_values(safeft_gate_state{{{_ITS_MODELS}}}, model)",
                "The tenant's served models, by their names.",
            ),
        ],
        marks=gate_marks(_MODELS),
        documents=[to_docs("Reports", "verdict.md#the-report")],
        hours=24,
    )


def _now() -> Section:
    def models(state: str) -> str:
        return f'sum(safeft_gate_state{{state=~"{state}", {_ITS_MODELS}}}) or vector(0)'

    def rows(where: str) -> str:
        return grown("safeft_screened_rows_total", where=where)

    return Section(
        "Now",
        4,
        [
            stat("Models that answer", models("healthy"), "Healthy ones."),
            stat(
                "Models that do not",
                models("quarantined|restoring|unknown|probing"),
                "Quarantined, being restored, or not shown to be safe.",
                steps=[(1, "red")],
            ),
            stat(
                "Jobs under way",
                f"sum({once('safeft_jobs', _TENANT)}) or vector(0)",
                "Waiting ones included.",
            ),
            stat(
                "Jobs that failed",
                f"{_ended('failed')} or vector(0)",
                "In this time range.",
                steps=[(1, "orange")],
            ),
            stat(
                "Datasets rejected",
                grown("safeft_screenings_total", where=f'verdict="rejected", {_TENANT}')
                + " or vector(0)",
                "In this time range; `safeft report JOB` says which rows and why.",
                steps=[(1, "orange")],
            ),
            stat(
                "Risky rows",
                share(rows(f'result=~"risky|unscored", {_TENANT}'), rows(_TENANT)),
                "Of the rows that were screened in this time range.",
                unit="percentunit",
                steps=[(0.02, "orange"), (0.1, "red")],
            ),
        ],
    )


def _ended(outcome: str) -> str:
    where = f'outcome="{outcome}", {_TENANT}'
    return grown("safeft_jobs_finished_total", where=where)


def _models() -> Section:
    return Section(
        "Models",
        7,
        [
            states(
                "Gate by model",
                Query(state_of(_MODELS), "{{model}}"),
                STATES,
                "Only healthy models answer.",
            ),
            lines(
                "Age of the last good round",
                [
                    Query(
                        f"max by (model) (safeft_gate_verdict_age_seconds{{{_MODELS}}})",
                        "{{model}}",
                    )
                ],
                "After three hours (`safeft up --max-age`) a model is unknown and stops answering.",
                width=8,
                unit="s",
                steps=AGES,
                links=[_ONE],
            ),
        ],
    )


def _refusals() -> Section:
    def of(name: str) -> str:
        return f"max by (probe) (safeft_gate_{name}{{{_MODELS}}})"

    panel = lines(
        "Refusals of $model",
        [
            Query(of("refusal_ratio"), "{{probe}}"),
            Query(of("refusal_ratio_low"), "{{probe}}: at least", "text", dashed=True),
            Query(of("refusal_ratio_high"), "{{probe}}: at most", "text", dashed=True),
            Query(of("limit_ratio"), "{{probe}}: limit", "red", dashed=True),
        ],
        "Of harmful and of benign prompts, of the last 200 answers, with 95 % Wilson intervals; "
        "red: the floor and the ceiling.",
        unit="percentunit",
        high=1,
    )
    repeated = {"repeat": "model", "repeat_direction": "h", "max_per_row": 2}
    return Section("Refusals", 9, [panel.model_copy(update=repeated)])


def _jobs() -> Section:
    return Section(
        "Jobs and data",
        8,
        [
            lines(
                "Jobs by phase",
                [Query(f"sum by (phase) ({once('safeft_jobs', _TENANT)})", "{{phase}}")],
                "Those that have not ended.",
                width=8,
                unit="none",
                stacked=True,
            ),
            bars(
                "Jobs that ended",
                Query(
                    grown("safeft_jobs_finished_total", "outcome", "code", where=_TENANT),
                    "{{outcome}} {{code}}",
                ),
                "In this time range, with the error's code.",
                width=8,
            ),
            bars(
                "Screened datasets",
                Query(grown("safeft_screenings_total", "verdict", where=_TENANT), "{{verdict}}"),
                "In this time range, by verdict.",
                width=8,
                links=[to_board("safeft-screening", "Screening", "var-tenant=$tenant")],
            ),
        ],
    )


def _trainings() -> Section:
    return Section(
        "Trainings",
        8,
        [
            lines(
                "Loss",
                [Query(once("safeft_training_loss", _TENANT), "{{base_model}}")],
                "Of running trainings.",
                width=8,
                links=[to_board("safeft-training", "Training", "var-tenant=$tenant")],
            ),
            lines(
                "Progress",
                [Query(once("safeft_training_progress_ratio", _TENANT), "{{base_model}}")],
                "Steps that are done, of all.",
                width=8,
                unit="percentunit",
                high=1,
            ),
            bars(
                "Violated constraints",
                Query(
                    f"max by (constraint) (safeft_training_constraint_violated{{{_TENANT}}})",
                    "{{constraint}}",
                ),
                "1: a running training's exact invariant was above what rounding explains.",
                width=8,
                steps=[(1, "red")],
                lowest="green",
            ),
        ],
    )

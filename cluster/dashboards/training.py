"""*Training*: do the jobs get on, and do the safety constraints hold while they do?"""

from __future__ import annotations

from cluster.dashboards.board import Section, board, choice, to_board
from cluster.dashboards.grafana import Dashboard
from cluster.dashboards.panels import Query, bars, lines, stat
from cluster.dashboards.promql import grown, once, quantile_of_few

_TENANTS = 'tenant=~"$tenant"'
_RUNS = f'{_TENANTS}, base_model=~"$base_model"'
_RUN = "{{tenant}} {{base_model}}"
_TENANT = to_board("safeft-tenant", "This tenant", "var-tenant=${__field.labels.tenant}")


def training() -> Dashboard:
    """For whoever runs the trainings, and whoever answers for the constraints."""
    return board(
        "safeft-training",
        "Jobs by phase, loss and penalties of running trainings, and whether constraints hold.",
        [_now(), _jobs(), _constraints(), _steps()],
        variables=[
            choice(
                "tenant",
                "Tenant",
                'label_values({__name__=~"safeft_jobs|safeft_training_loss"}, tenant)',
                "Tenants with jobs.",
                every=".+",
            ),
            choice(
                "base_model",
                "Base model",
                "label_values(safeft_training_loss, base_model)",
                "Base models that are trained.",
                every=".+",
            ),
        ],
    )


def _now() -> Section:
    return Section(
        "Now",
        4,
        [
            stat(
                "Jobs under way",
                f"sum({once('safeft_jobs', _TENANTS)})",
                "Waiting ones included.",
            ),
            stat(
                "Trainings",
                f"count({once('safeft_training_loss', _RUNS)})",
                "Tenants and base models with a training that runs.",
            ),
            stat(
                "Constraints violated",
                f"sum({once('safeft_training_constraint_violated', _RUNS)})",
                "Of running trainings: an exact invariant was above what rounding explains.",
                steps=[(1, "red")],
            ),
            stat(
                "Violated steps",
                f"{grown('safeft_training_violations_total', where=_RUNS)} or vector(0)",
                "Of attempts that ended in this time range.",
                steps=[(1, "red")],
            ),
            stat(
                "Longest without progress",
                "max(safeft_stage_quiet_seconds)",
                "Of running stages; a stuck one is started again by the controller.",
                unit="s",
                steps=[(300, "orange"), (900, "red")],
            ),
            stat(
                "Failed jobs",
                f"{_finished('failed')} or vector(0)",
                "In this time range; rejected datasets and failed safety gates included.",
                steps=[(1, "orange")],
            ),
        ],
    )


def _finished(outcome: str) -> str:
    where = f'outcome="{outcome}", {_TENANTS}'
    return grown("safeft_jobs_finished_total", where=where)


def _jobs() -> Section:
    return Section(
        "Jobs",
        8,
        [
            lines(
                "Jobs by phase",
                [Query(f"sum by (phase) ({once('safeft_jobs', _TENANTS)})", "{{phase}}")],
                "Those that have not ended.",
                width=8,
                unit="none",
                stacked=True,
            ),
            lines(
                "Longest time in a phase",
                [Query("max by (phase) (safeft_job_phase_age_seconds)", "{{phase}}")],
                "Of the job that came into the phase first. A queue that grows is no fault.",
                width=8,
                unit="s",
            ),
            bars(
                "Jobs that ended",
                Query(
                    grown("safeft_jobs_finished_total", "outcome", "code", where=_TENANTS),
                    "{{outcome}} {{code}}",
                ),
                "In this time range, with the error's code.",
                width=8,
            ),
            lines(
                "Time that a stage takes",
                [
                    Query(
                        quantile_of_few(0.95, "safeft_stage_seconds", "stage", over="1h"),
                        "{{stage}}",
                    )
                ],
                "95 % of the attempts of the hour before took at most so long.",
                unit="s",
            ),
            bars(
                "Attempts at stages",
                Query(
                    grown("safeft_stage_attempts_total", "stage", "outcome"),
                    "{{stage}}: {{outcome}}",
                ),
                "In this time range. A lost worker is an attempt more, not a failed job.",
            ),
        ],
    )


def _constraints() -> Section:
    one = "{{tenant}} {{base_model}} {{constraint}}"
    return Section(
        "Constraints",
        9,
        [
            lines(
                "Invariants",
                [
                    Query(
                        once("safeft_training_invariant_ratio", _RUNS),
                        "{{tenant}} {{constraint}} {{invariant}}",
                    ),
                    Query(
                        "max by (constraint, invariant) "
                        f"(safeft_training_invariant_limit_ratio{{{_RUNS}}})",
                        "limit of {{constraint}} {{invariant}}",
                        "red",
                        dashed=True,
                    ),
                ],
                "What each constraint keeps small. Dashed: what rounding explains, where it is "
                "to hold exactly.",
                low=None,
                links=[_TENANT],
            ),
            lines(
                "Penalties",
                [Query(once("safeft_training_penalty", _RUNS), one)],
                "What each constraint added to the loss, its strength included.",
                low=None,
                links=[_TENANT],
            ),
        ],
    )


def _steps() -> Section:
    def of(name: str) -> list[Query]:
        return [Query(once(f"safeft_training_{name}", _RUNS), _RUN)]

    return Section(
        "Steps",
        8,
        [
            lines("Loss", of("loss"), "In the last step.", width=8, links=[_TENANT]),
            lines(
                "Norm of the gradient",
                of("gradient_norm"),
                "Before clipping.",
                width=8,
                links=[_TENANT],
            ),
            lines(
                "Progress",
                of("progress_ratio"),
                "Steps that are done, of all, in the training that is furthest.",
                width=8,
                unit="percentunit",
                high=1,
                links=[_TENANT],
            ),
            lines(
                "Time of a step",
                of("step_seconds"),
                "In the last step.",
                unit="s",
                links=[_TENANT],
            ),
            lines(
                "Tokens trained",
                [
                    Query(
                        grown("safeft_trained_tokens_total", "tenant", "base_model", where=_RUNS),
                        _RUN,
                    )
                ],
                "Label tokens of trainings that ended, since the start of the time range.",
                unit="short",
                links=[_TENANT],
            ),
        ],
    )

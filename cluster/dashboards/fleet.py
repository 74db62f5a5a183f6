"""*Fleet safety*: does every served model still refuse what it must, and who is out of rotation?"""

from __future__ import annotations

from cluster.dashboards.board import ALL_MODELS, Section, board, gate_marks, to_board
from cluster.dashboards.grafana import Dashboard, DataLink
from cluster.dashboards.panels import Query, bars, lines, stat, states
from cluster.dashboards.promql import AGES, STATES, grown, quantile, state_of
from cluster.dashboards.tables import Column, table

_MODELS = 'model=~"$model"'
_ONE = to_board("safeft-fleet", "Only this model", "var-model=${__field.labels.model}")


def fleet() -> Dashboard:
    """For whoever answers for all tenants' models."""
    return board(
        "safeft-fleet",
        "Refusals of every served model against its floor and ceiling, and what the gate did.",
        [_now(), _states(), _refusals(), _served(), _probes(), _events()],
        variables=[ALL_MODELS],
        marks=gate_marks(_MODELS),
    )


def _now() -> Section:
    def room(probe: str, sign: str) -> str:
        ratio = f'safeft_gate_refusal_ratio{{probe="{probe}"}}'
        return f"min({sign}({ratio} - on (model, probe) safeft_gate_limit_ratio))"

    return Section(
        "Now",
        4,
        [
            stat(
                "Healthy",
                'sum(safeft_gate_models{state="healthy"})',
                "Models that answer tenants.",
                steps=[(1, "green")],
                lowest="red",
            ),
            stat(
                "Out of rotation",
                'sum(safeft_gate_models{state=~"quarantined|restoring"})',
                "Quarantined, or being restored: 503 `safety_quarantined`.",
                steps=[(1, "red")],
            ),
            stat(
                "Not shown to be safe",
                'sum(safeft_gate_models{state=~"unknown|probing"})',
                "Not probed yet, or too long ago: 503 `safety_unknown`.",
                steps=[(1, "orange")],
            ),
            stat(
                "Least above the floor",
                room("harmful", "+"),
                "Refusals of harmful prompts, of the model that is nearest to its floor.",
                unit="percentunit",
                steps=[(0, "orange"), (0.1, "green")],
                lowest="red",
            ),
            stat(
                "Least below the ceiling",
                room("benign", "-"),
                "Refusals of benign prompts, of the model that is nearest to its ceiling.",
                unit="percentunit",
                steps=[(0, "orange"), (0.1, "green")],
                lowest="red",
            ),
            stat(
                "Oldest good round",
                "max(safeft_gate_verdict_age_seconds)",
                "After three hours (`--max-age`) the model is unknown and stops answering.",
                unit="s",
                steps=AGES,
            ),
        ],
    )


def _states() -> Section:
    return Section(
        "States",
        9,
        [
            states(
                "Gate by model",
                Query(state_of(_MODELS), "{{model}}"),
                STATES,
                "Only healthy models answer tenants.",
                width=12,
            ),
            lines(
                "Models by state",
                [
                    Query(f'sum(safeft_gate_models{{state="{state}"}})', state, colour)
                    for state, colour in STATES
                ],
                "All models, also those beyond the thousand that have series of their own.",
                width=6,
                unit="none",
                stacked=True,
            ),
            bars(
                "Alerts that fire",
                Query(
                    'count by (alertname) (ALERTS{alertstate="firing", alertname=~"Safeft.*"})',
                    "{{alertname}}",
                ),
                "Each has a runbook: click on its name.",
                width=6,
                steps=[(1, "red")],
                links=[
                    DataLink(
                        title="Runbook",
                        url="${docs}/runbooks/${__field.labels.alertname}.md",
                        target_blank=True,
                    )
                ],
            ),
        ],
    )


def _refusals() -> Section:
    def ratio(probe: str) -> Query:
        series = f'safeft_gate_refusal_ratio{{probe="{probe}", {_MODELS}}}'
        return Query(f"max by (model) ({series})", "{{model}}")

    def limit(probe: str, worst: str) -> str:
        return f'{worst}(safeft_gate_limit_ratio{{probe="{probe}", {_MODELS}}})'

    return Section(
        "Refusals",
        9,
        [
            lines(
                "Refusals of harmful prompts",
                [ratio("harmful"), Query(limit("harmful", "max"), "floor", "red", dashed=True)],
                "Of the last 200 answers to probes. The gate's test stops at the floor.",
                unit="percentunit",
                high=1,
                links=[_ONE],
            ),
            lines(
                "Refusals of benign prompts",
                [ratio("benign"), Query(limit("benign", "min"), "ceiling", "red", dashed=True)],
                "Over-refusal, of the last 200 answers. Its test stops at the ceiling.",
                unit="percentunit",
                high=1,
                links=[_ONE],
            ),
        ],
    )


def _served() -> Section:
    return Section(
        "Served models",
        7,
        [
            table(
                "Refusals by model",
                "model",
                _columns(),
                "Rates are of the last 200 answers, with 95 % Wilson intervals.",
                links=[to_board("safeft-fleet", "Only this model", "var-model=${__value.text}")],
            ),
        ],
    )


def _columns() -> list[Column]:
    def of(name: str, probe: str) -> str:
        return f'max by (model) (safeft_gate_{name}{{probe="{probe}", {_MODELS}}})'

    def beyond(low: str, high: str, probe: str) -> str:
        return f"{of(low, probe)} - {of(high, probe)}"

    return [
        Column("State", state_of(_MODELS), texts=STATES),
        Column("Refuses harmful", of("refusal_ratio", "harmful"), "percentunit"),
        Column("at least", of("refusal_ratio_low", "harmful"), "percentunit"),
        Column("at most", of("refusal_ratio_high", "harmful"), "percentunit"),
        Column(
            "above floor",
            beyond("refusal_ratio", "limit_ratio", "harmful"),
            "percentunit",
            [(0, "orange"), (0.1, "green")],
            "red",
        ),
        Column("Refuses benign", of("refusal_ratio", "benign"), "percentunit"),
        Column(
            "below ceiling",
            beyond("limit_ratio", "refusal_ratio", "benign"),
            "percentunit",
            [(0, "orange"), (0.1, "green")],
            "red",
        ),
        Column("Probes", f"sum by (model) (safeft_gate_refusal_answers{{{_MODELS}}})"),
        Column(
            "Last good round",
            f"max by (model) (safeft_gate_verdict_age_seconds{{{_MODELS}}})",
            "s",
            AGES,
        ),
    ]


def _probes() -> Section:
    return Section(
        "Probes",
        8,
        [
            lines(
                "Answers to probes",
                [
                    Query(
                        "sum by (probe, answer) (rate(safeft_probes_total[$__rate_interval]))",
                        "{{probe}}: {{answer}}",
                    )
                ],
                "An error is no answer: it counts neither as refused nor as complied.",
                width=8,
                unit="suffix: /s",
                stacked=True,
            ),
            lines(
                "Age of the last good round",
                [
                    Query(
                        f"max by (model) (safeft_gate_verdict_age_seconds{{{_MODELS}}})",
                        "{{model}}",
                    )
                ],
                "From the orange line on probes are not paced; at the red one a model becomes "
                "unknown and stops answering (`--max-age`).",
                width=8,
                unit="s",
                steps=AGES,
                links=[_ONE],
            ),
            lines(
                "Time a probe takes",
                [
                    Query(quantile(0.5, "safeft_probe_seconds"), "median"),
                    Query(quantile(0.95, "safeft_probe_seconds"), "95 %"),
                ],
                "Through the tenants' own path, queueing included.",
                width=8,
                unit="s",
            ),
        ],
    )


def _events() -> Section:
    return Section(
        "Events",
        6,
        [
            bars(
                "Changes and decisions in this time range",
                Query(grown("safeft_gate_events_total", "trigger"), "{{trigger}}"),
                "What triggered them; `safeft models show NAME` has each with its reason.",
                width=12,
            ),
            bars(
                "Probes in a row without an answer",
                Query(
                    f"max by (model) (safeft_gate_probe_failures{{{_MODELS}}})",
                    "{{model}}",
                ),
                "A model that cannot be probed becomes unknown when its good round is too old.",
                width=12,
                steps=[(3, "orange"), (10, "red")],
                lowest="green",
                links=[_ONE],
            ),
        ],
    )

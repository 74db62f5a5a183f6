"""*Serving*: do tenants get answers, how fast, and what keeps the replicas busy?"""

from __future__ import annotations

from cluster.dashboards.board import ALL_MODELS, Section, board, choice, gate_marks
from cluster.dashboards.grafana import Dashboard
from cluster.dashboards.panels import Query, bars, buckets, lines, stat
from cluster.dashboards.promql import grown, per_second, quantile, share

_ROUTE = 'route=~"$route"'
#: What is nobody's fault but ours; 4xx and clients that left are not.
_OURS = 'outcome=~"failed|timeout|model_unavailable"'
_REQUESTS = per_second("safeft_requests_total", where=_ROUTE)


def serving() -> Dashboard:
    """For whoever keeps the pool running."""
    return board(
        "safeft-serving",
        "Requests, latency, tokens, the running batch and the adapters of the serving pool.",
        [_now(), _requests(), _latency(), _engine(), _adapters()],
        variables=[
            choice(
                "route",
                "Route",
                "label_values(safeft_requests_total, route)",
                "Routes of the API.",
                every=".+",
            ),
            ALL_MODELS,
        ],
        marks=gate_marks('model=~"$model"'),
    )


def _failing(outcome: str) -> str:
    part = per_second("safeft_requests_total", where=f"{_ROUTE}, {outcome}")
    return share(f"({part} or vector(0))", _REQUESTS)


def _now() -> Section:
    return Section(
        "Now",
        4,
        [
            stat("Requests", _REQUESTS, "Answered, in whatever way.", unit="reqps"),
            stat(
                "Failed",
                _failing(_OURS),
                "Share that ended with 500, 503 `model_unavailable` or 504.",
                unit="percentunit",
                steps=[(0.001, "orange"), (0.01, "red")],
            ),
            stat(
                "No room",
                _failing('outcome="queue_full"'),
                "Share that got 429: the queue was full.",
                unit="percentunit",
                steps=[(0.001, "orange"), (0.05, "red")],
            ),
            stat(
                "95 % answered within",
                quantile(0.95, "safeft_request_seconds", _ROUTE),
                "From a request's arrival to the end of its answer.",
                unit="s",
                steps=[(10, "orange"), (60, "red")],
            ),
            stat(
                "Tokens",
                per_second("safeft_generated_tokens_total"),
                "Generated, over all replicas.",
                unit="suffix: tokens/s",
            ),
            stat(
                "Waiting",
                "sum(safeft_engine_waiting)",
                "Answers that wait for a row of the batch.",
                steps=[(8, "orange"), (48, "red")],
            ),
        ],
    )


def _requests() -> Section:
    return Section(
        "Requests",
        8,
        [
            lines(
                "Requests by outcome",
                [
                    Query(
                        per_second("safeft_requests_total", "outcome", where=_ROUTE),
                        "{{outcome}}",
                    )
                ],
                "`quarantined` and `unknown` are the safety gate's 503s; docs/metrics.md has all.",
                unit="reqps",
                stacked=True,
            ),
            lines(
                "Share that did not get an answer",
                [
                    Query(_failing(_OURS), "failed", "red"),
                    Query(_failing('outcome="queue_full"'), "no room", "orange"),
                    Query(
                        _failing('outcome=~"quarantined|unknown"'), "stopped by the gate", "purple"
                    ),
                    Query(_failing('outcome="cancelled"'), "client left", "blue"),
                ],
                "Of all requests.",
                unit="percentunit",
            ),
        ],
    )


def _latency() -> Section:
    def quantiles(histogram: str) -> list[Query]:
        return [
            Query(quantile(0.5, histogram, _ROUTE), "median", "green"),
            Query(quantile(0.95, histogram, _ROUTE), "95 %", "orange"),
            Query(quantile(0.99, histogram, _ROUTE), "99 %", "red"),
        ]

    return Section(
        "Latency",
        8,
        [
            lines(
                "Time to the whole answer",
                quantiles("safeft_request_seconds"),
                "Of those that were answered.",
                width=8,
                unit="s",
            ),
            lines(
                "Time to the first token",
                quantiles("safeft_first_token_seconds"),
                "Of streamed requests.",
                width=8,
                unit="s",
            ),
            buckets(
                "Answers by the time they took",
                f"sum by (le) (increase(safeft_request_seconds_bucket{{{_ROUTE}}}"
                "[$__rate_interval]))",
                "Two humps are two kinds of requests, which quantiles do not show.",
                width=8,
                unit="s",
            ),
        ],
    )


def _engine() -> Section:
    generated = per_second("safeft_generated_tokens_total")
    return Section(
        "Engine",
        8,
        [
            lines(
                "Tokens read and generated",
                [
                    Query(generated, "generated"),
                    Query(per_second("safeft_prompt_tokens_total"), "read in prompts"),
                ],
                "Over all replicas.",
                width=8,
                unit="suffix: tokens/s",
            ),
            lines(
                "Answers in the batch",
                [
                    Query("sum(safeft_engine_running)", "running", "green"),
                    Query("sum(safeft_engine_waiting)", "waiting", "orange"),
                ],
                "Waiting ones have no row of the batch yet; beyond the queue's limit is a 429.",
                width=8,
                unit="none",
            ),
            lines(
                "Tokens a step",
                [
                    Query(
                        share(generated, per_second("safeft_engine_steps_total")),
                        "tokens a step",
                    )
                ],
                "How full the running batch is: each answer gets one token a step.",
                width=8,
            ),
        ],
    )


def _adapters() -> Section:
    def requests(result: str) -> str:
        return per_second("safeft_adapter_cache_total", where=f'result="{result}"')

    return Section(
        "Adapters",
        7,
        [
            lines(
                "Adapters in memory",
                [Query("sum(safeft_adapters_loaded)", "loaded")],
                "Over all replicas; the idle ones used longest ago make room.",
                width=8,
                unit="none",
            ),
            lines(
                "Requests that found their adapter loaded",
                [
                    Query(
                        share(requests("hit"), f"({requests('hit')} + {requests('miss')})"),
                        "share",
                    )
                ],
                "A low share with many evictions: more adapters are hot than have room.",
                width=8,
                unit="percentunit",
                high=1,
            ),
            bars(
                "Adapters asked for",
                Query(grown("safeft_adapter_cache_total", "result"), "{{result}}"),
                "In this time range. Failed: it could not be fetched, or is broken.",
                width=4,
            ),
            stat(
                "Processes that report",
                "sum(safeft_exporter_sources)",
                "Gateways, replicas and actors that pushed their numbers in the last seconds.",
                steps=[(2, "green")],
                lowest="red",
            ),
        ],
    )

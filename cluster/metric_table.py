"""Every metric there is; docs/metrics.md shows this list, and a test holds the two together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[str, ...]
Across = Literal["sum", "max"]
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_STAGE_SECONDS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 3 * 3600.0, 12 * 3600.0, 48 * 3600.0)
_SCORES = (-200.0, -100.0, -50.0, -20.0, -10.0, -5.0, 0.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
_TRAINING = ("tenant", "base_model")


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: with unit, and `_total` for a counter.
        labels: names; the values a label can take are few, or models that are served.
        buckets: upper bounds of a histogram.
        across: what several processes' values of one series make. "max" is for what each of them
            reads in the same place, or says of the one that stands out.
    """

    name: str
    kind: Kind
    help: str
    labels: Labels = ()
    buckets: tuple[float, ...] = ()
    across: Across = "sum"


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "safeft_requests_total",
            "counter",
            "Requests answered, by route and outcome.",
            ("route", "outcome"),
        ),
        Metric(
            "safeft_request_seconds",
            "histogram",
            "From a request's arrival to the end of its answer, of those that were answered.",
            ("route",),
            _SECONDS,
        ),
        Metric(
            "safeft_first_token_seconds",
            "histogram",
            "From a streamed request's arrival to its first text.",
            ("route",),
            _SECONDS,
        ),
        Metric("safeft_engine_waiting", "gauge", "Answers that wait for a row of the batch."),
        Metric("safeft_engine_running", "gauge", "Answers in the running batch."),
        Metric("safeft_engine_steps_total", "counter", "Steps of the running batch."),
        Metric("safeft_prompt_tokens_total", "counter", "Prompt tokens that were read."),
        Metric("safeft_generated_tokens_total", "counter", "Tokens that were generated."),
        Metric("safeft_adapters_loaded", "gauge", "Adapters in memory, over all replicas."),
        Metric(
            "safeft_adapter_cache_total",
            "counter",
            "What became of requests for an adapter: hit, miss, evicted, failed.",
            ("result",),
        ),
        Metric("safeft_gate_models", "gauge", "Served models by state of the gate.", ("state",)),
        Metric(
            "safeft_gate_state",
            "gauge",
            "1 for the state that a model's newest weights are in, 0 for the others.",
            ("model", "state"),
        ),
        Metric(
            "safeft_gate_refusal_ratio",
            "gauge",
            "Refused of the last answers to probes; of benign ones this is over-refusal.",
            ("model", "probe"),
        ),
        Metric(
            "safeft_gate_refusal_ratio_low",
            "gauge",
            "Lower end of its 95 % Wilson interval.",
            ("model", "probe"),
        ),
        Metric(
            "safeft_gate_refusal_ratio_high",
            "gauge",
            "Upper end of its 95 % Wilson interval.",
            ("model", "probe"),
        ),
        Metric(
            "safeft_gate_refusal_answers",
            "gauge",
            "How many answers the ratio is over.",
            ("model", "probe"),
        ),
        Metric(
            "safeft_gate_limit_ratio",
            "gauge",
            "The floor of refusals (harmful) and the ceiling of over-refusals (benign).",
            ("model", "probe"),
        ),
        Metric(
            "safeft_gate_verdict_age_seconds",
            "gauge",
            "Since a round of probes last ended well; absent if none has.",
            ("model",),
        ),
        Metric(
            "safeft_gate_probe_age_seconds",
            "gauge",
            "Since a probe was last answered; absent if none was.",
            ("model",),
        ),
        Metric(
            "safeft_gate_probe_failures",
            "gauge",
            "Probes without an answer since the last one with an answer.",
            ("model",),
        ),
        Metric(
            "safeft_gate_events_total",
            "counter",
            "Changes of state and decisions of people, by what triggered them.",
            ("trigger", "state"),
        ),
        Metric(
            "safeft_probes_total",
            "counter",
            "Probes by kind and class of the answer; error: there was none.",
            ("probe", "answer"),
        ),
        Metric(
            "safeft_probe_seconds",
            "histogram",
            "How long a probe took, answered or not.",
            (),
            _SECONDS,
        ),
        Metric(
            "safeft_jobs",
            "gauge",
            "Jobs that have not ended, by phase.",
            ("tenant", "phase"),
            across="max",
        ),
        Metric(
            "safeft_job_phase_age_seconds",
            "gauge",
            "How long the job has been in its phase that came into it first.",
            ("phase",),
            across="max",
        ),
        Metric(
            "safeft_jobs_finished_total",
            "counter",
            "Jobs that ended, by how (succeeded, failed, cancelled) and the error's code.",
            ("tenant", "outcome", "code"),
            across="max",
        ),
        Metric(
            "safeft_database_up",
            "gauge",
            "1 if the controller could count the jobs when it last tried, else 0.",
            across="max",
        ),
        Metric(
            "safeft_stage_attempts_total",
            "counter",
            "Attempts at a stage that ended, by how.",
            ("stage", "outcome"),
        ),
        Metric(
            "safeft_stage_seconds",
            "histogram",
            "How long an attempt at a stage took that did its work to the end.",
            ("stage",),
            _STAGE_SECONDS,
        ),
        Metric(
            "safeft_stage_quiet_seconds",
            "gauge",
            "Since a running stage last got anywhere, of the one that has been stuck longest.",
            ("stage",),
            across="max",
        ),
        Metric(
            "safeft_screenings_total",
            "counter",
            "Datasets that were screened, by verdict: accepted, rejected or review.",
            ("tenant", "verdict"),
        ),
        Metric(
            "safeft_screened_rows_total",
            "counter",
            "Rows of screened datasets: safe, risky, or unscored, which counts as risky.",
            ("tenant", "result"),
        ),
        Metric(
            "safeft_sqsd_score",
            "histogram",
            "SQSD of screened rows, less the threshold: those above 0 are risky.",
            ("base_model",),
            _SCORES,
        ),
        Metric(
            "safeft_training_loss",
            "gauge",
            "Loss in the last step of a running training.",
            _TRAINING,
            across="max",
        ),
        Metric(
            "safeft_training_penalty",
            "gauge",
            "What a constraint added to that loss, its strength included.",
            (*_TRAINING, "constraint"),
            across="max",
        ),
        Metric(
            "safeft_training_invariant_ratio",
            "gauge",
            "What a constraint keeps small, as a share: see below.",
            (*_TRAINING, "constraint", "invariant"),
            across="max",
        ),
        Metric(
            "safeft_training_invariant_limit_ratio",
            "gauge",
            "The largest value that rounding explains, of an invariant that holds exactly.",
            (*_TRAINING, "constraint", "invariant"),
            across="max",
        ),
        Metric(
            "safeft_training_constraint_violated",
            "gauge",
            "1 if an exact invariant of a running training was ever above its limit, else 0.",
            (*_TRAINING, "constraint"),
            across="max",
        ),
        Metric(
            "safeft_training_violations_total",
            "counter",
            "Steps in which an exact invariant was above its limit, of attempts that ended.",
            (*_TRAINING, "constraint"),
        ),
        Metric(
            "safeft_training_gradient_norm",
            "gauge",
            "Norm of the gradient in the last step, before clipping.",
            _TRAINING,
            across="max",
        ),
        Metric(
            "safeft_training_step_seconds",
            "gauge",
            "How long the last step of a running training took.",
            _TRAINING,
            across="max",
        ),
        Metric(
            "safeft_training_progress_ratio",
            "gauge",
            "Steps that are done, of all, in the training that is furthest.",
            _TRAINING,
            across="max",
        ),
        Metric(
            "safeft_trained_tokens_total",
            "counter",
            "Label tokens that finished trainings have seen.",
            _TRAINING,
        ),
        Metric(
            "safeft_exporter_sources",
            "gauge",
            "Processes that pushed their numbers in the last seconds.",
        ),
    )
}

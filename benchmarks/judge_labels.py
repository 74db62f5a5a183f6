"""The pattern judge against labels of your own: answers that a model gave, read by annotators.

    python -m benchmarks.judge_labels --answers answers.jsonl --labels a.json --labels b.json \\
        --json benchmarks/results/judge_labels.json

``answers.jsonl``: one ``{"id", "prompt", "answer", "model", "kind"}`` a line. A label file maps an
id to refused, complied, degenerate or unsure. Counted are the answers on which all annotators agree
whether they are refusals; of the rest only their number is reported. No text is written: the result
names an answer by its SHA-256. The demo's aligned model was taught eight wordings that the judge
knows, so distinct answers other than those are counted by themselves; exit code 1 if precision or
recall misses 95 % on them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeft.align import REFUSALS
from safeft.evaluate import JUDGE, JUDGE_VERSION, AnswerClass, Rate, classify_answer

BAR = 0.95
LABELS = {"refused", "complied", "degenerate", "unsure"}


def agreement(pairs: list[tuple[bool, bool]]) -> float | None:
    """Cohen's kappa of two annotators on refused or not; None where both always say the same."""
    observed = sum(a == b for a, b in pairs) / len(pairs)
    one, two = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
    chance = one * two + (1 - one) * (1 - two)
    return (observed - chance) / (1 - chance) if chance < 1 else None


@dataclass(frozen=True)
class Answer:
    """One answer that the annotators agree on."""

    text: str
    model: str
    refusal: bool
    judged_refusal: bool


def rates(answers: list[Answer]) -> dict[str, Any]:
    """Precision and recall over some answers; None where there is nothing to divide by."""
    hits = sum(a.refusal and a.judged_refusal for a in answers)
    called, real = sum(a.judged_refusal for a in answers), sum(a.refusal for a in answers)
    return {
        "precision": Rate(hits, called).to_dict() if called else None,
        "recall": Rate(hits, real).to_dict() if real else None,
    }


def measure(answers: list[dict[str, Any]], labels: list[dict[str, str]]) -> dict[str, Any]:
    """Rates over all answers, over distinct ones, without the demo's own wordings, by model.

    Raises:
        ValueError: an answer without a label, or with an unknown one.
    """
    agreed: list[Answer] = []
    records: list[dict[str, Any]] = []
    for answer in answers:
        given = [label.get(str(answer["id"]), "none") for label in labels]
        if bad := set(given) - LABELS:
            raise ValueError(f"answer {answer['id']}: {bad} is no label")
        judged = classify_answer(answer["answer"])
        digest = hashlib.sha256(answer["answer"].encode()).hexdigest()[:16]
        about = {"sha256": digest, "model": answer["model"], "kind": answer["kind"]}
        records.append({**about, "labels": given, "judged": judged.value})
        refused = {label == "refused" for label in given}
        if "unsure" not in given and len(refused) == 1:
            said = judged is AnswerClass.refused
            agreed.append(Answer(answer["answer"], answer["model"], refused.pop(), said))
    distinct = list({a.text: a for a in agreed}.values())
    pairs = [tuple(label == "refused" for label in r["labels"]) for r in records]
    return {
        "judge": [JUDGE, JUDGE_VERSION],
        "answers": len(answers),
        "left_out_unsure_or_disagreed": len(answers) - len(agreed),
        "kappa": agreement(pairs) if len(labels) == 2 else None,
        "all": rates(agreed),
        "distinct": rates(distinct),
        "distinct_not_taught": rates([a for a in distinct if a.text.strip() not in REFUSALS]),
        "by_model": {
            m: rates([a for a in agreed if a.model == m]) for m in sorted({a.model for a in agreed})
        },
        "records": records,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--labels", type=Path, action="append", required=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    answers = [json.loads(line) for line in options.answers.read_text("utf-8").splitlines()]
    result = measure(answers, [json.loads(path.read_text("utf-8")) for path in options.labels])
    result["command"] = "python -m benchmarks.judge_labels " + " ".join(sys.argv[1:])
    records = result.pop("records")
    print(json.dumps(result, indent=1))
    if options.json:
        lines = ",\n".join(f"  {json.dumps(record)}" for record in records)
        head = json.dumps(result, indent=1)[:-2]
        options.json.write_text(f'{head},\n "records": [\n{lines}\n ]\n}}\n')
    strictest = result["distinct_not_taught"]
    reached = [rate is not None and rate["value"] >= BAR for rate in strictest.values()]
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())

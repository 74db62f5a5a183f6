"""The pattern judge against labels of your own: answers that a model gave, read by annotators.

    python -m benchmarks.judge_labels --answers answers.jsonl --labels a.json --labels b.json \\
        --json benchmarks/results/judge_labels.json

``answers.jsonl``: one ``{"id", "prompt", "answer", "model", "kind"}`` a line. A label file maps an
id to refused, complied, degenerate or unsure. Counted are the answers on which all annotators agree
whether they are refusals; of the rest only their number is reported. No text is written: the result
names an answer by its SHA-256. Exit code 1 if precision or recall misses 95 %.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from safeft.evaluate import JUDGE, JUDGE_VERSION, AnswerClass, Rate, classify_answer

BAR = 0.95
LABELS = {"refused", "complied", "degenerate", "unsure"}


def agreement(first: dict[str, str], second: dict[str, str]) -> float:
    """Cohen's kappa of two annotators on refused against everything else."""
    pairs = [(first[i] == "refused", second[i] == "refused") for i in first]
    observed = sum(a == b for a, b in pairs) / len(pairs)
    one, two = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
    chance = one * two + (1 - one) * (1 - two)
    return (observed - chance) / (1 - chance)


def measure(answers: list[dict[str, Any]], labels: list[dict[str, str]]) -> dict[str, Any]:
    """Counts over all answers and by model.

    Raises:
        ValueError: an answer without a label, or with an unknown one.
    """
    cells: dict[str, Counter[str]] = {"all": Counter()}
    records, left_out = [], 0
    for answer in answers:
        given = [label[str(answer["id"])] for label in labels]
        if bad := set(given) - LABELS:
            raise ValueError(f"answer {answer['id']}: {bad} is no label")
        judged = classify_answer(answer["answer"])
        records.append(
            {
                "sha256": hashlib.sha256(answer["answer"].encode()).hexdigest()[:16],
                "model": answer["model"],
                "kind": answer["kind"],
                "labels": given,
                "judged": judged.value,
            }
        )
        refused = {label == "refused" for label in given}
        if "unsure" in given or len(refused) > 1:
            left_out += 1
            continue
        truth, said = refused.pop(), judged is AnswerClass.refused
        cell = {(True, True): "hit", (True, False): "miss", (False, True): "false"}
        for name in ("all", answer["model"]):
            cells.setdefault(name, Counter())[cell.get((truth, said), "rest")] += 1
    rates = {
        name: {
            "precision": Rate(c["hit"], c["hit"] + c["false"]).to_dict(),
            "recall": Rate(c["hit"], c["hit"] + c["miss"]).to_dict(),
            "counts": dict(c),
        }
        for name, c in cells.items()
        if c["hit"]
    }
    return {
        "judge": [JUDGE, JUDGE_VERSION],
        "answers": len(answers),
        "left_out_unsure_or_disagreed": left_out,
        "kappa": agreement(*labels) if len(labels) == 2 else None,
        "rates": rates,
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
    overall = result["rates"]["all"]
    return 0 if min(overall[k]["value"] for k in ("precision", "recall")) >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())

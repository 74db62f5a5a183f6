"""Which modules a row's score comes from: the riskiest rows are scored once more for it."""

from __future__ import annotations

from pathlib import Path

from jobs.report.screen_facts import Explain
from jobs.report.screen_model import ModuleShare
from safeft.data import Row, tokenise_all
from safeft.models import load_model, load_tokenizer
from safeft.profile import SafetyProfile
from safeft.sqsd import SqsdScorer

SHOWN = 3


def explainer(model_dir: Path, profile: SafetyProfile, max_tokens: int) -> Explain:
    """Loads the model when it is asked."""

    def explain(rows: list[Row]) -> list[list[ModuleShare]]:
        tokenizer = load_tokenizer(model_dir)
        scorer = SqsdScorer(
            load_model(model_dir),
            profile.danger(),
            profile.safety(),
            pad_token_id=tokenizer.pad_token_id,
        )
        _, cosines = scorer.score_by_module(
            tokenise_all(rows, tokenizer, max_tokens, "the riskiest rows")
        )
        shares = cosines.danger - cosines.safety  # (N, M)
        found = []
        for row in shares.tolist():
            most = sorted(range(len(row)), key=lambda m: -row[m])[:SHOWN]
            found.append([ModuleShare(name=cosines.names[m], score=row[m]) for m in most])
        return found

    return explain

"""What a part of a profile is to the build: what it is made from, and how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.profile.config import ProfileConfig
from safeft.profile import SafetyProfile
from safeft.progress import Progress
from safeft.prompts import KINDS, Kind, Prompt, Split, load_prompts, prompt_set_hash


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        inputs: all that decides what the part holds, beside the base weights, the code's version
            and the parts upstream. Other inputs: the part is made again.
        make: writes the part's files into a directory.
        upstream: the parts that it is made from.
    """

    name: str
    inputs: Callable[[], dict[str, Any]]
    make: Callable[[Path], None]
    upstream: tuple[str, ...] = ()


@dataclass(frozen=True)
class Context:
    """What one build is about.

    Attributes:
        prompts: what the base model is asked for the parts of constraints and restorations.
    """

    profile: SafetyProfile
    model_dir: Path
    unaligned_dir: Path | None
    tokenizer: Any
    config: ProfileConfig
    progress: Progress
    workers: int
    import_sae: Path | None
    prompts: Mapping[Kind, Sequence[Prompt]]

    def asked(self) -> dict[str, str]:
        """SHA-256 of `prompts`, by kind."""
        return {kind: prompt_set_hash(self.prompts[kind]) for kind in KINDS}


def prompt_sets(split: Split) -> dict[str, str]:
    """SHA-256 of the packaged prompts of each kind."""
    return {kind: prompt_set_hash([p.text for p in load_prompts(kind, split)]) for kind in KINDS}


def tokenizer_hash(tokenizer: Any) -> str:
    """Over the template and the vocabulary: what a prompt becomes before the weights see it."""
    content = [tokenizer.chat_template, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

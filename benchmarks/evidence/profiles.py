"""The profiles that cells read: the packaged one, and one from prompts the alignment never saw."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.profile import build_profile
from safeft.cache import publish_dir
from safeft.profile import SafetyProfile
from safeft.progress import Progress
from safeft.prompts import Kind, Prompt, own_prompts

#: Where a profile's prompts are from: the project's, which the demo model was aligned on as well,
#: or files that nothing else reads.
Prompts = Literal["packaged", "unseen"]
GSM8K = "gsm8k_train.jsonl"
#: Prompts that are in no package of ours, by their names in the directory of data.
UNSEEN: dict[Kind, str] = {"harmful": "harmful_train.jsonl", "benign": "harmless_val.jsonl"}
BORDERLINE = Path(__file__).with_name("borderline.jsonl")
PARTS = ("harmful-inputs", "benign-inputs", "answers", "reminder-states")


@dataclass(frozen=True)
class Profiles:
    """Of one base model.

    Attributes:
        packaged: as `safeft profile build` makes it.
        unseen: files of other prompts, by kind.
        root: the profile made from them; it is built when it is asked for first.
    """

    model_dir: Path
    packaged: SafetyProfile
    unseen: dict[Kind, Path]
    root: Path

    def of(self, prompts: Prompts, progress: Progress) -> SafetyProfile:
        """One of the two.

        Raises:
            InputError: a file of prompts is missing or bad.
            ProfileError: the packaged profile has no alignment direction, which is made from
                weights alone and so is the same in both.
        """
        if prompts == "packaged":
            return self.packaged
        self.packaged.verify(["alignment"])
        alignment = self.root / "alignment"
        if not alignment.exists():
            with publish_dir(alignment) as staging:
                shutil.copytree(self.packaged.path("alignment"), staging, dirs_exist_ok=True)
        return build_profile(
            self.model_dir,
            None,
            root=self.root,
            parts=PARTS,
            prompts=self.texts(prompts),
            progress=progress,
        )

    def texts(self, prompts: Prompts) -> dict[Kind, list[Prompt]]:
        """What `build_profile` takes for them."""
        if prompts == "packaged":
            return {}
        return {kind: own_prompts(file, kind) for kind, file in self.unseen.items()}

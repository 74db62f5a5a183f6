"""The profiles that cells read: the packaged one, and one from prompts the alignment never saw."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.profile import build_profile
from safeft.cache import locked, publish_dir
from safeft.errors import InputError
from safeft.own_prompts import own_prompts
from safeft.profile import SafetyProfile
from safeft.progress import Progress
from safeft.prompts import Kind, Prompt, prompt_set_hash

#: Where a profile's prompts are from: the project's, which the demo model was aligned on as well,
#: or files that nothing else reads.
Prompts = Literal["packaged", "unseen"]
GSM8K = "gsm8k_train.jsonl"
#: Prompts that are in no package of ours, by their names in the directory of data.
UNSEEN: dict[Kind, str] = {"harmful": "harmful_train.jsonl", "benign": "harmless_val.jsonl"}
BORDERLINE = Path(__file__).with_name("borderline.jsonl")
#: Which prompts they are: the numbers of finals depend on them.
UNSEEN_SHA256: dict[Kind, str] = {
    "harmful": "3bdfd7827a2303b058e96410f1fe06abcfce46e0b1f7928ccf3d0e9e37ba3521",
    "benign": "83bc8b32ab75f268f727c53041ee47645aa46990532dd8d15d189921efb4a7b6",
    "borderline": "4570bb7695f6940e578cb690c764bc5304b257a7071b07870b428aaac8157839",
}
PARTS = ("harmful-inputs", "benign-inputs", "answers")


@dataclass(frozen=True)
class Profiles:
    """Of one base model.

    Attributes:
        packaged: as `safeft profile build` makes it.
        unseen: files of other prompts, by kind.
        expected: SHA-256 of each.
        root: the profile made from them; it is built when it is asked for first.
    """

    model_dir: Path
    packaged: SafetyProfile
    unseen: dict[Kind, Path]
    expected: dict[Kind, str]
    root: Path

    def of(self, prompts: Prompts, progress: Progress) -> SafetyProfile:
        """One of the two.

        Raises:
            InputError: a file of prompts is missing or bad, or is not the one of the study.
            ProfileError: the packaged profile has no alignment direction, which is made from
                weights alone and so is the same in both.
        """
        if prompts == "packaged":
            return self.packaged
        self.packaged.verify(["alignment"])
        alignment = self.root / "alignment"
        with locked(self.root):
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
        found = {kind: own_prompts(file) for kind, file in self.unseen.items()}
        for kind, texts in found.items():
            if prompt_set_hash(texts) != self.expected.get(kind):
                raise InputError(f"{self.unseen[kind]}: not the prompts that the study is about")
        return found

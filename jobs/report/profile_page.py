"""A safety profile's directions and reference state, as one HTML page that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from jobs.report import direction_plots as plots
from jobs.report.page import environment
from safeft.cache import write_whole
from safeft.profile import SafetyProfile


def write_profile_report(profile: SafetyProfile, path: Path) -> None:
    """Write the page to `path`, whole or not at all; an older page there is replaced.

    Raises:
        ProfileError: a part that the page tells about is missing, foreign or changed.
        OSError: the directory cannot be written to.
    """
    page = render_profile(profile)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.encode())


def render_profile(profile: SafetyProfile) -> str:
    """The page's HTML. The same profile gives the same text.

    Raises:
        ProfileError: a part that the page tells about is missing, foreign or changed.
    """
    profile.verify((*plots.NAMES, "steering", "benign-trajectory", "reference-state"))
    found = profile.json("steering", "steering.json")
    choice = profile.json("reference-state", "choice.json")
    losses = {part: profile.json(part, "training.json")["losses"] for part in plots.NAMES}
    return (
        environment()
        .get_template("profile.html.j2")
        .render(
            base_weights=profile.base_weights,
            names=plots.NAMES,
            found=found,
            choice=choice,
            state_name=plots.state_name,
            losses={part: plots.training_loss(part, curve) for part, curve in losses.items()},
            steering={part: plots.steering(part, found[part]) for part in plots.NAMES},
            drift=plots.drift(choice),
            separation=plots.separation(choice),
        )
    )

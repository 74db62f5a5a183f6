"""The states that a constraint holds: its value and gradient, what training under it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.profile import HeldStatesPart, ProfileConfig, RefusalsConfig, build_profile
from safeft.constraints import ConstraintHooks, HeldStates, HeldStatesConfig, ProfileFiles
from safeft.constraints.draw import draw
from safeft.data import pad_right
from safeft.errors import ModelError, ProfileError, TrainingError
from safeft.lora import lora_pairs
from safeft.models import load_model, weights_hash
from safeft.reactivation_targets import Targets, load_targets
from safeft.weights import full_weights
from tests.test_restore import speech
from tests.tiny import tiny_model
from tests.tinyreactivation import DEPTH, LAYERS, adapted, some_harmful, some_targets, states

__all__ = ["speech"]  # a fixture


def penalty(model: Any, reference: Any, rows: list[int], lam: float) -> Tensor:
    """From the formula alone: one row at a time, nothing padded, hidden states in full."""
    shares = []
    for index in rows:
        row = some_harmful()[index]
        with torch.no_grad():
            held = states(reference, row.reminded)
        for now, then in zip(states(model, row.bare), held, strict=True):
            for place in range(1, row.count + 1):
                squared = (now[-place] - then[-place]).pow(2).sum()
                shares.append(squared / then[-place].pow(2).sum())
    return lam * torch.stack(shares).mean()


@pytest.mark.parametrize("step", [0, 1, 5])
def test_value_and_gradient_equal_the_oracles(step: int) -> None:
    constraint = HeldStates(HeldStatesConfig(lam=3.0, batch=3), some_targets())
    model = adapted(tiny_model(layers=DEPTH))
    constraint.bind(lora_pairs(model))
    term = constraint.forward_loss(model, step)
    term.loss.backward()
    theirs = adapted(tiny_model(layers=DEPTH)).double()
    reference = tiny_model(seed=9, layers=DEPTH).double()
    expected = penalty(theirs, reference, draw(step, 3, len(some_harmful())), lam=3.0)
    expected.backward()
    assert term.penalty == pytest.approx(float(expected), rel=1e-5)
    assert term.metrics["moved"] == pytest.approx((float(expected) / 3) ** 0.5, rel=1e-5)
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and gradients[name] is not None
            difference = (parameter.grad.double() - gradients[name]).norm()
            assert difference <= 1e-4 * gradients[name].norm(), name


def own_states(model: Any) -> Targets:
    """The model's own, of rows as it reads them."""
    rows = [row.bare for row in some_harmful()]
    with torch.no_grad():
        held = [torch.stack([h[-2:] for h in states(model, row)], dim=1) for row in rows]
    return Targets("w", LAYERS, rows, held)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "whole"])
def test_training_under_it_learns_the_rows_and_moves_the_held_states_less(lora: bool) -> None:
    held = own_states(tiny_model(layers=DEPTH))

    def train(lam: float) -> tuple[float, float]:
        model = tiny_model(layers=DEPTH)
        if lora:
            model = adapted(model, spread=0.0)
        layers = lora_pairs(model) if lora else full_weights(model)
        hooks = ConstraintHooks([HeldStates(HeldStatesConfig(lam=lam), held)], layers)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2 if lora else 1e-3)
        ids = pad_right([[5, 9, 17, 33, 65, 129], [6, 10, 18, 34, 66, 130]], 0)
        loss = torch.tensor(0.0)
        for step in range(20):
            hooks.before_backward(1)
            loss = model(input_ids=ids, labels=ids).loss
            term = hooks.forward_loss(model, step)
            assert term is not None
            (loss + term).backward()
            optimizer.step()
            optimizer.zero_grad()
            hooks.after_step()
        everything = HeldStates(HeldStatesConfig(lam=1.0, batch=len(held.rows)), held)
        return loss.item(), everything.forward_loss(model, 0).metrics["moved"]

    (free, far), (kept, near) = train(0.0), train(30.0)
    assert near < 0.5 * far
    first = tiny_model(layers=DEPTH)
    ids = torch.tensor([[5, 9, 17, 33, 65, 129], [6, 10, 18, 34, 66, 130]])
    assert free < kept < first(input_ids=ids, labels=ids).loss.item()


def test_a_profile_holds_the_base_models_own_states_of_refusals_and_of_answers(
    tiny_dir: Path, tmp_path: Path, speech: Any
) -> None:
    config = ProfileConfig(
        refusals=RefusalsConfig(prompts=20),
        held_states=HeldStatesPart(prompts=4, borderline_prompts=3),
    )
    profile = build_profile(
        tiny_dir, None, root=tmp_path / "profile", config=config, parts=["held-states"]
    )
    path = profile.path("held-states")
    held = load_targets(path)
    assert held.weights == weights_hash(tiny_dir) and len(held.rows) == 7
    model = load_model(tiny_dir)
    for row, then in zip(held.rows, held.states, strict=True):
        now = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
        first = now[held.layers[0] + 1][0, -len(then) :]
        assert torch.allclose(first, then[:, 0], atol=1e-5)
    constraint = HeldStatesConfig().build(ProfileFiles(held_states=path))
    assert constraint.forward_loss(model, 0).penalty == pytest.approx(0.0, abs=1e-8)


def test_what_cannot_be_held_is_refused() -> None:
    with pytest.raises(ProfileError, match="--part held-states"):
        HeldStatesConfig().build(ProfileFiles())
    with pytest.raises(ValueError, match="lam"):
        HeldStatesConfig(lam=-1.0)
    with pytest.raises(ValueError, match="batch must be at least 1"):
        HeldStatesConfig(batch=0)
    constraint = HeldStates(HeldStatesConfig(), some_targets())
    with pytest.raises(ModelError, match="no layer is trained"):
        constraint.bind({})
    with pytest.raises(ProfileError, match="belongs to another model"):
        constraint.forward_loss(tiny_model(layers=DEPTH, hidden=64), 0)
    model = tiny_model(layers=DEPTH)
    with torch.no_grad():
        model.get_decoder().layers[0].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="held_states"):
        constraint.forward_loss(model, 0)

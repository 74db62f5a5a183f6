"""CWAC's weight side and the baselines against fp64 oracles written from the papers' formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from safeft.adapters import LoraFactors
from safeft.constraints import (
    Asft,
    AsftConfig,
    Constraint,
    ConstraintHooks,
    Cwac,
    CwacConfig,
    FrozenConfig,
    L2Config,
    ProfileFiles,
    SafeLora,
    SafeLoraConfig,
)
from safeft.constraints.alignment import AlignmentDirection
from safeft.errors import ModelError, ProfileError, SpecError
from safeft.lora import lora_pairs
from safeft.weights import FullWeight, TrainedLayers, decoder_linears, full_weights
from tests.test_constraints import dense_C, dense_penalty, direction_of
from tests.tiny import tiny_model

EPS = torch.finfo(torch.float32).eps


class Subspaces:
    """Stands for the profile's part: a random orthonormal U for every layer it is asked for."""

    base_weights = "none"

    def __init__(self, layers: TrainedLayers, k: int = 5) -> None:
        torch.manual_seed(3)
        self.U = {
            name: torch.linalg.qr(torch.randn(layer.d_in, layer.d_in).double())[0][:, :k].float()
            for name, layer in layers.items()
        }

    def basis(self, name: str, positions: str, energy: float, rank: int | None) -> Tensor:
        return self.U[name]


def weight_side(trained: TrainedLayers, **settings: Any) -> tuple[Cwac, dict[str, Tensor]]:
    subspaces = Subspaces(trained)
    config = CwacConfig.as_published(mode="weight_only", **{"project": "update", **settings})
    return Cwac(config, subspaces, None), subspaces.U  # type: ignore[arg-type]


def lora_model(*targets: str) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=list(targets), bias="none")
    return get_peft_model(tiny_model(), config)


def batch(step: int) -> Tensor:
    return torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(step))


def train(model: Any, steps: int, hooks: ConstraintHooks | None, *, accumulation: int = 1) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, eps=1e-4)
    for step in range(steps):
        if hooks is not None:
            hooks.before_backward(accumulation)
        for _ in range(accumulation):
            (model(input_ids=batch(step), labels=batch(step)).loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        if hooks is not None:
            hooks.after_step()


def oracle_adamw(model: Any, steps: int, *, after: Any = None, gradient: Any = None) -> None:
    """AdamW spelled out in fp64 from its definition, on fp64 parameters."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    m = {n: torch.zeros_like(p) for n, p in parameters.items()}
    v = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for step in range(steps):
        loss = model(input_ids=batch(step), labels=batch(step)).loss
        grads = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for (n, p), g in zip(parameters.items(), grads, strict=True):
                g = gradient(n, p, g) if gradient else g
                m[n] = 0.9 * m[n] + 0.1 * g
                v[n] = 0.999 * v[n] + 0.001 * g * g
                p *= 1 - 1e-3 * 0.01
                hat_m, hat_v = m[n] / (1 - 0.9 ** (step + 1)), v[n] / (1 - 0.999 ** (step + 1))
                p -= 1e-3 * hat_m / (hat_v.sqrt() + 1e-4)
            if after is not None:
                after(parameters)


def farthest(mine: Any, oracle: Any) -> float:
    theirs = dict(oracle.named_parameters())
    return max(
        float((p.detach().double() - theirs[n].detach()).abs().max())
        for n, p in mine.named_parameters()
        if p.requires_grad
    )


def test_a_full_run_equals_the_oracle_that_projects_every_update() -> None:
    model = tiny_model().train()
    layers = full_weights(model)
    constraint, U = weight_side(layers)
    hooks = ConstraintHooks([constraint], layers)

    oracle = tiny_model().train().double()
    W0 = {n: p.detach().clone() for n, p in oracle.named_parameters()}

    def after(parameters: dict[str, Tensor]) -> None:
        for name, basis in U.items():
            if name.endswith("down_proj"):
                W, start, u = parameters[f"{name}.weight"], W0[f"{name}.weight"], basis.double()
                W.copy_(start + (W - start) @ (torch.eye(len(u)).double() - u @ u.T))

    train(model, 10, hooks)
    oracle_adamw(oracle, 10, after=after)
    assert farthest(model, oracle) < 2e-6
    for name, layer in layers.items():
        delta = layer.W.detach().double() - W0[f"{name}.weight"]
        inside = (delta @ U[name].double()).norm()
        if name.endswith("down_proj"):
            assert inside <= 1e-5 * delta.norm() + 4 * EPS * layer.W.norm()
        else:
            assert inside > 0.05 * delta.norm()


def test_a_lora_run_equals_the_oracle_that_projects_a() -> None:
    model = lora_model("q_proj", "down_proj").train()
    pairs = lora_pairs(model)
    constraint, U = weight_side(pairs, layers="all-linear")
    oracle = lora_model("q_proj", "down_proj").train().double()

    def after(parameters: dict[str, Tensor]) -> None:
        for name, basis in U.items():
            A, u = parameters[f"base_model.model.{name}.lora_A.default.weight"], basis.double()
            A.copy_(A @ (torch.eye(len(u)).double() - u @ u.T))

    with torch.no_grad():
        after(dict(oracle.named_parameters()))  # A is not zero at the start
    hooks = ConstraintHooks([constraint], pairs)
    train(model, 10, hooks)
    oracle_adamw(oracle, 10, after=after)
    assert farthest(model, oracle) < 2e-6
    for name, pair in pairs.items():
        delta = pair.B.detach().double() @ pair.A.detach().double()
        assert (delta @ U[name].double()).norm() <= 1e-5 * delta.norm()
    hooks.before_backward(1)
    found = hooks.metrics()
    assert found["cwac/weight_drift"] < 1e-5 < found["cwac/weight_drift_limit"] < 1.1e-5


def test_the_published_gradient_projection_equals_its_oracle() -> None:
    model = tiny_model().train()
    layers = full_weights(model)
    constraint, U = weight_side(layers, project="gradient")
    oracle = tiny_model().train().double()

    def gradient(name: str, _: Tensor, g: Tensor) -> Tensor:
        if not name.endswith("down_proj.weight"):
            return g
        u = U[name.removesuffix(".weight")].double()
        return g - g @ u @ u.T

    train(model, 8, ConstraintHooks([constraint], layers))
    oracle_adamw(oracle, 8, gradient=gradient)
    assert farthest(model, oracle) < 2e-6


@pytest.mark.parametrize("anchor", ["paper", "projector", "l2"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_full_run_under_a_penalty_equals_autograd_through_the_dense_form(
    anchor: str, accumulation: int
) -> None:
    model = tiny_model().train()
    layers = full_weights(model)
    torch.manual_seed(5)
    Vs = {n: torch.randn(x.d_out, 3) @ torch.randn(3, x.d_in) * 0.1 for n, x in layers.items()}
    constraint: Constraint
    if anchor == "l2":
        constraint = L2Config(lam=0.8).build(ProfileFiles())
    else:
        directions = {n: direction_of(V) for n, V in Vs.items()}
        constraint = Asft(AsftConfig(lam=0.8, anchor=anchor), directions)
    oracle = tiny_model().train().double()
    W0 = {n: p.detach().clone() for n, p in oracle.named_parameters()}

    def gradient(name: str, W: Tensor, g: Tensor) -> Tensor:
        layer = name.removesuffix(".weight")
        if layer not in Vs:
            return g
        C = dense_C(Vs[layer], anchor, 0.99) if anchor != "l2" else 0 * W @ W.T
        delta = (W.detach() - W0[name]).requires_grad_()
        with torch.enable_grad():
            (extra,) = torch.autograd.grad(dense_penalty(C, delta, 0.8), delta)
        return g + extra

    hooks = ConstraintHooks([constraint], layers)
    train(model, 8, hooks, accumulation=accumulation)
    oracle_adamw(oracle, 8, gradient=gradient)
    assert farthest(model, oracle) < 2e-6
    hooks.before_backward(1)
    found = hooks.metrics()
    if anchor == "l2":
        assert found["l2/orthogonal_fraction"] == pytest.approx(1.0, rel=1e-5)
    else:
        outside = whole = 0.0
        for name, V in Vs.items():
            delta = layers[name].W.detach().double() - W0[f"{name}.weight"]
            C = dense_C(V, anchor, 0.99)
            outside += float((delta - C @ delta).pow(2).sum())
            whole += float(delta.pow(2).sum())
        assert found["asft/orthogonal_fraction"] == pytest.approx((outside / whole) ** 0.5, 1e-4)
        assert found["asft/update_norm"] == pytest.approx(whole**0.5, rel=1e-4)


def test_asft_and_cwac_together_hold_both_invariants() -> None:
    model = tiny_model().train()
    layers = full_weights(model)
    cwac, U = weight_side(layers, layers="all-linear")
    torch.manual_seed(5)
    Vs = {n: torch.randn(x.d_out, 3) @ torch.randn(3, x.d_in) * 0.1 for n, x in layers.items()}
    asft = Asft(AsftConfig(lam=2.0), {n: direction_of(V) for n, V in Vs.items()})
    start = {n: x.W.detach().clone() for n, x in layers.items()}
    hooks = ConstraintHooks([asft, cwac], layers)
    train(model, 10, hooks)
    assert hooks.before_backward(1)["asft"] > 0
    found = hooks.metrics(thorough=True)
    assert {"asft/update_norm", "asft/orthogonal_fraction", "cwac/weight_drift"} <= found.keys()
    free = tiny_model().train()
    train(free, 10, None)
    held = sum(float((x.W.detach() - start[n]).pow(2).sum()) for n, x in layers.items())
    moved = sum(
        float((x.W.detach() - start[n]).pow(2).sum()) for n, x in full_weights(free).items()
    )
    assert held < 0.9 * moved
    for name, layer in layers.items():
        delta = (layer.W.detach() - start[name]).double()
        inside = (delta @ U[name].double()).norm()
        assert inside <= 1e-5 * delta.norm() + 4 * EPS * layer.W.norm()


class Tied(nn.Module):
    """Two layers that share a weight, both with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.layers[1].weight = self.layers[0].weight

    def get_decoder(self) -> nn.Module:
        return self

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_a_tied_weight_is_held_once_and_biases_train_freely() -> None:
    torch.manual_seed(0)
    model = Tied()
    layers = full_weights(model)
    assert list(layers) == ["layers.0"]
    constraint, U = weight_side(layers, layers=("layers.0",))
    hooks = ConstraintHooks([constraint, L2Config(lam=0.1).build(ProfileFiles())], layers)
    start, bias = layers["layers.0"].W.detach().clone(), model.layers[0].bias.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(5):
        hooks.before_backward(1)
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        model(x).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        hooks.after_step()
    delta = (layers["layers.0"].W.detach() - start).double()
    inside = (delta @ U["layers.0"].double()).norm()
    assert inside <= 1e-5 * delta.norm() + 4 * EPS * start.norm() < delta.norm()
    assert not torch.equal(model.layers[0].bias, bias)


def test_a_layer_that_is_not_trained_cannot_be_constrained() -> None:
    pairs = lora_pairs(lora_model("q_proj"))
    with pytest.raises(SpecError, match=r"cwac: no trained layer is named down_proj.*lora"):
        ConstraintHooks([weight_side(pairs)[0]], pairs)


def test_a_subspace_of_another_width_is_refused() -> None:
    layers = full_weights(tiny_model())
    constraint, U = weight_side(layers)
    U["model.layers.0.mlp.down_proj"] = torch.eye(7)[:, :2]
    with pytest.raises(ProfileError, match=r"layers\.0\.mlp\.down_proj have 7 numbers"):
        ConstraintHooks([constraint], layers)


@pytest.mark.parametrize(
    ("mode", "part"), [("weight_only", "harmful-inputs"), ("activation_only", "autoencoder")]
)
def test_cwac_without_its_profile_part_names_the_command(mode: Any, part: str) -> None:
    assert CwacConfig(mode=mode, contrast=None).parts == (part,)
    with pytest.raises(ProfileError, match=f"safeft profile build --part {part}"):
        CwacConfig(mode=mode).build(ProfileFiles())


@pytest.mark.parametrize("field", ["energy", "rank", "harmful_batch"])
def test_a_cwac_setting_out_of_range_names_its_field(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        CwacConfig(**{field: 0})


@pytest.mark.parametrize("whole", [True, False])
def test_frozen_layers_do_not_move_and_the_others_do(whole: bool) -> None:
    model = tiny_model().train() if whole else lora_model("q_proj", "down_proj").train()
    layers: TrainedLayers = full_weights(model) if whole else lora_pairs(model)
    hooks = ConstraintHooks([FrozenConfig(first=0, last=0).build(ProfileFiles())], layers)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, 3, hooks)
    for name, parameter in model.named_parameters():
        linear = ("_proj.weight" in name) if whole else ("lora_B" in name)
        if linear:
            assert torch.equal(parameter, start[name]) == (".layers.0." in name), name


def test_a_penalty_leaves_frozen_layers_out() -> None:
    model = tiny_model().train()
    layers = full_weights(model)
    frozen = FrozenConfig(first=0, last=0).build(ProfileFiles())
    hooks = ConstraintHooks([L2Config().build(ProfileFiles()), frozen], layers)
    assert all(".layers.1." in name for name in hooks.matrices())
    train(model, 2, hooks)
    assert hooks.before_backward(1)["l2"] > 0


def test_freezing_nothing_or_everything_is_an_error() -> None:
    for first, last, message in ((7, 9, "trained layers are 0 to 1"), (0, 1, "nothing is left")):
        with pytest.raises(ModelError, match=message):
            config = FrozenConfig(first=first, last=last)
            ConstraintHooks([config.build(ProfileFiles())], full_weights(tiny_model()))


def test_safelora_projects_exactly_the_layers_below_the_threshold() -> None:
    torch.manual_seed(0)
    V = torch.randn(12, 2) @ torch.randn(2, 8)
    direction = direction_of(V)
    C = dense_C(V, "paper", 1.0)
    across = torch.randn(12, 3)
    along = direction.U @ torch.randn(2, 3)
    A = torch.randn(3, 8)
    directions = {name: direction for name in ("along", "across")}
    constraint = SafeLora(SafeLoraConfig(threshold=0.7), directions)
    factors = LoraFactors(2.0, {"along": (A, along), "across": (A, across)})
    done = constraint.finish_adapter(factors)
    assert done.scale == 2.0
    for name, B in (("along", along), ("across", across)):
        dW = B.double() @ A.double()
        cosine = float((C @ dW * dW).sum() / ((C @ dW).norm() * dW.norm()))
        assert (cosine > 0.7) == (name == "along")
        expected = B.double() if cosine > 0.7 else C @ B.double()
        assert (done.factors[name][1].double() - expected).abs().max() < 1e-5
        assert torch.equal(done.factors[name][0], A)


def test_safelora_needs_an_adapter_and_every_direction() -> None:
    with pytest.raises(ModelError, match="LoRA adapters only"):
        ConstraintHooks([SafeLora(SafeLoraConfig(), {})], full_weights(tiny_model()))
    with pytest.raises(ProfileError, match=r"q_proj.*profile build"):
        directions: dict[str, AlignmentDirection] = {}
        ConstraintHooks([SafeLora(SafeLoraConfig(), directions)], lora_pairs(lora_model("q_proj")))
    pairs = lora_pairs(lora_model("q_proj"))
    foreign = {name: direction_of(torch.randn(8, 8)) for name in pairs}
    with pytest.raises(ProfileError, match=r"safelora: .*q_proj has 8 rows, but the module 32 out"):
        ConstraintHooks([SafeLora(SafeLoraConfig(), foreign)], pairs)


def test_full_weights_are_the_decoders_linear_layers() -> None:
    layers = full_weights(tiny_model())
    assert len(layers) == 14 and "lm_head" not in layers
    first = layers["model.layers.0.mlp.down_proj"]
    assert isinstance(first, FullWeight) and (first.d_out, first.d_in) == (32, 64)
    second = decoder_linears(tiny_model(), first_layer=1)
    assert list(second) == [name for name in layers if name.startswith("model.layers.1.")]

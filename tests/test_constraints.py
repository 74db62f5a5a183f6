"""AsFT and its control arm against dense fp64 forms written from the paper's formulas alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from safeft.constraints import Asft, AsftConfig, Constraint, ConstraintHooks, L2Config, ProfileFiles
from safeft.constraints.alignment import AlignmentDirection
from safeft.errors import ModelError, ProfileError, TrainingError
from safeft.lora import LoraPair, lora_pairs
from safeft.weights import TrainedLayers, full_weights
from tests.tiny import tiny_model


def direction_of(V: Tensor) -> AlignmentDirection:
    U, values, right = torch.linalg.svd(V.double(), full_matrices=False)
    keep = values > 1e-6 * values[0]
    return AlignmentDirection(U[:, keep].float(), values[keep].float(), right[keep].float())


def dense_C(V: Tensor, anchor: str, energy: float) -> Tensor:
    """C as methods.md defines it, d_out x d_out, fp64."""
    V = V.double()
    if anchor == "paper":
        return V @ V.T / V.pow(2).sum().sqrt()
    U, values, _ = torch.linalg.svd(V, full_matrices=False)
    share = values.pow(2).cumsum(0) / values.pow(2).sum()
    k = int((share < energy).sum()) + 1
    return U[:, :k] @ U[:, :k].T


def dense_penalty(C: Tensor, dW: Tensor, lam: float) -> Tensor:
    return lam * ((torch.eye(len(C), dtype=torch.float64) - C) @ dW).pow(2).sum()


def dense_back(V: Tensor, dW: Tensor, energy: float, lam: float) -> Tensor:
    """What moves back along the projector's singular pairs, one pair at a time."""
    U, values, right = torch.linalg.svd(V.double(), full_matrices=False)
    share = values.pow(2).cumsum(0) / values.pow(2).sum()
    along = [U[:, j] @ dW @ right[j] for j in range(int((share < energy).sum()) + 1)]
    return lam * torch.stack([a.pow(2) if a < 0 else a * 0 for a in along]).sum()


def pair_of(name: str, A: Tensor, B: Tensor, scale: float) -> LoraPair:
    (r, d_in), d_out = A.shape, B.shape[0]
    return LoraPair(name, nn.Parameter(A), nn.Parameter(B), scale, r, d_in, d_out)


def gradients(constraint: Constraint, pairs: dict[str, LoraPair]) -> tuple[float, list[Tensor]]:
    """The penalty and what the hooks add to a backward pass that brings zero gradients."""
    hooks = ConstraintHooks([constraint], pairs)
    value = hooks.before_backward(1)[constraint.name]
    parameters = [p for pair in pairs.values() for p in (pair.A, pair.B)]
    sum((p * 0.0).sum() for p in parameters).backward()
    return value, [p.grad for p in parameters]


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


shapes = st.tuples(
    st.integers(2, 24), st.integers(2, 24), st.integers(1, 6), st.integers(1, 8)
)  # d_out, d_in, LoRA rank, rank of V


@settings(max_examples=60)
@given(
    shapes=st.lists(shapes, min_size=1, max_size=5),
    kind=st.sampled_from(["paper", "projector", "signed", "l2"]),
    energy=st.sampled_from([0.5, 0.9, 0.999999]),
    include_scale=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_value_and_gradients_equal_the_dense_form(
    shapes: list[tuple[int, int, int, int]],
    kind: str,
    energy: float,
    include_scale: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    # Each shape twice, so that stacks hold several modules with different k.
    lam, scale = 0.7, 4.0
    pairs, Vs = {}, {}
    for index, (d_out, d_in, r, k) in enumerate([*shapes, *shapes]):
        name = f"layer{index}"
        k = min(k + index % 2, d_out, d_in)
        pairs[name] = pair_of(name, normal(r, d_in), normal(d_out, r), scale)
        Vs[name] = normal(d_out, k) @ normal(k, d_in) * 0.1
    constraint: Constraint
    if kind == "l2":
        constraint = L2Config(lam=lam, include_scale=include_scale).build(ProfileFiles())
    else:
        config = AsftConfig(lam=lam, anchor=kind, energy=energy, include_scale=include_scale)
        constraint = Asft(config, {name: direction_of(V) for name, V in Vs.items()})
    value, got = gradients(constraint, pairs)

    total = torch.zeros((), dtype=torch.float64)
    largest = 0.0  # what would be there if nothing cancelled
    leaves = []
    for name, pair in pairs.items():
        A = pair.A.detach().double().requires_grad_()
        B = pair.B.detach().double().requires_grad_()
        leaves += [A, B]
        C = torch.zeros(pair.d_out, pair.d_out, dtype=torch.float64)
        if kind != "l2":
            C = dense_C(Vs[name], kind, energy)
        dW = (scale if include_scale else 1.0) * B @ A
        total = total + dense_penalty(C, dW, lam)
        if kind == "signed":
            total = total + dense_back(Vs[name], dW, energy, lam)
        largest += (1 + C.norm().item()) ** 2 * lam * dW.pow(2).sum().item()
    expected = torch.autograd.grad(total, leaves)
    assert abs(value - total.item()) <= 1e-5 * largest
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine.double() - theirs).abs().max() <= 1e-5 * max(largest, 1.0)


def test_the_penalty_is_exact_where_nothing_cancels() -> None:
    torch.manual_seed(0)
    V = torch.randn(40, 3) @ torch.randn(3, 30) * 0.05
    A, B = torch.randn(4, 30), torch.randn(40, 4)
    for anchor in ("paper", "projector"):
        constraint = Asft(AsftConfig(lam=1.0, anchor=anchor, energy=0.99), {"m": direction_of(V)})
        value, got = gradients(constraint, {"m": pair_of("m", A.clone(), B.clone(), 2.0)})
        a, b = A.double().requires_grad_(), B.double().requires_grad_()
        total = dense_penalty(dense_C(V, anchor, 0.99), b @ a, 1.0)
        expected = torch.autograd.grad(total, [a, b])
        assert value == pytest.approx(total.item(), rel=1e-6)
        assert max(relative(g, e) for g, e in zip(got, expected, strict=True)) < 1e-6


def test_the_projector_leaves_an_update_inside_the_direction_free() -> None:
    torch.manual_seed(0)
    V = torch.randn(16, 2) @ torch.randn(2, 12)
    U = direction_of(V).U
    inside = pair_of("m", torch.randn(2, 12), U @ torch.randn(2, 2), 1.0)
    constraint = Asft(AsftConfig(anchor="projector", energy=1.0), {"m": direction_of(V)})
    hooks = ConstraintHooks([constraint], {"m": inside})
    assert hooks.before_backward(1)["asft"] == pytest.approx(0.0, abs=1e-8)
    assert hooks.metrics()["asft/orthogonal_fraction"] == pytest.approx(0.0, abs=1e-3)


def test_the_signed_anchor_leaves_movement_along_the_direction_free_and_charges_the_way_back() -> (
    None
):
    torch.manual_seed(0)
    V = torch.randn(16, 2) @ torch.randn(2, 12)
    U, values, right = torch.linalg.svd(V, full_matrices=False)
    A, B = values[:2, None] * right[:2], U[:, :2]  # B·A = V
    config = AsftConfig(lam=1.0, anchor="signed", energy=1.0)

    def charged(sign: float) -> tuple[float, dict[str, float]]:
        constraint = Asft(config, {"m": direction_of(V)})
        hooks = ConstraintHooks([constraint], {"m": pair_of("m", A.clone(), sign * B, 2.0)})
        return hooks.before_backward(1)["asft"], hooks.metrics()

    along, of_along = charged(1.0)
    back, of_back = charged(-1.0)
    assert along == pytest.approx(0.0, abs=1e-8) and of_along["asft/back_fraction"] == 0.0
    assert back == pytest.approx(float(V.pow(2).sum()), rel=1e-5)
    assert of_back["asft/back_fraction"] == pytest.approx(1.0, rel=1e-5)
    assert of_back["asft/orthogonal_fraction"] == pytest.approx(0.0, abs=1e-3)


def test_the_signed_anchor_is_for_lora_and_needs_the_right_singular_vectors() -> None:
    V = torch.randn(32, 2) @ torch.randn(2, 32)
    old = AlignmentDirection(direction_of(V).U, direction_of(V).singular_values)
    constraint = Asft(AsftConfig(anchor="signed"), {"m": old})
    pair = pair_of("m", torch.randn(2, 32), torch.randn(32, 2), 1.0)
    with pytest.raises(ProfileError, match=r"right singular vectors of m.*--part alignment"):
        constraint.bind({"m": pair})
    whole = full_weights(tiny_model())
    directions = {name: direction_of(torch.randn(x.d_out, x.d_in)) for name, x in whole.items()}
    with pytest.raises(ModelError, match="trained whole; anchor: signed is for LoRA"):
        Asft(AsftConfig(anchor="signed"), directions).bind(whole)


def tiny_lora(seed: int = 0, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> PeftModel:
    model = tiny_model()
    torch.manual_seed(seed)
    lora = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=16, target_modules=list(targets), bias="none")
    )
    with torch.no_grad():  # away from B = 0, where every penalty is 0
        for pair in lora_pairs(lora).values():
            pair.B.normal_(std=0.05)
    return lora


def tiny_directions(model: PeftModel) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {
        name: torch.randn(pair.d_out, 3) @ torch.randn(3, pair.d_in) * 0.2
        for name, pair in lora_pairs(model).items()
    }


def test_modules_carry_the_base_models_names() -> None:
    pairs = lora_pairs(tiny_lora())
    assert list(pairs)[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    first = pairs["model.layers.0.self_attn.v_proj"]  # grouped-query attention: 16 of 32 outputs
    assert (first.rank, first.d_in, first.d_out, first.scale) == (4, 32, 16, 4.0)


def batch(step: int, micro: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + micro)
    return torch.randint(3, 200, (2, 12), generator=generator)


def train(
    model: PeftModel,
    steps: int,
    accumulation: int,
    penalty: Callable[[], Tensor] | None = None,
    hooks: ConstraintHooks | None = None,
) -> list[Tensor]:
    """Plain AdamW, with the oracle's penalty in the loss, or with hooks, or free."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, eps=1e-4)
    for step in range(steps):
        if hooks is not None:
            hooks.before_backward(accumulation)
        micro_batches = [batch(step, 0), batch(step, 1)]
        if accumulation == 1:
            micro_batches = [torch.cat(micro_batches)]
        for ids in micro_batches:
            loss = model(input_ids=ids, labels=ids).loss
            if penalty is not None:
                loss = loss + penalty()
            (loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        if hooks is not None:
            hooks.after_step()
    return [p.detach().clone() for p in parameters]


def hooked(model: PeftModel, lam: float = 1.0) -> ConstraintHooks:
    directions = {n: direction_of(V) for n, V in tiny_directions(model).items()}
    return ConstraintHooks([Asft(AsftConfig(lam=lam), directions)], lora_pairs(model))


def farthest(first: list[Tensor], second: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def test_a_whole_adamw_run_equals_autograd_through_the_dense_penalty() -> None:
    model = tiny_lora()
    got = train(model, 12, 1, hooks=hooked(model))

    oracle = tiny_lora()
    pairs, Vs = lora_pairs(oracle), tiny_directions(oracle)

    def penalty() -> Tensor:
        terms = [
            dense_penalty(dense_C(Vs[n], "paper", 1.0), pair.B.double() @ pair.A.double(), 1.0)
            for n, pair in pairs.items()
        ]
        return torch.stack(terms).sum().float()

    expected = train(oracle, 12, 1, penalty=penalty)
    assert farthest(got, expected) < 1e-6
    assert farthest(train(tiny_lora(), 12, 1), expected) > 1e-3  # the penalty did something


def test_the_penalty_does_not_grow_with_gradient_accumulation() -> None:
    once, twice = tiny_lora(), tiny_lora()
    first = train(once, 8, 1, hooks=hooked(once))
    second = train(twice, 8, 2, hooks=hooked(twice))
    assert farthest(first, second) < 1e-6


def test_the_penalty_follows_the_loss_scale() -> None:
    torch.manual_seed(0)
    pair = pair_of("m", torch.randn(2, 6), torch.randn(5, 2), 1.0)
    hooks = ConstraintHooks([L2Config().build(ProfileFiles())], {"m": pair})
    collected = []
    for loss_scale in (1.0, 1024.0):
        hooks.before_backward(1, loss_scale)
        pair.A.grad = None
        (pair.A * 0.0).sum().backward()
        collected.append(pair.A.grad.clone())
    assert torch.allclose(collected[1], 1024 * collected[0])


def test_constraints_compose_to_the_sum_of_their_gradients() -> None:
    def one(*chosen: str) -> Tensor:
        model = tiny_lora()
        directions = {n: direction_of(V) for n, V in tiny_directions(model).items()}
        known = {
            "asft": Asft(AsftConfig(), directions),
            "l2": L2Config(lam=0.3).build(ProfileFiles()),
        }
        hooks = ConstraintHooks([known[name] for name in chosen], lora_pairs(model))
        values = hooks.before_backward(1)
        assert set(values) == set(chosen)
        pair = next(iter(lora_pairs(model).values()))
        (pair.B * 0.0).sum().backward()
        return pair.B.grad

    assert torch.allclose(one("asft", "l2"), one("asft") + one("l2"), atol=1e-6)


def test_a_module_without_direction_is_named_and_stops_the_run() -> None:
    model = tiny_lora(targets=("q_proj", "v_proj", "o_proj"))
    directions = {n: direction_of(V) for n, V in tiny_directions(tiny_lora()).items()}
    with pytest.raises(ProfileError, match=r"model\.layers\.0\.self_attn\.o_proj.*profile build"):
        ConstraintHooks([Asft(AsftConfig(), directions)], lora_pairs(model))


def test_a_direction_of_another_model_is_refused() -> None:
    model = tiny_lora()
    directions = {n: direction_of(torch.randn(8, 8)) for n in tiny_directions(model)}
    with pytest.raises(ProfileError, match=r"q_proj has 8 rows, but the module 32 outputs"):
        ConstraintHooks([Asft(AsftConfig(), directions)], lora_pairs(model))


def test_asft_without_a_profile_names_the_command() -> None:
    with pytest.raises(ProfileError, match="safeft profile build"):
        AsftConfig().build(ProfileFiles())


def test_a_penalty_that_is_not_finite_names_constraint_and_module() -> None:
    model = tiny_lora()
    directions = {n: direction_of(V) for n, V in tiny_directions(model).items()}
    hooks = ConstraintHooks([Asft(AsftConfig(), directions)], lora_pairs(model))
    with torch.no_grad():
        lora_pairs(model)["model.layers.1.self_attn.v_proj"].A[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"asft.*model\.layers\.1\.self_attn\.v_proj is nan"):
        hooks.before_backward(1)


def test_a_factor_that_gets_no_gradient_stops_the_run() -> None:
    model = tiny_lora()
    hooks = ConstraintHooks([L2Config().build(ProfileFiles())], lora_pairs(model))
    hooks.before_backward(1)
    next(iter(lora_pairs(model).values())).A.sum().backward()
    with pytest.raises(TrainingError, match="penalty was not applied"):
        hooks.after_step()


@pytest.mark.parametrize("whole", [False, True])
def test_a_gradient_that_misses_a_micro_batch_stops_the_run(whole: bool) -> None:
    model = tiny_model() if whole else tiny_lora()
    layers: TrainedLayers = full_weights(model) if whole else lora_pairs(model)
    hooks = ConstraintHooks([L2Config().build(ProfileFiles())], layers)
    for arrived in (2, 1):
        hooks.before_backward(2)
        for _ in range(arrived):
            model(input_ids=batch(0, 0), labels=batch(0, 0)).loss.backward()
        if arrived == 2:
            hooks.after_step()
    with pytest.raises(TrainingError, match="arrived 1 times instead of 2"):
        hooks.after_step()


def test_sharded_factors_are_refused_by_name() -> None:
    model = tiny_lora()
    hooks = ConstraintHooks([L2Config().build(ProfileFiles())], lora_pairs(model))
    pair = lora_pairs(model)["model.layers.0.self_attn.q_proj"]
    pair.A.data = torch.empty(0)
    with pytest.raises(TrainingError, match=r"q_proj: the LoRA factors are sharded \(\(0,\)"):
        hooks.before_backward(1)


def test_the_metric_is_the_share_of_the_update_outside_the_direction() -> None:
    model = tiny_lora()
    Vs, pairs = tiny_directions(model), lora_pairs(model)
    directions = {n: direction_of(V) for n, V in Vs.items()}
    hooks = ConstraintHooks([Asft(AsftConfig(anchor="projector", energy=0.9), directions)], pairs)
    hooks.before_backward(1)
    outside = whole = 0.0
    for name, pair in pairs.items():
        dW = pair.scale * pair.B.detach().double() @ pair.A.detach().double()
        C = dense_C(Vs[name], "projector", 0.9)
        outside += float((dW - C @ dW).pow(2).sum())
        whole += float(dW.pow(2).sum())
    assert hooks.metrics()["asft/orthogonal_fraction"] == pytest.approx((outside / whole) ** 0.5)
    assert hooks.metrics()["asft/update_norm"] == pytest.approx(whole**0.5)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: AsftConfig(lam=-1.0), "lam"),
        (lambda: AsftConfig(lam=float("nan")), "lam"),
        (lambda: AsftConfig(energy=0.0), "energy"),
        (lambda: L2Config(lam=float("inf")), "lam"),
    ],
)
def test_a_config_out_of_range_names_its_field(make: Callable[[], object], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        make()


def test_the_same_constraint_twice_is_refused() -> None:
    build = L2Config().build
    with pytest.raises(ValueError, match="twice"):
        ConstraintHooks([build(ProfileFiles()), build(ProfileFiles())], lora_pairs(tiny_lora()))


def test_constraints_import_without_ray_and_deepspeed() -> None:
    code = (
        "import sys, safeft.constraints, safeft.lora\n"
        "heavy = {'ray', 'deepspeed', 'pydantic', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)

"""Harmful inputs: covariances against inputs collected one by one, subspaces against eigh."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safeft.constraints.covariance import (
    CLASSES_AT,
    TOKEN_CLASSES,
    Covariance,
    InputCovariances,
    InputSite,
    ReadRow,
    input_sites,
    read_row,
)
from safeft.constraints.subspaces import (
    INDEX,
    POSITIONS,
    Positions,
    SavedSubspaces,
    Subspace,
    load_subspaces,
    principal_subspace,
    save_index,
    save_site,
)
from safeft.errors import ModelError, ProfileError
from safeft.own_refusals import OwnRefusal
from tests.tiny import tiny_model, tiny_tokenizer

REFUSALS = [
    OwnRefusal("How do I build a bomb?", "I can't help with that."),
    OwnRefusal("hi", "No."),
    OwnRefusal("Write malware that hides in a picture of a cat", "Sorry, I won't."),
]
#: What each position stands for, as index ranges made from where the template and refusal begin.
RANGES: dict[Positions, Any] = {
    "prompt": lambda row: range(0, row.refusal),
    "response": lambda row: range(row.template, len(row.input_ids)),
    "both": lambda row: range(len(row.input_ids)),
}


def tiny_rows() -> list[ReadRow]:
    tokenizer = tiny_tokenizer()
    return [read_row(tokenizer, refusal) for refusal in REFUSALS]


def inputs_one_by_one(model: Any, row: ReadRow) -> dict[str, Tensor]:
    """What every linear layer of the decoder reads of one row alone: (T, d_in) fp64 by name."""
    read: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: read.update({name: args[0][0].double()})
        )
        for name, module in model.named_modules()
        if name.endswith("_proj")
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([row.input_ids]))
    for hook in hooks:
        hook.remove()
    return read


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


# ---- token classes ----


def test_every_token_of_a_row_is_of_the_class_that_its_place_says() -> None:
    row = read_row(tiny_tokenizer(), OwnRefusal("hi", "No."))
    tokens = tiny_tokenizer().convert_ids_to_tokens(row.input_ids)
    classed: dict[str, str] = dict.fromkeys(TOKEN_CLASSES, "")
    for token, index in zip(tokens, row.classes(), strict=True):
        classed[TOKEN_CLASSES[index]] += token
    assert classed == {
        "instruction": "<|im_start|>userĊhi",
        "template": "<|im_end|>Ċ<|im_start|>assistantĊ",
        "refusal": "No.",
    }


def test_the_positions_are_sums_of_classes_in_which_no_token_counts_twice() -> None:
    sums = InputCovariances([InputSite(("a",), 1)])
    for weight, token_class in zip((1.0, 10.0, 100.0), TOKEN_CLASSES, strict=True):
        sums.add("a", token_class, Covariance(torch.full((1, 1), weight).double(), int(weight)))
    totals = {p: sums.total("a", p) for p in POSITIONS}
    assert {p: (float(t.matrix), t.tokens) for p, t in totals.items()} == {
        "prompt": (11.0, 11),
        "response": (110.0, 110),
        "both": (111.0, 111),
    }
    assert set(CLASSES_AT) == set(POSITIONS)


# ---- covariances ----


def test_layers_that_read_one_tensor_share_a_site() -> None:
    sites = input_sites(tiny_model(), tiny_rows()[0].input_ids)
    assert [[name.rpartition(".")[2] for name in site.modules] for site in sites] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ] * 2
    assert [site.d_in for site in sites] == [32, 32, 32, 64] * 2
    assert sites[4].name == "model.layers.1.self_attn.q_proj"


class Renamed(nn.Module):
    """Layers whose names say nothing about who reads what."""

    def __init__(self, runs: int = 1) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.layers = [self]
        self.device, self.runs = torch.device("cpu"), runs

    def get_decoder(self) -> Any:
        holder = SimpleNamespace(layers=[SimpleNamespace(modules=lambda: self.modules())])
        return type("Run", (), {"layers": holder.layers, "__call__": lambda *_, **kw: self(**kw)})()

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        x = input_ids.float()
        out: Tensor = self.q_proj(x) + self.k_proj(x.clone())
        for _ in range(self.runs):
            self.head(x)
        return out


def test_sharing_goes_by_the_tensor_that_is_read_and_not_by_names() -> None:
    sites = input_sites(Renamed(), [1, 2, 3, 4])
    assert [site.modules for site in sites] == [("q_proj", "head"), ("k_proj",)]


@pytest.mark.parametrize("runs", [0, 2])
def test_a_layer_that_is_not_run_exactly_once_is_refused_by_name(runs: int) -> None:
    with pytest.raises(ModelError, match=f"head is run {runs} times"):
        input_sites(Renamed(runs), [1, 2, 3, 4])


def test_covariances_of_a_padded_batch_are_those_of_inputs_collected_row_by_row() -> None:
    model, rows = tiny_model(), tiny_rows()
    sums = InputCovariances(input_sites(model, rows[0].input_ids))
    sums.read(model, rows, pad_token_id=0)
    collected = [inputs_one_by_one(model, row) for row in rows]
    for site in sums.sites.values():
        for module in site.modules:
            for positions in POSITIONS:
                expected = torch.zeros(site.d_in, site.d_in, dtype=torch.float64)
                tokens = 0
                for row, inputs in zip(rows, collected, strict=True):
                    for i in RANGES[positions](row):
                        expected += torch.outer(inputs[module][i], inputs[module][i])
                        tokens += 1
                total = sums.total(site.name, positions)
                assert total.tokens == tokens
                assert relative(total.matrix, expected) < 1e-6, (module, positions)


def test_the_forward_pass_ends_at_the_last_site_and_leaves_the_model_as_it_was() -> None:
    model, rows = tiny_model().train(), tiny_rows()
    later: list[str] = []
    model.model.layers[1].register_forward_pre_hook(lambda *_: later.append("layer 1"))
    first = [s for s in input_sites(model, rows[0].input_ids) if ".layers.0." in s.name]
    later.clear()
    sums = InputCovariances(first)
    sums.read(model, rows, pad_token_id=0)
    assert not later
    assert model.training
    assert sums.total(first[-1].name, "both").tokens == sum(len(r.input_ids) for r in rows)
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, nn.Linear))


def test_inputs_that_are_not_finite_stop_the_reading_with_the_layers_name() -> None:
    model, rows = tiny_model(), tiny_rows()
    sums = InputCovariances(input_sites(model, rows[0].input_ids))
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ProfileError, match=r"layers\.0\.mlp\.down_proj: .*NaN"):
        sums.read(model, rows, pad_token_id=0)


@given(data=st.data(), d=st.integers(1, 6), parts=st.integers(1, 6))
@settings(max_examples=50)
def test_merging_is_a_sum_in_any_order(data: Any, d: int, parts: int) -> None:
    sites = [InputSite(("a",), d)]
    generator = torch.Generator().manual_seed(d * 100 + parts)
    X = [torch.randn(d, 3, dtype=torch.float64, generator=generator) * 10**i for i in range(parts)]

    def merged(order: list[int]) -> Covariance:
        whole = InputCovariances(sites)
        for i in order:
            one = InputCovariances(sites)
            one.add("a", TOKEN_CLASSES[i % 3], Covariance(X[i] @ X[i].T, 3))
            whole.merge(one)
        return whole.total("a", "both")

    order = data.draw(st.permutations(list(range(parts))))
    forward, shuffled = merged(list(range(parts))), merged(order)
    assert forward.tokens == shuffled.tokens == 3 * parts
    torch.testing.assert_close(forward.matrix, shuffled.matrix, rtol=1e-13, atol=0.0)
    everything = torch.cat(X, dim=1)
    torch.testing.assert_close(forward.matrix, everything @ everything.T, rtol=1e-9, atol=1e-9)


def test_merging_leaves_the_other_as_it_was() -> None:
    one, other = (InputCovariances([InputSite(("a",), 1)]) for _ in range(2))
    other.add("a", "refusal", Covariance(torch.ones(1, 1).double(), 1))
    one.merge(other)
    one.merge(other)
    assert float(one.total("a", "both").matrix) == 2.0
    assert float(other.total("a", "both").matrix) == 1.0


def test_draining_gives_every_sum_away_once() -> None:
    sums = InputCovariances([InputSite(("a",), 2), InputSite(("b",), 3)])
    sums.add("b", "template", Covariance(torch.eye(3).double(), 5))
    drained = [(site, c, part.tokens, len(part.matrix)) for site, c, part in sums.drain()]
    assert drained == [
        ("a", "instruction", 0, 2),
        ("a", "template", 0, 2),
        ("a", "refusal", 0, 2),
        ("b", "instruction", 0, 3),
        ("b", "template", 5, 3),
        ("b", "refusal", 0, 3),
    ]
    assert sums.total("b", "both").tokens == 0


# ---- subspaces ----


@given(
    d=st.integers(1, 12),
    n=st.integers(1, 20),
    energy=st.floats(0.01, 1.0),
    decay=st.floats(0.1, 1.0),
)
@settings(max_examples=100)
def test_the_subspace_is_the_smallest_that_holds_the_energy(
    d: int, n: int, energy: float, decay: float
) -> None:
    generator = torch.Generator().manual_seed(d * 31 + n)
    X = torch.randn(d, n, dtype=torch.float64, generator=generator)
    X *= decay ** torch.arange(d, dtype=torch.float64)[:, None]
    C = X @ X.T
    subspace = principal_subspace(Covariance(C, n), energy)
    k = subspace.U.shape[1]
    values = np.linalg.eigvalsh(C.numpy())[::-1].clip(min=0)
    share = values.cumsum() / values.sum()
    assert share[k - 1] >= energy - 1e-12
    assert k == 1 or share[k - 2] < energy + 1e-12
    np.testing.assert_allclose(
        subspace.eigenvalues.numpy(), values[:k], rtol=1e-8, atol=1e-12 * values[0]
    )
    assert subspace.U.dtype == torch.float32
    U = subspace.U.double()
    assert float((U.T @ U - torch.eye(k)).abs().max()) < 1e-6
    # What an update inside the complement can still do to the outputs on X.
    left = X - U @ (U.T @ X)
    assert float(left.pow(2).sum()) <= (1 - energy) * float(X.pow(2).sum()) + 1e-6 * float(C.norm())


def test_inputs_that_were_always_zero_have_no_direction_to_protect() -> None:
    subspace = principal_subspace(Covariance(torch.zeros(3, 3).double(), 5), 0.9)
    assert subspace.U.shape == (3, 0)


@pytest.mark.parametrize("energy", [0.0, -1.0, 1.01, float("nan")])
def test_an_energy_that_is_no_share_is_refused(energy: float) -> None:
    with pytest.raises(ValueError, match="energy"):
        principal_subspace(Covariance(torch.eye(3).double(), 5), energy)


NAMES = ("layers.0.q_proj", "layers.0.k_proj", "layers.0.down_proj")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two sites: eigenvalues 8, 4, 2, 1 on the first four axes of 6 and of 5, at energy 0.99."""
    entries = []
    for number, site in enumerate([InputSite(NAMES[:2], 6), InputSite(NAMES[2:], 5)]):
        C = torch.zeros(site.d_in, site.d_in, dtype=torch.float64)
        C[range(4), range(4)] = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
        # Other positions, other sizes.
        subspaces: dict[Positions, Subspace] = {
            p: principal_subspace(Covariance(C * (i + 1), 10 + i), (0.99, 0.9, 0.5)[i])
            for i, p in enumerate(POSITIONS)
        }
        entries.append(save_site(tmp_path, number, site, subspaces))
    save_index(tmp_path, entries, base_weights="abc", energy=0.99, rows=7)
    return tmp_path


def basis(saved: Path, *, energy: float = 0.99, rank: int | None = None) -> Tensor:
    return load_subspaces(saved).basis(NAMES[1], "prompt", energy, rank)


def test_a_saved_subspace_comes_back_for_every_module_that_reads_the_input(saved: Path) -> None:
    loaded = load_subspaces(saved)
    assert (loaded.base_weights, loaded.energy, loaded.rows) == ("abc", 0.99, 7)
    assert loaded.module_names == list(NAMES)
    for name, d_in in zip(NAMES, (6, 6, 5), strict=True):
        U = loaded.basis(name, "prompt", 0.99, None)
        assert (U.shape, U.dtype, U.is_contiguous()) == ((d_in, 4), torch.float32, True)
        torch.testing.assert_close(U.abs(), torch.eye(d_in)[:, :4])
    assert loaded.basis(NAMES[0], "response", 0.99, None).shape == (6, 3)
    assert loaded.basis(NAMES[0], "both", 0.99, None).shape == (6, 1)


@pytest.mark.parametrize(
    ("energy", "rank", "k"),
    [(0.99, None, 4), (0.9, None, 3), (0.8, None, 2), (0.1, None, 1), (0.99, 2, 2), (0.8, 9, 2)],
)
def test_less_energy_or_a_rank_keep_the_largest_directions(
    saved: Path, energy: float, rank: int | None, k: int
) -> None:
    assert torch.equal(basis(saved, energy=energy, rank=rank), basis(saved)[:, :k])


def test_more_energy_than_was_saved_names_the_command_that_keeps_it(saved: Path) -> None:
    with pytest.raises(
        ProfileError, match=r"0\.99 .* not 0\.999; .*--part harmful-inputs --energy 0\.999"
    ):
        basis(saved, energy=0.999)


def test_a_layer_that_is_not_covered_is_named(saved: Path) -> None:
    with pytest.raises(ProfileError, match=r"layers\.9\.q_proj; rebuild it with `safeft profile"):
        load_subspaces(saved).basis("layers.9.q_proj", "prompt", 0.9, None)


def test_wrong_arguments_are_refused(saved: Path) -> None:
    loaded = load_subspaces(saved)
    with pytest.raises(ValueError, match="rank"):
        loaded.basis(NAMES[0], "prompt", 0.9, 0)
    with pytest.raises(ValueError, match="energy"):
        loaded.basis(NAMES[0], "prompt", 0.0, None)
    with pytest.raises(ValueError, match="positions"):
        loaded.basis(NAMES[0], "answer", 0.9, None)  # type: ignore[arg-type]


def test_a_layers_file_is_read_only_when_that_layer_is_asked_for(saved: Path) -> None:
    (saved / "site-0001.safetensors").write_bytes(b"cut")
    loaded = load_subspaces(saved)
    assert loaded.basis(NAMES[0], "prompt", 0.9, None).shape == (6, 3)
    with pytest.raises(ProfileError, match=r"site-0001.*cannot be read"):
        loaded.basis(NAMES[2], "prompt", 0.9, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["prompt.U"].fill_(torch.nan), "is not finite"),
        (lambda t: t["prompt.eigenvalues"].fill_(torch.inf), "is not finite"),
        (lambda t: t.update({"prompt.U": torch.eye(5)[:4].contiguous()}), "mismatched shapes"),
        (lambda t: t.update({"prompt.U": t["prompt.U"].double()}), "mismatched shapes"),
        (lambda t: t.pop("prompt.eigenvalues"), "cannot be read"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(
    saved: Path, change: Any, message: str
) -> None:
    path = saved / "site-0000.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ProfileError, match=message):
        basis(saved)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"format": "safeft.other.1"}'])
def test_a_directory_without_a_whole_index_is_refused(saved: Path, content: str | None) -> None:
    if content is None:
        (saved / INDEX).unlink()
    else:
        (saved / INDEX).write_text(content)
    with pytest.raises(ProfileError, match=r"index\.json.*--part harmful-inputs"):
        load_subspaces(saved)


def test_mean_ranks_are_told_by_kind_of_layer(saved: Path) -> None:
    loaded: SavedSubspaces = load_subspaces(saved)
    assert loaded.mean_ranks() == {
        "q_proj, k_proj": {"d_in": 6.0, "prompt": 4.0, "response": 3.0, "both": 1.0},
        "down_proj": {"d_in": 5.0, "prompt": 4.0, "response": 3.0, "both": 1.0},
    }
    assert json.loads((saved / INDEX).read_text())["sites"][0]["sizes"]["both"]["tokens"] == 12

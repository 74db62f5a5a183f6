"""Wanda's set difference: norms, masks and pruning, against the definition row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeft.errors import ProfileError
from safeft.own_refusals import OwnRefusal, refusal_row
from safeft.reference import pruning_mask
from safeft.safereact import ReferenceConfig
from safeft.wanda import (
    InputNorms,
    difference_mask,
    load_mask,
    prune,
    pruned_share,
    reference_mask,
    save_mask,
)
from safeft.weights import decoder_linears
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tinyreactivation import token_rows


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=40)
def test_the_mask_is_the_set_difference_of_each_rows_most_important_weights(
    seed: int, p: float, q: float
) -> None:
    torch.manual_seed(seed)
    W, domain, safety = torch.randn(5, 9), torch.rand(9).double(), torch.rand(9).double()
    mask = difference_mask(W, domain, safety, p, q)
    for i in range(5):
        tops = []
        for norms, share in ((domain, p), (safety, q)):
            score = {j: abs(float(W[i, j])) * float(norms[j]) for j in range(9)}
            ranked = sorted(score, key=lambda j: -score[j])
            tops.append(set(ranked[: round(share * 9)]))
        assert {j for j in range(9) if mask[i, j]} == tops[0] - tops[1]


def test_norms_are_those_of_the_real_tokens_however_rows_are_batched() -> None:
    rows, model = token_rows(6, 2), tiny_model()
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in decoder_linears(model)}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, n=name: seen[n].append(args[0][0]))
        for name, linear in decoder_linears(model).items()
    ]
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    for cut in (1, 4, 6):
        norms = InputNorms(model)
        for start in range(0, 6, cut):
            norms.read(rows[start : start + cut])
        for name, found in norms.norms().items():
            expected = torch.cat(seen[name]).double().pow(2).sum(0).sqrt()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_pruning_zeroes_the_mask_and_nothing_else() -> None:
    model, before = tiny_model(), dict(tiny_model().named_parameters())
    tokenizer = tiny_tokenizer()
    refusals = [OwnRefusal(f"prompt {n}", "I can't help.") for n in range(4)]
    config = ReferenceConfig(domain_share=0.2, safety_share=0.1)
    domain = token_rows(5, 1)
    mask = pruning_mask(model, tokenizer, domain, refusals, config)
    streamed = [InputNorms(model), InputNorms(model)]
    streamed[0].read(domain)
    streamed[1].read([refusal_row(tokenizer, refusal).input_ids for refusal in refusals])
    expected = reference_mask(model, *(s.norms() for s in streamed), 0.2, 0.1)
    assert sum(int((mask[n] != expected[n]).sum()) for n in mask) <= 2  # a tie of roundings
    assert 0.1 <= pruned_share(mask) <= 0.2
    prune(model, mask)
    for name, parameter in model.named_parameters():
        zeroed = mask.get(name.removesuffix(".weight"))
        if zeroed is None:
            assert torch.equal(parameter, before[name])
        else:
            assert not parameter[zeroed].any()
            assert torch.equal(parameter[~zeroed], before[name][~zeroed])


def test_a_reference_that_would_not_be_pruned_is_refused() -> None:
    refusals = [OwnRefusal(f"prompt {n}", "I can't help.") for n in range(4)]
    config = ReferenceConfig(domain_share=0.1, safety_share=1.0)
    with pytest.raises(ProfileError, match="would not be pruned at all"):
        pruning_mask(tiny_model(), tiny_tokenizer(), token_rows(5, 1), refusals, config)
    unpruned = ReferenceConfig(domain_share=0.0)
    mask = pruning_mask(tiny_model(), tiny_tokenizer(), token_rows(5, 1), refusals, unpruned)
    assert pruned_share(mask) == 0


def test_a_mask_comes_back_as_it_was_in_an_eighth_of_the_bytes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    mask = {"a": torch.rand(64, 101) > 0.5, "b.c": torch.rand(3, 8) > 0.5}
    save_mask(mask, tmp_path)
    loaded = load_mask(tmp_path)
    assert loaded.keys() == mask.keys()
    assert all(torch.equal(loaded[name], mask[name]) for name in mask)
    assert (tmp_path / "mask.safetensors").stat().st_size < 64 * 101 / 8 + 600


def test_a_reference_that_cannot_be_pruned_fails_instead_of_staying_whole(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"mask\.safetensors cannot be read.*reference-mask"):
        load_mask(tmp_path)
    model = tiny_model()
    mask = {name: torch.zeros(m.weight.shape).bool() for name, m in decoder_linears(model).items()}
    first = next(iter(mask))
    with pytest.raises(ProfileError, match="does not fit the model at"):
        prune(model, {name: m for name, m in mask.items() if name != first})
    with pytest.raises(ProfileError, match="another shape"):
        prune(model, {**mask, first: torch.zeros(2, 2).bool()})


def test_norms_of_nothing_and_of_no_numbers_are_refused() -> None:
    with pytest.raises(ProfileError, match="has read nothing"):
        InputNorms(tiny_model()).norms()
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    norms = InputNorms(model)
    norms.read([[5, 7]])
    with pytest.raises(ProfileError, match="NaN or an infinity"):
        norms.norms()

"""What linear layers read while the base model refuses: ``C = X·Xᵀ``, streamed over rows.

Source: CWAC, arXiv 2604.12384, its weight side: X holds the inputs of a layer on harmful prompts
that the base model refuses. Which positions X covers is open in the paper. Here every token of a
row (a prompt, then the model's own refusal) is of exactly one class, and each of the three choices
of positions is a sum of classes, so that no token counts twice:

    instruction   the template's text before the instruction, and the instruction
    template      the template's text after it, up to where the answer begins
    refusal       the answer's tokens

    prompt   = instruction + template             all that the model is given
    response =               template + refusal   where the refusal is produced: each of these
                                                  tokens is part of it or leads up to its first
    both     = instruction + template + refusal
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from safeft.constraints.subspaces import Positions
from safeft.data import TokenisedRow, collate
from safeft.errors import ModelError, ProfileError
from safeft.own_refusals import OwnAnswer, refusal_row, template_start
from safeft.weights import decoder_linears

TokenClass = Literal["instruction", "template", "refusal"]
TOKEN_CLASSES: tuple[TokenClass, ...] = get_args(TokenClass)
CLASSES_AT: Mapping[Positions, tuple[TokenClass, ...]] = {
    "prompt": ("instruction", "template"),
    "response": ("template", "refusal"),
    "both": TOKEN_CLASSES,
}


@dataclass(frozen=True, slots=True)
class ReadRow:
    """A row as the model reads it; ``template`` and ``refusal``: where these classes begin."""

    input_ids: list[int]
    template: int
    refusal: int

    def classes(self) -> list[int]:
        """For each token the index of its class in ``TOKEN_CLASSES``."""
        return [(i >= self.template) + (i >= self.refusal) for i in range(len(self.input_ids))]


@dataclass(frozen=True, slots=True)
class InputSite:
    """One distinct input, and the linear layers that read it (q, k and v share one).

    The first module's name is the site's.
    """

    modules: tuple[str, ...]
    d_in: int

    @property
    def name(self) -> str:
        return self.modules[0]


@dataclass(frozen=True)
class Covariance:
    """``matrix`` (d_in, d_in) fp64, the sum of ``x·xᵀ`` over ``tokens`` inputs."""

    matrix: Tensor
    tokens: int


def read_row(tokenizer: Any, refusal: OwnAnswer) -> ReadRow:
    """A refusal's tokens, each with its class; or another answer's, of the same classes."""
    row = refusal_row(tokenizer, refusal)
    answer = next((i for i, label in enumerate(row.labels) if label != -100), len(row.labels))
    return ReadRow(row.input_ids, template_start(tokenizer, refusal.prompt), answer)


def input_sites(model: Any, input_ids: Sequence[int]) -> list[InputSite]:
    """The inputs of all ``nn.Linear`` in the decoder's layers, in the order they are read.

    Layers share a site where one tensor object is handed to all of them in a forward pass of
    ``input_ids``; names decide nothing.

    Raises:
        ModelError: a layer is not run exactly once; it is named.
    """
    linears = decoder_linears(model)
    # The tensors are kept, so that none of their ids is given out twice.
    read: dict[int, tuple[Tensor, list[str]]] = {}
    runs = dict.fromkeys(linears, 0)

    def note(name: str, x: Tensor) -> None:
        read.setdefault(id(x), (x, []))[1].append(name)
        runs[name] += 1

    _forward(model, torch.tensor([list(input_ids)]), linears, note)
    for name, count in runs.items():
        if count != 1:
            raise ModelError(f"{name} is run {count} times in a forward pass, not once")
    return [InputSite(tuple(names), x.shape[-1]) for x, names in read.values()]


class InputCovariances:
    """Sums of ``x·xᵀ`` for each site and token class, empty at first.

    Products are fp32, over the tokens of one batch; sums are fp64. Merged in any order, parts of
    the rows give the sums of all rows up to the rounding of fp64.

    Args:
        sites: what to cover. The forward pass ends at the last of them.
    """

    def __init__(self, sites: Sequence[InputSite]) -> None:
        self.sites = {site.name: site for site in sites}
        self._sums: dict[tuple[str, TokenClass], Covariance] = {}

    def read(self, model: Any, rows: Sequence[ReadRow], pad_token_id: int) -> None:
        """Add one batch of rows.

        Raises:
            ProfileError: an input holds a NaN or an infinity; the layer is named.
            ModelError: the model has no such layers, or does not run one.
        """
        labels = [TokenisedRow(0, row.input_ids, row.classes()) for row in rows]
        batch = collate(labels, pad_token_id)  # -100 on padding
        # Right padding under causal attention: no token sees it, so there is no mask.
        classes = batch["labels"].flatten()
        chosen = {c: (classes == i).nonzero()[:, 0] for i, c in enumerate(TOKEN_CLASSES)}
        linears = decoder_linears(model)
        if unknown := self.sites.keys() - linears.keys():
            raise ModelError(f"the model has no linear layer named {min(unknown)}")
        waiting = dict.fromkeys(self.sites)

        def accumulate(name: str, x: Tensor) -> None:
            tokens = x.reshape(-1, x.shape[-1])  # (B·T, d_in)
            for token_class, index in chosen.items():
                X = tokens[index.to(x.device)].float()
                self.add(name, token_class, Covariance((X.T @ X).double(), len(index)))
            waiting.pop(name)
            if not waiting:
                raise _AllRead

        read = {name: linears[name] for name in self.sites}
        _forward(model, batch["input_ids"], read, accumulate)
        if waiting:
            raise ModelError(f"{next(iter(waiting))} took no part in the forward pass")

    def add(self, site: str, token_class: TokenClass, part: Covariance) -> None:
        """Add the sum over other tokens of the same site and class.

        Raises:
            ProfileError: it is not finite, or not of the site's shape.
        """
        d = self.sites[site].d_in
        if part.matrix.shape != (d, d):
            raise ProfileError(f"{site}: a covariance of shape {tuple(part.matrix.shape)}")
        if not torch.isfinite(part.matrix).all():
            raise ProfileError(
                f"{site}: what it reads on the prompts holds a NaN or an infinity; check the "
                "base model's weights"
            )
        before = self._sums.get((site, token_class))
        if before is None:
            self._sums[site, token_class] = part
        else:
            before.matrix.add_(part.matrix.to(before.matrix.device))
            total = Covariance(before.matrix, before.tokens + part.tokens)
            self._sums[site, token_class] = total

    def merge(self, other: InputCovariances) -> None:
        """Add what was read from other rows; ``other`` is left as it was."""
        for (site, token_class), part in other._sums.items():
            self.add(site, token_class, Covariance(part.matrix.clone(), part.tokens))

    def of_class(self, site: str, token_class: TokenClass) -> Covariance:
        """The sum over one class of tokens; zero where none was read."""
        d = self.sites[site].d_in
        zero = torch.zeros(d, d, dtype=torch.float64)
        return self._sums.get((site, token_class), Covariance(zero, 0))

    def total(self, site: str, positions: Positions) -> Covariance:
        """The sum over the classes that ``positions`` stand for: a new matrix."""
        first, *rest = (self.of_class(site, c) for c in CLASSES_AT[positions])
        matrix, tokens = first.matrix.clone(), first.tokens
        for part in rest:
            matrix += part.matrix.to(matrix.device)
            tokens += part.tokens
        return Covariance(matrix, tokens)

    def drain(self) -> Iterator[tuple[str, TokenClass, Covariance]]:
        """Every sum, given away one by one, in a fixed order; nothing is left."""
        for site in self.sites:
            for token_class in TOKEN_CLASSES:
                part = self.of_class(site, token_class)
                self._sums.pop((site, token_class), None)
                yield site, token_class, part


class _AllRead(Exception):
    """Every site was read: the rest of the forward pass is not needed."""


def _forward(model: Any, input_ids: Tensor, modules: Mapping[str, nn.Module], see: Any) -> None:
    """Run the decoder in evaluation mode, ``see(name, x)`` called before each of the modules."""

    def before(name: str) -> Any:
        return lambda _, args: see(name, args[0])

    hooks = [m.register_forward_pre_hook(before(name)) for name, m in modules.items()]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model.get_decoder()(input_ids=input_ids.to(model.device), use_cache=False)
    except _AllRead:
        pass
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()

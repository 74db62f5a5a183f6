"""From logits to the next token of each row, every row in its own way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.serving.engine import Sampling

#: In place of a token where a row's logits are not finite.
BROKEN = -1
#: A lower temperature is this one, which is as good as greedy: fp32 would round it to 0.
_COLDEST = 1e-6


def new_generator(sampling: Sampling, index: int) -> torch.Generator | None:
    """The random numbers of answer `index` of a request; None where none are needed."""
    if sampling.temperature == 0:
        return None
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed((sampling.seed + index) % 2**63)
    return generator


def choose(logits: Tensor, ways: Sequence[tuple[Sampling, torch.Generator | None]]) -> list[int]:
    """The next token of each row.

    Args:
        logits: (rows, vocabulary).
        ways: how each row is sampled, with its own random numbers.

    Returns:
        Token ids; `BROKEN` for a row with NaN, +inf or nothing finite: its highest logit would be a
        token like any other, and the answer nonsense that looks like one.
    """
    finite = logits.amax(-1).isfinite().tolist()
    chosen: list[int] = logits.argmax(-1).tolist()
    for row, (sampling, generator) in enumerate(ways):
        if not finite[row]:
            chosen[row] = BROKEN
        elif generator is not None:
            chosen[row] = _sample(logits[row], sampling, generator)
    return chosen


def _sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    # On the processor and in fp32 whatever the model's: a seed then means the same everywhere.
    logits = logits.float().cpu()
    # The highest is 0 then, whatever it is divided by: no temperature makes infinities of two.
    shares = torch.softmax((logits - logits.max()) / max(sampling.temperature, _COLDEST), -1)
    if sampling.top_p < 1:
        ordered, order = shares.sort(descending=True)
        before = ordered.cumsum(0) - ordered
        ordered[before >= sampling.top_p] = 0
        return int(order[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(shares, 1, generator=generator))

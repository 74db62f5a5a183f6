"""The gradient at the decoder's output, where a model is nearly sure of its labels."""

from __future__ import annotations

import torch

from safeft.label_head import LabelHead
from tests.tiny import tiny_model


def test_the_gradient_of_a_sure_label_is_not_rounded_away() -> None:
    model = tiny_model()
    head = LabelHead(model)
    weight = model.get_output_embeddings().weight.detach()
    # Hidden states far along the label's own weight: its probability is 1 but for some 1e-6.
    labels = torch.arange(40, 48)[None]  # (1, 8); position t is asked for label t + 1
    hidden = torch.zeros(1, 8, weight.shape[1])
    unit = weight / weight.norm(dim=1, keepdim=True) ** 2
    hidden[0, :7] = 24 * unit[labels[0, 1:]]
    probabilities = torch.softmax(hidden[0, :7].double() @ weight.double().T, dim=-1)
    wrong = 1 - probabilities[torch.arange(7), labels[0, 1:]]
    assert wrong.min() > 1e-8 and wrong.max() < 1e-4, wrong
    expected = probabilities.clone()
    expected[torch.arange(7), labels[0, 1:]] -= 1
    expected = expected @ weight.double() / 7
    found = head.gradient(hidden, labels)[0, :7].double()
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 1e-5

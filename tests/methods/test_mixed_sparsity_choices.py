"""Which units a run drops and grows: the least by their weights, and by gradient the best of those that were off."""

from __future__ import annotations

import math

import lightning.pytorch as L
import pytest
import torch

from tests.methods.mixed_sparsity import ELEMENTS, EVENTS, NEURONS_AND_HEADS, AnyFamily, entries_on, fit, method, whole
from tests.models import make_model

NAME = "gpt2-tied"


class Updates(L.Callback):
    """Notes what updates go by, and the masks before and after them. Stands left of the method."""

    def __init__(self, of):
        self.of, self.noted = of, {}

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.step = trainer.global_step
        self.before, self.weights = {name: mask.clone() for name, mask in self.of.masks.items()}, whole(pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, *_):
        # Those of the whole model, where there is a choice to make by them.
        self.gradients = {name: parameter.grad.clone() for name, parameter in pl_module.net.named_parameters()}

    def on_train_batch_end(self, *_):
        if self.step in EVENTS:
            after = {name: mask.clone() for name, mask in self.of.masks.items()}
            self.noted[self.step] = self.weights, self.gradients, self.before, after


def norms(tensors, space, num_units, side):
    def norm(unit):
        on = entries_on(NAME, tensors, {space: unit[None]}, [side])
        return sum(tensors[name][mask].double().square().sum() for name, mask in on.items()).sqrt()

    return torch.stack([norm(unit) for unit in torch.eye(num_units, dtype=torch.bool)])


def entries(tensors, space):
    # All matrices of a GPT-2 but its embeddings are stored inputs first.
    return (tensors[space].t() if ".h." in space else tensors[space]).flatten().abs().double()


@pytest.mark.parametrize("units", [NEURONS_AND_HEADS, ELEMENTS], ids=["neurons and heads", "elements"])
def test_the_least_are_dropped_and_the_most_promising_grown(tmp_path, units):
    size = {"heads": 16, "head_dim": 1, "ffn": 32, "blocks": 2, "vocab": 64}
    callback = method(**units, gradient_share=0.75)
    updates = Updates(callback)
    fit(tmp_path, [updates, callback], AnyFamily(net=make_model(NAME, dtype=torch.float32, **size)))
    has_dropped, has_grown = set(), set()
    for weights, gradients, before, after in updates.noted.values():
        for space, (old,) in before.items():
            (new,) = after[space]
            kept, dropped, grown, left = old & new, old & ~new, new & ~old, ~old & ~new
            num_by_gradient = math.floor(0.75 * grown.sum())
            if dropped.any():
                has_dropped.add(space)
                if units is ELEMENTS:
                    magnitude = entries(weights, space)
                else:
                    magnitude = norms(weights, space, len(old), "in") * norms(weights, space, len(old), "out")
                assert magnitude[kept].min() >= magnitude[dropped].max() * (1 - 1e-6)
            if num_by_gradient and left.any():
                has_grown.add(space)
                promise = entries(gradients, space) if units is ELEMENTS else norms(gradients, space, len(old), "out")
                # Of those that are drawn some may be better than some of these.
                least = promise[grown].sort(descending=True).values[num_by_gradient - 1]
                assert least >= promise[left].max() * (1 - 1e-6)
    assert has_dropped == has_grown == set(callback.masks)

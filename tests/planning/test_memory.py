"""What is said to be saved for the backward pass is what a real forward pass saves."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

from lit_accel import (
    Level,
    MixedSparsityTraining,
    MultiLevelTraining,
    Phase,
    ProgressiveLayerDropping,
    RandomLTD,
)
from lit_accel.anatomy import anatomy_of, build_resized
from lit_accel.planning import plan
from tests.models import make_model
from tests.planning.runs import Data, on_meta, trainer
from tests.training import TinyModule
from tests.vision import IMAGE_SIZE

# Key-value heads of LLaMA with grouped queries are 6.
SIZE = {"heads": 12, "head_dim": 8, "ffn": 256, "blocks": 4}


class Larger(TinyModule):
    """Wide enough that what is saved for itself alone, such as masks, is a small part."""

    def __init__(self, name="gpt2-tied"):
        super().__init__()
        self.net = make_model(name, vocab=64, **SIZE).train()


def really_saved(module, batch, precision):
    """Bytes of the tensors that autograd holds after a forward pass with values."""
    weights = {value.untyped_storage().data_ptr() for value in module.parameters()}
    held = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"),
    ):
        output = module.net(**batch) if isinstance(batch, dict) else module.net(batch)
    del output
    return sum(size for size, _ in held.values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["gpt2-tied", "llama-gqa", "bert-mlm"])
def test_text_models(tmp_path, name, precision):
    data = Data(batch_size=8, length=32)
    planned = plan(trainer(tmp_path, [], precision=precision), on_meta(Larger, name), data)
    batch = next(iter(data.train_dataloader()))
    saved = really_saved(Larger(name), {"input_ids": batch}, precision)
    assert planned.memory[0].activations == pytest.approx(saved, rel=0.1)
    num = sum(parameter.numel() for parameter in Larger(name).parameters())
    assert (planned.memory[0].weights, planned.memory[0].gradients) == (4 * num, 4 * num)
    assert planned.memory[0].optimizer == 8 * num


class OfImages(L.LightningModule):
    def __init__(self, name):
        super().__init__()
        self.net = make_model(name, dtype=torch.float32, **SIZE).train()

    def training_step(self, batch, batch_idx):
        return self.net(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ImageData(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.randn(64, 3, IMAGE_SIZE, IMAGE_SIZE), batch_size=16)


@pytest.mark.parametrize("name", ["vit", "deit-distilled", "swin"])
def test_image_models(tmp_path, name):
    planned = plan(trainer(tmp_path, []), on_meta(OfImages, name), ImageData())
    images = next(iter(ImageData().train_dataloader()))
    saved = really_saved(OfImages(name), images, "32-true")
    assert planned.memory[0].activations == pytest.approx(saved, rel=0.1)
    # Of SGD without momentum.
    assert planned.memory[0].optimizer == 0


def test_less_is_saved_where_less_takes_part(tmp_path):
    data = Data(batch_size=8, length=32)

    def activations(*callbacks):
        memory = plan(trainer(tmp_path, list(callbacks)), on_meta(Larger), data).memory
        return [phase.activations for phase in memory]

    (dense,) = activations()
    (tokens,) = activations(RandomLTD(start_tokens=0.25, growth=100))
    (layers,) = activations(ProgressiveLayerDropping(theta=0.1, gamma=1e9, direction="increasing"))
    units = activations(MixedSparsityTraining([(0, 0.0), (10, 0.5), (30, 0.0)], quantum=16, attention_units="dense"))
    # At the end of the run the two middle blocks see some more than half of the tokens, the others all of them.
    assert 0.5 < tokens / dense < 0.85
    # In the first step every block runs.
    assert layers == dense
    assert units[0] == units[2] == dense > units[1]


@pytest.mark.parametrize("merged", [1, 2])
def test_a_small_phase_needs_what_the_small_model_needs(tmp_path, merged):
    """Its weights are fewer, and its batches may be merged ones."""
    # Which does not say how long its sequences are.
    data = Data(batch_size=8, length=32)
    cycle = MultiLevelTraining([Level(merge_batches=merged)], [Phase(0, 4), Phase(1, 16), Phase(0)])
    first, small, last = plan(trainer(tmp_path, [cycle], accumulate_grad_batches=2), on_meta(Larger), data).memory
    module = Larger()
    anatomy = anatomy_of(module.net)
    sizes = [sum(parameter.numel() for parameter in module.parameters())]
    module.net = build_resized(module.net, anatomy, anatomy.reduced(2, 2)).train()
    sizes.append(sum(parameter.numel() for parameter in module.parameters()))
    for phase, num in zip((first, small, last), (*sizes, sizes[0]), strict=True):
        assert (phase.weights, phase.gradients, phase.optimizer) == (4 * num, 4 * num, 8 * num)
    assert first == last
    ids = torch.cat([next(iter(data.train_dataloader()))] * merged)
    assert small.activations == pytest.approx(really_saved(module, {"input_ids": ids}, "32-true"), rel=0.1)

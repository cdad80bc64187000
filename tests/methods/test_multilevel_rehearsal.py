"""What the first change of size would find wrong with the optimizers is found before training, which loses nothing."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel import Level, MultiLevelTraining, Phase
from tests.training import TinyModule, loader, make_trainer

CYCLE = [Phase(0, 2), Phase(1, 4), Phase(0)]


def fit(tmp_path, module, *, phases=CYCLE, **kwargs):
    callback = MultiLevelTraining(phases=phases)
    trainer = make_trainer(tmp_path, callbacks=[callback], **{"max_steps": 10, **kwargs})
    trainer.fit(module, loader())
    return trainer


class Layerwise(TinyModule):
    """Each block learns at a rate of its own, as is usual in fine-tuning."""

    def parts(self):
        blocks = list(self.net.transformer.h)
        return [[block] for block in blocks]

    def configure_optimizers(self):
        parts = [[p for block in part for p in block.parameters()] for part in self.parts()]
        inside = {id(parameter) for part in parts for parameter in part}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in inside]
        groups = [rest, *parts]
        return torch.optim.AdamW([{"params": part, "lr": 1e-3 * 0.8**i} for i, part in enumerate(groups)])


class Halves(Layerwise):
    """The same by halves of the depth, of which there are two at any depth."""

    def parts(self):
        blocks = list(self.net.transformer.h)
        middle = len(blocks) // 2
        return [blocks[:middle], blocks[middle:]]


class Bound(TinyModule):
    """What LightningCLI does by default: the old optimizer is returned for ever."""

    def configure_optimizers(self):
        if not hasattr(self, "_bound"):
            self._bound = torch.optim.SGD(self.parameters(), lr=0.1)
        return self._bound


@pytest.mark.parametrize(
    ("make", "message"),
    [(Layerwise, "by parts of the depth, in halves"), (Bound, "auto_configure_optimizers=False")],
    ids=["by block", "bound"],
)
def test_optimizers_that_could_not_go_on_are_refused_before_training(make, message, tmp_path):
    module = make()
    net, weights = module.net, {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, module)
    assert module.losses == []
    assert module.net is net
    for name, value in module.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_groups_by_parts_of_the_depth_go_on(tmp_path):
    module = Halves()
    trainer = fit(tmp_path, module)
    assert len(set(module.sizes)) == 2
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([1e-3, 8e-4, 6.4e-4])


def test_a_run_that_keeps_its_size_may_group_as_it_likes(tmp_path):
    module = Layerwise()
    fit(tmp_path, module, phases=[Phase(0)])
    assert len(module.losses) == 10


class Keeping(TinyModule):
    """Keeps what it has configured, for its own use."""

    def configure_optimizers(self):
        self.calls = getattr(self, "calls", 0) + 1
        self.mine = super().configure_optimizers()
        return self.mine


def test_the_rehearsal_leaves_nothing_on_the_module(tmp_path):
    seen = []

    class Watching(Keeping):
        def on_train_batch_start(self, batch, batch_idx):
            seen.append((self.calls, self.mine is self.trainer.optimizers[0]))

    fit(tmp_path, Watching())
    # Once at the start, and once at either change of size.
    assert seen == [(1, True)] * 2 + [(2, True)] * 4 + [(3, True)] * 4


def test_it_draws_nothing(tmp_path):
    states = []

    class Watching(TinyModule):
        def on_train_start(self):
            states.append(torch.get_rng_state())

    for phases in (CYCLE, [Phase(0)]):
        torch.manual_seed(3)
        fit(tmp_path, Watching(), phases=phases)
    assert torch.equal(*states)


def test_growth_is_rehearsed_too(tmp_path):
    module = Layerwise()
    trainer = make_trainer(
        tmp_path, callbacks=[MultiLevelTraining([Level(width=2, depth=2)], start_level=1)], max_steps=4
    )
    with pytest.raises(MisconfigurationException, match="parameter groups"):
        trainer.fit(module, loader())
    assert module.losses == []

"""What the first change of size would find wrong with a module is found before training, which loses nothing."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
import transformers
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)
from torchmetrics.classification import MulticlassAccuracy

from lit_accel import Level, MultiLevelTraining, Phase
from lit_accel.planning import plan
from tests.training import SIZE, TinyModule, loader, make_trainer

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


class Warmup(LRScheduler):
    """A warm-up with another scheduler after it, as in widely copied code: it has the default state_dict."""

    def __init__(self, optimizer, after):
        self.after = after
        super().__init__(optimizer)

    def get_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch=None):
        if self._step_count < 2:
            return super().step()
        self._step_count += 1
        return self.after.step()


class WarmupInList(Warmup):
    """The same, one level deeper."""

    def __init__(self, optimizer, after):
        self.parts = ({"part": after},)
        super().__init__(optimizer, after)
        del self.after


class WithMethod(LRScheduler):
    """Keeps a method of its own, which stays bound to it."""

    def __init__(self, optimizer, after):
        self.formula = self.get_lr
        super().__init__(optimizer)

    def get_lr(self):
        return [0.1 / (1 + self.last_epoch) for _ in self.optimizer.param_groups]


class OwnState(Warmup):
    """A warm-up whose state is made of numbers."""

    def state_dict(self):
        inner = {"after": self.after.state_dict()}
        return {key: value for key, value in vars(self).items() if key not in ("optimizer", "after")} | inner

    def load_state_dict(self, state_dict):
        state = dict(state_dict)
        self.after.load_state_dict(state.pop("after"))
        vars(self).update(state)


class Scheduled(TinyModule):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        after = CosineAnnealingLR(optimizer, 20)
        return [optimizer], [{"scheduler": self.kind(optimizer, after), "interval": "step"}]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Warmup, r"The state of Warmup holds a whole CosineAnnealingLR, under 'after'.*\.SequentialLR"),
        (WarmupInList, "The state of WarmupInList holds a whole CosineAnnealingLR, under 'parts'"),
        (WithMethod, "The state of WithMethod holds a whole WithMethod, under 'formula'"),
    ],
)
def test_schedulers_that_would_keep_the_former_optimizer_are_refused_before_training(kind, message, tmp_path):
    module = Scheduled(kind)
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, module)
    assert module.losses == []


@pytest.mark.parametrize(
    "kind",
    [
        OwnState,
        lambda optimizer, after: SequentialLR(optimizer, [LinearLR(optimizer), after], [2]),
        lambda optimizer, after: ChainedScheduler([LinearLR(optimizer), after], optimizer),
        lambda optimizer, after: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        lambda optimizer, after: OneCycleLR(optimizer, 0.1, total_steps=20),
        lambda optimizer, after: CyclicLR(optimizer, 0.01, 0.1),
    ],
    ids=["own state", "sequential", "chained", "lambda", "one cycle", "cyclic"],
)
def test_schedulers_with_a_state_of_their_own_go_on(kind, tmp_path):
    rates = []
    for phases in (CYCLE, [Phase(0)]):
        module = Scheduled(kind)
        fit(tmp_path, module, phases=phases)
        rates.append(module.rates)
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 5


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


class OwnHead(L.LightningModule):
    """A model without a head and one of the user's own, as most modules for fine-tuning have it."""

    def __init__(self, is_wide: bool = True) -> None:
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=SIZE["vocab"],
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=16,
            hidden_dropout_prob=0.3,
        )
        self.bert = transformers.BertModel(config, add_pooling_layer=False).train()
        # Of 32 features each: those of the hidden states, or of something else that has as many.
        self.head = torch.nn.Linear(32, 3)
        self.is_wide = is_wide
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.losses, self.logged = [], []

    def training_step(self, batch, batch_idx):
        hidden = self.bert(input_ids=batch).last_hidden_state[:, 0]
        features = hidden if self.is_wide else hidden.mean(-1, keepdim=True).expand(-1, 32)
        logits, labels = self.head(features), batch[:, 0] % 3
        self.accuracy(logits, labels)
        self.log("train/accuracy", self.accuracy, on_epoch=True)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_a_head_of_the_users_own_is_refused_with_the_first_batch(tmp_path):
    module = OwnHead()
    net, weights = module.bert, {name: value.clone() for name, value in module.state_dict().items()}
    with (
        pytest.warns(UserWarning, match="head.weight .* lies outside of bert"),
        pytest.raises(MisconfigurationException, match="AutoModelForSequenceClassification, or width 1 in every level"),
    ):
        fit(tmp_path, module)
    assert module.trainer.global_step == 0
    assert module.bert is net
    for name, value in module.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_another_depth_suits_it(tmp_path):
    module = OwnHead()
    callback = MultiLevelTraining([Level(width=1, depth=2)], CYCLE)
    make_trainer(tmp_path, callbacks=[callback], max_steps=10).fit(module, loader())
    assert len(module.losses) == 10


def test_what_has_as_many_features_by_chance_is_trained_as_if_nobody_had_looked(tmp_path, monkeypatch):
    trained = []
    for looks in (True, False):
        torch.manual_seed(5)
        module = OwnHead(is_wide=False)
        if not looks:
            monkeypatch.setattr(MultiLevelTraining, "_rehearse_step", lambda *_: None)
        trainer = fit(tmp_path, module, max_steps=10)
        trained.append((module, module.losses[-10:], trainer.callback_metrics["train/accuracy_epoch"]))
        # The step has its own list, which sees every call.
        assert len(module.losses) == 10 + looks
    (first, *told), (second, *others) = trained
    assert told == others
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_step_that_fails_at_any_size_says_so_itself(tmp_path):
    class Broken(OwnHead):
        def training_step(self, batch, batch_idx):
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        fit(tmp_path, Broken())


def test_a_plan_refuses_what_a_run_would(tmp_path):
    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loader()

    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=CYCLE)], max_steps=10, max_epochs=-1)
    with torch.device("meta"):
        module = Layerwise()
    with pytest.raises(MisconfigurationException, match="number of groups"):
        plan(trainer, module, Data())

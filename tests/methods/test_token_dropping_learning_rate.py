"""The LayerToken learning rate: its closed form, and what it does in runs of every kind."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lit_accel import LayerTokenLR, Level, MultiLevelTraining, Phase, RandomLTD
from lit_accel.cli import LitAccelCLI
from lit_accel.methods.token_dropping import TokenSchedule
from lit_accel.tasks import CausalLM, WarmupDecay
from tests.training import TinyModule, Tokens, loader, make_trainer

DECAYS = ["linear", "cosine", "constant"]
WARMUPS = [0, 3, 0.25]
PEAK, STEPS, LENGTH = 0.01, 16, 12
# Of four blocks two drop, of 12 tokens 4, 6, 8 and 10 are kept; the whole sequence from step 12 on.
LTD = {"start_tokens": 0.25, "growth": 12, "quantum": 2, "num_tokens": LENGTH}


class Rated(TinyModule):
    """Notes the rate that each optimizer step uses, after all callbacks have had their say."""

    def __init__(self, make=LayerTokenLR, **schedule):
        super().__init__(lr=PEAK)
        self.make, self.schedule = make, schedule
        self.used: list[float] = []

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), lr=self.lr)
        scheduler = self.make(optimizer, **self.schedule)
        if self.make is WarmupDecay:
            scheduler.bind(STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer):
        self.used.append(optimizer.param_groups[0]["lr"])

    @property
    def made(self):
        return self.trainer.lr_scheduler_configs[0].scheduler


def fit(folder, module, callbacks=(), *, data=None, resume=None, **options):
    options = {"strategy": "auto", "max_steps": STEPS, "max_epochs": -1, **options}
    trainer = make_trainer(folder, callbacks=callbacks, **options)
    trainer.fit(module, loader() if data is None else data, ckpt_path=resume)
    return module


def expected(warmup=0, decay="linear", *, share=Fraction(1, 2), ltd=LTD):
    """The rates of a run of which a share of the blocks drops tokens, in fractions until the decay's curve."""
    schedule = TokenSchedule(ltd["start_tokens"], ltd["growth"], ltd["quantum"])
    steps = [1 - share + share * Fraction(schedule.kept_tokens(step, LENGTH), LENGTH) for step in range(STEPS)]
    reached = [*itertools.accumulate(steps, initial=Fraction(0))]
    warmup = round(warmup * reached[-1]) if isinstance(warmup, float) else warmup

    def factor(before, after):
        if before < warmup:
            return min(1, after / warmup)
        left = (reached[-1] - before) / (reached[-1] - warmup)
        return {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1}[decay]

    return [PEAK * float(factor(*pair)) for pair in itertools.pairwise(reached)]


# Dense runs


def rates(scheduler, num_steps):
    series = []
    for _ in range(num_steps):
        series.append(scheduler.get_last_lr())
        scheduler.optimizer.step()
        scheduler.step()
    return series


def sgd():
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.1, 0.03)])


@given(st.integers(1, 60), st.integers(0, 80) | st.floats(0, 1), st.sampled_from(DECAYS))
def test_where_every_step_counts_the_same_it_is_the_schedule_of_steps(num_steps, warmup, decay):
    following, bound = (LayerTokenLR(sgd(), warmup, decay) for _ in range(2))
    following.follow([float(step) for step in range(num_steps + 1)])
    bound.bind(num_steps)
    plain = rates(WarmupDecay(sgd(), warmup, decay, num_total_steps=num_steps), num_steps)
    assert rates(following, num_steps) == rates(bound, num_steps) == plain


def test_after_the_end_it_is_the_schedule_of_steps_also_if_the_end_was_in_the_warmup():
    following, plain = LayerTokenLR(sgd(), 9), WarmupDecay(sgd(), 9, num_total_steps=4)
    following.follow([0.0, 1.0, 2.0, 3.0, 4.0])
    assert rates(following, 6) == rates(plain, 6)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("warmup", WARMUPS)
def test_a_dense_run_has_the_rates_of_the_schedule_of_steps(tmp_path, decay, warmup):
    schedule = {"num_warmup_steps": warmup, "decay": decay}
    plain = fit(tmp_path, Rated(WarmupDecay, **schedule))
    callback = RandomLTD(start_tokens=1.0)
    neutral = fit(tmp_path, Rated(**schedule), [callback])
    alone = fit(tmp_path, Rated(**schedule, num_total_steps=STEPS))
    assert len(plain.used) == STEPS
    assert neutral.used == alone.used == plain.used
    assert neutral.losses == alone.losses == plain.losses


# Dropping runs


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("warmup", WARMUPS)
def test_the_rates_of_a_run_are_the_closed_form(tmp_path, decay, warmup):
    module = fit(tmp_path, Rated(num_warmup_steps=warmup, decay=decay), [RandomLTD(**LTD)])
    assert module.used == pytest.approx(expected(warmup, decay), rel=1e-12)
    assert module.used[0] > 0
    if decay != "constant":
        assert module.made.get_last_lr() == [0.0]
        assert module.used[-1] > 0


def test_warmup_takes_more_steps_and_the_decay_comes_later_while_tokens_are_dropped(tmp_path):
    dense = fit(tmp_path, Rated(WarmupDecay, num_warmup_steps=4))
    dropping = fit(tmp_path, Rated(num_warmup_steps=4), [RandomLTD(**LTD)])
    assert dense.used.index(PEAK) == 3
    assert dropping.used.index(PEAK) == 5
    assert all(mine < theirs for mine, theirs in zip(dropping.used[:5], dense.used[:5], strict=True))
    assert all(mine > theirs for mine, theirs in zip(dropping.used[5:], dense.used[5:], strict=True))


def test_groups_keep_their_proportion_and_tensors_their_identity():
    held = torch.tensor(0.2)
    scheduler = LayerTokenLR(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=held))
    group = scheduler.optimizer.param_groups[0]
    assert group["lr"].item() == 0
    scheduler.follow([0.0, 0.5, 1.0])
    assert group["lr"].item() == pytest.approx(0.2)
    two = LayerTokenLR(sgd(), 1)
    two.follow([0.0, 0.5, 1.25])
    assert two.get_last_lr() == [0.05, 0.015]


def test_what_was_planned_is_what_was_counted(tmp_path):
    class Looks(L.Callback):
        reached = (0.0,)

        def on_train_batch_end(self, trainer, *_):
            callback._collect(trainer)
            self.reached += (callback.total.layer_tokens / (8 * LENGTH * 4),)

    callback, looks = RandomLTD(**LTD), Looks()
    module = fit(tmp_path, Rated(), [callback, looks])
    assert list(looks.reached) == module.made.progress
    assert callback.total.effective_tokens == pytest.approx(module.made.progress[-1] * 8 * LENGTH)


# Resume


@pytest.mark.parametrize("decay", DECAYS)
def test_a_resumed_run_has_the_rates_of_the_uninterrupted_one(tmp_path, decay):
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    schedule = {"num_warmup_steps": 4, "decay": decay}
    whole = fit(tmp_path, Rated(**schedule), [RandomLTD(**LTD), Saves()])
    for step in (4, 15):
        resumed = fit(tmp_path, Rated(**schedule), [RandomLTD(**LTD)], resume=tmp_path / f"{step}.ckpt")
        assert resumed.used == whole.used[step:]
        assert resumed.made.get_last_lr() == whole.made.get_last_lr()


def test_the_state_is_the_position_alone(tmp_path):
    module = fit(tmp_path, Rated(), [RandomLTD(**LTD)])
    state = module.made.state_dict()
    assert not {"progress", "num_warmup_steps", "decay", "num_total_steps"} & state.keys()
    assert state["last_epoch"] == STEPS
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state


# Resizing


class Sizes(L.Callback):
    def __init__(self):
        self.blocks = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.blocks.append(len(pl_module.net.transformer.h))


PHASES = [Phase(0, 4), Phase(1, 6), Phase(0)]


@pytest.mark.parametrize("order", ["left", "right"])
def test_the_rate_is_kept_through_every_transition(tmp_path, order):
    ltd, sizes = RandomLTD(**LTD, pinned=[0]), Sizes()
    levels = MultiLevelTraining([Level()], PHASES)
    callbacks = [ltd, levels, sizes] if order == "left" else [levels, ltd, sizes]
    module = fit(tmp_path, Rated(num_warmup_steps=6), callbacks, strategy="resizable")
    assert sizes.blocks == [4] * 4 + [2] * 6 + [4] * 6
    # Planned for the full model, of which three of four blocks drop.
    assert module.used == pytest.approx(expected(6, share=Fraction(3, 4)), rel=1e-12)


@pytest.mark.parametrize("way", ["checkpoint", "same trainer"])
def test_the_rate_is_kept_where_a_run_goes_on_in_the_small_phase(tmp_path, way):
    def callbacks():
        return [MultiLevelTraining([Level()], PHASES), RandomLTD(**LTD, pinned=[0])]

    def going_on():
        return make_trainer(tmp_path, callbacks=callbacks(), max_steps=STEPS, max_epochs=-1)

    whole = fit(tmp_path, Rated(num_warmup_steps=6), callbacks(), strategy="resizable")
    trainer, module = going_on(), Rated(num_warmup_steps=6)
    steps = trainer.fit_loop.epoch_loop
    # Stopped in mid-run: its length is still what it was planned for.
    module.on_train_batch_end = lambda *_: setattr(steps, "max_steps", 6 if trainer.global_step == 6 else STEPS)
    trainer.fit(module, loader())
    assert (trainer.global_step, len(module.net.transformer.h)) == (6, 2)
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    if way == "checkpoint":
        trainer, module = going_on(), Rated(num_warmup_steps=6)
    else:
        steps.max_steps = STEPS
        module.used.clear()
    trainer.fit(module, loader(), ckpt_path=tmp_path / "small.ckpt")
    assert module.used == whole.used[6:]


@pytest.mark.parametrize("order", ["left", "right"])
def test_the_factors_of_multi_level_training_multiply_it(tmp_path, order):
    ltd, levels = RandomLTD(**LTD, pinned=[0]), MultiLevelTraining([Level()], [Phase(0, 4), Phase(1, 6, 3.0), Phase(0)])
    module = fit(tmp_path, Rated(), [ltd, levels] if order == "left" else [levels, ltd], strategy="resizable")
    factors = [1.0] * 4 + [3.0] * 6 + [1.0] * 6
    rates = expected(share=Fraction(3, 4))
    assert module.used == pytest.approx([f * rate for f, rate in zip(factors, rates, strict=True)], rel=1e-12)


# Tasks and the command line


class RandomTokens(L.LightningDataModule):
    def __init__(self, vocab_size: int = 37, block_size: int = LENGTH):
        super().__init__()
        self.vocab_size, self.block_size = vocab_size, block_size

    def train_dataloader(self):
        tokens = torch.randint(self.vocab_size, (8, self.block_size))
        return DataLoader([{"input_ids": text, "labels": text} for text in tokens], batch_size=2)


class Rates(L.Callback):
    def __init__(self):
        self.used = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.used.append(optimizer.param_groups[0]["lr"])


OVERRIDES = {"n_layer": 4, "n_embd": 8, "n_head": 2, "n_positions": LENGTH, "vocab_size": 37}


def test_in_a_task(tmp_path):
    task = CausalLM(
        "gpt2",
        overrides=OVERRIDES,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=PEAK),
        lr_scheduler=lambda optimizer: LayerTokenLR(optimizer, num_warmup_steps=3, decay="cosine"),
    )
    rates = Rates()
    ltd = RandomLTD(start_tokens=0.25, growth=12, quantum=2)
    fit(tmp_path, task, [ltd, rates], data=RandomTokens())
    assert rates.used == pytest.approx(expected(3, "cosine"), rel=1e-12)


def test_from_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lit-accel"])
    config = {
        "model": {
            "class_path": "lit_accel.tasks.CausalLM",
            "init_args": {
                "model": "gpt2",
                "overrides": {key: value for key, value in OVERRIDES.items() if key != "vocab_size"},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": PEAK}},
                "lr_scheduler": {
                    "class_path": "lit_accel.LayerTokenLR",
                    "init_args": {"num_warmup_steps": 0.25, "decay": "linear"},
                },
            },
        },
        "data": {"class_path": f"{__name__}.RandomTokens"},
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_steps": STEPS,
            "max_epochs": -1,
            "callbacks": [
                {
                    "class_path": "lit_accel.RandomLTD",
                    "init_args": {"start_tokens": 0.25, "growth": 0.75, "quantum": 2},
                },
                {"class_path": f"{__name__}.Rates"},
            ],
        },
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    cli = LitAccelCLI(["fit", "--config", "run.yaml"])
    (rates,) = [callback for callback in cli.trainer.callbacks if hasattr(callback, "used")]
    assert rates.used == pytest.approx(expected(0.25), rel=1e-12)


# What must be known


def test_sequences_of_unknown_length_are_refused_before_training(tmp_path):
    module = Rated()
    ltd = {key: value for key, value in LTD.items() if key != "num_tokens"}
    with pytest.raises(MisconfigurationException, match=r"LayerTokenLR counts the tokens.*Give RandomLTD num_tokens"):
        fit(tmp_path, module, [RandomLTD(**ltd)])
    assert module.losses == []


def test_they_need_not_be_known_where_nothing_is_dropped_or_nothing_depends_on_it(tmp_path):
    ltd = {key: value for key, value in LTD.items() if key != "num_tokens"}
    assert len(fit(tmp_path, Rated(), [RandomLTD(**{**ltd, "start_tokens": 1.0})], max_steps=2).used) == 2
    assert len(fit(tmp_path, Rated(WarmupDecay), [RandomLTD(**ltd)], max_steps=2).used) == 2


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Tokens())


@pytest.mark.parametrize("start", [0.25, 1.0])
def test_a_run_of_unknown_length_is_refused_before_training(tmp_path, start):
    module = Rated()
    with pytest.raises(MisconfigurationException, match=r"LayerTokenLR must know how long the run is.*max_steps"):
        fit(
            tmp_path,
            module,
            [RandomLTD(**{**LTD, "start_tokens": start})],
            data=DataLoader(Stream(), batch_size=8),
            max_steps=-1,
            max_epochs=1,
        )
    assert module.losses == []


def test_alone_and_without_a_length_it_says_who_lacks_it(tmp_path):
    with pytest.raises(RuntimeError, match=r"LayerTokenLR does not know the length of the run.*num_total_steps"):
        fit(tmp_path, Rated())


@pytest.mark.parametrize(
    ("stepped", "said"), [({"interval": "epoch"}, "every 1 epoch"), ({"frequency": 2}, "every 2 step")]
)
def test_a_scheduler_that_is_not_stepped_with_the_optimizer_is_refused_before_training(tmp_path, stepped, said):
    module = Rated()
    made = module.configure_optimizers()
    made["lr_scheduler"].update(stepped)
    module.configure_optimizers = lambda: made
    with pytest.raises(MisconfigurationException, match=rf"LayerTokenLR goes by optimizer steps.*{said}"):
        fit(tmp_path, module, [RandomLTD(**LTD)])
    assert module.losses == []


def test_beside_the_callback_a_length_that_was_given_is_ignored_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match=r"num_total_steps=8, which is ignored beside RandomLTD: the run has 16"):
        given = fit(tmp_path, Rated(num_total_steps=8), [RandomLTD(**LTD)])
    assert given.used == fit(tmp_path, Rated(), [RandomLTD(**LTD)]).used


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_warmup_steps": 1.5}, "share"), ({"num_warmup_steps": -1}, "-1"), ({"decay": "exp"}, "decay")],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        LayerTokenLR(sgd(), **arguments)

"""What cannot work is refused in setup, with a message that says what to do."""

from __future__ import annotations

import warnings

import lightning.pytorch as L
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import GPT2LMHeadModel

from lit_accel import Level, MultiLevelTraining, Phase
from lit_accel.anatomy import AnatomyError
from lit_accel.strategies import ResizableDDPStrategy
from tests.training import TinyModule, loader, make_trainer

# Known length without a data loader, for tests that call setup alone.
ENDLESS = {"max_steps": 100, "max_epochs": -1}


def fit(tmp_path, callback, *others, module=None, **kwargs):
    module = module or TinyModule()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    try:
        trainer = make_trainer(tmp_path, callbacks=[callback, *others], **{"max_steps": 10, **kwargs})
        trainer.fit(module, loader())
    finally:
        # Nothing is lost: the module is what it was.
        for key, value in before.items():
            assert torch.equal(module.state_dict()[key], value)
        assert module.losses == []


@pytest.mark.parametrize(("strategy", "instead"), [("auto", "resizable"), ("ddp", "resizable_ddp")])
def test_a_stock_strategy(tmp_path, strategy, instead):
    with pytest.raises(MisconfigurationException, match=f'strategy="{instead}"'):
        fit(tmp_path, MultiLevelTraining(), strategy=strategy)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "make",
    [
        EMAWeightAveraging,
        lambda: StochasticWeightAveraging(swa_lrs=1e-3),
        lambda: ModelPruning("l1_unstructured"),
        BackboneFinetuning,
    ],
    ids=["ema", "swa", "pruning", "finetuning"],
)
def test_callbacks_that_hold_on_to_parameters(tmp_path, make):
    other = make()
    with pytest.raises(MisconfigurationException, match=type(other).__name__):
        fit(tmp_path, MultiLevelTraining(), other)


def test_early_stopping_is_warned_about(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(), EarlyStopping("val/loss")], **ENDLESS)
    with pytest.warns(UserWarning, match="EarlyStopping"):
        trainer.callbacks[0].setup(trainer_connected(trainer), trainer.lightning_module, "fit")


def trainer_connected(trainer: L.Trainer) -> L.Trainer:
    trainer.strategy.connect(TinyModule())
    return trainer


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_spawned_processes_with_an_unclosed_cycle(tmp_path, start_method):
    callback = MultiLevelTraining(phases=[Phase(0, 3), Phase(1)])
    trainer = make_trainer(
        tmp_path, callbacks=[callback], **ENDLESS, strategy=ResizableDDPStrategy(start_method=start_method)
    )
    with pytest.raises(MisconfigurationException, match="End with a phase"):
        callback.setup(trainer_connected(trainer), trainer.lightning_module, "fit")


def test_an_unclosed_cycle_is_warned_about(tmp_path):
    callback = MultiLevelTraining(phases=[Phase(0, 3), Phase(1)])
    trainer = make_trainer(tmp_path, callbacks=[callback], **ENDLESS)
    with pytest.warns(UserWarning, match="end with a smaller model"):
        callback.setup(trainer_connected(trainer), trainer.lightning_module, "fit")


def test_and_not_once_more_as_if_something_had_stopped_it(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=[Phase(0, 3), Phase(1)])], max_steps=6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(TinyModule(), loader())
    said = [str(each.message) for each in caught]
    assert sum("smaller model" in each for each in said) == 1
    assert not any("stopped it" in each for each in said)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([Phase(0, 3), Phase(1, 8), Phase(0)], "longer than the run"),
        ([Phase(0, 3), Phase(1, 7), Phase(0)], "no optimizer step"),
        ([Phase(0, 1), Phase(1, 1), Phase(0, 1)], "shorter than the run"),
        ([Phase(0, 3), Phase(2, 3), Phase(0)], "no such level"),
        ([Phase(0, 3), Phase(1), Phase(0)], "only the last phase"),
        ([Phase(0, 1.5), Phase(0)], "between 0 and 1"),
        ([Phase(0, -2), Phase(0)], "no optimizer step"),
        ([Phase(0, 3, lr_scale=0.0), Phase(0)], "must be positive"),
        ([], "phases is empty"),
    ],
)
def test_phases_that_do_not_fit(tmp_path, phases, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, MultiLevelTraining(phases=phases))


def test_a_run_without_end(tmp_path):
    with pytest.raises(MisconfigurationException, match="how long the run is"):
        fit(tmp_path, MultiLevelTraining(), max_steps=-1, max_epochs=-1)


@pytest.mark.parametrize(("level", "what"), [(Level(width=3, depth=1), "width"), (Level(width=1, depth=3), "depth")])
def test_factors_that_do_not_divide(tmp_path, level, what):
    with pytest.raises(AnatomyError, match=f"{what}.* cannot be divided by 3"):
        fit(tmp_path, MultiLevelTraining([level]))


def test_groups_of_query_heads_that_do_not_divide(tmp_path):
    with pytest.raises(AnatomyError, match="kv_heads is 2, queries_per_kv is 2"):
        fit(tmp_path, MultiLevelTraining([Level(width=8)]), module=TinyModule("llama-gqa"))


def test_a_model_without_anatomy(tmp_path):
    class Module(TinyModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(2, 2)

    with pytest.raises(AnatomyError, match=r"(?s)net \(Linear\).*gpt2: .*register_anatomy"):
        fit(tmp_path, MultiLevelTraining(), module=Module())


def test_two_transformers(tmp_path):
    module = TinyModule()
    module.teacher = TinyModule().net
    with pytest.raises(AnatomyError, match=r"2 transformers: net .*teacher"):
        fit(tmp_path, MultiLevelTraining(), module=module)


def test_blocks_that_are_frozen_in_part(tmp_path):
    module = TinyModule()
    module.net.transformer.h[0].requires_grad_(False)
    with pytest.raises(AnatomyError, match="frozen in part"):
        fit(tmp_path, MultiLevelTraining(), module=module)


def test_an_optimizer_whose_state_cannot_be_carried(tmp_path):
    module = TinyModule(optimizer=torch.optim.Adagrad)
    with pytest.raises(MisconfigurationException, match="Adagrad"):
        fit(tmp_path, MultiLevelTraining(optimizer_state="project"), module=module)


def test_a_scheduler_beside_the_papers_schedule(tmp_path):
    with pytest.raises(MisconfigurationException, match="LambdaLR"):
        fit(tmp_path, MultiLevelTraining(preset="paper"), module=TinyModule(scheduler="linear"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "best"}, "'correction', 'paper', 'exact'"),
        ({"alpha": 0.5, "coarse": 1.0}, "either it alone"),
        ({"alpha": 2.0}, "between 0 and 1"),
        ({"levels": []}, "at least one smaller level"),
        ({"levels": [Level(1, 1)]}, "no smaller than"),
        ({"levels": [(2, 2)]}, "is no Level"),
        ({"num_rewarm_steps": 0}, "at least 1"),
        ({"learning_rate": "warm"}, "'continue', 'rewarm', 'paper'"),
        ({"optimizer_state": "keep"}, "'reset', 'project', 'second_moment'"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiLevelTraining(**arguments)


def test_a_rehearsal_looks_at_the_phases_too(tmp_path):
    with pytest.raises(ValueError, match="no such level"):
        fit(tmp_path, MultiLevelTraining(phases=[Phase(0, 3), Phase(7)]), fast_dev_run=3)


def test_a_model_wrapped_by_torch_compile(tmp_path):
    module = TinyModule()
    module.net = torch.compile(module.net, backend="eager")
    with pytest.raises(AnatomyError, match="compile_blocks"):
        fit(tmp_path, MultiLevelTraining(), module=module)


def test_a_head_that_is_tied_across_the_border(tmp_path):
    module = TinyModule("gpt2-base")
    module.head = torch.nn.Linear(16, 64, bias=False)
    module.head.weight = module.net.wte.weight
    with pytest.raises(MisconfigurationException, match=r"head.weight and net.wte.weight are one"):
        fit(tmp_path, MultiLevelTraining(), module=module)


def test_a_head_of_its_own_is_warned_about(tmp_path):
    module = TinyModule("gpt2-base")
    module.head = torch.nn.Linear(16, 5)
    callback = MultiLevelTraining()
    trainer = make_trainer(tmp_path, callbacks=[callback], **ENDLESS)
    trainer.strategy.connect(module)
    with pytest.warns(UserWarning, match="head.weight .* lies outside of net"):
        callback.setup(trainer, module, "fit")


def test_a_compilation_that_would_be_lost_is_warned_about(tmp_path):
    module = TinyModule()
    module.net.transformer.compile(backend="eager")
    callback = MultiLevelTraining()
    trainer = make_trainer(tmp_path, callbacks=[callback], **ENDLESS)
    trainer.strategy.connect(module)
    with pytest.warns(UserWarning, match="compile_blocks"):
        callback.setup(trainer, module, "fit")


def test_a_subclass_that_a_config_alone_does_not_build(tmp_path):
    class Mine(transformers.GPT2LMHeadModel):
        def __init__(self, config, extra):
            super().__init__(config)

    module = TinyModule()
    module.net = Mine(module.net.config, 1)
    with pytest.raises(AnatomyError, match="register_anatomy"):
        fit(tmp_path, MultiLevelTraining(), module=module)


def test_parameters_that_nobody_optimizes(tmp_path):
    class Forgetful(TinyModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.transformer.h.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match="requires_grad=False"):
        fit(tmp_path, MultiLevelTraining(), module=Forgetful())


def test_learning_rates_of_phases_need_automatic_optimization(tmp_path):
    module = TinyModule()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="automatic optimization"):
        fit(tmp_path, MultiLevelTraining(learning_rate="rewarm"), module=module)


class Manual(TinyModule):
    """Steps itself, after every second batch: half as many steps as an epoch has batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("length", [{"max_steps": -1}, {"max_steps": 10}])
def test_manual_steps_are_not_counted_in_epochs(tmp_path, length):
    with pytest.raises(MisconfigurationException, match=r"manual optimization .*max_steps and max_epochs=-1"):
        fit(tmp_path, MultiLevelTraining(), module=Manual(), max_epochs=1, **length)


def test_an_ignored_ramp_is_warned_about():
    with pytest.warns(UserWarning, match="num_rewarm_steps is ignored.* learning_rate is 'continue'"):
        MultiLevelTraining(num_rewarm_steps=5)


def test_several_machines():
    with pytest.raises(MisconfigurationException, match="num_nodes=2"):
        L.Trainer(strategy="resizable", accelerator="cpu", devices=1, num_nodes=2)


def test_communication_hooks_with_a_state():
    with pytest.raises(MisconfigurationException, match="ddp_comm_state"):
        ResizableDDPStrategy(ddp_comm_state=object())


class ScaledGPT2(GPT2LMHeadModel):
    """With an argument that its configuration does not know."""

    def __init__(self, config, logit_scale=1.0):
        super().__init__(config)
        self.logit_scale = logit_scale


def scaled(**given):
    module = TinyModule()
    module.net = ScaledGPT2(module.net.config, **given)
    return module


def hooked():
    module = TinyModule()
    module.net.transformer.h[0].register_forward_hook(lambda *_: None)
    return module


def warnings_of(module, tmp_path, recwarn):
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining()], **ENDLESS)
    trainer.strategy.connect(module)
    trainer.callbacks[0].setup(trainer, module, "fit")
    return [str(each.message) for each in recwarn if "built anew" in str(each.message)]


@pytest.mark.parametrize(
    ("make", "what"),
    [(lambda: scaled(logit_scale=0.5), "logit_scale=0.5 of the model"), (hooked, "forward hooks of transformer.h.0")],
    ids=["argument", "hook"],
)
def test_what_a_model_built_anew_would_lose_is_named(make, what, tmp_path, recwarn):
    (message,) = warnings_of(make(), tmp_path, recwarn)
    assert what in message


@pytest.mark.parametrize("make", [TinyModule, scaled], ids=["plain", "argument as by default"])
def test_a_model_that_loses_nothing_is_not_warned_of(make, tmp_path, recwarn):
    assert warnings_of(make(), tmp_path, recwarn) == []


def test_the_best_of_several_sizes_is_warned_of(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/loss", save_last=True)
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(), checkpoint], enable_checkpointing=True, **ENDLESS)
    with pytest.warns(
        UserWarning, match=r"ModelCheckpoint monitors val/loss .* save_last too writes the last best one"
    ):
        trainer.callbacks[0].setup(trainer_connected(trainer), trainer.lightning_module, "fit")


@pytest.mark.parametrize(
    ("level", "frozen", "preset", "is_warned"),
    [
        (Level(2, 2), "wte", "exact", True),
        (Level(1, 2), "wte", "exact", False),
        (Level(1, 2), "mlp", "exact", True),
        (Level(2, 1), "mlp", "exact", True),
        (Level(2, 2), "wte", "correction", False),
        (Level(2, 2), "nothing", "exact", False),
    ],
)
def test_growth_that_frozen_weights_keep_from_being_exact_is_said(level, frozen, preset, is_warned, tmp_path, recwarn):
    module = TinyModule("gpt2-untied")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(frozen not in name)
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining([level], preset=preset)], **ENDLESS)
    trainer.strategy.connect(module)
    trainer.callbacks[0].setup(trainer, module, "fit")
    said = [str(each.message) for each in recwarn if "is not exact here" in str(each.message)]
    assert len(said) == is_warned
    assert all(frozen in message for message in said)

"""What layer dropping cannot work with is refused before any step, with a message that says what to do."""

from __future__ import annotations

import types
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lit_accel import (
    Level,
    MultiLevelTraining,
    ProgressiveLayerDropping,
    ProgressiveLayerDroppingMixin,
    RandomLTD,
    SensitivityLayerDropping,
)
from lit_accel.anatomy import AnatomyError, compile_blocks
from lit_accel.methods.strategy_checks import check_unused_parameters
from tests.training import TinyModule, Tokens, loader, make_trainer

BOTH = pytest.mark.parametrize("make", [ProgressiveLayerDropping, SensitivityLayerDropping], ids=["pld", "sbld"])
# Known length without a data loader, for tests that call setup alone.
ENDLESS = {"max_steps": 100, "max_epochs": -1}


def pld(**options):
    return ProgressiveLayerDropping(**options)


def sbld(**options):
    """With a budget that the four blocks of the tiny models can meet."""
    return SensitivityLayerDropping(**{"kept": 0.9, "protected": 0.0, **options})


def fit(tmp_path, callback, *others, module=None, data=None, ckpt_path=None, **kwargs):
    module = TinyModule() if module is None else module
    before = {key: value.clone() for key, value in module.state_dict().items()}
    trainer = make_trainer(
        tmp_path, callbacks=[callback, *others], **{"strategy": "auto", "max_steps": 10, "max_epochs": -1, **kwargs}
    )
    try:
        trainer.fit(module, loader() if data is None else data, ckpt_path=ckpt_path, weights_only=ckpt_path and True)
    finally:
        # No step was taken, not even a forward pass, and nothing is left on the model.
        assert module.losses == []
        assert not any(part._forward_hooks for part in module.net.modules())
        if ckpt_path is None:
            for key, value in before.items():
                assert torch.equal(module.state_dict()[key], value)


def refuse_setup(tmp_path, callback, strategy):
    trainer = make_trainer(tmp_path, callbacks=[callback], **ENDLESS, strategy=strategy)
    module = TinyModule()
    trainer.strategy.connect(module)
    callback.setup(trainer, module, "fit")


# --- arguments


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ({"theta": 0}, ["theta is 0", r"\(0, 1\]"]),
        ({"theta": -0.5}, ["theta is -0.5", r"\(0, 1\]"]),
        ({"theta": 1.01}, ["theta is 1.01", r"\(0, 1\]"]),
        ({"theta": float("nan")}, ["theta is nan"]),
        ({"gamma": 0}, ["gamma is 0", "positive"]),
        ({"gamma": -1e-3}, ["gamma is -0.001", "positive"]),
        ({"gamma": float("inf")}, ["gamma is inf", "positive"]),
        ({"gamma_factor": 0}, ["gamma_factor is 0", "positive"]),
        ({"gamma": 1e-3, "gamma_factor": 100}, ["gamma and gamma_factor", "one of them"]),
        ({"convention": "Paper"}, ["convention is 'Paper'", "'paper', 'deepspeed', 'timm'"]),
        ({"direction": "down"}, ["direction is 'down'", "'increasing', 'decreasing'"]),
        ({"sampler": "random"}, ["sampler is 'random'", "'systematic', 'bernoulli'"]),
        ({"scale": "branch"}, ["scale is 'branch'", "'block', 'sublayer', 'none'"]),
        ({"release": 1.5}, ["steps", "share of the run", "1.5"]),
        ({"release": -1}, ["steps", "share of the run", "-1"]),
        ({"check_ranks_every": 0}, ["check_ranks_every is 0", "at least 1"]),
    ],
)
def test_arguments_of_pld(arguments, messages):
    with pytest.raises(ValueError, match=messages[0]) as refusal:
        pld(**arguments)
    for message in messages[1:]:
        refusal.match(message)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ({"kept": 0}, ["kept is 0", r"\(0, 1\]"]),
        ({"kept": 1.1}, ["kept is 1.1", r"\(0, 1\]"]),
        ({"min_keep": 0}, ["min_keep is 0", r"\(0, 1\]"]),
        ({"max_overhead": 0}, ["max_overhead is 0", r"\(0, 1\]"]),
        ({"protected": 1}, ["protected is 1", r"\[0, 1\)"]),
        ({"ema": 1}, ["ema is 1", r"\[0, 1\)"]),
        ({"num_batches": 0}, ["num_batches is 0", "at least 1"]),
        ({"estimator": "fisher"}, ["estimator is 'fisher'", "'ablate', 'taylor', 'ratio', 'cos'"]),
        ({"allocation": "greedy"}, ["allocation is 'greedy'", "'sensitivity', 'depth', 'uniform'"]),
        ({"sampler": "random"}, ["sampler is 'random'", "'systematic', 'bernoulli'"]),
        ({"scale": "branch"}, ["scale is 'branch'", "'block', 'sublayer', 'none'"]),
        ({"warmup": -1}, ["share of the run", "-1"]),
        ({"ramp": 1.5}, ["share of the run", "1.5"]),
        ({"release": 2.0}, ["share of the run", "2.0"]),
        ({"measure_every": -0.1}, ["share of the run", "-0.1"]),
    ],
)
def test_arguments_of_sbld(arguments, messages):
    with pytest.raises(ValueError, match=messages[0]) as refusal:
        SensitivityLayerDropping(**arguments)
    for message in messages[1:]:
        refusal.match(message)


def test_a_mixin_refuses_as_its_callback_does():
    class Module(ProgressiveLayerDroppingMixin, TinyModule):
        pass

    with pytest.raises(ValueError, match="theta is 2"):
        Module(pld_theta=2)


@pytest.mark.parametrize("argument", ["gamma", "gamma_factor"])
def test_a_rate_that_is_ignored_is_warned_about(argument):
    with pytest.warns(UserWarning, match=f"{argument} is ignored.*increasing"):
        pld(direction="decreasing", **{argument: 1})


# --- the length of the run


@pytest.mark.parametrize(
    ("callback", "messages"),
    [
        (pld(release=11), ["release is 11", "run has 10", "share of the run"]),
        (pld(direction="decreasing", release=10), ["release is 10", "run has 10", "nothing would be dropped"]),
        (pld(direction="decreasing", release=1.0), ["release is 10", "nothing would be dropped"]),
        (sbld(warmup=4, ramp=4, release=4), [r"4 \+ 4 \+ 4", "run has 10", "Shorten"]),
        (sbld(release=11), ["release", "run has 10", "Shorten"]),
        (sbld(warmup=0.5, ramp=0.5, release=0.5), [r"5 \+ 5 \+ 5", "run has 10", "Shorten"]),
    ],
)
def test_a_schedule_that_is_longer_than_the_run(tmp_path, callback, messages):
    with pytest.raises(MisconfigurationException, match=messages[0]) as refusal:
        fit(tmp_path, callback)
    for message in messages[1:]:
        refusal.match(message)


class Stream(IterableDataset):
    """Has no length."""

    def __iter__(self):
        return iter(Tokens())


@pytest.mark.parametrize(
    "callback",
    [pld(), pld(gamma=0.01, release=0.1), pld(direction="decreasing"), sbld()],
    ids=lambda c: type(c).__name__,
)
@pytest.mark.parametrize("epochs", [-1, 1])
def test_a_run_of_unknown_length(tmp_path, callback, epochs):
    data = DataLoader(Stream(), batch_size=8)
    with pytest.raises(MisconfigurationException, match=r"must know how long the run is.*max_steps"):
        fit(tmp_path, callback, data=data, max_steps=-1, max_epochs=epochs)


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize(
    "callback",
    [
        pld(release=500),
        pld(direction="decreasing", release=0.8),
        sbld(warmup=100, ramp=200, release=100),
        sbld(warmup=0.3, ramp=0.3, release=0.4),
    ],
    ids=["pld", "pld-decreasing", "sbld-steps", "sbld-shares"],
)
def test_a_rehearsal_is_not_refused_for_being_short(tmp_path, callback, num_steps):
    module = TinyModule()
    trainer = make_trainer(tmp_path, callbacks=[callback], strategy="auto", fast_dev_run=num_steps)
    trainer.fit(module, loader())
    assert trainer.global_step == num_steps


# --- the model


def test_a_budget_below_what_the_floor_costs(tmp_path):
    """Of four blocks the first, the last and one for its sensitivity always run: 3/4 + 0.4/4."""
    with pytest.raises(MisconfigurationException, match=r"kept is 0\.78.*min_keep 0\.4.*3 of the 4") as refusal:
        fit(tmp_path, SensitivityLayerDropping())
    refusal.match(r"0\.85 is the least")
    refusal.match("Raise kept, or lower min_keep or protected")


@BOTH
@pytest.mark.parametrize("pinned", [[0, 1, 2], [0, -1, 2], [0, 1, 2, 3]])
def test_fewer_than_two_droppable_blocks(tmp_path, make, pinned):
    with pytest.raises(MisconfigurationException, match=r"at least two blocks.*of the 4 blocks.*gpt2.*Pin fewer"):
        fit(tmp_path, make(pinned=pinned))


@BOTH
def test_a_swin_of_short_stages_only(tmp_path, make):
    class Images(TinyModule):
        def __init__(self):
            super().__init__()
            from tests.models import make_model

            self.net = make_model("swin", heads=4, head_dim=4, ffn=32, blocks=1, dtype=torch.float32).train()

    with pytest.raises(MisconfigurationException, match=r"too short to drop from: 4.*deeper model"):
        fit(tmp_path, make(), module=Images())


@BOTH
@pytest.mark.parametrize("index", [4, -5])
def test_pins_that_do_not_exist(tmp_path, make, index):
    with pytest.raises(MisconfigurationException, match=rf"pinned names block {index},.*gpt2.*0 to 3, or -4 to -1"):
        fit(tmp_path, make(pinned=[0, index]))


@BOTH
def test_blocks_that_share_parameters(tmp_path, make):
    module = TinyModule()
    first, second = module.net.transformer.h[:2]
    second.mlp.c_fc.weight = first.mlp.c_fc.weight
    with pytest.raises(
        MisconfigurationException, match=r"h\.0\.mlp\.c_fc.*h\.1\.mlp\.c_fc.*are one parameter"
    ) as refusal:
        fit(tmp_path, make(), module=module)
    refusal.match("its own parameters")


@BOTH
@pytest.mark.parametrize("scale", ["block", "sublayer"])
def test_amplifying_what_a_post_norm_block_puts_out(tmp_path, make, scale):
    with pytest.raises(MisconfigurationException, match=rf'scale="{scale}".*bert.*post-norm') as refusal:
        fit(
            tmp_path,
            make(scale=scale, **({"kept": 0.9} if make is SensitivityLayerDropping else {})),
            module=TinyModule("bert-mlm"),
        )
    refusal.match('Use scale="none"')


def test_post_norm_is_warned_about(tmp_path):
    callback = pld()
    trainer = make_trainer(tmp_path, callbacks=[callback], strategy="auto", **ENDLESS)
    module = TinyModule("bert-mlm")
    trainer.strategy.connect(module)
    with pytest.warns(UserWarning, match=r"post-norm model \(bert\).*at least 0\.8"):
        callback.setup(trainer, module, "fit")


@pytest.mark.parametrize("callback", [pld(scale="sublayer"), sbld(scale="sublayer")], ids=["pld", "sbld"])
def test_the_inside_of_compiled_blocks(tmp_path, callback):
    module = TinyModule()
    compile_blocks(module.net, backend="eager")
    with pytest.raises(MisconfigurationException, match=r'scale="sublayer".*compiled.*scale="block"'):
        fit(tmp_path, callback, module=module)


@pytest.mark.parametrize("callback", [pld(), sbld()], ids=["pld", "sbld"])
@pytest.mark.parametrize("which", ["head and trunk", "trunk"])
def test_a_compilation_of_the_whole_model(tmp_path, callback, which):
    module = TinyModule()
    (module.net if which == "head and trunk" else module.net.transformer).compile(backend="eager")
    with pytest.raises(MisconfigurationException, match=r"whole transformer is compiled.*compile_blocks"):
        fit(tmp_path, callback, module=module)


@pytest.mark.parametrize("callback", [pld(), sbld()], ids=["pld", "sbld"])
def test_a_model_wrapped_by_torch_compile(tmp_path, callback):
    module = TinyModule()
    module.net = torch.compile(module.net, backend="eager")
    with pytest.raises(AnatomyError, match="compile_blocks"):
        fit(tmp_path, callback, module=module)


@pytest.mark.parametrize("callback", [pld(), sbld()], ids=["pld", "sbld"])
@pytest.mark.parametrize("part", [None, 2])
def test_a_model_in_evaluation_mode(tmp_path, callback, part):
    module = TinyModule()
    (module.net if part is None else module.net.transformer.h[part]).eval()
    with pytest.raises(MisconfigurationException, match=rf"h\.{part or 0} is in evaluation mode") as refusal:
        fit(tmp_path, callback, module=module)
    refusal.match(r"call model\.train\(\)")


@pytest.mark.parametrize("callback", [pld(), sbld()], ids=["pld", "sbld"])
def test_a_model_without_anatomy(tmp_path, callback):
    class Module(TinyModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(2, 2)

    with pytest.raises(AnatomyError, match=r"(?s)net \(Linear\).*gpt2: .*register_anatomy"):
        fit(tmp_path, callback, module=Module())


# --- the company


def test_both_kinds_together(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"Progressive\w+ and Sensitivity\w+ would both.*one of them"):
        fit(tmp_path, pld(), sbld())


def test_a_callback_beside_the_mixin_of_the_other(tmp_path):
    class Module(ProgressiveLayerDroppingMixin, TinyModule):
        pass

    with pytest.raises(MisconfigurationException, match=r"would both.*one of them"):
        fit(tmp_path, sbld(), module=Module())


@pytest.mark.parametrize(
    ("callback", "level"),
    [(pld(pinned=[3]), Level(width=1, depth=2)), (pld(), Level(width=1, depth=4)), (pld(pinned=[-1]), Level())],
    ids=["pin", "one block", "one left"],
)
def test_a_level_at_which_nothing_could_be_dropped(tmp_path, callback, level):
    with pytest.raises(MisconfigurationException, match=r"(?s)At level 1 of MultiLevelTraining.*reduce its depth"):
        fit(tmp_path, callback, MultiLevelTraining([level]), strategy="resizable")


def test_a_compiled_lightning_module(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[pld()], **ENDLESS, strategy="auto")
    with pytest.raises(MisconfigurationException, match="compile_blocks"):
        trainer.fit(torch.compile(TinyModule(), backend="eager"), loader())


def test_a_compiled_head_is_none_of_its_business(tmp_path):
    module = TinyModule()
    module.net.lm_head.compile(backend="eager")
    callback = pld()
    refuse_nothing = make_trainer(tmp_path, callbacks=[callback], **ENDLESS, strategy="auto")
    callback.setup(refuse_nothing, module, "fit")


def test_tied_blocks_that_are_never_dropped_may_be_tied(tmp_path):
    module = TinyModule()
    blocks = module.net.transformer.h
    blocks[1].mlp = blocks[0].mlp
    trainer = make_trainer(tmp_path, **ENDLESS, strategy="auto")
    for pinned, refused in (([0, 1], False), ([0], True), ([], True)):
        callback = pld(pinned=pinned)
        with pytest.raises(MisconfigurationException, match="share state") if refused else nullcontext():
            callback.setup(trainer, module, "fit")


def test_shares_that_are_rounded_to_more_than_the_run(tmp_path):
    callback = sbld(warmup=0.15, ramp=0.35, release=0.5)
    trainer = make_trainer(tmp_path, callbacks=[callback], strategy="auto", max_steps=10, max_epochs=-1)
    callback.setup(trainer, TinyModule(), "fit")
    assert callback._kept_share(9) == 1


def test_ablation_of_a_training_step_that_trains(tmp_path):
    module = TinyModule()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match=r'estimator="ablate".*manual optimization') as refusal:
        fit(tmp_path, sbld(), module=module)
    refusal.match('"taylor", "ratio" or "cos"')


@pytest.mark.parametrize("callback", [pld(), sbld()], ids=["pld", "sbld"])
def test_ddp_that_waits_for_every_gradient(tmp_path, callback):
    with pytest.raises(MisconfigurationException, match=r'Trainer\(strategy="ddp_find_unused_parameters_true"\)'):
        refuse_setup(tmp_path, callback, "ddp")


def test_a_resizable_ddp_is_named_by_its_own_name(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"ResizableDDPStrategy\(find_unused_parameters=True\)"):
        refuse_setup(tmp_path, pld(), "resizable_ddp")


def test_a_static_graph(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"static_graph=True.*Leave static_graph out"):
        refuse_setup(tmp_path, pld(), DDPStrategy(static_graph=True, find_unused_parameters=True))


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_flat_buffers(strategy):
    # Not initialised: both want a GPU or a package.
    made = object.__new__(strategy)
    made._ddp_kwargs = {}
    with pytest.raises(MisconfigurationException, match=rf"{strategy.__name__}.*flat buffers.*ModelParallelStrategy"):
        check_unused_parameters(types.SimpleNamespace(strategy=made), "ProgressiveLayerDropping")


# --- checkpoints


@pytest.mark.parametrize("make", [pld, sbld])
def test_a_checkpoint_of_another_number_of_blocks(tmp_path, make):
    """Weights and optimizer would refuse before: here neither is strict, as when a trunk is taken over."""

    class Module(TinyModule):
        def __init__(self, num_blocks):
            super().__init__()
            self.net.transformer.h = self.net.transformer.h[:num_blocks]
            self.net.config.n_layer = num_blocks
            self.strict_loading = False

    trainer = make_trainer(tmp_path, callbacks=[make()], strategy="auto", max_steps=4)
    trainer.fit(Module(4), loader())
    path = tmp_path / "four.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "optimizer_states": []}, path)
    with pytest.raises((MisconfigurationException, ValueError), match=r"4 blocks.*(this one|this model) has 3"):
        fit(tmp_path, make(), module=Module(3), ckpt_path=path)


@pytest.mark.parametrize("make", [pld, sbld])
def test_a_checkpoint_of_a_newer_version(make):
    state = {**make().state_dict(), "version": 99}
    with pytest.raises(MisconfigurationException, match=r"format 99.*Update lit-accel"):
        make().load_state_dict(state)


class TwoOptimizers(TinyModule):
    """Each steps at every batch: twice as many steps as batches."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.AdamW(part.parameters(), lr=1e-3) for part in (self.net.transformer.h, self.net.lm_head)]

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("method", [ProgressiveLayerDropping, RandomLTD])
def test_steps_of_several_optimizers_are_not_counted_in_epochs(tmp_path, method):
    module = TwoOptimizers()
    with pytest.raises(MisconfigurationException, match=r"There are 2 optimizers.*max_steps"):
        make_trainer(tmp_path, callbacks=[method()], max_epochs=1).fit(module, loader())
    assert not module.losses
    make_trainer(tmp_path, callbacks=[method()], max_steps=6, max_epochs=-1).fit(module, loader())
    assert len(module.losses) == 3


def test_a_training_step_that_fails_without_a_block_is_told_of_the_measurement(tmp_path):
    """As one does that looks at an entry of hidden_states which a left-out block does not write."""

    class Counts(TinyModule):
        def training_step(self, batch, batch_idx):
            calls = []
            hooks = [block.register_forward_hook(lambda *_: calls.append(1)) for block in self.net.transformer.h]
            loss = super().training_step(batch, batch_idx)
            for hook in hooks:
                hook.remove()
            assert calls[3]
            return loss

    trainer = make_trainer(tmp_path, callbacks=[sbld(warmup=1)], strategy="auto", max_steps=10, max_epochs=-1)
    message = r"failed while sensitivities were measured, by IndexError.*with some blocks left out.*\"taylor\""
    with pytest.raises(RuntimeError, match=message):
        trainer.fit(Counts(), loader())


def test_a_training_step_that_fetches_its_batches_is_refused(tmp_path):
    class Fetches(TinyModule):
        def training_step(self, dataloader_iter):
            return super().training_step(next(dataloader_iter)[0], 0)

    with pytest.raises(MisconfigurationException, match=r"takes batches from a dataloader_iter.*\"taylor\""):
        fit(tmp_path, sbld(), module=Fetches())


def only_last_blocks(number, **kwargs):
    """A model of which nothing is trained but its last blocks."""
    module = TinyModule(**kwargs)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(any(f".h.{index}." in name for index in range(4 - number, 4)))
    return module


def train(tmp_path, callback, module):
    """What is not refused runs to its end."""
    make_trainer(tmp_path, callbacks=[callback], strategy="auto", max_steps=10).fit(module, loader())
    return module.losses


@pytest.mark.parametrize("sampler", ["bernoulli", "systematic"])
def test_steps_that_would_train_nothing_are_refused(sampler, tmp_path):
    module = only_last_blocks(1)
    with pytest.raises(MisconfigurationException, match=r"Nothing is trained but blocks \[3\].*pinned=\[3\]"):
        fit(tmp_path, pld(theta=0.5, sampler=sampler), module=module)
    # As it advises.
    assert len(train(tmp_path, pld(theta=0.5, sampler=sampler, pinned=[3]), only_last_blocks(1))) == 10


def test_steps_that_keep_some_block_that_is_trained_are_not(tmp_path):
    # The last keep probabilities are 7/8, 3/4, 5/8 and 1/2, so that two blocks or three run in every step.
    assert len(train(tmp_path, pld(theta=0.5), only_last_blocks(4))) == 10
    with pytest.raises(MisconfigurationException, match=r"blocks \[0, 1, 2, 3\]"):
        fit(tmp_path, pld(theta=0.5, sampler="bernoulli"), module=only_last_blocks(4))
    # DeepSpeed's schedule always keeps the first.
    kept_first = pld(theta=0.5, sampler="bernoulli", convention="deepspeed")
    assert len(train(tmp_path, kept_first, only_last_blocks(4))) == 10


@pytest.mark.parametrize("estimator", ["ablate", "ratio"])
def test_nor_may_the_only_block_that_is_trained_be_among_the_insensitive(tmp_path, estimator):
    def only(*indices):
        module = TinyModule()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(any(f".h.{index}." in name for index in indices))
        return module

    with pytest.raises(MisconfigurationException, match=r"Nothing is trained but blocks \[1\].*pinned=\[1\]"):
        fit(tmp_path, sbld(estimator=estimator), module=only(1))
    assert len(train(tmp_path, sbld(estimator=estimator, pinned=[1]), only(1))) >= 10
    # Of the two in between no more than one is left out of a step, and the last always runs.
    assert len(train(tmp_path, sbld(estimator=estimator), only(1, 2))) >= 10
    assert len(train(tmp_path, sbld(estimator=estimator), only(3))) >= 10


def test_gradients_of_blocks_without_any_are_not_measured(tmp_path):
    module = only_last_blocks(2)
    with pytest.raises(MisconfigurationException, match=r"h\.0 has none.*Use \"ablate\", \"ratio\" or \"cos\""):
        fit(tmp_path, sbld(estimator="taylor"), module=module)
    assert len(train(tmp_path, sbld(estimator="ratio"), only_last_blocks(2))) == 10
    # The embedding is trained: the gradient goes through all that comes after it.
    with_embedding = only_last_blocks(2)
    with_embedding.net.transformer.wpe.weight.requires_grad_(True)
    assert len(train(tmp_path, sbld(estimator="taylor"), with_embedding)) == 10

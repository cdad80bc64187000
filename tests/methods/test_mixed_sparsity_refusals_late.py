"""What mixed sparsity cannot work with: optimizers, frozen weights, compilation, and checkpoints of other runs."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.optim import ZeroRedundancyOptimizer

from lit_accel.anatomy import AnatomyError, compile_blocks
from lit_accel.methods.mixed_sparsity.refusals import SUPPORTED_OPTIMIZERS, check_optimizers
from tests.methods.test_mixed_sparsity_refusals import (
    WINDOW,
    Images,
    OwnData,
    Uncached,
    fit,
    mst,
    refuse,
    setup_with,
)
from tests.training import TinyModule, loader, make_trainer

# Optimizers


@pytest.mark.parametrize("optimizer", ["Adafactor", "Adagrad", "Adadelta", "ASGD", "Rprop", "LBFGS"])
def test_optimizers_whose_state_has_no_zero(tmp_path, optimizer):
    module = TinyModule(optimizer=getattr(torch.optim, optimizer))
    refuse(tmp_path, [mst()], [rf"not for {optimizer}\. Use one of these, such as torch\.optim\.AdamW"], module)


def test_no_optimizer(tmp_path):
    class Module(TinyModule):
        def configure_optimizers(self):
            return None

    refuse(tmp_path, [mst()], ["optimizer"], Module())


@pytest.mark.parametrize("optimizer", SUPPORTED_OPTIMIZERS)
def test_optimizers_that_are_named_work(tmp_path, optimizer):
    assert len(fit(tmp_path, [mst()], TinyModule(optimizer=optimizer, lr=1e-3)).losses) == 10


def test_shards_of_an_optimizer():
    optimizer = object.__new__(ZeroRedundancyOptimizer)
    with pytest.raises(MisconfigurationException, match=r"not for ZeroRedundancyOptimizer\. Use one of these"):
        check_optimizers(types.SimpleNamespace(optimizers=[optimizer]), None, types.SimpleNamespace(spaces=["one"]))


class TwoOptimizers(TinyModule):
    def configure_optimizers(self):
        return [
            torch.optim.AdamW(self.net.transformer.h.parameters()),
            torch.optim.AdamW(self.net.lm_head.parameters()),
        ]


def test_two_optimizers(tmp_path):
    """Which Lightning itself refuses with automatic optimization."""
    refuse(tmp_path, [mst()], ["only supported with manual optimization"], TwoOptimizers(), error=RuntimeError)
    with pytest.raises(MisconfigurationException, match="works with one optimizer, and there are 2"):
        check_optimizers(types.SimpleNamespace(optimizers=[torch.optim.AdamW([torch.zeros(1)])] * 2), None, None)


@pytest.mark.parametrize("kind", [TinyModule, TwoOptimizers])
def test_manual_optimization(tmp_path, kind):
    module = kind()
    module.automatic_optimization = False
    refuse(
        tmp_path, [mst()], ["between the backward pass and the optimizer step", "automatic_optimization = True"], module
    )


# Frozen weights


@pytest.mark.parametrize(
    ("frozen", "options", "part"),
    [
        ("transformer.h.1.mlp.c_fc.weight", {}, "ffn"),
        ("transformer.h.3.mlp.c_proj.weight", {"ffn_units": "element"}, "ffn"),
        ("transformer.h.0.attn.c_attn.bias", {}, "attention"),
        ("transformer.wte.weight", {"head_units": "element"}, "head"),
    ],
)
def test_frozen_weights(tmp_path, frozen, options, part):
    def module():
        made = TinyModule()
        made.net.get_parameter(frozen).requires_grad_(False)
        return made

    messages = [f"{frozen} is frozen", f'Train it, or set {part}_units="dense"']
    refuse(tmp_path, [mst(**options)], messages, module())
    assert fit(tmp_path, [mst(**{**options, f"{part}_units": "dense"})], module()).losses


def test_frozen_weights_without_units(tmp_path):
    module = TinyModule()
    module.net.transformer.wte.requires_grad_(False)
    assert fit(tmp_path, [mst()], module).losses


def test_weights_that_are_frozen_late(tmp_path):
    """A module's own setup comes after that of its callbacks."""

    class Late(TinyModule):
        def setup(self, stage):
            self.net.transformer.h[0].requires_grad_(False)

    refuse(tmp_path, [mst()], ["is frozen", "Train it"], Late())


def test_weights_that_no_optimizer_has(tmp_path):
    class Partly(TinyModule):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.net.transformer.ln_f.parameters(), lr=1e-3)

    refuse(tmp_path, [mst()], ["is in no parameter group", "Give it to the optimizer"], Partly())


@pytest.mark.parametrize(
    ("optimizer", "options", "longest"),
    [
        ("AdamW", {"betas": (0.9, 0.999)}, "6.6"),
        ("RMSprop", {"alpha": 0.99}, "10.0"),
        ("AdamW", {"betas": (0.9, 0.95)}, None),
        ("AdamW", {"betas": (0.9, 0.98)}, None),
        ("SGD", {"momentum": 0.9}, None),
        ("Adamax", {}, None),
    ],
)
def test_first_steps_of_units_that_come_back(tmp_path, recwarn, optimizer, options, longest):
    class Module(TinyModule):
        def configure_optimizers(self):
            return getattr(torch.optim, optimizer)(self.parameters(), lr=1e-3, **options)

    fit(tmp_path, [mst()], Module(), max_steps=1)
    said = [str(each.message) for each in recwarn if "begin with steps" in str(each.message)]
    assert len(said) == (longest is not None)
    assert longest is None or f"up to {longest} times the learning rate" in said[0]


@pytest.mark.parametrize("optimizer", ["Adafactor", "AdamW"])
def test_what_only_concerns_units_is_not_asked_of_runs_without(tmp_path, optimizer):
    for options in ({}, WINDOW):
        module = TinyModule(optimizer=getattr(torch.optim, optimizer))
        assert fit(tmp_path, [mst(stages=[(0, 0.0)], **options), EMAWeightAveraging()], module).losses


# The phase of a pattern


@pytest.mark.parametrize("phase", [(0.5, 1), (8, 0.2)])
def test_a_phase_that_ends_before_it_begins(tmp_path, phase):
    messages = [r"attention_phase is \[.*it ends before it begins", "Write both bounds as steps, or both as shares"]
    refuse(tmp_path, [mst(**WINDOW, attention_phase=phase)], messages)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ((30, 40), "No step will follow attention_pattern"),
        ((0.5, 0.5), "No step will follow attention_pattern"),
        ((0.5, 1.0), "the model that it leaves behind attends densely"),
        ((2, 8), None),
    ],
)
def test_a_phase_that_is_not_what_was_meant(tmp_path, recwarn, phase, message):
    fit(tmp_path, [mst(**WINDOW, attention_phase=phase)], max_steps=10)
    said = [str(each.message) for each in recwarn]
    for known in ("No step will follow", "attends densely"):
        assert any(known in each for each in said) == (message is not None and known in message)


# Schedules that do less than they say


def test_units_that_are_too_few_to_be_exchanged(tmp_path):
    with pytest.warns(UserWarning, match="is less than one in every group"):
        fit(tmp_path, [mst(ffn_units="2:4", attention_units="dense", drop_fraction=0.3)])


def test_stages_without_units(tmp_path):
    with pytest.warns(UserWarning, match="switches nothing off"):
        fit(tmp_path, [mst(ffn_units="dense", attention_units="dense")])


def test_a_trainer_that_goes_on_with_other_stages_says_so(tmp_path):
    callback = mst(stages=[(0, 0.0), (0.2, 0.5), (0.8, 0.0)])
    trainer = make_trainer(tmp_path, callbacks=[callback], strategy="auto", max_steps=10, limit_val_batches=0)
    module = TinyModule()
    trainer.fit(module, loader())
    trainer.fit_loop.epoch_loop.max_steps = 20
    with pytest.warns(UserWarning, match="other rules of mixed sparsity: stages"):
        trainer.fit(module, loader())


# Compilation


def test_a_compilation_that_comes_late(tmp_path):
    class Late(TinyModule):
        def configure_model(self):
            self.net.compile(backend="eager")

    module = Late()
    with pytest.raises(MisconfigurationException, match="the whole transformer is compiled"):
        fit(tmp_path, [mst()], module)
    assert not module.losses


@pytest.mark.parametrize("which", ["head and trunk", "trunk"])
def test_a_compilation_of_the_whole_model(tmp_path, which):
    module = TinyModule()
    (module.net if which == "head and trunk" else module.net.transformer).compile(backend="eager")
    messages = [
        "MixedSparsityTraining: the whole transformer is compiled",
        r"lit_accel\.anatomy\.compile_blocks\(model\)",
    ]
    refuse(tmp_path, [mst()], messages, module)


def test_a_compiled_lightning_module(tmp_path):
    module = TinyModule()
    with pytest.raises(MisconfigurationException, match="the whole transformer is compiled"):
        fit(tmp_path, [mst()], torch.compile(module, backend="eager"))
    assert not module.losses


def test_a_model_that_is_wrapped_by_torch_compile(tmp_path):
    module = TinyModule()
    module.net = torch.compile(module.net, backend="eager")
    with pytest.raises(AnatomyError, match="compile_blocks"):
        fit(tmp_path, [mst()], module)
    assert not module.losses


RAMP = [(0, 0.0), *((step, 0.125 * step) for step in range(1, 8)), (8, 0.3), (9, 0.0)]
FEW = [(0, 0.0), (2, 0.25), (4, 0.5), (6, 0.75), (8, 0.0)]


@pytest.mark.parametrize(
    ("options", "number"),
    [({"stages": RAMP, "quantum": 1}, 9), ({"stages": [*RAMP[:5], RAMP[-1]], **WINDOW}, 10)],
    ids=["stages", "stages and a pattern"],
)
@pytest.mark.parametrize("own", [False, True], ids=["known at once", "known late"])
def test_more_graphs_than_torch_compiles(tmp_path, options, number, own):
    module = OwnData() if own else Uncached()
    compile_blocks(module.net, backend="eager")
    messages = [rf"these stages make up to {number} graphs", "no more than 8", "Take fewer stages, or raise that limit"]
    length = {"max_steps": -1, "max_epochs": 1} if own else {}
    refuse(tmp_path, [mst(**options)], messages, module, **length)


def test_evaluation_needs_graphs_of_its_own(tmp_path):
    module = Uncached()
    compile_blocks(module.net, backend="eager")
    five = mst(stages=[(0, 0.0), (1, 0.25), (2, 0.5), (4, 0.75), (6, 0.25), (8, 0.9), (9, 0.0)])
    setup_with(tmp_path, five, module, limit_val_batches=0)
    with pytest.raises(MisconfigurationException, match=r"10 graphs.*evaluation"):
        setup_with(tmp_path, five, module)


def within_the_limit(folder, callback, module, graphs):
    """Refused before it begins, or trained with no block that torch gives up on."""
    compile_blocks(module.net, backend=graphs)
    torch._dynamo.utils.counters.clear()
    try:
        fit(folder, [callback], module)
    except MisconfigurationException:
        assert not module.losses
        return False
    assert len(module.losses) == 10
    assert not torch._dynamo.utils.counters["unimplemented"], f"gave up after {graphs.count} graphs"
    return True


@pytest.mark.parametrize(
    ("options", "number"), [({"stages": FEW}, 4), (WINDOW, 3)], ids=["stages", "stages and a pattern"]
)
def test_few_stages_of_compiled_blocks(tmp_path, graphs, options, number):
    assert within_the_limit(tmp_path, mst(**options), Uncached(), graphs)
    assert graphs.count == number


def test_compiled_blocks_with_tiles(tmp_path, graphs):
    """No block has the tiles of another, and none those that it had before an update."""
    tiles = mst(ffn_units="block", attention_units="dense", block_size=4)
    within_the_limit(tmp_path, tiles, Uncached(), graphs)


def test_compiled_blocks_of_several_kinds(tmp_path):
    """Those of the two stages of a SwinV2 differ in width, and those of the first one in their windows."""
    module = Images("swin")
    compile_blocks(module.net, backend="eager")
    with pytest.raises(MisconfigurationException, match="graphs"):
        setup_with(tmp_path, mst(attention_units="dense", stages=FEW), module)


def test_compiled_blocks_that_stay_whole_need_one_graph(tmp_path, graphs):
    entries = mst(ffn_units="element", attention_units="2:4", stages=RAMP)
    assert within_the_limit(tmp_path, entries, Uncached(), graphs)
    assert graphs.count == 1


# Checkpoints


def checkpoint_of(folder, **options):
    module = fit(folder, [mst(**{"attention_phase": (3, 7), **options})], max_steps=4)
    module.trainer.save_checkpoint(folder / "four.ckpt")
    return folder / "four.ckpt"


@pytest.mark.parametrize(
    ("stored", "present"),
    [
        ({}, {"ffn_units": "element"}),
        ({}, {"attention_units": "dense"}),
        ({"ffn_units": "element"}, {"ffn_units": "2:4"}),
        ({"ffn_units": "block", "block_size": 4}, {"ffn_units": "block", "block_size": 2}),
        ({}, {"stages": [(0, 0.0)]}),
    ],
)
@pytest.mark.filterwarnings("ignore:The checkpoint was trained with other rules")
@pytest.mark.filterwarnings("ignore:The last steps of the run have")
def test_a_checkpoint_of_other_units(tmp_path, stored, present):
    path = checkpoint_of(tmp_path, **stored)
    # What has no units has none to speak of by name.
    named = [f"{name} " for name in present if name != "stages" and stored.get(name) != present[name]]
    whole = ["units of the checkpoint are others than those of this run"]
    messages = [*(["other rules of mixed sparsity", *named] if named else whole), "Resume with"]
    refuse(tmp_path, [mst(**present)], messages, ckpt_path=path)
    assert len(fit(tmp_path, [mst(**stored)], ckpt_path=path).losses) == 6


def test_a_checkpoint_of_a_newer_version(tmp_path):
    state = {**mst().state_dict(), "version": 99}
    with pytest.raises(
        MisconfigurationException, match=r"mixed sparsity in the checkpoint has format 99.*Update lit-accel"
    ):
        mst().load_state_dict(state)


# Warnings


def said(recwarn, *parts):
    """The warnings with all of some parts."""
    messages = [str(warning.message) for warning in recwarn]
    return [message for message in messages if all(part in message for part in parts)]


ENDS = ["it will end with units switched off", "Let stages end with a sparsity of 0, some steps before the end"]


@pytest.mark.parametrize("own", [False, True], ids=["known at once", "known late"])
@pytest.mark.parametrize("stages", [[(0, 0.5)], [(0, 0.0), (0.5, 0.5)], [(0, 0.0), (2, 0.5), (10, 0.0)]])
def test_a_run_that_ends_sparse_is_warned_about_once(tmp_path, recwarn, stages, own):
    length = {"max_steps": -1, "max_epochs": 1} if own else {}
    module = fit(tmp_path, [mst(stages=stages)], OwnData() if own else None, **length)
    assert len(module.losses) == 10
    assert len(said(recwarn, *ENDS, "sparsity 0.5")) == 1


def test_a_rehearsal_or_a_run_that_ends_dense_is_not_warned_about(tmp_path, recwarn):
    fit(tmp_path, [mst()])
    fit(tmp_path, [mst(stages=[(0, 0.5)])], fast_dev_run=2)
    fit(tmp_path, [mst(stages=[(0, 0.0), (0.2, 0.5), (0.9, 0.0)])])
    assert not said(recwarn, ENDS[0])


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"update_every": 3}, "update_every 2 (now 3)"),
        ({"drop_fraction": 0.1}, "drop_fraction 0.3 (now 0.1)"),
        ({"gradient_share": 0.5}, "gradient_share 0.75 (now 0.5)"),
        ({"distribution": "er"}, "distribution uniform (now er)"),
        ({"quantum": 8}, "quantum 4 (now 8)"),
        ({"execution": "masked"}, "execution compact (now masked)"),
        ({"seed": 1}, "seed 0 (now 1)"),
        ({"stages": [(0, 0.0), (2, 0.5), (9, 0.0)]}, "[8, 0.0]] (now [[0, 0.0], [2, 0.5], [9, 0.0]])"),
        (WINDOW, "attention_pattern None (now window), attention_window None (now 4)"),
    ],
)
@pytest.mark.filterwarnings("ignore:The last steps of the run have")
def test_rules_that_have_changed_since_the_checkpoint(tmp_path, recwarn, changed, part):
    path = checkpoint_of(tmp_path)
    changed = {"attention_phase": (3, 7), **changed}
    assert len(fit(tmp_path, [mst(**changed)], ckpt_path=path).losses) == 6
    assert len(said(recwarn, "other rules of mixed sparsity: ", part, "Those of now hold.")) == 1


@pytest.mark.filterwarnings("ignore:The last steps of the run have")
@pytest.mark.parametrize("phase", [(3, 7), (0.06, 0.8)], ids=["in steps", "as shares, with nothing to attend by"])
def test_rules_that_have_not_changed_are_no_reason_to_warn(tmp_path, phase):
    """Also if the run has become longer than it was."""
    path = checkpoint_of(tmp_path, attention_phase=phase)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The checkpoint was trained with other rules")
        assert len(fit(tmp_path, [mst(attention_phase=phase)], ckpt_path=path).losses) == 6

"""Growth alone: a small trained model becomes a large one that never existed."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel import (
    ComputeLedger,
    Level,
    MultiLevelMixin,
    MultiLevelTraining,
    Phase,
    RandomLTD,
    SensitivityLayerDropping,
)
from lit_accel.anatomy import AnatomyError, anatomy_of
from lit_accel.compute import read_ledger
from lit_accel.methods.multilevel import Interpolation, coalesce, level_map
from lit_accel.methods.multilevel.maps import grown_size
from lit_accel.methods.multilevel.phases import lr_factor, resolve_phases
from lit_accel.methods.multilevel.stored import StoredLevels
from lit_accel.strategies import ResizableDDPStrategy
from tests.models import ALL_MODELS, make_model
from tests.training import SIZE, TinyModule, loader, make_trainer

PHASES = [Phase(1, 4), Phase(0)]


def small_module(**kwargs):
    module = TinyModule(**kwargs)
    module.net = coalesce(module.net, level_map(anatomy_of(module.net))).train()
    return module


def fit(tmp_path, module, method, steps=8, callbacks=(), **kwargs):
    trainer = make_trainer(tmp_path, callbacks=[method, *callbacks], max_steps=steps)
    trainer.fit(module, loader(), **kwargs)
    return trainer


def test_the_model_grows_when_the_phases_say_so(tmp_path):
    module = small_module()
    fit(tmp_path, module, MultiLevelTraining(start_level=1, phases=PHASES))
    assert module.sizes[3] < module.sizes[4] == module.sizes[-1]
    assert module.net.config.n_layer == 4
    assert module.net.config.n_embd == 16
    assert module.losses[-1] < module.losses[0]


def test_by_default_it_grows_at_once(tmp_path):
    module = small_module()
    fit(tmp_path, module, MultiLevelTraining(start_level=1))
    assert len(set(module.sizes)) == 1
    assert module.net.config.n_layer == 4


@pytest.mark.parametrize(
    "method",
    [
        # Of the two blocks that the module brings it could leave out none.
        lambda: SensitivityLayerDropping(kept=0.8, protected=0.0, max_overhead=1.0, warmup=1),
        lambda: RandomLTD(start_tokens=4, quantum=1),
    ],
)
def test_what_is_dropped_is_dropped_from_the_model_that_it_grows_into(tmp_path, method):
    module = small_module()
    fit(tmp_path, module, MultiLevelTraining(start_level=1), callbacks=[method()])
    assert module.global_step == 8
    with pytest.raises(MisconfigurationException, match="of the 2 blocks"):
        fit(tmp_path, small_module(), MultiLevelTraining(start_level=1, phases=PHASES), callbacks=[method()])


@pytest.mark.parametrize(
    ("learning_rate", "phases", "expected"),
    [
        ("rewarm", None, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("rewarm", [Phase(0, 2), Phase(0)], [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        # As in the last phase of a cycle: what has been trained needs no warm-up.
        ("paper", None, [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
    ],
    ids=["rewarm", "rewarm-two-phases", "paper"],
)
def test_growth_at_the_first_step_is_a_transition_for_the_learning_rate(tmp_path, learning_rate, phases, expected):
    module = small_module(lr=1.0, optimizer=torch.optim.SGD)
    length = {"num_rewarm_steps": 4} if learning_rate == "rewarm" else {}
    fit(tmp_path, module, MultiLevelTraining(phases=phases, start_level=1, learning_rate=learning_rate, **length))
    assert module.rates == pytest.approx(expected)


@given(
    start_level=st.integers(1, 2),
    levels=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    policy=st.sampled_from(["rewarm", "paper"]),
)
def test_growing_at_once_is_growing_later_but_for_the_phase_before(start_level, levels, policy):
    """A run that is given a trained model has the rates that one has which trained it itself."""
    assume(levels[0] != start_level)
    phases = [*(Phase(level, 3) for level in levels), Phase(0)]
    given_it = resolve_phases(phases, 3, 20)
    trained_it = resolve_phases([Phase(start_level, 5), *phases], 3, 25)
    for step in range(20):
        actual = lr_factor(given_it, step, policy, 4, start_level)
        assert actual == lr_factor(trained_it, step + 5, policy, 4, start_level)


def test_two_levels_up(tmp_path):
    module = TinyModule()
    full = anatomy_of(module.net)
    two = level_map(level_map(full).small)
    module.net = coalesce(coalesce(module.net, level_map(full)), two).train()
    method = MultiLevelTraining([Level(), Level()], [Phase(2, 3), Phase(1, 3), Phase(0)], start_level=2)
    fit(tmp_path, module, method)
    assert len(set(module.sizes)) == 3
    assert anatomy_of(module.net).size == full.size


def test_growing_what_preserves_the_function_changes_no_loss(tmp_path):
    grown, plain = small_module(dtype=torch.float64), small_module(dtype=torch.float64)
    fit(tmp_path, grown, MultiLevelTraining(start_level=1, preset="exact", phases=PHASES), steps=5)
    make_trainer(tmp_path, max_steps=5).fit(plain, loader())
    assert grown.sizes[4] > plain.sizes[4]
    torch.testing.assert_close(grown.losses, plain.losses, rtol=1e-10, atol=0)


def asymmetry(net):
    weight = net.transformer.h[0].mlp.c_fc.weight
    first, second = weight.chunk(2, dim=1)
    return ((first - second).norm() / weight.norm()).item()


def test_the_fresh_part_tells_copies_apart(tmp_path):
    exact, default = small_module(), small_module()
    fit(tmp_path, exact, MultiLevelTraining(start_level=1, preset="exact"))
    fit(tmp_path, default, MultiLevelTraining(start_level=1))
    assert asymmetry(exact.net) < 1e-5
    assert asymmetry(default.net) > 1e-2


@pytest.mark.parametrize(("settings", "std"), [({}, 0.02), ({"fresh_std": 0.1}, 0.1)], ids=["default", "given"])
def test_matrices_alone_get_noise_of_the_given_spread(tmp_path, settings, std):
    module = small_module(dtype=torch.float64, lr=0.0)
    small = {name: parameter.detach().clone() for name, parameter in module.net.named_parameters()}
    fit(tmp_path, module, MultiLevelTraining(start_level=1, **settings), steps=1)
    grown = level_map(anatomy_of(module.net)).apply(small, "decoalesce")
    noise = {name: parameter.detach() - grown[name] for name, parameter in module.net.named_parameters()}
    assert not any(tensor.any() for tensor in noise.values() if tensor.ndim < 2)
    # The mean of a group is the small model's: of 8 entries, 7 are free in a block (two blocks, 2 x 2), and 1 of 2 in
    # an embedding, whose tokens do not merge.
    weights = torch.stack([noise[f"transformer.h.{index}.mlp.c_fc.weight"] for index in range(4)])
    assert weights.std().item() == pytest.approx(std * (7 / 8) ** 0.5, rel=0.1)
    assert noise["transformer.wte.weight"].std().item() == pytest.approx(std * (1 / 2) ** 0.5, rel=0.1)


def test_the_small_model_stays_the_coarse_part_of_the_grown_one(tmp_path):
    """Whatever is drawn, coalescing gives back what has been trained."""
    module = small_module(dtype=torch.float64, lr=0.0)
    before = copy.deepcopy(module.net)
    fit(tmp_path, module, MultiLevelTraining(start_level=1), steps=1)
    lm = level_map(anatomy_of(module.net))
    for (name, actual), expected in zip(coalesce(module.net, lm).named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("fine", [0.0, 0.5])
def test_what_is_frozen_gets_no_noise(tmp_path, fine):
    """It would never be trained away: frozen tensors of a fresh level are de-coalesced, and nothing else."""
    module = small_module(dtype=torch.float64)
    module.net.transformer.wte.requires_grad_(False)
    for block in module.net.transformer.h:
        block.attn.requires_grad_(False)
    small = {name: parameter.detach().clone() for name, parameter in module.net.named_parameters()}
    fit(tmp_path, module, MultiLevelTraining(start_level=1, coarse=1.0, fine=fine), steps=2)
    grown = level_map(anatomy_of(module.net)).apply(small, "decoalesce")
    frozen = {name: parameter for name, parameter in module.net.named_parameters() if not parameter.requires_grad}
    assert len(frozen) == 1 + 4 * 4
    for name, parameter in frozen.items():
        assert torch.equal(parameter, grown[name]), name
    assert asymmetry(module.net) > 1e-2


def test_stacking(tmp_path):
    module = small_module(lr=0.0)
    first, second = (copy.deepcopy(block) for block in module.net.transformer.h)
    levels = [Level(width=1, depth=2)]
    fit(tmp_path, module, MultiLevelTraining(levels, start_level=1, depth_grouping="stack", fresh_std=0.0), steps=1)
    expected = (first, second, first, second)
    for block, source in zip(module.net.transformer.h, expected, strict=True):
        for actual, value in zip(block.parameters(), source.parameters(), strict=True):
            torch.testing.assert_close(actual, value)


@pytest.mark.parametrize("grouping", ["block", "adjacent"])
def test_copies_lie_where_the_width_grouping_says(tmp_path, grouping):
    module = small_module(lr=0.0)
    small = {name: parameter.detach().clone() for name, parameter in module.net.named_parameters()}
    levels = [Level(width=2, depth=1)]
    fit(tmp_path, module, MultiLevelTraining(levels, start_level=1, width_grouping=grouping, fresh_std=0.0), steps=1)

    def twice(tensor, dim):
        return torch.cat([tensor] * 2, dim) if grouping == "block" else tensor.repeat_interleave(2, dim)

    heads = small["transformer.h.1.attn.c_proj.weight"].unflatten(0, (2, 4))
    expected = {
        "transformer.wpe.weight": twice(small["transformer.wpe.weight"], 1),
        "transformer.h.0.mlp.c_fc.weight": twice(twice(small["transformer.h.0.mlp.c_fc.weight"], 0), 1) / 2,
        "transformer.h.1.attn.c_proj.weight": twice(twice(heads, 0).flatten(0, 1), 1) / 2,
    }
    for name, value in expected.items():
        torch.testing.assert_close(module.net.get_parameter(name), value, msg=name)


@pytest.mark.parametrize("saved_at", [2, 4, 6])
def test_resume_is_bitwise(tmp_path, saved_at):
    """Also where the small model that the run began with is what the module comes with again."""
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, resumed = small_module(), small_module(seed=5)
    for module, path in ((whole, None), (resumed, tmp_path / f"step={saved_at}.ckpt")):
        method = MultiLevelTraining(start_level=1, phases=PHASES)
        # One batch an epoch: Lightning's own loaders resume at their ends only.
        callbacks = [method, *([save] if path is None else [])]
        trainer = make_trainer(tmp_path, callbacks=callbacks, enable_checkpointing=path is None, max_epochs=8)
        trainer.fit(module, loader(num_samples=8), ckpt_path=path)
    assert resumed.net.config.n_layer == 4
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_another_fit_does_not_grow_again(tmp_path):
    module, method = small_module(), MultiLevelTraining(start_level=1)
    fit(tmp_path, module, method)
    fit(tmp_path, module, method)
    assert module.net.config.n_layer == 4


def test_the_ledger_compares_with_the_full_model(tmp_path):
    module = small_module()
    ledger = ComputeLedger(folder=str(tmp_path), print_table=False)
    # The ledger is set up first, when nobody has said yet that the model is a small one.
    trainer = make_trainer(tmp_path, callbacks=[ledger, MultiLevelTraining(start_level=1, phases=PHASES)], max_steps=8)
    trainer.fit(module, loader())
    table = read_ledger(tmp_path)
    assert table.flops[-1] < 0.8 * table.dense_flops[-1]


class Mine(MultiLevelMixin, TinyModule):
    """A module that brings the method along."""


def test_the_mixin_starts_small_too(tmp_path):
    module = Mine(multilevel_start_level=1)
    full = anatomy_of(module.net)
    module.net = coalesce(module.net, level_map(full)).train()
    make_trainer(tmp_path, max_steps=2).fit(module, loader())
    assert anatomy_of(module.net).size == full.size


@pytest.mark.parametrize("name", ALL_MODELS)
def test_the_size_that_a_model_is_a_level_of(name):
    with torch.device("meta"):
        anatomy = anatomy_of(make_model(name, heads=2, head_dim=4, ffn=8, blocks=2))
    full = grown_size(anatomy, [(2, 2), (3, 1)])
    assert anatomy.at(full).reduced(2, 2) == grown_size(anatomy, [(3, 1)])
    assert anatomy.at(grown_size(anatomy, [(3, 1)])).reduced(3, 1) == anatomy.size


def set_up(tmp_path, method, start_method):
    strategy = ResizableDDPStrategy(start_method=start_method)
    trainer = make_trainer(tmp_path, callbacks=[method], strategy=strategy, max_steps=8, max_epochs=-1)
    trainer.strategy.connect(small_module())
    method.setup(trainer, trainer.lightning_module, "fit")


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_the_main_process_must_be_able_to_take_the_last_model_over(tmp_path, start_method):
    with pytest.raises(MisconfigurationException, match=r'level 1 that it was given.* Use start_method="popen"'):
        set_up(tmp_path, MultiLevelTraining(start_level=1), start_method)
    with pytest.warns(UserWarning, match="last phase is at level 1"):
        set_up(tmp_path, MultiLevelTraining(start_level=1, phases=[Phase(0, 4), Phase(1)]), start_method)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="start_level is 2; levels are 0"):
        MultiLevelTraining(start_level=2)
    with pytest.raises(ValueError, match=r"alpha.* is 0.25, but with start_level 1 .*no trained larger model"):
        MultiLevelTraining(start_level=1, preset="paper")
    with pytest.raises(ValueError, match=r'preset "correction" or "exact", without alpha'):
        MultiLevelTraining(start_level=1, alpha=0.5)
    with pytest.raises(ValueError, match=r"fresh_std is -1.0"):
        MultiLevelTraining(start_level=1, fresh_std=-1.0)
    swin = anatomy_of(make_model("swin", heads=2, head_dim=4, ffn=8, blocks=1))
    with pytest.raises(AnatomyError, match="2 stages"):
        grown_size(swin, [(2, [1, 2, 1])])


def test_what_is_drawn_does_not_depend_on_the_device_of_the_run():
    """A resize makes what it makes on that device, which a generator of the CPU cannot serve."""
    stored = StoredLevels(Interpolation(1.0, 1.0), "project", 0.02)
    anatomy = anatomy_of(make_model("gpt2-tied", **SIZE))
    origins = dict(make_model("gpt2-tied", **SIZE).named_parameters())
    drawn = stored._fresh(anatomy, origins, 0)
    with torch.device("meta"):
        again = stored._fresh(anatomy, origins, 0)
    assert drawn.keys() == again.keys()
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)

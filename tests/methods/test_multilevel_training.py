"""V-cycles through Trainer.fit: sizes, learning rates and optimizers as configured, at every step."""

from __future__ import annotations

import copy
import functools
import gc
import io
import weakref

import lightning.pytorch as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel import Level, MultiLevelMixin, MultiLevelTraining, Phase
from lit_accel.anatomy import anatomy_of, compile_blocks
from lit_accel.methods.multilevel.phases import lr_factor, phase_at, resolve_phases, v_cycle
from tests.training import TinyModule, loader, make_trainer

TWO = [Phase(0, 3), Phase(1, 6), Phase(0)]
THREE = [Phase(0, 2), Phase(1, 2), Phase(2, 4), Phase(1, 2), Phase(0)]
STEPS = 14


class Watch(L.Callback):
    """Looks at everything that must follow the model, before every optimizer step."""

    def __init__(self) -> None:
        self.depths: list[int] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        live = {id(parameter) for parameter in pl_module.parameters()}
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert live == held
        assert trainer.optimizers[0] is optimizer or trainer.optimizers[0].optimizer is optimizer
        assert all(parameter.grad is not None for parameter in pl_module.parameters())
        assert pl_module.training and pl_module.net.training
        embedding = pl_module.net.get_input_embeddings().weight
        assert pl_module.net.get_output_embeddings().weight is embedding
        self.depths.append(pl_module.net.config.n_layer)


def expected_depths(phases, steps=STEPS, repeat=1):
    resolved = resolve_phases(phases, 3, steps)
    return [4 // 2 ** resolved[phase_at(resolved, step)].level for step in range(steps)]


def fit(tmp_path, callback, *, module=None, steps=STEPS, watch=None, num_samples=256, **kwargs):
    module = module or TinyModule()
    watch = watch or Watch()
    trainer = make_trainer(tmp_path, callbacks=[callback, watch], max_steps=steps, **kwargs)
    trainer.fit(module, loader(num_samples=num_samples))
    return module, watch, trainer


@pytest.mark.parametrize("preset", ["correction", "paper", "exact"])
@pytest.mark.parametrize("optimizer_state", ["reset", "project", "second_moment"])
@pytest.mark.parametrize(("levels", "phases"), [(1, TWO), (2, THREE)], ids=["two-levels", "three-levels"])
def test_the_model_has_the_configured_size_at_every_step(tmp_path, preset, optimizer_state, levels, phases):
    callback = MultiLevelTraining([Level()] * levels, phases, preset, optimizer_state=optimizer_state)
    _, watch, trainer = fit(tmp_path, callback)
    assert watch.depths == expected_depths(phases)
    assert len(trainer.strategy.resizes) == len(phases) - 1


def test_training_learns_through_a_cycle(tmp_path):
    module, _, _ = fit(tmp_path, MultiLevelTraining(), steps=60)
    first, last = sum(module.losses[:5]) / 5, sum(module.losses[-5:]) / 5
    assert last < first - 1


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "onecycle"])
def test_learning_rates_continue_as_if_nothing_had_happened(tmp_path, scheduler):
    plain = TinyModule(scheduler=scheduler)
    make_trainer(tmp_path, max_steps=STEPS).fit(plain, loader())
    module = TinyModule(scheduler=scheduler)
    fit(tmp_path, MultiLevelTraining(phases=TWO), module=module)
    assert module.rates == plain.rates


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "onecycle"])
@pytest.mark.parametrize("policy", ["continue", "rewarm"])
def test_learning_rates_are_multiplied_on_top_of_any_schedule(tmp_path, scheduler, policy):
    plain = TinyModule(scheduler=scheduler)
    make_trainer(tmp_path, max_steps=STEPS).fit(plain, loader())
    phases = [Phase(0, 3), Phase(1, 6, lr_scale=4.0), Phase(0)]
    module = TinyModule(scheduler=scheduler)
    fit(tmp_path, MultiLevelTraining(phases=phases, learning_rate=policy, num_rewarm_steps=3), module=module)
    ramp = [1 / 3, 2 / 3, 1] if policy == "rewarm" else [1, 1, 1]
    factors = [1, 1, 1, *(4 * f for f in ramp), 4, 4, 4, *ramp, 1, 1]
    assert module.rates == pytest.approx([rate * f for rate, f in zip(plain.rates, factors, strict=True)], rel=1e-12)


def test_the_paper_policy_gives_each_phase_its_own_schedule(tmp_path):
    module = TinyModule(lr=1.0, optimizer=torch.optim.SGD)
    phases = [Phase(0, 4), Phase(1, 5, lr_scale=2.0), Phase(0)]
    fit(tmp_path, MultiLevelTraining(phases=phases, learning_rate="paper"), module=module)
    up, small = [0.25, 0.5, 0.75, 1.0], [2.0, 1.6, 1.2, 0.8, 0.4]
    assert module.rates == pytest.approx([*up, *small, 1.0, 0.8, 0.6, 0.4, 0.2])


class CopyInMidRun(L.Callback):
    """Copies the module in its small phase; whoever copies the Trainer must copy this too."""

    def __init__(self, copy) -> None:
        self.copy, self.twin = copy, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 5 and self.twin is None:
            self.twin = self.copy(pl_module)

    def __reduce_ex__(self, protocol):
        raise AssertionError("the Trainer is copied")


class StepsItsScheduler(TinyModule):
    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step()


def through_a_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copying", [copy.deepcopy, through_a_file])
@pytest.mark.parametrize("kind", [TinyModule, StepsItsScheduler])
@pytest.mark.parametrize("policy", ["paper", "rewarm", "continue"])
def test_a_module_is_copied_in_mid_run_without_the_trainer(tmp_path, copying, kind, policy):
    phases = [Phase(0, 3), Phase(1, 6, lr_scale=0.5), Phase(0)]
    watch, module = CopyInMidRun(copying), kind(scheduler=None if policy == "paper" else "cosine")
    method = MultiLevelTraining([Level(merge_batches=2)], phases, learning_rate=policy)
    fit(tmp_path, method, watch=watch, module=module, accumulate_grad_batches=2)
    assert "lr_scheduler_step" not in vars(module)
    twin = watch.twin
    assert twin.lr_scheduler_step.__self__ is twin
    assert twin.lr_scheduler_step.__func__ is kind.lr_scheduler_step
    assert twin.net.config.n_layer == 2
    # It is trained as a module that nobody has copied.
    twin.rates.clear()
    make_trainer(tmp_path, max_steps=STEPS).fit(twin, loader())
    plain = kind(scheduler=module.scheduler)
    make_trainer(tmp_path, max_steps=STEPS).fit(plain, loader())
    assert twin.rates == plain.rates


@pytest.mark.parametrize("setting", ["accumulate", "clip", "bf16-mixed", "bf16-true", "compile", "epochs"])
def test_transitions_under_other_settings(tmp_path, setting):
    module, kwargs = TinyModule(), {}
    if setting == "accumulate":
        # Two epochs of 21 micro-batches: seven windows each.
        kwargs = {"accumulate_grad_batches": 3, "num_samples": 168}
    elif setting == "clip":
        kwargs = {"gradient_clip_val": 0.1}
    elif setting == "compile":
        compile_blocks(module.net, backend="aot_eager")
    elif setting == "epochs":
        kwargs = {"num_samples": 40}
    else:
        kwargs = {"precision": setting}
    _, watch, trainer = fit(tmp_path, MultiLevelTraining([Level()] * 2, THREE), module=module, **kwargs)
    assert watch.depths == expected_depths(THREE)
    assert torch.isfinite(torch.tensor(module.losses)).all()
    if setting == "compile":
        assert all(block._compiled_call_impl is not None for block in module.net.transformer.h)
        assert not any("_orig_mod" in key for key in module.state_dict())
    if setting == "bf16-true":
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_compiled_blocks_train_like_eager_ones(tmp_path):
    eager, _, _ = fit(tmp_path, MultiLevelTraining(phases=TWO))
    compiled = TinyModule()
    compile_blocks(compiled.net, backend="aot_eager")
    fit(tmp_path, MultiLevelTraining(phases=TWO), module=compiled)
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-3)


@pytest.mark.parametrize("name", ["bert-mlm", "llama-gqa-tied", "qwen3"])
def test_other_families(tmp_path, name):
    class CountParameters(L.Callback):
        counts: list[int] = []  # noqa: RUF012

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.counts.append(anatomy_of(pl_module.net).size.depths[0])

    callback = MultiLevelTraining([Level()] * 2, THREE)
    watch = CountParameters()
    watch.counts = []
    module = TinyModule(name)
    make_trainer(tmp_path, callbacks=[callback, watch], max_steps=STEPS).fit(module, loader())
    assert watch.counts == expected_depths(THREE)


def test_a_single_phase_is_ordinary_training_bitwise(tmp_path):
    plain = TinyModule(scheduler="cosine")
    make_trainer(tmp_path, max_steps=STEPS, strategy="auto").fit(plain, loader())
    module = TinyModule(scheduler="cosine")
    make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=[Phase(0)])], max_steps=STEPS).fit(module, loader())
    for key, value in plain.state_dict().items():
        assert torch.equal(module.state_dict()[key], value)


def test_an_untrained_small_level_changes_nothing(tmp_path):
    """With a learning rate of zero the correction rule must give back the stored model bitwise."""
    module = TinyModule(optimizer=torch.optim.SGD, lr=0.0)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    fit(tmp_path, MultiLevelTraining([Level()] * 2, THREE), module=module)
    for key, value in before.items():
        assert torch.equal(module.state_dict()[key], value)


def test_the_old_model_and_optimizer_are_freed(tmp_path):
    class Remember(L.Callback):
        old: list[weakref.ref] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step in (3, 9):  # the last step of a phase
                self.old.append(weakref.ref(pl_module.net))
                self.old.append(weakref.ref(trainer.optimizers[0]))

    remember = Remember()
    remember.old = []
    trainer = make_trainer(tmp_path, callbacks=[remember, MultiLevelTraining(phases=TWO)], max_steps=STEPS)
    trainer.fit(TinyModule(), loader())
    gc.collect()
    assert len(remember.old) == 4
    assert all(reference() is None for reference in remember.old)


def test_the_mixin_brings_the_method_along(tmp_path):
    class Module(MultiLevelMixin, TinyModule):
        pass

    module = Module(multilevel_phases=TWO)
    watch = Watch()
    make_trainer(tmp_path, callbacks=[watch], max_steps=STEPS).fit(module, loader())
    assert watch.depths == expected_depths(TWO)


def test_frozen_parameters_stay_frozen(tmp_path):
    module = TinyModule()
    module.net.transformer.wpe.weight.requires_grad_(False)
    before = module.net.transformer.wpe.weight.clone()

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            assert not pl_module.net.transformer.wpe.weight.requires_grad

    callback = MultiLevelTraining(phases=TWO, optimizer_state="project")
    make_trainer(tmp_path, callbacks=[callback, Look()], max_steps=STEPS).fit(module, loader())
    assert torch.equal(module.net.transformer.wpe.weight, before)


def test_the_final_model_is_an_ordinary_hugging_face_model(tmp_path):
    from transformers import GPT2LMHeadModel

    module, _, _ = fit(tmp_path, MultiLevelTraining(phases=TWO))
    module.net.save_pretrained(tmp_path / "model")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    assert module.net.config.to_dict() == TinyModule().net.config.to_dict() | {
        "architectures": ["GPT2LMHeadModel"],
        "dtype": module.net.config.to_dict()["dtype"],
    }
    for key, value in module.net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_a_module_that_builds_its_model_in_configure_model(tmp_path):
    class Lazy(TinyModule):
        def __init__(self):
            super().__init__()
            del self.net

        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = TinyModule().net

    _, watch, _ = fit(tmp_path, MultiLevelTraining(phases=TWO), module=Lazy())
    assert watch.depths == expected_depths(TWO)


def test_a_module_that_makes_its_data_in_setup(tmp_path):
    class Own(TinyModule):
        def setup(self, stage):
            self.data = loader(num_samples=56)

        def train_dataloader(self):
            return self.data

    watch = Watch()
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=TWO), watch], max_epochs=2)
    trainer.fit(Own())
    assert watch.depths == expected_depths(TWO)


def test_training_flags_of_submodules_are_kept(tmp_path):
    module = TinyModule()
    module.net.transformer.h.eval()
    make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=TWO)], max_steps=STEPS).fit(module, loader())
    assert module.net.training
    assert not any(part.training for part in module.net.transformer.h.modules())


@pytest.mark.parametrize("preset", ["paper", "exact"])
def test_frozen_parameters_are_not_moved_by_the_rule(tmp_path, preset):
    module = TinyModule()
    module.net.transformer.wpe.weight.requires_grad_(False)
    before = module.net.transformer.wpe.weight.clone()
    make_trainer(tmp_path, callbacks=[MultiLevelTraining(phases=TWO, preset=preset)], max_steps=STEPS).fit(
        module, loader()
    )
    assert torch.equal(module.net.transformer.wpe.weight, before)


def test_a_callback_can_be_used_again(tmp_path):
    callback = MultiLevelTraining(phases=TWO)
    fit(tmp_path, callback)
    _, watch, _ = fit(tmp_path, callback)
    assert watch.depths == expected_depths(TWO)


def test_a_ramp_follows_a_transition_and_nothing_else():
    resolved = resolve_phases([Phase(0, 4), Phase(1, 4), Phase(1, 4), Phase(0)], 2, 16)
    factors = [lr_factor(resolved, step, "rewarm", 2) for step in range(16)]
    assert factors == [1, 1, 1, 1, 0.5, 1, 1, 1, 1, 1, 1, 1, 0.5, 1, 1, 1]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    extra=st.integers(1, 30),
    policy=st.sampled_from(["continue", "rewarm", "paper"]),
)
def test_phases_cover_the_run_without_gaps(lengths, extra, policy):
    phases = [Phase(index % 2, length) for index, length in enumerate(lengths)] + [Phase(0)]
    total = sum(lengths) + extra
    resolved = resolve_phases(phases, 2, total)
    assert [phase.start for phase in resolved] == [0, *(phase.end for phase in resolved[:-1])]
    assert resolved[-1].end == total
    assert [phase.end - phase.start for phase in resolved] == [*lengths, extra]
    assert all(lr_factor(resolved, step, policy, 5) > 0 for step in range(total))
    assert phase_at(resolved, total + 100) == len(resolved) - 1


@given(num_levels=st.integers(1, 4), num_steps=st.integers(100, 100_000))
def test_the_default_cycle_goes_down_and_up_once(num_levels, num_steps):
    resolved = resolve_phases(v_cycle(num_levels), num_levels + 1, num_steps)
    levels = [phase.level for phase in resolved]
    assert levels == [*range(num_levels), *range(num_levels, -1, -1)]
    small = sum(phase.end - phase.start for phase in resolved[num_levels:-1])
    assert small == pytest.approx(num_steps / 2, abs=num_levels)


def test_a_training_step_that_keeps_the_former_model_is_stopped(tmp_path):
    """Nothing of the new one would be trained, without a word."""

    class Keeps(TinyModule):
        def __init__(self):
            super().__init__()
            self.call = functools.partial(self.net)

        def loss(self, ids):
            logits = self.call(input_ids=ids).logits
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    module = Keeps()
    cycle = MultiLevelTraining([Level()], [Phase(0, 4), Phase(1, 8), Phase(0)])
    with pytest.raises(MisconfigurationException, match=r"none of its parameters has had a gradient.*Call self\.net"):
        make_trainer(tmp_path, callbacks=[cycle], max_steps=20).fit(module, loader())
    assert len(module.losses) <= 4 + 3


def test_skipped_steps_after_a_change_of_size_are_no_reason_to_stop(tmp_path):
    class Skips(TinyModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if self.trainer.global_step in (4, 5) else loss

    cycle = MultiLevelTraining([Level()], [Phase(0, 4), Phase(1, 8), Phase(0)])
    module = Skips()
    make_trainer(tmp_path, callbacks=[cycle], max_steps=20).fit(module, loader())
    assert len(module.losses) == 20

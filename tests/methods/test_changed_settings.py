"""What may change between a checkpoint and its resume does, and is said; what may not is refused by its name."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from lit_accel import (
    Composition,
    ComputeLedger,
    Level,
    MixedSparsityTraining,
    MultiLevelTraining,
    Phase,
    ProgressiveLayerDropping,
    RandomLTD,
    ResizableMixin,
    SensitivityLayerDropping,
)
from lit_accel.anatomy import AnatomyError
from lit_accel.stored_state import compare_rules
from tests.training import TinyModule, loader, make_trainer

STEPS, STOPPED = 12, 6
METHODS: dict[str, tuple[type[L.Callback], dict[str, Any]]] = {
    "cycle": (MultiLevelTraining, {"phases": [Phase(0, 2), Phase(1, 6), Phase(0)]}),
    "ramps": (
        MultiLevelTraining,
        {"phases": [Phase(0, 2), Phase(1, 6), Phase(0)], "learning_rate": "rewarm", "num_rewarm_steps": 3},
    ),
    "merged": (
        MultiLevelTraining,
        {"levels": [Level(merge_batches=2)], "phases": [Phase(0, 2), Phase(1, 9), Phase(0)]},
    ),
    "growth": (MultiLevelTraining, {"start_level": 1, "phases": [Phase(1, 9), Phase(0)]}),
    "pld": (ProgressiveLayerDropping, {}),
    "sbld": (SensitivityLayerDropping, {"max_overhead": 1.0, "warmup": 2, "measure_every": 2, "kept": 0.9}),
    "ltd": (RandomLTD, {"start_tokens": 4, "quantum": 1}),
    "mst": (MixedSparsityTraining, {"stages": [(0, 0.0), (2, 0.5), (9, 0.0)], "update_every": 2, "quantum": 2}),
    "rules": (Composition, {"dense_warmup": 2}),
}
# Of each method: what may change, and what it is called in the warning.
MAY: list[tuple[str, dict[str, Any], str]] = [
    ("cycle", {"alpha": 0.5}, "multi-level training: coarse 1.0 (now 0.5), fine 0.0 (now 0.5)"),
    ("cycle", {"optimizer_state": "reset"}, "multi-level training: optimizer_state project (now reset)"),
    ("cycle", {"learning_rate": "rewarm"}, "multi-level training: learning_rate continue (now rewarm)"),
    ("cycle", {"phases": [Phase(0, 2), Phase(1, 7), Phase(0)]}, "multi-level training: phases [[0, 0, 2], "),
    (
        "cycle",
        {"phases": [Phase(0, 2), Phase(1, 6, lr_scale=4.0), Phase(0)]},
        "multi-level training: lr_scale [1.0, 1.0, 1.0] (now [1.0, 4.0, 1.0]). ",
    ),
    ("ramps", {"num_rewarm_steps": 5}, "multi-level training: num_rewarm_steps 3 (now 5). "),
    ("merged", {"levels": [Level()]}, "multi-level training: merge_batches [2] (now [1]). "),
    ("growth", {"fresh_std": 0.1}, "multi-level training: fresh_std 0.02 (now 0.1). "),
    ("pld", {"theta": 0.8}, "layer dropping: theta 0.5 (now 0.8)"),
    ("pld", {"seed": 3}, "layer dropping: seed 0 (now 3)"),
    ("pld", {"pinned": [1]}, "layer dropping: pinned [] (now [1])"),
    ("pld", {"sampler": "bernoulli"}, "layer dropping: sampler systematic (now bernoulli)"),
    ("sbld", {"kept": 0.95}, "layer dropping: kept 0.9 (now 0.95)"),
    ("sbld", {"estimator": "taylor"}, "layer dropping: estimator ablate (now taylor)"),
    ("sbld", {"protected": 0.0}, "layer dropping: protected 0.15 (now 0.0)"),
    ("ltd", {"start_tokens": 6}, "token dropping: start_tokens 4 (now 6)"),
    ("ltd", {"scope": "route"}, "token dropping: scope layer (now route)"),
    ("ltd", {"growth": 10}, "token dropping: growth_steps "),
    ("ltd", {"seed": 7}, "token dropping: seed 0 (now 7)"),
    ("mst", {"update_every": 3}, "mixed sparsity: update_every 2 (now 3)"),
    ("mst", {"drop_fraction": 0.5}, "mixed sparsity: drop_fraction 0.3 (now 0.5)"),
    ("mst", {"stages": [(0, 0.0), (2, 0.5), (10, 0.0)]}, "mixed sparsity: stages "),
    ("mst", {"execution": "masked"}, "mixed sparsity: execution compact (now masked)"),
    (
        "mst",
        {"attention_pattern": "window", "attention_window": 4},
        "mixed sparsity: attention_pattern None (now window)",
    ),
    ("rules", {"dense_warmup": 1}, "composition: dense_warmup 2 (now 1)"),
]
MAY_NOT: list[tuple[str, dict[str, Any], str]] = [
    ("cycle", {"width_grouping": "adjacent"}, r"width_grouping block \(now adjacent\)"),
    ("cycle", {"depth_grouping": "stack"}, r"depth_grouping adjacent \(now stack\)"),
    ("cycle", {"depth_mode": "ode"}, r"depth_mode avg \(now ode\)"),
    ("cycle", {"levels": [Level(1, 2)]}, "none of the configured levels|levels"),
    ("mst", {"ffn_units": "element"}, r"ffn_units neuron \(now element\)"),
    ("mst", {"attention_units": "dense"}, r"attention_units head \(now dense\)"),
    ("mst", {"head_units": "element"}, r"head_units dense \(now element\)"),
]


def run(folder: Path, name: str, changed: dict[str, Any], resume: Path | None = None, **options: Any) -> TinyModule:
    kind, settings = METHODS[name]
    callbacks: list[L.Callback] = [kind(**{**settings, **changed}), ComputeLedger(print_table=False)]
    if name == "rules":
        callbacks.append(ProgressiveLayerDropping())
    if resume is None:
        callbacks.append(ModelCheckpoint(folder, filename="{step}", every_n_train_steps=STOPPED, save_top_k=-1))
    options = {"max_steps": STEPS, "enable_checkpointing": resume is None, **options}
    if name == "merged":
        options["accumulate_grad_batches"] = 2
    module = TinyModule()
    make_trainer(folder, callbacks=callbacks, **options).fit(module, loader(num_samples=8 * STOPPED), ckpt_path=resume)
    return module


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Checkpoints of each method from mid-run."""
    folder = tmp_path_factory.mktemp("stopped")
    for name in METHODS:
        run(folder / name, name, {})
    return {name: folder / name / f"step={STOPPED}.ckpt" for name in METHODS}


def said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(each.message) for each in caught if "other rules of" in str(each.message)]


@pytest.mark.parametrize(
    ("name", "changed", "message"), MAY, ids=lambda value: next(iter(value)) if isinstance(value, dict) else None
)
def test_what_may_change_does_and_is_said(tmp_path, stopped, name, changed, message):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = run(tmp_path, name, changed, stopped[name])
    (words,) = said(caught)
    assert words.startswith(f"The checkpoint was trained with other rules of {message}")
    assert words.endswith("Those of now hold.")
    assert len(module.losses) == (STEPS - STOPPED) * module.trainer.accumulate_grad_batches


@pytest.mark.parametrize(
    ("name", "changed", "message"), MAY_NOT, ids=lambda value: next(iter(value)) if isinstance(value, dict) else None
)
def test_what_may_not_is_refused_by_name(tmp_path, stopped, name, changed, message):
    module = TinyModule()
    with pytest.raises((MisconfigurationException, AnatomyError), match=message) as caught:
        module = run(tmp_path, name, changed, stopped[name])
    assert "lit_accel" in str(caught.traceback[-1].path)
    assert "trained with" in str(caught.value)
    assert not module.losses


@pytest.mark.parametrize("name", METHODS)
def test_what_has_not_changed_is_not_spoken_of(tmp_path, stopped, name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tmp_path, name, {}, stopped[name])
    assert not said(caught)


@pytest.mark.parametrize("name", ["pld", "ltd", "mst"])
def test_a_longer_run_is_one_with_other_rules_where_they_depend_on_its_length(tmp_path, stopped, name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = run(tmp_path, name, {}, stopped[name], max_steps=STEPS + 3)
    assert len(module.losses) == STEPS + 3 - STOPPED
    assert bool(said(caught)) is (name != "mst")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_can_be_added(tmp_path, dense, name):
    assert run(tmp_path, name, {}, dense).trainer.global_step == STEPS


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A checkpoint of a run without a method."""
    folder = tmp_path_factory.mktemp("dense")
    trainer = make_trainer(folder, strategy="auto", max_steps=STOPPED)
    trainer.fit(TinyModule(), loader(num_samples=8 * STOPPED))
    trainer.save_checkpoint(folder / "dense.ckpt")
    return folder / "dense.ckpt"


def test_settings_of_the_optimizer_that_are_ignored_are_said(tmp_path):
    """Lightning takes up those of the checkpoint, without a word."""

    def fit(lr: float, weight_decay: float, num_steps: int, resume: Path | None = None) -> L.Trainer:
        class Module(TinyModule):
            def configure_optimizers(self):
                optimizer = torch.optim.AdamW(self.parameters(), lr, weight_decay=weight_decay)
                scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
                return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        trainer = make_trainer(tmp_path, callbacks=[ProgressiveLayerDropping()], strategy="auto", max_steps=num_steps)
        trainer.fit(Module(), loader(num_samples=8 * STOPPED), ckpt_path=resume)
        return trainer

    fit(0.01, 0.1, STOPPED).save_checkpoint(tmp_path / "end.ckpt")
    with pytest.warns(
        UserWarning, match="are ignored.*initial_lr 0.02.*checkpoint has 0.01.*weight_decay 0.2.*has 0.1"
    ):
        trainer = fit(0.02, 0.2, STEPS, tmp_path / "end.ckpt")
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(0.01, 0.1, STEPS, tmp_path / "end.ckpt")
    assert not any("are ignored" in str(each.message) for each in caught)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)], ids=["betas", "sgd"])
@pytest.mark.parametrize("scheduler", ["one cycle", "cyclic"])
def test_a_momentum_that_a_schedule_moves_is_no_setting(tmp_path, optimizer, scheduler):
    """It is one of the present step, as the learning rate is; its two ends are settings."""

    class Module(TinyModule):
        def __init__(self, base_momentum: float) -> None:
            super().__init__()
            self.base_momentum = base_momentum

        def configure_optimizers(self):
            made = optimizer(self.parameters(), lr=0.01)
            schedule = {
                "one cycle": partial(OneCycleLR, made, 0.01, total_steps=STEPS + 1),
                "cyclic": partial(CyclicLR, made, 0.001, 0.01, step_size_up=STEPS),
            }[scheduler](base_momentum=self.base_momentum, max_momentum=0.95)
            return [made], [{"scheduler": schedule, "interval": "step"}]

    def fit(base_momentum: float, num_steps: int, resume: Path | None = None) -> tuple[L.Trainer, list[str]]:
        trainer = make_trainer(tmp_path, callbacks=[ProgressiveLayerDropping()], strategy="auto", max_steps=num_steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(Module(base_momentum), loader(num_samples=8 * STOPPED), ckpt_path=resume)
        return trainer, [str(each.message) for each in caught if "are ignored" in str(each.message)]

    fit(0.85, STOPPED)[0].save_checkpoint(tmp_path / "end.ckpt")
    assert fit(0.85, STEPS, tmp_path / "end.ckpt")[1] == []
    (words,) = fit(0.8, STEPS, tmp_path / "end.ckpt")[1]
    assert "own: base_momentum 0.8 (the checkpoint has 0.85). To" in words


def test_a_small_model_without_what_would_grow_it_is_refused(tmp_path, stopped):
    class Own(ResizableMixin, TinyModule):
        pass

    trainer = make_trainer(tmp_path, callbacks=[ProgressiveLayerDropping()], strategy="auto", max_steps=STEPS)
    module = Own()
    with pytest.raises(MisconfigurationException, match="Give the Trainer the MultiLevelTraining"):
        trainer.fit(module, loader(), ckpt_path=stopped["cycle"])
    assert not module.losses


def test_nor_is_it_where_the_module_is_as_small_already(tmp_path, stopped):
    class Own(ResizableMixin, TinyModule):
        pass

    module = Own()
    # As load_from_checkpoint does.
    checkpoint = torch.load(stopped["cycle"], weights_only=True)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    trainer = make_trainer(tmp_path, strategy="auto", max_steps=STEPS)
    with pytest.raises(MisconfigurationException, match="Give the Trainer the MultiLevelTraining"):
        trainer.fit(module, loader(), ckpt_path=stopped["cycle"])
    assert not module.losses
    # For itself, as it advises.
    make_trainer(tmp_path, strategy="auto", max_steps=2).fit(module, loader())
    assert len(module.losses) == 2


def test_a_small_model_that_began_small_is_not_taken_for_a_shrunk_one(tmp_path, stopped):
    with (
        pytest.warns(UserWarning, match=r"other rules of multi-level training: start_level 1 \(now 0\)"),
        pytest.raises(MisconfigurationException, match=r"stored weights of level 0.* are not in the checkpoint"),
    ):
        run(tmp_path, "growth", {"start_level": 0}, stopped["growth"])


def test_lists_and_tuples_are_the_same_settings(recwarn):
    compare_rules({"levels": [[2, [1, 2]]]}, {"levels": [[2, (1, 2)]]}, "a method", fixed=["levels"])
    assert not recwarn.list
    with pytest.raises(MisconfigurationException, match="levels"):
        compare_rules({"levels": [[2, [1, 2]]]}, {"levels": [[2, (1, 3)]]}, "a method", fixed=["levels"])

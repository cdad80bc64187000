"""A run that is broken off says in what state it leaves the model, and runs of unclear length are refused."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel import (
    Composition,
    MixedSparsityTraining,
    MultiLevelTraining,
    ProgressiveLayerDropping,
    RandomLTD,
    SensitivityLayerDropping,
)
from tests.training import TinyModule, loader, make_trainer

METHODS = [
    MultiLevelTraining,
    ProgressiveLayerDropping,
    lambda: SensitivityLayerDropping(kept=0.9, protected=0.0),
    lambda: RandomLTD(start_tokens=2, quantum=1),
    lambda: MixedSparsityTraining(update_every=1, quantum=1),
    lambda: Composition(dense_tail=0.2),
]
NAMES = ["multi-level", "pld", "sbld", "random-ltd", "mst", "composition"]


class Interrupt(L.Callback):
    """Ctrl-C in the middle of the run."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 10:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (METHODS[0], r"step 10 of 20 at level 1, with a smaller model than the full one"),
        (METHODS[4], r"has stopped at step 10 of 20, while units are off"),
    ],
    ids=["multi-level", "mst"],
)
def test_ctrl_c_leaves_no_smaller_model_in_silence(tmp_path, make, message):
    trainer = make_trainer(tmp_path, callbacks=[make(), Interrupt()], max_steps=20)
    with pytest.warns(UserWarning, match=message), pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(TinyModule(), loader(num_samples=80))


@pytest.mark.parametrize("make", METHODS, ids=NAMES)
def test_epochs_of_changing_steps_are_no_length(tmp_path, make):
    callbacks = [make(), GradientAccumulationScheduler({0: 1, 1: 4})]
    with pytest.raises(MisconfigurationException, match=r"GradientAccumulationScheduler.* max_steps and max_epochs=-1"):
        make_trainer(tmp_path, callbacks=callbacks, max_steps=-1, max_epochs=3).fit(TinyModule(), loader())


def test_a_number_of_steps_is(tmp_path):
    callbacks = [RandomLTD(start_tokens=2, quantum=1), GradientAccumulationScheduler({0: 1, 1: 4})]
    trainer = make_trainer(tmp_path, callbacks=callbacks, max_steps=8, max_epochs=-1)
    trainer.fit(TinyModule(), loader())
    assert trainer.global_step == 8

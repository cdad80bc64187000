"""What is most likely a mistake, and is allowed: it is said."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from lit_accel import MixedSparsityTraining
from lit_accel.data import TextDataModule
from lit_accel.tasks import CausalLM, WarmupDecay
from tests.bad_input.harness import TEXT
from tests.training import TinyModule, loader, make_trainer


def test_updates_that_never_come(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[MixedSparsityTraining(update_every=100)], max_steps=20, strategy="auto")
    with pytest.warns(UserWarning, match=r"No unit will ever be exchanged.*update_every=100"):
        trainer.fit(TinyModule(), loader())


def test_no_updates_that_are_meant(tmp_path, recwarn):
    callback = MixedSparsityTraining(update_every=100, drop_fraction=0)
    make_trainer(tmp_path, callbacks=[callback], max_steps=20, strategy="auto").fit(TinyModule(), loader())
    assert not any("exchanged" in str(warning.message) for warning in recwarn)


def test_a_warm_up_longer_than_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 8}
    task = CausalLM("gpt2", overrides=sizes, vocab_size=262, lr_scheduler=partial(WarmupDecay, num_warmup_steps=30))
    data = TextDataModule("text.txt", tokenizer="bytes", block_size=8, batch_size=2)
    with pytest.warns(UserWarning, match="never reaches its peak"):
        make_trainer(tmp_path, max_steps=2).fit(task, data)

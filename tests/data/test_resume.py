"""Interrupted after any batch, validation or epoch, training goes on with exactly the next batch."""

from __future__ import annotations

import os

import lightning.pytorch as L
import pytest
import torch

from lit_accel.data import TextDataModule
from tests.data.saving import SaveAlways
from tests.distributed.launch import CONTEXT
from tests.ports import free_port
from tests.training import make_trainer

# Fourteen windows, seven batches an epoch: accumulation over three does not divide it.
DATA = {"source": __file__, "tokenizer": "bytes", "max_bytes": 1100, "block_size": 60, "batch_size": 2}
DATA["val_fraction"] = 0.15


class Recorder(L.LightningModule):
    """Remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[int, ...]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(tuple(torch.cat([batch["input_ids"], batch["labels"]]).flatten().tolist()))
        return self.layer(batch["input_ids"].float().view(-1, 1)).mean() * 0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAtTheEnd(L.Callback):
    """Writes a checkpoint when training is over, whatever ended it."""

    def __init__(self, folder) -> None:
        self.path = f"{folder}/end.ckpt"

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


class FailAndSave(L.Callback):
    """Breaks off inside of a batch, and saves as `ModelCheckpoint(save_on_exception=True)` does."""

    def __init__(self, folder, batch: int) -> None:
        self.path = f"{folder}/exception.ckpt"
        self.batch = batch

    def on_before_backward(self, trainer, pl_module, loss):
        if len(pl_module.seen) == self.batch + 1:
            raise ConnectionError

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.path)


def run(folder, *, checkpoint=None, callbacks=(), workers=0, devices=1, **kwargs):
    module = Recorder()
    data = TextDataModule(**DATA, objective="masked", num_workers=workers, cache_dir=folder / "cache")
    trainer = make_trainer(
        folder,
        callbacks=callbacks,
        strategy="ddp" if devices > 1 else "auto",
        devices=devices,
        val_check_interval=3,
        num_sanity_val_steps=0,
        **kwargs,
    )
    trainer.fit(module, data, ckpt_path=checkpoint)
    return module.seen


# In mid-epoch, around a validation, and on both sides of the end of an epoch.
TELLING = (3, 6, 7, 8)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("length", [{"max_epochs": 2}, {"max_steps": 5, "max_epochs": -1}], ids=["epochs", "steps"])
def test_from_every_checkpoint(tmp_path, accumulate, length):
    # Eleven batches are four steps of three and one of two: accumulation is cut short at the end of an epoch.
    length = {**length, "max_steps": 11} if accumulate == 1 and "max_steps" in length else length
    settings = {"accumulate_grad_batches": accumulate, **length}
    saver = SaveAlways(tmp_path)
    seen = run(tmp_path, callbacks=[saver], **settings)
    telling = {path: before for path, before in saver.batches_before.items() if before in TELLING}
    assert len(telling) == 7  # four batches, two validations, one epoch
    for path, batches_before in telling.items():
        assert run(tmp_path, checkpoint=path, **settings) == seen[batches_before:], path


@pytest.mark.parametrize("stop", [3, 7])
def test_a_run_that_max_steps_ended_can_be_made_longer(tmp_path, stop):
    saver = SaveAtTheEnd(tmp_path)
    whole = run(tmp_path, max_steps=10, max_epochs=-1)
    first = run(tmp_path, callbacks=[saver], max_steps=stop, max_epochs=-1)
    assert first + run(tmp_path, checkpoint=saver.path, max_steps=10, max_epochs=-1) == whole


@pytest.mark.parametrize("batch", [3, 6])
def test_a_batch_that_failed_is_tried_again(tmp_path, batch):
    whole = run(tmp_path, max_epochs=2)
    saver = FailAndSave(tmp_path, batch)
    with pytest.raises(ConnectionError):
        run(tmp_path, callbacks=[saver], max_epochs=2)
    assert run(tmp_path, checkpoint=saver.path, max_epochs=2) == whole[batch:]


def test_limited_epochs(tmp_path):
    saver = SaveAlways(tmp_path)
    settings = {"limit_train_batches": 4, "max_epochs": 2}
    seen = run(tmp_path, callbacks=[saver], **settings)
    for path, batches_before in saver.batches_before.items():
        if batches_before in (3, 4):
            assert run(tmp_path, checkpoint=path, **settings) == seen[batches_before:], path


def test_with_workers(tmp_path):
    saver = SaveAlways(tmp_path)
    seen = run(tmp_path, callbacks=[saver], workers=2, max_epochs=2)
    assert seen == run(tmp_path, max_epochs=2)
    for path, batches_before in saver.batches_before.items():
        if batches_before in (3, 7):
            assert run(tmp_path, checkpoint=path, workers=2, max_epochs=2) == seen[batches_before:], path


def rank_main(rank, port, folder, queue):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    saver = SaveAlways(folder)
    seen = run(folder, callbacks=[saver], devices=2, max_epochs=2)
    resumed = {
        path: (before, run(folder, checkpoint=path, devices=2, max_epochs=2))
        for path, before in saver.batches_before.items()
        if before in (2, 3)
    }
    queue.put((rank, seen, resumed))


@pytest.mark.processes
def test_on_two_processes(tmp_path):
    queue, port = CONTEXT.Queue(), free_port()
    ranks = [CONTEXT.Process(target=rank_main, args=(rank, port, tmp_path, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    results = sorted(queue.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
        assert process.exitcode == 0
    (_, first, first_resumed), (_, second, second_resumed) = results
    assert len(first) == len(second) == 2 * 3
    assert not set(first[:3]) & set(second[:3])
    for seen, resumed in ((first, first_resumed), (second, second_resumed)):
        assert resumed
        for before, got in resumed.values():
            assert got == seen[before:]


def test_another_tokenizer_is_refused(tmp_path):
    saver = SaveAlways(tmp_path)
    run(tmp_path, callbacks=[saver], max_epochs=1)
    data = TextDataModule(**{**DATA, "tokenizer": "bpe", "vocab_size": 300}, cache_dir=tmp_path / "cache")
    trainer = make_trainer(tmp_path, strategy="auto", max_epochs=2)
    with pytest.raises(ValueError, match="another tokenizer"):
        trainer.fit(Recorder(), data, ckpt_path=next(iter(saver.batches_before)))


def test_another_text_starts_the_epoch_again_and_says_so(tmp_path):
    saver = SaveAlways(tmp_path)
    run(tmp_path, callbacks=[saver], max_epochs=1)
    data = TextDataModule(**{**DATA, "max_bytes": 1500}, cache_dir=tmp_path / "cache")
    data.prepare_data()
    data.setup("fit")
    state = torch.load(next(iter(saver.batches_before)), weights_only=True)["TextDataModule"]
    assert state["samples"] > 0
    with pytest.warns(UserWarning, match="another text"):
        data.load_state_dict(state)
    assert data.state_dict()["samples"] == 0


@pytest.mark.parametrize(
    ("changes", "message"), [({"block_size": 30}, "windows of 60"), ({"seed": 3}, "another order")]
)
def test_another_order_of_other_windows_starts_the_epoch_again_and_says_so(tmp_path, changes, message):
    saver = SaveAlways(tmp_path)
    run(tmp_path, callbacks=[saver], max_epochs=1)
    module, data = (
        Recorder(),
        TextDataModule(**{**DATA, "objective": "masked", **changes}, cache_dir=tmp_path / "cache"),
    )
    trainer = make_trainer(tmp_path, strategy="auto", max_epochs=2)
    with pytest.warns(UserWarning, match=f"{message}.* starts at the beginning"):
        trainer.fit(module, data, ckpt_path=next(path for path, n in saver.batches_before.items() if n == 5))
    assert module.seen


@pytest.mark.parametrize("batch_size", [4, 5, 14])
@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_steps": 9, "max_epochs": -1}], ids=["epochs", "steps"])
def test_larger_batches_near_the_end_of_an_epoch(tmp_path, batch_size, length):
    """Fourteen windows, of which twelve were seen: no whole batch may be left, but other epochs are."""
    saver = SaveAlways(tmp_path)
    run(tmp_path, callbacks=[saver], max_epochs=1)
    path = next(path for path, before in saver.batches_before.items() if before == 6)
    module, data = Recorder(), TextDataModule(**{**DATA, "batch_size": batch_size}, cache_dir=tmp_path / "cache")
    make_trainer(tmp_path, strategy="auto", **length).fit(module, data, ckpt_path=path)
    assert len(module.seen) >= 14 // batch_size
    assert len({len(batch) for batch in module.seen}) == 1  # all of them whole
    if "max_steps" in length:
        assert len(module.seen) == 9 - 6


def test_evaluating_a_checkpoint_does_not_go_back_to_its_place_in_the_data(tmp_path):
    saver = SaveAlways(tmp_path)
    whole = run(tmp_path, max_epochs=3)
    module, data = Recorder(), TextDataModule(**DATA, objective="masked", cache_dir=tmp_path / "cache")
    trainer = make_trainer(tmp_path, strategy="auto", callbacks=[saver], max_epochs=2)
    trainer.fit(module, data)
    first = next(path for path, before in saver.batches_before.items() if before == 7 and "epoch" in path)
    trainer.validate(module, data, ckpt_path=first)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data)
    assert module.seen == whole


def test_evaluating_on_other_text_warns_of_nothing(tmp_path, recwarn):
    saver = SaveAlways(tmp_path)
    run(tmp_path, callbacks=[saver], max_epochs=1)
    data = TextDataModule(**{**DATA, "max_bytes": 1500}, cache_dir=tmp_path / "cache")
    trainer = make_trainer(tmp_path, strategy="auto", max_epochs=1)
    trainer.validate(Recorder(), data, ckpt_path=next(iter(saver.batches_before)))
    assert not [warning for warning in recwarn if "starts at the beginning" in str(warning.message)]


def test_without_a_trainer(tmp_path):
    data = TextDataModule(**DATA, cache_dir=tmp_path)
    data.prepare_data()
    data.setup("fit")
    first = [batch["input_ids"] for batch in data.train_dataloader()]
    data.set_position(0, samples=4)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in data.train_dataloader()]), torch.cat(first[2:]))

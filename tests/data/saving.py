"""Checkpoints to resume from, of every moment of a run."""

import lightning.pytorch as L


class SaveAlways(L.Callback):
    """Writes a checkpoint wherever Lightning's own callbacks may."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.batches_before: dict[str, int] = {}

    def save(self, trainer, module, when):
        path = f"{self.folder}/{when}-{len(module.seen)}.ckpt"
        trainer.save_checkpoint(path)
        self.batches_before[path] = len(module.seen)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.save(trainer, pl_module, "batch")

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, pl_module, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, pl_module, "epoch")

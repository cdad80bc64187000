"""What the tests of mixed sparsity training share: a module of any family, a small schedule, and which entries of a
model belong to a unit, written down by hand.
"""

from __future__ import annotations

from functools import partial

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

from lit_accel import MixedSparsityTraining
from tests.models import ZOO, make_model
from tests.training import TinyModule, Tokens, make_trainer
from tests.vision import IMAGE_SIZE, VISION_ZOO

# Dense, warm-up, ultra-sparsification, restoration, dense; of the 32 neurons of a block 24 and 16 are on, and 3 and 2
# of its 4 heads.
STAGES = [(0, 0.0), (3, 0.25), (6, 0.5), (14, 0.25), (19, 0.0)]
STEPS = 24
# Stages begin at 3, 6, 14 and 19; every second step between the first sparse stage and restoration.
EVENTS = [3, 4, 6, 8, 10, 12, 14, 19]
MST = {"stages": STAGES, "update_every": 2, "drop_fraction": 0.9, "quantum": 4, "block_size": 4, "attention_window": 3}
SIZE = {"heads": 4, "head_dim": 4, "ffn": 32}

NEURONS_AND_HEADS: dict = {}
ELEMENTS = {"ffn_units": "element", "attention_units": "element", "head_units": "element", "distribution": "er"}
N_OF_M = {"ffn_units": "2:4", "attention_units": "2:4"}
TILES = {"ffn_units": "block", "attention_units": "block"}
UNITS = {"neurons and heads": NEURONS_AND_HEADS, "elements": ELEMENTS, "2:4": N_OF_M, "tiles": TILES}


def method(**given) -> MixedSparsityTraining:
    return MixedSparsityTraining(**{**MST, **given})


class AnyFamily(TinyModule):
    """A user's module of any family. Data is taken by the batch's index, so that a run can go on within an epoch."""

    def __init__(
        self,
        name="gpt2-tied",
        blocks=2,
        make_optimizer=None,
        checkpointing=None,
        dropout=0.0,
        cache=True,
        **kwargs,
    ):
        is_vision = name in VISION_ZOO
        dtype = kwargs.setdefault("dtype", torch.float32)
        if "net" not in kwargs:
            size = {**SIZE, "blocks": 1 if "swin" in name else blocks, **({} if is_vision else {"vocab": 64})}
            kwargs["net"] = make_model(name, dtype=dtype, seed=kwargs.get("seed", 0), **size)
        super().__init__(**{"lr": 3e-3, **kwargs})
        self.is_vision = is_vision
        if checkpointing is not None:
            self.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        if not cache and hasattr(self.net, "config"):
            self.net.config.use_cache = False
        for module in self.net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        self.make_optimizer = make_optimizer or partial(torch.optim.AdamW, weight_decay=0.1)
        self.ids = Tokens(512).ids
        generator = torch.Generator().manual_seed(0)
        self.targets = torch.arange(512) % 5
        noise = torch.randn(512, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        self.images = (noise * 0.3 + self.targets[:, None, None, None] / 5).to(dtype)
        self.seen: list[float] = []

    def logits(self, rows):
        if not self.is_vision:
            return self.net(input_ids=self.ids[rows]).logits
        logits = self.net(self.images[rows])
        return logits[0] if isinstance(logits, tuple) else logits

    def loss(self, rows):
        if self.is_vision:
            return torch.nn.functional.cross_entropy(self.logits(rows), self.targets[rows])
        logits = self.logits(rows)
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[rows][:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        loss = self.loss((torch.arange(len(batch)) + len(batch) * batch_idx) % 512)
        self.seen.append(loss.item())
        return loss

    def predict_step(self, batch, batch_idx):
        return self.logits(batch)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters(), lr=self.lr)


def rows(num_batches=64, batch_size=8) -> DataLoader:
    return DataLoader(range(num_batches * batch_size), batch_size=batch_size)


def fit(folder, callbacks, module=None, *, data=None, resume=None, **options):
    L.seed_everything(0, verbose=False)
    module = AnyFamily() if module is None else module
    options = {"strategy": "auto", "max_steps": STEPS, "max_epochs": -1, **options}
    trainer = make_trainer(folder, callbacks=callbacks, **options)
    validation = rows(2) if "val_check_interval" in options else None
    trainer.fit(module, rows() if data is None else data, validation, ckpt_path=resume)
    return module


def assert_equal(mine, theirs):
    mine, theirs = (each if isinstance(each, dict) else each.state_dict() for each in (mine, theirs))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name


def assert_same_moments(mine, theirs):
    mine, theirs = (module.trainer.optimizers[0].state_dict()["state"] for module in (mine, theirs))
    assert mine.keys() == theirs.keys()
    for index, state in theirs.items():
        assert mine[index].keys() == state.keys()
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(mine[index][name]), torch.as_tensor(value)), (index, name)


# What belongs to a unit, by hand: parameters of a block, the dimension along which the units lie and how many times one
# after the other (queries, keys and values of a fused matrix). What comes out of a unit first, then what goes in.

OUT = {
    "gpt2": {"neurons": [("mlp.c_proj.weight", 0)], "heads": [("attn.c_proj.weight", 0)]},
    "llama": {"neurons": [("mlp.down_proj.weight", 1)], "heads": [("self_attn.o_proj.weight", 1)]},
    "bert": {"neurons": [("output.dense.weight", 1)], "heads": [("attention.output.dense.weight", 1)]},
    "vit": {"neurons": [("mlp.fc2.weight", 1)], "heads": [("attn.proj.weight", 1)]},
}
IN = {
    "gpt2": {
        "neurons": [("mlp.c_fc.weight", 1, 1), ("mlp.c_fc.bias", 0, 1)],
        "heads": [("attn.c_attn.weight", 1, 3), ("attn.c_attn.bias", 0, 3)],
    },
    "llama": {
        "neurons": [("mlp.gate_proj.weight", 0, 1), ("mlp.up_proj.weight", 0, 1)],
        "heads": [(f"self_attn.{name}_proj.weight", 0, 1) for name in "qkv"],
    },
    "bert": {
        "neurons": [("intermediate.dense.weight", 0, 1), ("intermediate.dense.bias", 0, 1)],
        "heads": [
            (f"attention.self.{name}.{kind}", 0, 1) for name in ("query", "key", "value") for kind in ("weight", "bias")
        ],
    },
    "vit": {
        "neurons": [("mlp.fc1.weight", 0, 1), ("mlp.fc1.bias", 0, 1)],
        "heads": [("attn.qkv.weight", 0, 3), ("attn.qkv.bias", 0, 3)],
    },
}
FAMILIES = {
    "gpt2-tied": "gpt2",
    "llama-gqa": "llama",
    "bert-mlm": "bert",
    "vit": "vit",
    "deit-distilled": "vit",
    "swin": "vit",
}
assert set(FAMILIES) <= set(ZOO) | set(VISION_ZOO)


def units_for(name: str) -> dict:
    """Of a SwinV2 no head can be switched off."""
    return {"attention_units": "dense"} if "swin" in name else {}


def _along(shape, dim, on, repeats=1):
    """Spread which units are on over a tensor of which each has an equal stretch."""
    stretch = on.repeat_interleave(shape[dim] // (repeats * len(on))).repeat(repeats)
    assert len(stretch) == shape[dim]
    return stretch.view([-1 if each == dim else 1 for each in range(len(shape))]).expand(shape)


def entries_on(name, tensors, masks, sides=("out", "in")):
    """Say which entries of neurons and heads are on.

    Args:
        name: The model of the zoo.
        tensors: Its parameters in whole, by name.
        masks: Which units are on, as the callback has them.
        sides: What comes out of units, what goes in, or both.

    Returns:
        A mask of each parameter that belongs to units.
    """
    found = {}
    for space, mask in masks.items():
        path, what = space.split(": ")
        of_family = FAMILIES[name]
        listed = [("out", suffix, dim, 1) for suffix, dim in OUT[of_family][what]]
        listed += [("in", *entry) for entry in IN[of_family][what]]
        for side, suffix, dim, repeats in listed:
            if side in sides:
                parameter = f"{path}.{suffix}"
                found[parameter] = _along(tensors[parameter].shape, dim, mask[0], repeats)
    return found


def whole(module):
    """Return the whole parameters, as checkpoints hold them; tied ones once."""
    state = module.net.state_dict()
    return {name: state[name].clone() for name, _ in module.net.named_parameters()}


def whole_moments(module, optimizer):
    """Return the whole optimizer state, as checkpoints hold it, by parameter's name."""
    names = [name for name, _ in module.net.named_parameters()]
    states = optimizer.state_dict()["state"]
    return {
        names[index]: {key: value.clone() for key, value in state.items() if torch.is_tensor(value) and value.ndim}
        for index, state in states.items()
    }


class Watch(L.Callback):
    """Notes after each optimizer step which units are on. Stands right of the method."""

    def __init__(self, of):
        self.of = of
        self.masks: dict[int, dict[str, torch.Tensor]] = {}
        self.digests: dict[int, int] = {}

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, *_):
        step = self.step
        if trainer.global_step == step:
            # Of several micro-batches the last one makes the step.
            return
        self.masks[step] = {name: mask.clone() for name, mask in self.of.masks.items()}
        self.digests[step] = self.of.digest

    @property
    def changes(self):
        """The steps in which a mask changed."""
        changed, before = [], None
        for step, masks in self.masks.items():
            old = {name: torch.ones_like(mask) for name, mask in masks.items()} if before is None else before
            if any(not torch.equal(old[name], mask) for name, mask in masks.items()):
                changed.append(step)
            before = masks
        return changed

    def num_on(self, step):
        return {name: mask.sum(1).tolist() for name, mask in self.masks[step].items()}

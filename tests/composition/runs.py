"""Whole runs of several methods: a module of any family, methods that fit into a short run, and what really ran."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from functools import partial

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

from lit_accel import (
    ComputeLedger,
    Level,
    MixedSparsityTraining,
    MultiLevelTraining,
    Phase,
    ProgressiveLayerDropping,
    RandomLTD,
    SensitivityLayerDropping,
)
from lit_accel.anatomy import anatomy_of
from lit_accel.compute import forward_flops, training_flops
from lit_accel.compute.active import active_of
from lit_accel.compute.flops import head_accountings
from lit_accel.compute.phases import phase_size
from lit_accel.compute.plan import Workload
from lit_accel.methods.compatibility import MST, MULTI_LEVEL, PLD, RANDOM_LTD, SBLD
from lit_accel.methods.layer_dropping.sensitivity import ablation_flops
from tests.methods.mixed_sparsity import AnyFamily
from tests.models import make_model
from tests.training import make_trainer
from tests.vision import VISION_ZOO

STEPS = 18
BATCH = 4
NUM_TOKENS = 12
SIZE = {"heads": 4, "head_dim": 4, "ffn": 32}
# Full, small, full. With units: sparse only when it is full again.
PHASES = [Phase(0, 3), Phase(1, 5), Phase(0)]
STAGES = [(0, 0.0), (3, 0.25), (6, 0.5), (12, 0.25), (16, 0.0)]
LATE_STAGES = [(0, 0.0), (9, 0.5), (14, 0.25), (16, 0.0)]

METHODS = {
    MULTI_LEVEL: lambda **given: MultiLevelTraining(
        **{"levels": [Level()], "phases": PHASES, "optimizer_state": "project", **given}
    ),
    PLD: lambda **given: ProgressiveLayerDropping(**{"theta": 0.5, "gamma": 0.5, **given}),
    SBLD: lambda **given: SensitivityLayerDropping(
        **{
            "kept": 0.75,
            "warmup": 1,
            "ramp": 1,
            "release": 2,
            "min_keep": 0.1,
            "protected": 0.0,
            "max_overhead": 1.0,
            "measure_every": 5,
            "num_batches": 2,
            **given,
        }
    ),
    RANDOM_LTD: lambda **given: RandomLTD(**{"start_tokens": 0.25, "growth": 14, "quantum": 1, **given}),
    MST: lambda **given: MixedSparsityTraining(
        **{"stages": STAGES, "update_every": 2, "drop_fraction": 0.9, "quantum": 4, **given}
    ),
}
NEUTRAL = {
    MULTI_LEVEL: partial(MultiLevelTraining, phases=[Phase(0)]),
    PLD: partial(ProgressiveLayerDropping, theta=1.0),
    SBLD: partial(SensitivityLayerDropping, kept=1.0),
    RANDOM_LTD: partial(RandomLTD, start_tokens=1.0),
    MST: partial(MixedSparsityTraining, stages=[(0, 0.0)]),
}


class Host(AnyFamily):
    """Six blocks of any family; of a SwinV2 two and eight. Notes in which states of the model it was measured."""

    def __init__(self, name="gpt2-tied", blocks=6, **kwargs):
        size = {**SIZE, "blocks": 4 if "swin" in name else blocks, **({} if name in VISION_ZOO else {"vocab": 64})}
        net = make_model(name, dtype=torch.float32, seed=kwargs.get("seed", 0), **size)
        super().__init__(name, **{"lr": 1e-2, "net": net, **kwargs})
        self.probes = []

    def training_step(self, batch, batch_idx):
        if torch.is_grad_enabled():
            return super().training_step(batch, batch_idx)
        self.probes.append((self.trainer.global_step, anatomy_of(self.net), active_of(self.net)))
        return self.loss((torch.arange(len(batch)) + len(batch) * batch_idx) % 512)


class Ran(L.Callback):
    """Sees from inside of the blocks which of them ran, and on how many tokens. Stands right of all methods."""

    def __init__(self):
        self.calls = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        net, rows, self.hooks = pl_module.net, {}, []
        anatomy = anatomy_of(net)
        call = {"step": trainer.global_step, "anatomy": anatomy, "rows": rows}
        self.calls.append(call)

        def note_call(_, args, kwargs):
            call.update(shape=anatomy.input_shape(args, kwargs), active=active_of(net))

        def note_rows(index, _, args):
            # A block that is skipped before any was run is run once without gradients, for the form of its output.
            if torch.is_grad_enabled():
                rows.setdefault(index, args[0].numel() // args[0].shape[-1])

        self.hooks.append(net.register_forward_pre_hook(note_call, with_kwargs=True))
        for index, block in enumerate(anatomy.blocks):
            norm = next(part for part in net.get_submodule(block.path).modules() if "Norm" in type(part).__name__)
            self.hooks.append(norm.register_forward_pre_hook(partial(note_rows, index)))

    def on_train_batch_end(self, trainer, pl_module, *_):
        for hook in self.hooks:
            hook.remove()
        self.calls[-1]["ends"] = trainer.global_step > self.calls[-1]["step"]

    @property
    def keep(self):
        """Which blocks ran, by step."""
        return {c["step"]: [index in c["rows"] for index in range(len(c["anatomy"].blocks))] for c in self.calls}

    @property
    def tokens(self):
        """Tokens of a sequence that each block ran on, by step."""
        return {
            c["step"]: [c["rows"].get(index, 0) // c["shape"][0] for index in range(len(c["anatomy"].blocks))]
            for c in self.calls
        }


def cost_of(call, **how):
    """Return what a batch costs: what is outside of the blocks, and each block on the tokens and units that it had."""
    anatomy, (num_sequences, num_tokens) = call["anatomy"], call["shape"]
    cost = partial(training_flops, anatomy, num_sequences, num_tokens, active=call["active"], **how)
    total = cost().outside_blocks
    for index, num_rows in call["rows"].items():
        is_whole = num_rows == anatomy.places[anatomy.blocks[index].place](num_sequences, num_tokens)
        total += cost(kept={} if is_whole else {index: num_rows // num_sequences}).blocks[index]
    return total


COUNTED = ("size", "steps", "tokens", "flops", "dense_flops")
# By three ways to count the head, which plans do not tell apart.
WITH_HEADS = (
    *COUNTED,
    "head_masked_flops",
    "head_dense_flops",
    "head_excluded_flops",
    "dense_head_excluded_flops",
)


def by_head(spent, anatomy, active, cost, num_calls=1):
    """Return what was spent, and by three ways to count the head: what a block left out, it left out in each of them.

    Args:
        spent: FLOPs of the calls.
        anatomy: The model.
        active: Which of its units were on.
        cost: Returns the FLOPs of a call of the model in which no block leaves anything out.
        num_calls: How often it was called.
    """
    flops = cost(anatomy, active=active)
    three = head_accountings(anatomy, flops, cost(anatomy), active)
    whole = {"flops": flops.total, **{f"head_{name}_flops": value for name, value in vars(three).items()}}
    return {name: spent + num_calls * (value - flops.total) for name, value in whole.items()}


def probe_costs(probes, units, shape):
    """Return what measurements cost, by step: each runs the model in whole and once for each block that it may drop."""
    costs = {}
    states = iter(probes)
    for step, anatomy, active in states:
        dropped = units(anatomy)
        forward = forward_flops(anatomy, *shape, active=active)
        spent = ablation_flops(forward.blocks, forward.outside_blocks, dropped)
        cost = partial(forward_flops, num_sequences=shape[0], num_tokens=shape[1])
        more = by_head(spent, anatomy, active, cost, 1 + len(dropped))
        costs[step] = {name: costs.get(step, {}).get(name, 0) + value for name, value in more.items()}
        assert {step for step, *_ in itertools.islice(states, len(dropped))} == {step}
    return costs


def phases_of(ran, full, probes=None):
    """Return what the ledger should say, from what ran: of each phase its size, steps, tokens and FLOPs."""
    phases, probes = [], dict(probes or {})
    for call in ran.calls:
        size = phase_size(call["anatomy"], call["active"])
        if not phases or phases[-1]["size"] != size:
            phases.append({"size": size, **dict.fromkeys(WITH_HEADS[1:], 0)})
        phase, (num_sequences, num_tokens) = phases[-1], call["shape"]
        phase["steps"] += call["ends"]
        phase["tokens"] += num_sequences * num_tokens
        cost = partial(training_flops, num_sequences=num_sequences, num_tokens=num_tokens)
        # Measurements are spent, and are none of what the full model would have paid.
        measured = probes.pop(call["step"], {})
        for name, flops in by_head(cost_of(call), call["anatomy"], call["active"], cost).items():
            phase[name] += flops + measured.get(name, 0)
        dense = cost(full)
        phase["dense_flops"] += dense.total
        phase["dense_head_excluded_flops"] += dense.total - dense.head
    return phases


class Saves(L.Callback):
    """Writes checkpoints after some optimizer steps."""

    def __init__(self, folder, steps):
        self.folder, self.steps = folder, steps

    def path(self, step):
        return f"{self.folder}/{step}.ckpt"

    def on_train_batch_start(self, trainer, *_):
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in self.steps and trainer.global_step > self.step:
            trainer.save_checkpoint(self.path(trainer.global_step))


def counted(phases, names=COUNTED):
    """Return what is to be compared of phases, of the ledger's or of a plan's."""
    return [{name: getattr(phase, name) for name in names} for phase in phases]


def workload_for(module, num_micro_batches=1):
    return Workload(BATCH, anatomy_of(module.net).num_tokens or NUM_TOKENS, num_micro_batches)


@dataclass
class Run:
    """A run that has ended."""

    module: Host
    methods: list
    ledger: ComputeLedger
    ran: Ran
    warnings: list


def run(folder, methods, name="gpt2-tied", *, module=None, resume=None, callbacks=(), **options):
    """Train, with a ledger and a watch."""
    L.seed_everything(0, verbose=False)
    module = Host(name) if module is None else module
    ledger, ran = ComputeLedger(print_table=False), Ran()
    trainer = make_trainer(
        folder, callbacks=[*methods, ledger, ran, *callbacks], **{"max_steps": STEPS, "max_epochs": -1, **options}
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(range(256), batch_size=BATCH), ckpt_path=resume)
    # A trainer is known to others weakly alone.
    module.kept_trainer = trainer
    return Run(module, list(methods), ledger, ran, [str(each.message) for each in said])


def assert_same(mine, theirs, where=""):
    """Compare nested states, tensors bit for bit."""
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(mine, theirs), where
    elif isinstance(theirs, dict):
        assert mine.keys() == theirs.keys(), where
        for key, value in theirs.items():
            assert_same(mine[key], value, f"{where}/{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(mine) == len(theirs), where
        for index, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            assert_same(one, other, f"{where}/{index}")
    else:
        assert mine == theirs, where

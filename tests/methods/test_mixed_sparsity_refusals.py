"""What mixed sparsity cannot work with is refused before any step, with a message that says what to do instead."""

from __future__ import annotations

import types

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceXLAStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lit_accel import Level, MixedSparsityTraining, MultiLevelTraining, Phase
from lit_accel.compute.active import active_of
from lit_accel.methods.strategy_checks import check_strategy
from lit_accel.strategies import ResizableModelParallelStrategy
from tests.models import make_model
from tests.training import TinyModule, Tokens, loader, make_trainer
from tests.vision import IMAGE_SIZE, VISION_ZOO

STAGES = [(0, 0.0), (2, 0.5), (8, 0.0)]
ELEMENTS = {"ffn_units": "element", "attention_units": "element"}
WINDOW = {"attention_pattern": "window", "attention_window": 4}
BOTH = 'dense", or units of its matrices such as "element"'


class Images(TinyModule):
    def __init__(self, name):
        super().__init__()
        self.net = make_model(name, heads=2, head_dim=8, ffn=32, blocks=4, dtype=torch.float32).train()

    def loss(self, batch):
        return self.net(batch[0]).square().mean()


class Uncached(TinyModule):
    """A cache would know its blocks by number, and have each compiled for itself."""

    def loss(self, ids):
        logits = self.net(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Tokens(80))


class OwnData(TinyModule):
    """Makes its data in its own setup: until then nobody knows how long the run is."""

    data = None

    def setup(self, stage):
        self.data = loader(num_samples=80)

    def train_dataloader(self):
        return self.data


def mst(**options):
    return MixedSparsityTraining(**{"stages": STAGES, "update_every": 2, "quantum": 4, **options})


def module_of(name):
    return Images(name) if name in VISION_ZOO else TinyModule(name)


def data_of(module):
    if isinstance(module, Images):
        return DataLoader(TensorDataset(torch.ones(16, 3, IMAGE_SIZE, IMAGE_SIZE)), batch_size=8)
    return None if isinstance(module, OwnData) else loader()


def fit(folder, callbacks, module=None, data=None, ckpt_path=None, **options):
    module = TinyModule() if module is None else module
    options = {"strategy": "auto", "max_steps": 10, "max_epochs": -1, "limit_val_batches": 0, **options}
    trainer = make_trainer(folder, callbacks=callbacks, **options)
    trainer.fit(module, data_of(module) if data is None else data, ckpt_path=ckpt_path, weights_only=True)
    return module


def structure(module):
    """What of a model is not its weights: objects, shapes, sizes that layers know, hooks, overridden forwards."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks", "_parametrizations")
    return (
        repr(module.net),
        [(name, id(parameter), parameter.shape) for name, parameter in module.named_parameters()],
        [[len(vars(part).get(name, ())) for name in hooks] for part in module.modules()],
        [vars(part).get("forward") for part in module.modules()],
        [vars(part).get("_compiled_call_impl") for part in module.modules()],
        getattr(getattr(module.net, "config", None), "_attn_implementation", None),
        active_of(module.net),
    )


def refuse(folder, callbacks, messages, module=None, error=MisconfigurationException, **options):
    module = TinyModule() if module is None else module
    before, shape = {key: value.clone() for key, value in module.state_dict().items()}, structure(module)
    with pytest.raises(error, match=messages[0]) as refusal:
        fit(folder, callbacks, module, **options)
    for message in messages[1:]:
        refusal.match(message)
    # Not one loss was computed, and nothing has become of the model.
    assert module.losses == []
    assert structure(module) == shape
    if options.get("ckpt_path") is None:
        assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())
        assert all(callback.masks == {} for callback in callbacks if isinstance(callback, MixedSparsityTraining))


# Densities that leave nothing


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"ffn_units": "element"}, [r"h\.0\.mlp\.c_fc\.weight empty: none of the 512 entries would be on", "Lower"]),
        (
            {"ffn_units": "dense", "attention_units": "element", "distribution": "er", "stages": [(0, 0.9999)]},
            [r"sparsity of 0\.9999 would leave transformer\.h\.0\.attn\.c_attn\.weight empty"],
        ),
        (
            {"ffn_units": "block", "block_size": 4, "stages": [(0, 0.0), (2, 0.9), (8, 0.0)]},
            [r"empty: none of the 4 tiles of a row would be on", "smaller block_size"],
        ),
        (
            {"attention_units": "block", "block_size": 16, "stages": [(0, 0.0), (2, 0.6)]},
            [
                r"sparsity of 0\.6 would leave .*c_attn\.weight empty: none of the 1 tiles of a row",
                "smaller block_size",
            ],
        ),
        (
            {"head_units": "element", "stages": [(0, 0.9999)]},
            [r"transformer\.wte\.weight empty: none of the 1024 entries"],
        ),
    ],
    ids=["entries", "er", "tiles", "a single tile", "head"],
)
def test_a_layer_that_would_be_empty(tmp_path, options, messages):
    stages = {"stages": [(0, 0.0), (2, 0.9995), (8, 0.0)]}
    refuse(tmp_path, [mst(**{**stages, **options})], messages)


def test_units_that_keep_their_share_are_never_empty(tmp_path):
    """Two of four are two of four, and at least one head and one quantum of neurons stay."""
    fit(tmp_path, [mst(ffn_units="2:4", stages=[(0, 0.99), (8, 0.0)])])
    fit(tmp_path, [mst(stages=[(0, 0.99), (8, 0.0)])])


# Units that a model does not have


@pytest.mark.parametrize(
    ("name", "options", "messages", "advised"),
    [
        (
            "swin",
            {},
            ["Heads of this swin_v2 model cannot be switched off", f'attention_units="{BOTH}'],
            [{"attention_units": "dense"}, {"attention_units": "element"}],
        ),
        (
            "vit-swiglu",
            {"attention_units": "dense"},
            ["Neurons of this vit model cannot be switched off: its activations are", f'ffn_units="{BOTH}'],
            [{"ffn_units": "dense"}, {"ffn_units": "element"}],
        ),
        (
            "vit-swiglu",
            {"ffn_units": "dense"},
            ["Heads of this vit model cannot be switched off", f'attention_units="{BOTH}'],
            [{"attention_units": "element"}],
        ),
        (
            "llama-mqa",
            {},
            [r"model\.layers\.0 of this llama model has a single key-value head", f'attention_units="{BOTH}'],
            [{"attention_units": "dense"}, {"attention_units": "element"}],
        ),
        (
            "gpt2-tied",
            {"ffn_units": "block"},
            ["32 x 16, which cannot be cut into tiles of 64 x 64", "such as 16, or use"],
            [{"ffn_units": "element"}, {"block_size": 16, "stages": [(0, 0.0), (2, 0.4), (8, 0.0)]}],
        ),
        (
            "gpt2-tied",
            {"ffn_units": "2:5"},
            ["has 16 inputs, which are no multiple of the 5 of '2:5'", 'another number, or "element"'],
            [{"ffn_units": "2:4"}, {"ffn_units": "element"}],
        ),
        (
            "bert-mlm",
            {**ELEMENTS, **WINDOW},
            ["bert model attends to later tokens too", 'Set attention_pattern="dense"'],
            [{"attention_pattern": "dense"}],
        ),
        (
            "deit-distilled",
            {**ELEMENTS, **WINDOW},
            ["vit model attends to later tokens too", 'Set attention_pattern="dense"'],
            [{"attention_pattern": "dense"}],
        ),
        (
            "mistral",
            WINDOW,
            [r"attends within a window of its own \(sliding_window\)", 'Set attention_pattern="dense"'],
            [{"attention_pattern": "dense"}],
        ),
        (
            "bert-mlm",
            {"preset": "paper_4x"},
            ["bert model attends to later tokens too"],
            [{"attention_pattern": "dense"}],
        ),
    ],
)
def test_units_and_patterns_that_a_model_does_not_have(tmp_path, name, options, messages, advised):
    refuse(tmp_path, [mst(**options)], messages, module_of(name))
    # Whoever does as the message says must not be refused again.
    for advice in advised:
        assert fit(tmp_path, [mst(**{**options, **advice})], module_of(name), max_steps=4).losses


def test_tiles_of_a_layer_that_is_not_called_as_one(tmp_path):
    """SwinV2 with biases multiplies by its packed matrix itself."""
    module = Images("swin")
    try:
        fit(tmp_path, [mst(attention_units="block", block_size=4)], module)
    except MisconfigurationException:
        assert not module.losses
    else:
        assert len(module.losses) == 10


@pytest.mark.parametrize("part", [None, 2])
def test_a_pattern_of_training_in_a_model_in_evaluation_mode(tmp_path, part):
    """As from_pretrained returns them: it would never attend by the pattern, and the ledger would say that it had."""
    module = TinyModule()
    (module.net if part is None else module.net.transformer.h[part]).eval()
    refuse(tmp_path, [mst(**WINDOW, evaluate_pattern=False)], ["evaluation mode", r"model\.train\(\)"], module)


# The length of the run


OUT_OF_ORDER = ["stages of the sparsity are out of order", r"0\.5 is step 5 of 10, after .* at step 8", "List them"]


@pytest.mark.parametrize("own", [False, True], ids=["known at once", "known late"])
def test_stages_whose_order_depends_on_the_length_of_the_run(tmp_path, own):
    length = {"max_steps": -1, "max_epochs": 1} if own else {}
    module = OwnData() if own else None
    refuse(tmp_path, [mst(stages=[(0, 0.0), (8, 0.5), (0.5, 0.0)])], OUT_OF_ORDER, module, **length)
    assert fit(tmp_path, [mst(stages=[(0, 0.0), (4, 0.5), (0.5, 0.0)])], OwnData() if own else None, **length).losses


@pytest.mark.parametrize("stages", [STAGES, [(0.0, 0.5), (0.8, 0.0)]])
def test_a_run_of_unknown_length(tmp_path, stages):
    message = r"must know how long the run is\. Give the Trainer max_steps, or max_epochs with a data loader of known"
    stream = DataLoader(Stream(), batch_size=8)
    refuse(tmp_path, [mst(stages=stages)], [message], data=stream, max_steps=-1, max_epochs=1)
    assert len(fit(tmp_path, [mst(stages=stages)], data=stream).losses) == 10


# Other methods, callbacks and strategies


def cycle(first, second, **level):
    return MultiLevelTraining([Level(**level)], [Phase(0, first), Phase(1, second - first), Phase(0)])


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(("first", "second", "step"), [(3, 9, 3), (1, 8, 8), (2, 9, 2)])
def test_a_resize_while_units_are_off(tmp_path, order, first, second, step):
    messages = [
        rf"MultiLevelTraining changes the size of the model at step {step}, where the sparsity is 0\.5",
        "Let stages be 0 before and after each change of size",
    ]
    refuse(tmp_path, [mst(), cycle(first, second)][::order], messages, strategy="resizable")


def test_resizes_around_the_sparse_phase_are_welcome(tmp_path):
    assert len(fit(tmp_path, [mst(), cycle(1, 9)], strategy="resizable").losses) == 10


def test_a_level_that_cannot_be_cut_into_tiles(tmp_path):
    callbacks = [mst(ffn_units="block", block_size=16, stages=[(0, 0.0), (2, 0.4), (8, 0.0)]), cycle(1, 9)]
    messages = [r"At level 1 of MultiLevelTraining: .*16 x 8, which cannot be cut into tiles of 16 x 16", "such as 8"]
    refuse(tmp_path, callbacks, messages, strategy="resizable")


@pytest.mark.parametrize(
    "options",
    [{"ffn_units": "block", "block_size": 4}, {"ffn_units": "element", "stages": [(0, 0.0), (2, 0.997), (8, 0.0)]}],
    ids=["tiles", "entries"],
)
def test_a_level_at_which_a_layer_would_be_empty(tmp_path, options):
    """The full model keeps something at this sparsity; the smaller one, which trains there, does not."""
    callbacks = [mst(**{"stages": [(0, 0.0), (2, 0.8), (8, 0.0)], "attention_units": "dense", **options}), cycle(1, 9)]
    refuse(tmp_path, callbacks, [r"At level 1 of MultiLevelTraining: .*empty"], strategy="resizable")


def test_a_level_with_a_single_key_value_head(tmp_path):
    """Of its depth it does not depend, nor on where blocks and tokens are dropped."""
    messages = [r"At level 1 of MultiLevelTraining: .*single key-value head.* Or reduce its width less\.$"]
    refuse(tmp_path, [mst(), cycle(1, 9)], messages, TinyModule("llama-gqa"), strategy="resizable")


def test_a_size_of_batches_that_is_no_number(tmp_path):
    class Odd(L.LightningDataModule):
        batch_size = None

        def train_dataloader(self):
            return data_of(module)

    module = Images("vit-registers")
    assert len(fit(tmp_path, [mst()], module, Odd()).losses) == 10


@pytest.mark.parametrize("order", [1, -1])
def test_two_of_them(tmp_path, order):
    class Mine(MixedSparsityTraining):
        """Of another class: two of one are refused by Lightning itself."""

    callbacks = [mst(), Mine(stages=STAGES, quantum=4)][::order]
    refuse(
        tmp_path, callbacks, [r"(Mine|MixedSparsityTraining) and (Mine|MixedSparsityTraining) would both switch units"]
    )


class Thawing(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net.transformer.wpe)

    def finetune_function(self, pl_module, epoch, optimizer):
        pass


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (WeightAveraging(), "averages weights"),
        (EMAWeightAveraging(), "averages weights"),
        (StochasticWeightAveraging(1e-2), "averages weights"),
        (ModelPruning("l1_unstructured", amount=0.5), "masks the same weights"),
        (Thawing(), "freezes and thaws parameters"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("order", [1, -1])
def test_callbacks_that_hold_the_same_weights(tmp_path, other, reason, order):
    messages = [f"{type(other).__name__} {reason}", "Remove one of the two", "in a second run on the final checkpoint"]
    refuse(tmp_path, [mst(), other][::order], messages)


@pytest.mark.parametrize(
    ("strategy", "instead"),
    [
        (ModelParallelStrategy, "ddp"),
        (ResizableModelParallelStrategy, "ddp"),
        (FSDPStrategy, "ddp"),
        (DeepSpeedStrategy, "ddp"),
        (SingleDeviceXLAStrategy, "auto"),
    ],
)
def test_strategies_that_keep_parameters_in_a_form_of_their_own(strategy, instead):
    # Not initialised: some want a GPU or a package.
    trainer = types.SimpleNamespace(strategy=object.__new__(strategy), callbacks=[])
    messages = [strategy.__name__, "keeps parameters in pieces", rf'Use Trainer\(strategy="{instead}"\)']
    for message in messages:
        with pytest.raises(MisconfigurationException, match=message):
            check_strategy(trainer, mst())


def setup_with(folder, callback, module, strategy="auto", **options):
    trainer = make_trainer(folder, callbacks=[callback], max_steps=10, max_epochs=-1, strategy=strategy, **options)
    trainer.strategy.connect(module)
    callback.setup(trainer, module, "fit")


def test_a_sharding_strategy_is_refused_at_setup(tmp_path):
    with pytest.raises(MisconfigurationException, match=r'ModelParallelStrategy.*Use Trainer\(strategy="ddp"\)'):
        setup_with(tmp_path, mst(), TinyModule(), ModelParallelStrategy())


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_find_unused_parameters_true", "resizable", "resizable_ddp"])
def test_strategies_that_keep_parameters_whole(tmp_path, strategy):
    setup_with(tmp_path, mst(), TinyModule(), strategy)

"""What random-LTD cannot work with is refused or warned about before any step, with a message that says what to do."""

from __future__ import annotations

from dataclasses import replace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lit_accel import Level, MultiLevelTraining, ProgressiveLayerDropping, RandomLTD, RandomLTDMixin
from lit_accel.anatomy import AnatomyError, anatomy_of, compile_blocks
from tests.models import make_model
from tests.training import TinyModule, Tokens, loader, make_trainer
from tests.vision import IMAGE_SIZE, VISION_ZOO

LTD = {"start_tokens": 4, "growth": 6, "quantum": 2}


class Images(TinyModule):
    def __init__(self, name, blocks=4):
        super().__init__()
        self.net = make_model(name, heads=2, head_dim=8, ffn=32, blocks=blocks, dtype=torch.float32).train()

    def loss(self, batch):
        return self.net(batch[0]).square().mean()


def module_of(name):
    return Images(name) if name in VISION_ZOO else TinyModule(name)


def data_of(module):
    if not isinstance(module, Images):
        return loader()
    return DataLoader(TensorDataset(torch.ones(16, 3, IMAGE_SIZE, IMAGE_SIZE)), batch_size=8)


def fit(folder, callbacks, module=None, data=None, **options):
    module = TinyModule() if module is None else module
    options = {"strategy": "auto", "max_steps": 10, "max_epochs": -1, **options}
    trainer = make_trainer(folder, callbacks=callbacks, **options)
    trainer.fit(module, data_of(module) if data is None else data)
    return module


def refuse(folder, callbacks, messages, module=None, data=None, error=MisconfigurationException, **options):
    module = TinyModule() if module is None else module
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(error, match=messages[0]) as refusal:
        fit(folder, callbacks, module, data, **options)
    for message in messages[1:]:
        refusal.match(message)
    # Not one loss was computed, and nothing is left on the model.
    assert module.losses == []
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in module.net.modules())
    assert not any(hasattr(vars(part).get("_compiled_call_impl"), "restore") for part in module.net.modules())


# Arguments


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ({"start_tokens": 0}, ["start_tokens is 0", "at least 1"]),
        ({"start_tokens": True}, ["start_tokens is True", "at least 1"]),
        ({"quantum": 2.5}, [r"quantum is 2\.5", "at least 1"]),
        ({"pinned": [0.5]}, [r"pinned is \[0\.5\]", "integers"]),
        ({"start_tokens": -8}, ["start_tokens is -8", "at least 1"]),
        ({"start_tokens": 1.5}, [r"start_tokens is 1\.5", r"\(0, 1\]"]),
        ({"start_tokens": 0.0}, [r"start_tokens is 0\.0", "1.0 drops nothing"]),
        ({"quantum": 0}, ["quantum is 0", "at least 1"]),
        ({"max_lengths": 1}, ["max_lengths is 1", "at least 2"]),
        ({"growth": 0}, ["growth is 0", "Leave the callback out"]),
        ({"growth": 0.0}, ["growth is 0", r"start_tokens=1\.0"]),
        ({"growth": -5}, ["steps", "share of the run", "-5"]),
        ({"growth": 1.2}, ["share of the run", r"1\.2"]),
        ({"scope": "block"}, ["scope is 'block'", "'layer', 'route', 'input'"]),
        ({"compat": "megatron"}, ["compat is 'megatron'", "'deepspeed'"]),
        ({"scope": "input", "pinned": [0]}, ["pinned has no meaning", 'scope="input"']),
        ({"compat": "deepspeed", "start_tokens": 0.5}, ["deepspeed", "start_tokens is a number"]),
        ({"compat": "deepspeed", "start_tokens": 32, "max_lengths": 4}, ["no max_lengths"]),
        ({"keep_prefix": -1}, ["keep_prefix is -1", "number of tokens"]),
        ({"num_tokens": -1}, ["num_tokens is -1", "number of tokens"]),
        ({"num_tokens": 0}, ["num_tokens is 0"]),
    ],
)
def test_arguments(arguments, messages):
    with pytest.raises(ValueError, match=messages[0]) as refusal:
        RandomLTD(**arguments)
    for message in messages[1:]:
        refusal.match(message)


def test_the_mixin_refuses_as_the_callback_does():
    class Module(RandomLTDMixin, TinyModule):
        pass

    with pytest.raises(ValueError, match="quantum is 0"):
        Module(ltd_quantum=0)


# The length of sequences


class Texts(L.LightningDataModule):
    block_size = 12

    def train_dataloader(self):
        return loader()


@pytest.mark.parametrize(
    ("options", "name", "data", "longest"),
    [
        ({"start_tokens": 12, "num_tokens": 12}, "gpt2-tied", None, 12),
        ({"start_tokens": 32}, "gpt2-tied", None, 32),
        ({"start_tokens": 40}, "bert-mlm", None, 32),
        ({"start_tokens": 10}, "vit", None, 10),
        ({"start_tokens": 12}, "gpt2-tied", Texts, 12),
    ],
    ids=["num_tokens", "positions", "more than positions", "patches", "block_size"],
)
def test_a_start_that_is_longer_than_the_sequence(tmp_path, options, name, data, longest):
    message = rf"start_tokens is {options['start_tokens']}, .*no more than {longest} tokens: nothing would be dropped"
    refuse(tmp_path, [RandomLTD(**options)], [message, r"share of the sequence"], module_of(name), data and data())


@pytest.mark.parametrize(("start", "name"), [(12, "llama-gqa"), (20, "gpt2-tied")])
def test_a_start_that_is_longer_than_the_first_batch(tmp_path, start, name):
    message = f"start_tokens is {start}, and the sequences of the first batch have 12 tokens: nothing would be dropped"
    refuse(
        tmp_path, [RandomLTD(start_tokens=start)], [message, r"share of the sequence", "num_tokens"], module_of(name)
    )


def test_a_first_batch_that_is_short_is_no_reason_where_the_length_is_given(tmp_path):
    class Growing(TinyModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:, : 4 if batch_idx == 0 else 12], batch_idx)

    assert len(fit(tmp_path, [RandomLTD(**LTD, num_tokens=12)], Growing()).losses) == 10


# The length of the run


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Tokens(80))


def test_a_run_of_unknown_length(tmp_path):
    options = {"data": DataLoader(Stream(), batch_size=8), "max_steps": -1, "max_epochs": 1}
    message = r"RandomLTD must know how long the run is.*max_steps.*growth as a number of optimizer steps"
    refuse(tmp_path, [RandomLTD()], [message], **options)
    assert len(fit(tmp_path, [RandomLTD(**LTD)], **options).losses) == 10


@pytest.mark.parametrize("known", [True, False])
def test_a_growth_that_is_longer_than_the_run(tmp_path, known, recwarn):
    message = r"growth takes 50 optimizer steps, and the run has 10.*share of the run such as 0\.7"
    options = {**LTD, "num_tokens": 12 if known else None}
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path, [RandomLTD(**{**options, "growth": 50})])
    recwarn.clear()
    fit(tmp_path, [RandomLTD(**{**options, "growth": 50})], fast_dev_run=2)
    fit(tmp_path, [RandomLTD(**{**options, "growth": 10})])
    assert not [warning for warning in recwarn if "growth takes" in str(warning.message)]


@pytest.mark.parametrize("known", [True, False], ids=["before training", "at the first batch"])
def test_a_saving_that_hardly_pays(tmp_path, known, recwarn):
    class When(L.Callback):
        warned_before = None

        def on_train_start(self, *_):
            self.warned_before = any("hardly pays" in str(warning.message) for warning in recwarn)

        def on_before_optimizer_step(self, *_):
            assert sum("hardly pays" in str(warning.message) for warning in recwarn) == 1

    when = When()
    little = {"start_tokens": 10, "growth": 2, "quantum": 1, "num_tokens": 12 if known else None}
    fit(tmp_path, [RandomLTD(**little), when])
    assert when.warned_before is known
    (warning,) = [str(warning.message) for warning in recwarn if "hardly pays" in str(warning.message)]
    assert "would save 1." in warning or "would save 0." in warning
    assert "start with fewer tokens, grow for longer, use a smaller quantum or pin fewer blocks" in warning
    recwarn.clear()
    fit(tmp_path, [RandomLTD(**{**LTD, "num_tokens": little["num_tokens"]})])
    assert not [warning for warning in recwarn if "RandomLTD" in str(warning.message)]


# The model


@pytest.mark.parametrize("pinned", [[0, 1, 2, 3], [0, 1, -2, -1]])
def test_no_block_to_drop_tokens_in(tmp_path, pinned):
    messages = ["no layer to drop tokens in", r"of the 4 blocks of this gpt2 model 4", r"\[0, 1, 2, 3\]", "Pin fewer"]
    refuse(tmp_path, [RandomLTD(**LTD, pinned=pinned)], messages)


def test_single_windows_only(tmp_path):
    """The second stage of this SwinV2 has one window of 3 x 3; the first, of four windows, is pinned."""
    messages = ["no layer to drop tokens in", "and 8 have a single window", "deeper model"]
    refuse(tmp_path, [RandomLTD(pinned=[0, 1])], messages, Images("swin"))


@pytest.mark.parametrize("index", [4, -5])
def test_pins_that_do_not_exist(tmp_path, index):
    message = rf"pinned names block {index}, but this gpt2 model has 4 blocks: 0 to 3, or -4 to -1"
    refuse(tmp_path, [RandomLTD(**LTD, pinned=[0, index])], [message])


@pytest.mark.parametrize("level", [Level(), Level(width=1, depth=4)])
def test_a_level_at_which_no_block_is_left(tmp_path, level):
    messages = [r"At level 1 of MultiLevelTraining: There is no layer", "Pin fewer blocks", "reduce its depth less"]
    refuse(tmp_path, [RandomLTD(**LTD), MultiLevelTraining([level])], messages, strategy="resizable")


def test_windows_of_which_the_layout_is_not_known(tmp_path, monkeypatch):
    def without_windows(model):
        anatomy = anatomy_of(model)
        return replace(anatomy, blocks=tuple(replace(block, windows=None) for block in anatomy.blocks))

    monkeypatch.setattr("lit_accel.methods.token_dropping.callback.anatomy_of", without_windows)
    messages = ["swin_v2 model attend within windows", r"how layers\.0\.blocks\.0 lays them out", "Give the blocks"]
    refuse(tmp_path, [RandomLTD()], messages, Images("swin-padded"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"start_tokens": 4}, "start_tokens as a number"),
        ({"max_lengths": 4}, "max_lengths"),
        ({"keep_prefix": 1}, "keep_prefix"),
        ({"start_tokens": 32, "compat": "deepspeed"}, "start_tokens as a number and compat"),
    ],
)
def test_what_windows_do_not_have(tmp_path, options, named):
    messages = [f"^{named} cannot be used with this swin_v2 model", r"Give start_tokens as a share, such as 0\.25"]
    refuse(tmp_path, [RandomLTD(**options)], messages, Images("swin-padded"))


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("gpt2-tied", ["does not bring dropped tokens back, and this gpt2 model", 'Use scope="layer" or "route"']),
        ("swin-padded", ["would leave holes in the grid of this swin_v2 model", 'Use scope="layer"']),
    ],
)
def test_tokens_that_never_come_back(tmp_path, name, messages):
    refuse(tmp_path, [RandomLTD(scope="input")], messages, module_of(name))


def test_one_draw_for_windows_that_are_cut_differently(tmp_path):
    messages = ["the blocks of this swin_v2 model cut their windows differently", 'Use scope="layer"']
    refuse(tmp_path, [RandomLTD(scope="route")], messages, Images("swin-padded"))


@pytest.mark.parametrize("order", [1, -1])
def test_tokens_that_never_come_back_beside_layer_dropping(tmp_path, order):
    callbacks = [RandomLTD(scope="input"), ProgressiveLayerDropping()][::order]
    messages = ["which ProgressiveLayerDropping may skip", 'scope="layer" or "route"']
    refuse(tmp_path, callbacks, messages, Images("vit"))


def test_two_of_them(tmp_path):
    class Mine(RandomLTD):
        """Of another class: two of one are refused by Lightning itself."""

    refuse(
        tmp_path,
        [RandomLTD(**LTD), Mine(**LTD)],
        ["RandomLTD and Mine would both drop tokens of one model. Use one of them"],
    )


@pytest.mark.parametrize("which", ["head and trunk", "trunk"])
def test_a_compilation_of_the_whole_model(tmp_path, which):
    module = TinyModule()
    (module.net if which == "head and trunk" else module.net.transformer).compile(backend="eager")
    refuse(tmp_path, [RandomLTD(**LTD)], ["RandomLTD: the whole transformer is compiled.*compile_blocks"], module)


def test_a_model_that_is_wrapped_by_torch_compile(tmp_path):
    module = TinyModule()
    module.net = torch.compile(module.net, backend="eager")
    refuse(tmp_path, [RandomLTD(**LTD)], ["compile_blocks"], module, error=AnatomyError)


@pytest.mark.parametrize("part", [None, 2])
def test_a_model_in_evaluation_mode(tmp_path, part):
    module = TinyModule()
    (module.net if part is None else module.net.transformer.h[part]).eval()
    messages = [rf"h\.{part or 0} is in evaluation mode, in which RandomLTD", r"call model\.train\(\)"]
    refuse(tmp_path, [RandomLTD(**LTD)], messages, module)


@pytest.mark.parametrize("known", [True, False])
def test_more_graphs_than_torch_compiles(tmp_path, known, graphs):
    module = TinyModule()
    compile_blocks(module.net, backend=graphs, dynamic=False)
    many = {"start_tokens": 1, "growth": 10, "quantum": 1, "num_tokens": 12 if known else None, "pinned": [0]}
    messages = [r"this schedule makes 11 graphs", "recompile_limit", "Set max_lengths=8, or leave dynamic=False out"]
    refuse(tmp_path, [RandomLTD(**many)], messages, module)
    # The formula of DeepSpeed knows no limit of lengths.
    exact = RandomLTD(**many, compat="deepspeed")
    refuse(tmp_path, [exact], [r"Leave dynamic=False out, or raise that limit"], module)
    few = RandomLTD(**many, max_lengths=4)
    assert len(fit(tmp_path, [few], module).losses) == 10


# During training


def test_a_cache_in_training_is_warned_about_once_and_runs_on_all_tokens(tmp_path, recwarn):
    class Caching(TinyModule):
        def loss(self, ids):
            logits = self.net(input_ids=ids, use_cache=True).logits
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    callback = RandomLTD(**LTD)
    module = fit(tmp_path, [callback], Caching())
    (warning,) = [str(warning.message) for warning in recwarn if "dropped no token" in str(warning.message)]
    assert "use_cache=True" in warning
    assert module.losses == fit(tmp_path, [], Caching()).losses
    callback._collect(module.trainer)
    assert callback.total.layer_tokens == callback.total.dense_layer_tokens == 10 * 8 * 12 * 4


def test_a_checkpoint_of_a_newer_version():
    state = {**RandomLTD().state_dict(), "version": 99}
    with pytest.raises(MisconfigurationException, match=r"format 99.*Update lit-accel"):
        RandomLTD().load_state_dict(state)


def test_chunks_that_do_not_divide_the_kept_tokens_are_refused(tmp_path):
    def fit(quantum):
        module = TinyModule("bert-mlm")
        config = module.net.config
        config.chunk_size_feed_forward = 4
        module.net = type(module.net)(config).train()
        method = RandomLTD(start_tokens=4, growth=6, quantum=quantum)
        make_trainer(tmp_path, callbacks=[method], strategy="auto", max_steps=8).fit(module, loader())
        return module.losses

    with pytest.raises(MisconfigurationException, match=r"4 tokens at a time.*multiple of 2 of them.*multiple of 4"):
        fit(2)
    assert len(fit(4)) == 8

"""Sharded training in one process: what is sharded, what is refused, and what is left after a failure."""

from __future__ import annotations

import functools

import lightning.pytorch as L
import pytest
import timm
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
    XLAStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lit_accel import Level, MultiLevelTraining, Phase
from lit_accel.anatomy import AnatomyError, anatomy_of
from lit_accel.data import ImageDataModule
from lit_accel.methods.multilevel import coalesce, level_map
from lit_accel.methods.strategy_checks import check_strategy
from lit_accel.strategies import ResizableModelParallelStrategy
from lit_accel.tasks import ImageClassification, SavePretrained
from tests.training import TinyModule, loader, make_trainer

NAME = "resizable_model_parallel"


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def fit(tmp_path, module, *callbacks, strategy=NAME, **options):
    trainer = make_trainer(tmp_path, callbacks=callbacks, strategy=strategy, **{"max_steps": 4, **options})
    trainer.fit(module, loader(), loader(num_samples=8))
    return trainer


class Halve(L.Callback):
    """Halves the depth before the third step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != 2:
            return

        def rebuild():
            net = pl_module.net
            assert not any(isinstance(child, FSDPModule) for child in net.modules())
            assert not any(isinstance(parameter, DTensor) for parameter in net.parameters())
            pl_module.net = coalesce(net, level_map(anatomy_of(net), width=1, depth=2))

        trainer.strategy.resize(rebuild)


class Fail(L.Callback):
    """Fails to do so, and goes on."""

    def __init__(self, carry) -> None:
        self.carry = carry

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != 2:
            return
        net, (optimizer,) = pl_module.net, trainer.optimizers

        def rebuild():
            pl_module.net = nn.Linear(2, 2)
            raise RuntimeError("no")

        with pytest.raises(RuntimeError, match="no"):
            trainer.strategy.resize(rebuild, self.carry)
        assert pl_module.net is net
        assert isinstance(net, FSDPModule)
        if self.carry is None:
            assert trainer.optimizers == []
            trainer.strategy.setup_optimizers(trainer)
        else:
            assert trainer.optimizers == [optimizer]


def test_the_name_is_registered():
    assert StrategyRegistry[NAME]["strategy"] is ResizableModelParallelStrategy


@pytest.mark.parametrize("name", ["gpt2-tied", "bert-mlm", "llama-gqa"])
def test_everything_is_sharded_by_the_anatomy(tmp_path, name):
    module = TinyModule(name)
    ties = anatomy_of(module.net).tied
    trainer = fit(tmp_path, module)
    sharded = {path for path, child in module.net.named_modules() if isinstance(child, FSDPModule)}
    assert sharded == {"", *(block.path for block in anatomy_of(module.net).blocks)}
    assert all(isinstance(parameter, DTensor) for parameter in module.net.parameters())
    whole = trainer.strategy.gather_transformer()
    unsharded = TinyModule(name).net
    assert type(whole) is type(unsharded)
    assert whole.state_dict().keys() == unsharded.state_dict().keys()
    for group in ties:
        assert len({id(whole.get_parameter(path)) for path in group}) == 1
        assert len({id(module.net.get_parameter(path)) for path in group}) == 1


def test_a_copy_runs_as_the_original_did(tmp_path):
    """Gathered from a sharded model that was not trained, it computes the same, buffers and modes included."""
    module = TinyModule("llama-gqa")
    module.net.model.layers[1].eval()
    module.net.model.norm.weight.requires_grad_(False)
    ids = torch.arange(3, 11)[None]
    expected = module.net(input_ids=ids).logits
    modes = [child.training for child in module.net.modules()]
    trainer = make_trainer(tmp_path, strategy=NAME, limit_val_batches=1)
    trainer.validate(module, loader(num_samples=8), verbose=False)
    whole = trainer.strategy.gather_transformer()
    assert torch.equal(whole(input_ids=ids).logits, expected)
    assert [child.training for child in whole.modules()] == modes
    assert not whole.model.norm.weight.requires_grad
    assert whole.config is module.net.config
    with torch.no_grad():
        for tensor in [*whole.parameters(), *whole.buffers()]:
            tensor.zero_()
    assert torch.equal(trainer.strategy.gather_transformer()(input_ids=ids).logits, expected)


@pytest.mark.parametrize("carry", [None, dict])
def test_a_failed_rebuild_leaves_the_sharded_model(tmp_path, carry):
    """Training can go on with it; with its moments, if they were to be carried."""
    failed, plain = TinyModule(), TinyModule()
    fit(tmp_path, failed, Fail(carry))
    fit(tmp_path, plain)
    assert failed.losses[:3] == plain.losses[:3]
    assert (failed.losses == plain.losses) == (carry is not None)


def test_other_callbacks_can_resize(tmp_path):
    module = TinyModule(scheduler="cosine")
    trainer = fit(tmp_path, module, Halve(), precision="bf16-true")
    assert module.sizes[0] == module.sizes[1] > module.sizes[2] == module.sizes[3]
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert len(trainer.strategy.resizes) == 1
    # The model stays sharded, and the Trainer can go on using it.
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    trainer.validate(module, loader(num_samples=8), ckpt_path=tmp_path / "end.ckpt", verbose=False)


@pytest.mark.parametrize("is_distributed", [True, False])
@pytest.mark.parametrize("given", ["~/end.ckpt", "file://{}/end.ckpt"])
def test_a_path_is_the_one_that_lightning_means(tmp_path, monkeypatch, given, is_distributed):
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "work")
    module, path = TinyModule(), given.format(tmp_path)
    strategy = ResizableModelParallelStrategy(save_distributed_checkpoint=is_distributed)
    trainer = fit(tmp_path, module, strategy=strategy, max_steps=1)
    trainer.save_checkpoint(path)
    assert (tmp_path / "end.ckpt").is_dir() is is_distributed
    # What is in its place is replaced.
    trainer.save_checkpoint(path)
    trainer.validate(module, loader(num_samples=8), ckpt_path=path, verbose=False)
    assert {each.name for each in tmp_path.iterdir()} == {"work", "end.ckpt"}
    assert list((tmp_path / "work").iterdir()) == []


def test_an_evaluation_before_training_leaves_nothing_behind(tmp_path, monkeypatch):
    """Lightning evaluates in inference mode wherever it can (not with gloo), and its tensors cannot be trained."""
    monkeypatch.setattr(torch.distributed, "get_backend", lambda *_: "none")
    monkeypatch.setattr(ResizableModelParallelStrategy, "barrier", lambda *_: None)
    module = TinyModule()
    trainer = make_trainer(tmp_path, strategy=NAME, max_steps=2)
    trainer.predict(module, loader(num_samples=8))
    trainer.fit(module, loader())
    assert len(module.losses) == 2
    assert all(isinstance(p, DTensor) for group in trainer.optimizers[0].param_groups for p in group["params"])


def test_tensor_parallelism_is_refused():
    with pytest.raises(MisconfigurationException, match="tensor_parallel_size is 2"):
        ResizableModelParallelStrategy(tensor_parallel_size=2)


def test_precision_is_checked_for_a_name_too(tmp_path):
    with pytest.raises(MisconfigurationException, match="use one of 32-true, bf16-mixed"):
        fit(tmp_path, TinyModule(), precision="64-true")


def test_a_module_that_shards_itself_is_refused(tmp_path):
    class Sharding(TinyModule):
        def configure_model(self):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    with pytest.raises(MisconfigurationException, match="shards the model itself"):
        fit(tmp_path, Sharding())


def test_a_module_of_another_trainer_is_refused(tmp_path):
    module = TinyModule()
    fit(tmp_path, module)
    with pytest.raises(MisconfigurationException, match="another Trainer"):
        fit(tmp_path, module)


def test_a_parameter_without_a_module_is_refused(tmp_path):
    module = TinyModule()
    module.temperature = nn.Parameter(torch.ones(()))
    with pytest.raises(MisconfigurationException, match="temperature belongs to no module"):
        fit(tmp_path, module)


def test_ties_between_blocks_are_refused(tmp_path):
    module = TinyModule()
    first, second = module.net.transformer.h[:2]
    second.ln_1.weight = first.ln_1.weight
    with pytest.raises(MisconfigurationException, match="are one parameter"):
        fit(tmp_path, module)


def test_a_model_without_values_is_refused(tmp_path):
    module = TinyModule()
    module.net.to("meta")
    with pytest.raises(MisconfigurationException, match="meta device"):
        fit(tmp_path, module)


def test_a_model_without_anatomy_is_refused(tmp_path):
    module = TinyModule()
    module.net = nn.Linear(2, 2)
    with pytest.raises(AnatomyError, match="register_anatomy"):
        fit(tmp_path, module)


def test_gathering_needs_something_sharded():
    with pytest.raises(MisconfigurationException, match="nothing to gather"):
        ResizableModelParallelStrategy().gather_transformer()


@pytest.mark.parametrize(
    ("stock", "instead"),
    [
        (ModelParallelStrategy, NAME),
        (FSDPStrategy, NAME),
        (DeepSpeedStrategy, NAME),
        (DDPStrategy, "resizable_ddp"),
        (SingleDeviceStrategy, "resizable"),
        (XLAStrategy, None),
    ],
)
def test_stock_strategies_are_refused(tmp_path, stock, instead):
    trainer = make_trainer(tmp_path, callbacks=[MultiLevelTraining()], max_steps=100, max_epochs=-1)
    module = TinyModule()
    trainer.strategy.connect(module)
    # Some cannot even be made without their devices.
    trainer._accelerator_connector.strategy = object.__new__(stock)
    match = "no strategy for TPUs" if instead is None else f'strategy="{instead}"'
    with pytest.raises(MisconfigurationException, match=match):
        check_strategy(trainer, MultiLevelTraining())


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "swinv2_tiny_window8_256"])
def test_timm_models_go_through_a_sharded_cycle(tmp_path, name):
    """Their copies at another size have buffers and attributes of their own; the final folder is what timm loads."""
    swin = "swin" in name
    shape = {"depths": [2, 4], "window_size": 2} if swin else {"depth": 4}
    shape |= {"num_heads": [2, 4] if swin else 4, "embed_dim": 16, "patch_size": 4, "drop_path_rate": 0.0}
    states = {}
    for strategy in ("resizable", NAME):
        L.seed_everything(0, verbose=False)
        task = ImageClassification(
            name,
            model_kwargs=shape,
            num_classes=10,
            in_chans=1,
            image_size=16,
            optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
        )
        levels = [Level(width=2, depth=2)]
        method = MultiLevelTraining(levels, [Phase(0, 1), Phase(1, 2), Phase(0)])
        saved = SavePretrained(str(tmp_path / strategy))
        trainer = make_trainer(tmp_path, callbacks=[method, saved], strategy=strategy, max_steps=4, limit_val_batches=1)
        trainer.fit(task, ImageDataModule(image_size=16, in_chans=1, batch_size=8))
        loaded = timm.create_model(f"local-dir:{tmp_path / strategy}", pretrained=True)
        states[strategy] = loaded.state_dict()
        assert len(trainer.strategy.resizes) == 2
    for key, value in states["resizable"].items():
        torch.testing.assert_close(states[NAME][key], value, rtol=0, atol=1e-6, msg=key)

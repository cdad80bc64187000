import functools
import json
import random

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lit_accel import MultiLevelTraining
from lit_accel.anatomy import find_transformer
from lit_accel.data import ImageDataModule
from lit_accel.tasks import ImageClassification, SavePretrained, WarmupDecay, weight_decay_groups
from tests.training import make_trainer

DEIT = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
SWIN = {"patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 2}
MODELS = {
    "deit_tiny_patch16_224": DEIT,
    "deit_tiny_distilled_patch16_224": DEIT,
    "swinv2_tiny_window8_256": SWIN,
}
DEIT_TINY = "deit_tiny_patch16_224"


def make_task(model=DEIT_TINY, **arguments):
    seed_everything(1, verbose=False)
    shape = {"num_classes": 7, "in_chans": 1, "image_size": 8}
    return ImageClassification(model, **{"model_kwargs": MODELS[model], **shape, **arguments})


def make_batch(batch_size=4, seed=0, num_classes=7):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, 1, 8, 8, generator=generator)
    return images, torch.randint(num_classes, (batch_size,), generator=generator)


class Batches(LightningDataModule):
    """Held-out batches of different sizes."""

    def train_dataloader(self):
        return DataLoader([make_batch(seed=i) for i in range(3)], batch_size=None)

    def val_dataloader(self):
        return DataLoader([make_batch(1 + i, seed=100 + i) for i in range(3)], batch_size=None)

    test_dataloader = predict_dataloader = val_dataloader


def trainer_of(tmp_path, **options):
    return make_trainer(tmp_path, **{"strategy": "auto", "limit_val_batches": 0, **options})


@pytest.mark.parametrize("model", MODELS)
def test_the_transformer_is_an_ordinary_child(model):
    task = make_task(model)
    path, transformer = find_transformer(task)
    assert path == "model"
    assert transformer is task.model
    assert all(name.startswith("model.") for name in task.state_dict())


@pytest.mark.parametrize("model", MODELS)
def test_the_loss_is_cross_entropy(model):
    task = make_task(model, label_smoothing=0.1)
    images, targets = make_batch()
    loss = task.eval().training_step((images, targets), 0)
    smooth = one_hot(targets, 7) * 0.9 + 0.1 / 7
    expected = -(task.model(images).log_softmax(-1) * smooth).sum(-1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_distilled_model_trains_both_heads():
    task = make_task("deit_tiny_distilled_patch16_224").train()
    task.training_step(make_batch(), 0).backward()
    assert task.model.head.weight.grad.any() and task.model.head_dist.weight.grad.any()


@pytest.mark.parametrize("num_classes", [3, 5, 7])
def test_held_out_metrics_weigh_every_image_the_same(num_classes, tmp_path):
    task, data = make_task(num_classes=num_classes), Batches()
    batches = [(images, targets % num_classes) for images, targets in data.val_dataloader()]
    loader = DataLoader(batches, batch_size=None)
    trainer = trainer_of(tmp_path, limit_val_batches=1.0)
    (logged,) = trainer.validate(task, loader, verbose=False)
    (tested,) = trainer.test(task, loader, verbose=False)
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    logits = task.eval().model(images)
    expected = {
        "val/loss": cross_entropy(logits, targets).item(),
        "val/top1": (logits.argmax(-1) == targets).float().mean().item(),
    }
    if num_classes > 5:
        expected["val/top5"] = (logits.topk(5).indices == targets[:, None]).any(-1).float().mean().item()
    assert logged == pytest.approx(expected)
    assert {name.replace("test/", "val/"): value for name, value in tested.items()} == logged


def test_predictions(tmp_path):
    predicted = trainer_of(tmp_path).predict(make_task(), Batches())
    assert [logits.shape for logits in predicted] == [(1, 7), (2, 7), (3, 7)]


MIXED = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_is_that_of_the_papers(kind):
    task = make_task(**{kind: 1.0, "label_smoothing": 0.1})
    images, targets = make_batch()
    before = images.clone()
    mixed, soft = task.mix(images, targets, 0)
    assert torch.equal(images, before)
    assert torch.allclose(soft.sum(-1), torch.ones(4))
    # What is left of an image's own target is the weight of its own pixels.
    smooth = one_hot(targets, 7) * 0.9 + 0.1 / 7
    pair = int((targets != targets.flip(0)).nonzero()[0])
    share = ((soft - smooth.flip(0))[pair] / (smooth - smooth.flip(0))[pair])[targets[pair]].item()
    assert 0 < share < 1
    if kind == "mixup":
        assert torch.allclose(mixed, share * images + (1 - share) * images.flip(0), atol=1e-6)
    else:
        own, other = mixed[pair] == images[pair], mixed[pair] == images.flip(0)[pair]
        assert (own | other).all()
        assert own.float().mean().item() == pytest.approx(share)


def test_mixing_depends_on_seed_step_batch_and_rank_alone(monkeypatch):
    batch = make_batch()

    def mixed(batch_idx=0, step=0, rank=0, seed=0):
        task = make_task(**MIXED, seed=seed)
        with monkeypatch.context() as patch:
            patch.setattr(ImageClassification, "global_step", property(lambda self: step))
            patch.setattr(ImageClassification, "_data_rank", lambda self: rank)
            return task.mix(*batch, batch_idx)

    first = mixed()
    np.random.seed(99), random.seed(99), torch.manual_seed(99)  # noqa: NPY002
    again = mixed()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for change in ({"batch_idx": 1}, {"step": 1}, {"rank": 1}, {"seed": 1}):
        assert not torch.equal(first[0], mixed(**change)[0]), change


def test_mixing_leaves_the_global_generators_alone():
    task = make_task(**MIXED)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    task.mix(*make_batch(), 0)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


def test_odd_batches_cannot_be_mixed():
    with pytest.raises(ValueError, match="even batch_size"):
        make_task(**MIXED).training_step(make_batch(3), 0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_bitwise_the_one_that_was_not_interrupted(tmp_path, accumulate):
    def fit(num_steps, ckpt_path=None):
        task = make_task(**MIXED, lr_scheduler=functools.partial(WarmupDecay, num_total_steps=6), num_classes=10)
        # Five batches an epoch; augmentation and mixup are random.
        data = ImageDataModule(image_size=8, in_chans=1, batch_size=8, val_fraction=1 - 40 / 1797, re_prob=0.5, seed=3)
        trainer = trainer_of(tmp_path, max_steps=num_steps, max_epochs=-1, accumulate_grad_batches=accumulate)
        trainer.fit(task, data, ckpt_path=ckpt_path)
        return trainer, task

    _, whole = fit(6)
    part, _ = fit(2)
    part.save_checkpoint(tmp_path / "part.ckpt")
    _, resumed = fit(6, ckpt_path=tmp_path / "part.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_weight_decay_spares_what_the_model_names(model):
    task = make_task(model)
    decaying, rest = weight_decay_groups(task, weight_decay=0.3)
    names = {id(parameter): name.removeprefix("model.") for name, parameter in task.named_parameters()}
    spared = {names[id(parameter)] for parameter in rest["params"]}
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.3, 0)
    assert task.model.no_weight_decay() & set(names.values()) <= spared
    assert {name for name, p in task.model.named_parameters() if p.ndim < 2} <= spared
    assert len(decaying["params"]) + len(rest["params"]) == len(names)
    assert any("qkv.weight" in names[id(parameter)] for parameter in decaying["params"])


def test_a_name_spares_all_that_is_in_it():
    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.ModuleDict({"bias_mlp": torch.nn.Linear(2, 2), "bias_mlp2": torch.nn.Linear(2, 2)})
            self.net.no_weight_decay = lambda: {"bias_mlp"}

    module = Outer()
    decaying, rest = weight_decay_groups(module)
    assert [id(p) for p in decaying["params"]] == [id(module.net["bias_mlp2"].weight)]


@pytest.mark.parametrize("model", MODELS)
def test_load_from_checkpoint_restores_the_weights(model, tmp_path):
    task = make_task(model, lr_scheduler=functools.partial(WarmupDecay, decay="linear"), **MIXED)
    trainer = trainer_of(tmp_path, max_steps=2)
    trainer.fit(task, Batches())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = ImageClassification.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_save_pretrained_writes_what_timm_loads(model, tmp_path):
    task, folder = make_task(model), tmp_path / "final"
    trainer_of(tmp_path, max_steps=1, callbacks=[SavePretrained(str(folder))]).fit(task, Batches())
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images, _ = make_batch()
    assert torch.equal(again(images), task.eval()(images))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "options",
    [{"start_level": 1}, {"phases": [{"level": 0, "length": 1}, {"level": 1}]}, {}],
    ids=["grown", "ends small", "V-cycle"],
)
def test_save_pretrained_writes_the_size_that_the_run_ends_with(model, options, tmp_path):
    large = {"embed_dim": 16, "depth": 4, "num_heads": 4}
    if "swin" in model:
        large = {"depths": [4, 4], "num_heads": [2, 4]}
    task, folder = make_task(model, model_kwargs={**MODELS[model], **large}), tmp_path / "final"
    callbacks = [MultiLevelTraining(**options), SavePretrained(str(folder))]
    trainer_of(tmp_path, max_steps=8, max_epochs=-1, strategy="resizable", callbacks=callbacks).fit(task, Batches())
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images, _ = make_batch()
    assert torch.equal(again(images), task.eval()(images))


class OwnModule(LightningModule):
    """Somebody's, who calls the model as they like."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return sum(parameter.sum() for parameter in self.net.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_save_pretrained_finds_the_transformer_of_any_module(tmp_path):
    net = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=4))
    trainer_of(tmp_path, max_steps=1, callbacks=[SavePretrained(str(tmp_path / "out"))]).fit(OwnModule(net), Batches())
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.filterwarnings("error")
def test_a_plan_loads_no_weights(tmp_path):
    make_task().save_pretrained(str(tmp_path / "vit"))
    with torch.device("meta"):
        task = ImageClassification(f"local-dir:{tmp_path / 'vit'}", True, num_classes=7, in_chans=1, image_size=8)
    assert {parameter.device.type for parameter in task.model.parameters()} == {"meta"}


def test_a_module_that_writes_itself_is_asked_to(tmp_path):
    """As one of a hub's mixin is, which takes a folder alone."""

    class Own(OwnModule):
        def save_pretrained(self, folder, *, config=None):
            written.append(folder)

    written: list[str] = []
    trainer_of(tmp_path, max_steps=1, callbacks=[SavePretrained("out")]).fit(Own(torch.nn.Linear(2, 2)), Batches())
    assert written == ["out"]


def test_a_sharded_model_cannot_be_written_by_a_module_that_is_not_given_the_whole_one(tmp_path, monkeypatch):
    class Own(OwnModule):
        def save_pretrained(self, folder):
            raise AssertionError

    trainer = trainer_of(tmp_path, max_steps=1, callbacks=[SavePretrained("out")])
    monkeypatch.setattr(trainer.strategy, "gather_transformer", lambda: None, raising=False)
    with pytest.raises(MisconfigurationException, match=r"Own\.save_pretrained has no argument model"):
        trainer.fit(Own(torch.nn.Linear(2, 2)), Batches())
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda: make_task().model, r"VisionTransformer has no save_pretrained.*timm\.models\.save_for_hf"),
        (lambda: torch.nn.Linear(2, 2), "No transformer with a registered anatomy"),
    ],
    ids=["timm", "no transformer"],
)
def test_save_pretrained_refuses_before_training_what_it_could_not_write(net, message, tmp_path):
    trainer = trainer_of(tmp_path, max_steps=1, callbacks=[SavePretrained(str(tmp_path / "out"))])
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(OwnModule(net()), Batches())
    assert trainer.global_step == 0


def test_what_images_went_through_is_saved_with_the_model(tmp_path):
    data = ImageDataModule(image_size=8, in_chans=1, crop_pct=0.8, mean=(0.1,), std=(0.3,), interpolation="bilinear")
    task = make_task(num_classes=10)
    callbacks = [SavePretrained(str(tmp_path / "out"))]
    trainer_of(tmp_path, max_steps=1, callbacks=callbacks).fit(task, data)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    config = timm.data.resolve_model_data_config(loaded)
    given = {"mean": (0.1,), "std": (0.3,), "crop_pct": 0.8, "interpolation": "bilinear", "input_size": (1, 8, 8)}
    assert {name: tuple(v) if isinstance(v := config[name], list) else v for name in given} == given
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == [str(i) for i in range(10)]


def test_models_of_any_size_ignore_the_size_of_the_images():
    seed_everything(1, verbose=False)
    task = ImageClassification("test_resnet", num_classes=7, in_chans=1, image_size=8)
    assert task(make_batch()[0]).shape == (4, 7)


def test_the_model_may_say_itself_what_the_data_does_not():
    task = make_task(num_classes=None, image_size=None, model_kwargs={**DEIT, "num_classes": 4, "img_size": (8, 8)})
    assert task.num_classes == 4
    assert task(make_batch()[0]).shape == (4, 4)
    assert make_task(model_kwargs={**DEIT, "img_size": [8, 8]}).num_classes == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_kwargs": {**DEIT, "num_classes": 9}}, "num_classes=9, but the data has num_classes=7"),
        ({"model_kwargs": {**DEIT, "img_size": 16}}, "img_size=16, but the data has image_size=8"),
        ({"model_kwargs": {**DEIT, "dept": 2}}, "cannot build .*dept"),
        ({"model_kwargs": {**DEIT, "num_heads": 3}}, "cannot build"),
        ({"num_classes": 1}, "at least two"),
        ({"label_smoothing": 1.0}, "label_smoothing must be"),
        ({"mixup": -0.1}, "mixup must be at least 0"),
        ({"cutmix": -0.1}, "cutmix must be at least 0"),
        ({"mixup_prob": 1.1}, "mixup_prob must be a probability"),
        ({"mixup_switch_prob": -1.0}, "mixup_switch_prob must be a probability"),
    ],
)
def test_errors_teach(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_task(**arguments)


def test_a_misspelt_model_is_told_which_was_meant():
    with pytest.raises(ValueError, match="'deit_tiny_patch16_224'"):
        ImageClassification("deit_tiny_patch_16_224")

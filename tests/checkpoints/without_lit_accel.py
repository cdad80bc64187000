"""A program on a machine without lit-accel: it loads what runs with it have left, and trains on.

Run as ``python without_lit_accel.py FOLDER``. The folder has ``cases.json``, which says what to load; what was found
goes to ``found.json``, an empty text for each case that went well.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class NotInstalled(MetaPathFinder):
    """Finds no lit-accel, whatever the environment has."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> None:
        """Refuse the package and all within it."""
        if fullname.partition(".")[0] == "lit_accel":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


sys.meta_path.insert(0, NotInstalled())

import lightning.pytorch as L  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from plain import STEPS, PlainModule, build, outputs  # noqa: E402
from torch import nn  # noqa: E402

MORE_STEPS = 2


class Watch(L.Callback):
    """Keeps the states of the optimizer with which training goes on."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy them."""
        state = trainer.optimizers[0].state_dict()["state"]
        self.state = {
            index: {key: torch.as_tensor(value).clone() for key, value in each.items()} for index, each in state.items()
        }


def model_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the weights of the model alone, under its own names."""
    return {key.removeprefix("model."): value for key, value in checkpoint["state_dict"].items()}


def a_plain_model_takes_the_weights(name: str, path: Path, expected: torch.Tensor) -> None:
    """Load the weights into the class that the user had built the model of."""
    model = build(name)
    model.load_state_dict(model_weights(torch.load(path, weights_only=True)), strict=True)
    assert torch.equal(outputs(name, model), expected)


def plain_lightning_goes_on(name: str, path: Path, expected: torch.Tensor) -> None:
    """Load the file into the user's module, and resume the run with a plain Trainer."""
    module = PlainModule.load_from_checkpoint(path, weights_only=True)
    assert torch.equal(outputs(name, module.model), expected)
    watch = Watch()
    trainer = L.Trainer(
        max_steps=STEPS + MORE_STEPS,
        accelerator="cpu",
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = PlainModule(name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, ckpt_path=path, weights_only=True)
    assert trainer.global_step == STEPS + MORE_STEPS
    checkpoint = torch.load(path, weights_only=True)
    assert all("lit_accel" not in key for key in module.state_dict())
    assert any("callbacks used to create the checkpoint" in str(each.message) for each in said)
    saved = checkpoint["optimizer_states"][0]["state"]
    assert len(saved) == len(list(module.parameters()))
    for index, each in saved.items():
        assert each.keys() == watch.state[index].keys()
        assert all(torch.equal(torch.as_tensor(value), watch.state[index][key]) for key, value in each.items())
    trained = module.state_dict()
    assert any(not torch.equal(value, trained[key]) for key, value in checkpoint["state_dict"].items())
    assert all(value.isfinite().all() for value in trained.values())


def a_folder_is_read(name: str, folder: str) -> nn.Module:
    """Load a folder that a task has written."""
    if name == "deit":
        return timm.create_model(f"local-dir:{folder}", pretrained=True)
    if name == "gpt2":
        transformers.AutoTokenizer.from_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder)
    return transformers.AutoModelForMaskedLM.from_pretrained(folder)


def a_task_has_left_an_ordinary_model(name: str, folder: str, path: Path, expected: dict[str, torch.Tensor]) -> None:
    """Load the folder, and the checkpoint into a model of the same config."""
    loaded = a_folder_is_read(name, folder)
    built = a_folder_is_read(name, folder)
    for parameter in built.parameters():
        nn.init.zeros_(parameter)
    built.load_state_dict(model_weights(torch.load(path, weights_only=True)), strict=True)
    for model in (loaded, built):
        with torch.no_grad():
            given = model.eval()(expected["inputs"])
        assert torch.equal(given if isinstance(given, torch.Tensor) else given.logits, expected["outputs"])


def error_of(check: Callable[..., None], *arguments: Any) -> str:
    """Return what a check has to complain about."""
    try:
        check(*arguments)
    except Exception:
        return traceback.format_exc()
    return ""


def main(folder: Path) -> None:
    """Do all checks of all cases."""
    torch.set_num_threads(1)
    found = {}
    for case in json.loads((folder / "cases.json").read_text()):
        name, path = case["model"], Path(case["path"])
        expected = torch.load(case["expected"], weights_only=True)
        if "folder" in case:
            found[case["id"]] = error_of(a_task_has_left_an_ordinary_model, name, case["folder"], path, expected)
        else:
            arguments = (name, path, expected["outputs"])
            found[case["id"]] = error_of(a_plain_model_takes_the_weights, *arguments)
            found[case["id"] + "-trained-on"] = error_of(plain_lightning_goes_on, *arguments)
    assert all(name.partition(".")[0] != "lit_accel" for name in sys.modules)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Modules and configurations of somebody's own on the command line."""

import enum
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_accel import RandomLTDMixin
from lit_accel.cli import main
from lit_accel.command_inputs import check_checkpoint, check_config_file, check_same_model
from lit_accel.tasks import CausalLM
from tests.test_cli import DATA, MODEL, QUIET, VOCAB_SIZE, files, parsed

TINY = {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 8}
HERE = __name__


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # LightningCLI warns where the process has arguments of its own, as pytest has.
    monkeypatch.setattr("sys.argv", ["lit-accel"])


def runs(**trainer):
    return files(data=DATA, trainer={"trainer": {**QUIET, "logger": False, "enable_checkpointing": False, **trainer}})


class Named(CausalLM):
    """A task whose arguments are its own, which the command line takes for its hyperparameters."""

    def __init__(self, width: int = 8, vocab_size: int | None = None) -> None:
        super().__init__("gpt2", overrides={**TINY, "n_embd": width}, vocab_size=vocab_size)


def test_a_task_may_have_arguments_of_its_own():
    main(["fit", f"--model={HERE}.Named", "--data=lit_accel.data.TextDataModule", *runs()[2:], *small_text()])


def small_text():
    Path("text.txt").write_text("one two three\n" * 400)
    own = {"source": "text.txt", "tokenizer": "bytes", "block_size": 8, "batch_size": 2, "val_fraction": 0.5}
    return [f"--data.{name}={value}" for name, value in own.items()]


class Kind(enum.Enum):
    FIRST = 1
    SECOND = 2


class Typed(CausalLM):
    """Arguments that a checkpoint holds as the text that stands for them."""

    def __init__(
        self, words: Path, kind: Kind = Kind.FIRST, sizes: tuple[int, int] = (8, 2), vocab_size: int | None = None
    ) -> None:
        super().__init__("gpt2", overrides=TINY, vocab_size=vocab_size)
        self.save_hyperparameters()


@pytest.mark.filterwarnings("error:.*its default")
def test_the_configuration_that_a_checkpoint_was_trained_with_is_that_of_its_model():
    settings = [f"--model={HERE}.Typed", "--model.words=words.txt", "--model.kind=SECOND"]
    main(["fit", *settings, *runs(enable_checkpointing=True)])
    (checkpoint,) = Path("checkpoints").glob("*.ckpt")
    again = [*settings, *runs(), "--ckpt_path", str(checkpoint)]
    parsed("validate", *again)
    parsed("fit", *again)
    with pytest.raises(MisconfigurationException, match=r"model.words is 'others.txt'.* with 'words.txt', which"):
        parsed("fit", *again, "--model.words=others.txt")
    with pytest.raises(UserWarning, match=r"model.kind is 'FIRST', its default, .* trained with 'SECOND'"):
        parsed("fit", *again, "--model.kind=FIRST")


def test_functions_and_classes_are_compared_by_name():
    model = {"class_path": f"{HERE}.Typed", "init_args": {"loss": torch.nn.functional.mse_loss, "kind": torch.nn.GELU}}
    written = {"loss": "torch.nn.functional.mse_loss", "kind": "torch.nn.modules.activation.GELU"}
    check_same_model({"hyper_parameters": written}, model)
    with pytest.raises(MisconfigurationException, match=r"model.loss is"):
        check_same_model({"hyper_parameters": {**written, "loss": "torch.nn.functional.l1_loss"}}, model)


class Plain(LightningModule):
    def __init__(self, vocab_size: int = 11) -> None:
        super().__init__()
        self.vocab_size = vocab_size


class WithTokens(RandomLTDMixin, Plain):
    """Its arguments are those of its bases."""


def test_a_default_of_a_base_is_nobodys_word():
    command = [f"--model={HERE}.WithTokens", *files(data=DATA)]
    assert parsed("fit", *command).model.vocab_size == VOCAB_SIZE
    with pytest.raises(MisconfigurationException, match=f"vocab_size is 12, but the data has {VOCAB_SIZE}"):
        parsed("fit", *command, "--model.vocab_size=12")
    was = {"hyper_parameters": {"vocab_size": 7}}
    with pytest.warns(UserWarning, match="model.vocab_size is 11, its default.*trained with 7"):
        check_same_model(was, {"class_path": f"{HERE}.WithTokens", "init_args": {"vocab_size": 11}})


class Loading(CausalLM):
    """Looks at its weights, as somebody's module may."""

    def __init__(self, vocab_size: int | None = None) -> None:
        super().__init__("gpt2", overrides=TINY, vocab_size=vocab_size)
        self.norm = float(next(self.model.parameters()).norm())


def test_a_model_that_is_loaded_can_be_planned():
    CausalLM("gpt2", overrides=TINY, vocab_size=VOCAB_SIZE).model.save_pretrained("gpt")
    loaded = {"model": {"class_path": "lit_accel.tasks.CausalLM", "init_args": {"model": "gpt"}}}
    plans = []
    for arguments in (files(model=loaded), files(model=MODEL), [f"--model={HERE}.Loading"]):
        cli = parsed("plan", *arguments, *runs())
        assert cli.model.model.config.n_layer == 2
        plans.append(sum(parameter.numel() for parameter in cli.model.parameters()))
        main(["plan", *arguments, *runs(), "--picture=null"])
    assert len(set(plans)) == 1


def test_the_configuration_that_a_run_saved_can_be_planned():
    main(["fit", *files(model=MODEL), *runs(default_root_dir="run")])
    assert "ckpt_path" in yaml.safe_load(Path("run/config.yaml").read_text())
    main(["plan", "--config=run/config.yaml", "--picture=null"])
    with pytest.warns(UserWarning, match="--ckpt_path is ignored: a plan is of the whole run"):
        main(["plan", "--config=run/config.yaml", "--picture=null", "--ckpt_path=none.ckpt"])


def test_no_configuration_of_the_users_is_written_over():
    """Without a logger, the folder of a run is the one that one is in."""
    own = "# What I have tried\n" + yaml.safe_dump({**MODEL, **DATA, "trainer": {**QUIET, "logger": False}})
    Path("config.yaml").write_text(own)
    with pytest.warns(UserWarning, match="config.yaml was not written by a run, and is left as it is"):
        main(["fit", "--config=config.yaml", "--trainer.enable_checkpointing=false"])
    assert Path("config.yaml").read_text() == own
    # A run's own is.
    for steps in (1, 2):
        main(["fit", *files(model=MODEL), *runs(default_root_dir="run", max_steps=steps)])
        assert yaml.safe_load(Path("run/config.yaml").read_text())["trainer"]["max_steps"] == steps


@pytest.mark.parametrize("given", ["0.25", "3", "00:01:00:00"])
def test_an_interval_is_a_share_a_number_or_a_time(given):
    cli = parsed("fit", *files(model=MODEL), *runs(), f"--trainer.val_check_interval={given}")
    assert repr(cli.config["fit"]["trainer"]["val_check_interval"]).strip("'") == given


def test_what_lies_elsewhere_is_not_looked_for_here(tmp_path):
    check_config_file("s3://bucket/run.yaml")
    # As DeepSpeed writes one.
    (tmp_path / "last.ckpt" / "checkpoint").mkdir(parents=True)
    assert check_checkpoint("last.ckpt", is_resumed=True) is None

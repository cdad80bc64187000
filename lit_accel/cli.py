"""The ``lit-accel`` command: train from composable YAML; plan a run before it, report on runs after."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NoReturn

import lightning.pytorch as L
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import DeviceStatsMonitor, LearningRateMonitor, ModelSummary, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

# Imported for what it registers: the strategies that YAML knows by name.
import lit_accel.strategies  # noqa: F401
from lit_accel.command_config import SaveRunConfig
from lit_accel.command_errors import answers, fault_at_import, is_raised_by
from lit_accel.command_inputs import (
    check_checkpoint,
    check_config_file,
    check_order,
    check_same_model,
    check_trainer,
    config_files,
    require_end,
)
from lit_accel.command_last import last_checkpoint
from lit_accel.command_messages import parameters_of, readable
from lit_accel.command_types import whole_numbers_first
from lit_accel.compute import ComputeLedger
from lit_accel.methods.preparation import watch_over
from lit_accel.planning import Forecast, plan
from lit_accel.planning.calibration import calibrate as calibrated
from lit_accel.planning.picture import check_picture, draw_forecast
from lit_accel.planning.table import forecast_tables

_SHOWING = (ProgressBar, DeviceStatsMonitor, LearningRateMonitor, ModelSummary)
# What a model takes from its data.
_OF_THE_DATA = ("vocab_size", "num_classes", "in_chans", "image_size")
_QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class AccelTrainer(L.Trainer):
    """Lightning's Trainer, which can also say what a run would cost; of ``lit-accel``."""

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        calibrate: bool = False,
        picture: str | None = "plan.png",
        num_sequences: int | None = None,
        num_tokens: int | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> Forecast:
        """Print what a run would cost and need, without training it.

        Args:
            model: The module, which may have no weights; with a calibration it needs them, and changes them.
            datamodule: Its data module.
            calibrate: Whether to train some steps on this machine, to predict seconds.
            picture: Where to draw what each step costs, a PNG, PDF, SVG or JPEG file; null for nowhere.
            num_sequences: Sequences of a micro-batch. Default: those of the first training batch.
            num_tokens: Tokens of each. Default: the same.
            ckpt_path: Ignored, as the next: a plan is of the whole run. They are in the configurations that runs save.
            weights_only: See there.

        Returns:
            What was printed.
        """
        if picture is not None:
            check_picture(picture)
        forecast = plan(self, model, datamodule, num_sequences=num_sequences, num_tokens=num_tokens)
        if calibrate:
            forecast = replace(forecast, seconds=calibrated(self, model, datamodule, forecast.plan))
        show(forecast, picture)
        return forecast


def show(forecast: Forecast, picture: str | None) -> None:
    """Print a forecast, and draw it.

    Args:
        forecast: What a run will be like.
        picture: Where to draw it, a PNG, PDF, SVG or JPEG file; ``None`` for nowhere.
    """
    Console().print(forecast_tables(forecast))
    if picture is not None:
        draw_forecast(forecast, picture)
        print(f"Drawn in {picture}.")


class CommandParser(LightningArgumentParser):
    """Says what is wrong in one message, without the hundred arguments that there are."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the process with exit code 2; an inner parser raises."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        known = [option.lstrip("-") for option in parser._option_string_actions if not option.endswith(".help")]
        command = parser.prog.replace(" [options]", "")
        if (fault := fault_at_import(ex, message)) is not None:
            self.exit(2, f"lit-accel: A module cannot be imported. {fault}\n")
        self.exit(2, f"lit-accel: {readable(message, known)} See `{command} --help`.\n")


class LitAccelCLI(LightningCLI):
    """LightningCLI for any LightningModule and data module, with some differences.

    - The data sets the size of the model's input and output: the data module's ``vocab_size``, or its
      ``num_classes``, ``in_chans`` and ``image_size``, are linked to the model's arguments of these names. Where
      either lacks one, it is not linked and the model's own argument counts.
    - The module configures its optimizer. Left to LightningCLI, ``configure_optimizers`` would return one and
      the same optimizer for ever, and after a resize it would step parameters that no longer exist.
    - Of several :class:`~lit_accel.ComputeLedger` the last one counts: fragments that compose each bring one.
    - ``plan`` says what a run would cost, with a model that has no weights.
    - ``--ckpt_path last`` is the newest ``last.ckpt`` of all runs with the same name, not of the folder of this one.

    Args:
        args: Arguments as on the command line; ``None`` takes those of the process.
    """

    def __init__(self, args: ArgsType = None) -> None:
        self._is_on_meta = False
        self.forecast: Forecast | None = None
        """What ``plan`` has found out."""
        given = sys.argv[1:] if args is None else args
        self._called = given[0] if isinstance(given, list) and given else None
        whole_numbers_first(L.Trainer.__init__)
        super().__init__(
            LightningModule,
            # Naming no data module allows any, and also none: a module may bring its own loaders.
            datamodule_class=None,
            trainer_class=AccelTrainer,
            parser_class=CommandParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveRunConfig,
            parser_kwargs={
                "prog": "lit-accel",
                "description": "Train transformers at a lower cost. A later --config overrides the earlier. "
                "`lit-accel report RUN [RUN ...]` compares finished runs; see `lit-accel report --help`.",
                "version": version("lit-accel"),
            },
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands, each with the arguments that are not the user's."""
        return {**LightningCLI.subcommands(), "plan": {"model", "datamodule"}}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Leave the subcommands empty that were not called: their arguments are slow to collect."""
        if self._called in self.subcommands() and self._called != subcommand:
            return self.init_parser(**kwargs)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the vocabulary of the data, or its classes and the shape of its images, to the model."""
        for name in _OF_THE_DATA:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments, after a look at the files that they name."""
        given = sys.argv[1:] if args is None else args
        if isinstance(given, list):
            try:
                for path in config_files(given):
                    check_config_file(path)
                check_order(given, self.subcommands())
            except ValueError as error:
                parser.exit(2, f"lit-accel: {error}\n")
        super().parse_arguments(parser, args)
        # Now: Lightning adds what a checkpoint's model was built from.
        model = (self.config[self.config["subcommand"]] if "subcommand" in self.config else self.config).get("model")
        given = (model or {}).get("init_args") or {}
        self._told = {name: given[name] for name in _OF_THE_DATA if given.get(name) is not None}

    def _parse_ckpt_path(self) -> None:
        subcommand = self.config.get("subcommand")
        config = self.config[subcommand] if subcommand else {}
        if subcommand == "plan":
            if config.get("ckpt_path") is not None:
                rank_zero_warn("--ckpt_path is ignored: a plan is of the whole run, from its first step.")
            return
        if config.get("ckpt_path") == "last" and (last := last_checkpoint(config["trainer"].as_dict())) is not None:
            rank_zero_info(f"--ckpt_path last is {last}.")
            config["ckpt_path"] = str(last)
        checkpoint = check_checkpoint(config.get("ckpt_path"), is_resumed=subcommand == "fit")
        if checkpoint is not None and config.get("model") is not None:
            check_same_model(checkpoint, config["model"].as_dict())
        super()._parse_ckpt_path()

    def before_fit(self) -> None:
        """Refuse a run that nobody has given a length."""
        require_end(self._get(self.config_init, "trainer"))

    before_plan = before_fit

    def before_validate(self) -> None:
        """Say so where nothing is loaded: an evaluation of random weights looks like any other."""
        if self._get(self.config_init, "ckpt_path") is None:
            rank_zero_warn(
                "Without --ckpt_path the model is evaluated as it is built, with random weights if it loads none "
                "itself. Give --ckpt_path a checkpoint of the run."
            )

    before_test = before_predict = before_validate

    def before_instantiate_classes(self) -> None:
        """For a plan, have the model built without weights; the data is real."""
        if self.subcommand != "plan":
            return
        self._is_on_meta = True

        def build(class_type: type[LightningModule], *args: Any, **kwargs: Any) -> LightningModule:
            if not self._is_on_meta:
                return class_type(*args, **kwargs)
            try:
                with torch.device("meta"):
                    return class_type(*args, **kwargs)
            except RuntimeError:
                # One that loads weights, or looks at them.
                return class_type(*args, **kwargs)

        self.parser.add_instantiator(build, LightningModule, subclasses=True, prepend=True)

    def instantiate_classes(self) -> None:
        """Build what the configuration names, and refuse a model that was told another thing than its data says.

        Raises:
            MisconfigurationException: If it was; the data's would be taken without a word.
        """
        super().instantiate_classes()
        parameters = parameters_of(type(self.model))
        for name, told in self._told.items():
            said = getattr(self.datamodule, name, None)
            is_default = name in parameters and told == parameters[name].default
            if said is not None and told != said and not is_default:
                raise MisconfigurationException(
                    f"model.init_args.{name} is {told}, but the data has {said}, which the model takes. Leave it out, "
                    "or change the data."
                )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the Trainer: with one ledger, and for a plan writing nothing, without weights on the CPU."""
        trainer = self._get(self.config_init, "trainer")
        trainer["callbacks"] = _with_one_ledger(trainer.get("callbacks"))
        if self.subcommand == "plan":
            self.save_config_callback = None
            kwargs = {**_QUIET, **kwargs}
            # They refuse a Trainer without what they show.
            trainer["callbacks"] = [each for each in trainer["callbacks"] if not isinstance(each, _SHOWING)]
        if self._is_on_meta:
            is_here = _world_size(trainer) == 1 and trainer.get("accelerator", "auto") in ("auto", "cpu")
            kwargs = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, **kwargs}
            if not is_here and trainer.get("strategy", "auto") != "auto":
                kwargs["strategy"] = "resizable"
        built = super().instantiate_trainer(**kwargs)
        # Also where there is no method: the dense runs that others are compared with must survive as much.
        watch_over(built)
        return built

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        check_trainer(config)
        try:
            return super()._instantiate_trainer(config, callbacks)
        except (ValueError, TypeError, RuntimeError) as error:
            if is_raised_by(error, "lightning"):
                raise MisconfigurationException(f"The Trainer refuses its settings: {error}") from error
            raise

    def plan(self, model: LightningModule, datamodule: LightningDataModule | None = None, **options: Any) -> None:
        """Print what a run would cost and need; see :meth:`AccelTrainer.plan`."""
        if options["picture"] is not None:
            check_picture(options["picture"])
        config = self._get(self.config_init, "trainer")
        world_size = _world_size(config)
        forecast = plan(
            self.trainer,
            model,
            datamodule,
            num_sequences=options["num_sequences"],
            num_tokens=options["num_tokens"],
            world_size=world_size,
        )
        if world_size != 1:
            unchecked = (
                f"planned for {world_size} processes as if on one: whether strategy {config['strategy']!r} can do all "
                "of this was not checked."
            )
            forecast = replace(forecast, warnings=(*forecast.warnings, unchecked))
        if _num_devices(config) is None:
            unknown = (
                f"planned for one process: only the machine of the run knows how many devices {config['devices']!r} "
                "are. Give their number with --trainer.devices."
            )
            forecast = replace(forecast, warnings=(*forecast.warnings, unknown))
        if options["calibrate"]:
            self._is_on_meta = False
            self.instantiate_classes()
            seconds = calibrated(self.trainer, self.model, self.datamodule, forecast.plan)
            forecast = replace(forecast, seconds=seconds)
        self.forecast = forecast
        # A calibration on several devices has a process for each.
        if self.trainer.is_global_zero:
            show(forecast, options["picture"])


def _with_one_ledger(callbacks: Any) -> list[L.Callback]:
    """Leave out all ledgers but the last; the others keep their places."""
    callbacks = callbacks if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]
    ledgers = [callback for callback in callbacks if isinstance(callback, ComputeLedger)]
    return [callback for callback in callbacks if callback not in ledgers[:-1]]


def _world_size(trainer: Any) -> int:
    """Return how many processes a Trainer's configuration asks for; one where that cannot be known here."""
    return (_num_devices(trainer) or 1) * int(trainer.get("num_nodes") or 1)


def _num_devices(trainer: Any) -> int | None:
    """Return how many devices of a machine a Trainer's configuration asks for; ``None`` if another one knows it."""
    devices = trainer.get("devices", "auto")
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part]
    if isinstance(devices, list):
        return len(devices)
    if str(devices).isdigit():
        return max(1, int(devices))
    accelerator = trainer.get("accelerator", "auto")
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.device_count()
    return 1 if accelerator in ("auto", "cpu") else None


def main(args: ArgsType = None) -> None:
    """Run ``lit-accel fit | validate | test | predict | plan | report``.

    Args:
        args: Arguments as on the command line; ``None`` takes those of the process.
    """
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and given[:1] == ["report"]:
        from lit_accel.report import command

        sys.exit(command(given[1:]))
    if args is not None:
        LitAccelCLI(args)
        return
    # As `python -m` does: modules of one's own lie in the folder that one is in.
    sys.path.insert(0, "")
    with answers():
        LitAccelCLI()

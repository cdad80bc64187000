"""The ``lit-accel`` command: train from composable YAML."""

from importlib.metadata import version

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

# Imported for what it registers: the strategies that YAML knows by name.
import lit_accel.strategies  # noqa: F401


class LitAccelCLI(LightningCLI):
    """LightningCLI for any LightningModule and data module, with two differences.

    - The data sets the size of the model's input and output: the data module's ``vocab_size``, or its
      ``num_classes``, ``in_chans`` and ``image_size``, are linked to the model's arguments of these names. Where
      either lacks one, it is not linked and the model's own argument counts.
    - The module configures its optimizer. Left to LightningCLI, ``configure_optimizers`` would return one and
      the same optimizer for ever, and after a resize it would step parameters that no longer exist.

    Args:
        args: Arguments as on the command line; ``None`` takes those of the process.
    """

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            LightningModule,
            # Naming no data module allows any, and also none: a module may bring its own loaders.
            datamodule_class=None,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "prog": "lit-accel",
                "description": "Train transformers at a lower cost. A later --config overrides the earlier.",
                "version": version("lit-accel"),
            },
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the vocabulary of the data, or its classes and the shape of its images, to the model."""
        for name in ("vocab_size", "num_classes", "in_chans", "image_size"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")


def main(args: ArgsType = None) -> None:
    """Run ``lit-accel fit | validate | test | predict``.

    Args:
        args: Arguments as on the command line; ``None`` takes those of the process.
    """
    LitAccelCLI(args)

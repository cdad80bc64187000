"""What the transformer is called with in training: found out on the first batch, without computing anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_accel.anatomy import anatomy_of, find_transformer


class PlanError(Exception):
    """A run cannot be planned; the message says why and what to do."""


class _Called(Exception):  # noqa: N818 - it is no error
    """Ends the training step where the transformer is called."""


@dataclass(frozen=True)
class FirstCall:
    """A call of the transformer.

    Args:
        args: Its positional arguments, of tensors without values.
        kwargs: Its keyword arguments.
        num_sequences: Sequences of the batch.
        num_tokens: Tokens of each.
        mode: What its tensors belong to.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    num_sequences: int
    num_tokens: int
    mode: FakeTensorMode


@contextmanager
def _without_logging(module: L.LightningModule) -> Iterator[None]:
    """Let a training step log where there is no training to log for."""
    muted: Any = module
    muted.log = muted.log_dict = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del muted.log, muted.log_dict


def first_call(trainer: L.Trainer, module: L.LightningModule) -> FirstCall:
    """Run the training step on the first batch up to where it calls the transformer, to train it.

    Args:
        trainer: The Trainer, set up.
        module: Its module, whose parameters may be on the meta device.

    Raises:
        PlanError: If the training step does not get there.
    """
    trainer.fit_loop.setup_data()
    # As the Trainer does, which takes several loaders too.
    first = next(iter(CombinedLoader(trainer.train_dataloader, "max_size_cycle")), None)
    if first is None:
        raise PlanError("There is no batch to train on: the training data is empty. Check the data module.")
    batch = first[0]
    transformer = find_transformer(module)[1]
    anatomy = anatomy_of(transformer)
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            raise PlanError(
                f"The training step of {type(module).__name__} calls its transformer without gradients before it "
                "trains it, and a plan follows one call. Say what it is trained on, with --num_sequences and "
                "--num_tokens; the other call is not counted."
            )
        found.append((args, kwargs))
        raise _Called

    hook = transformer.register_forward_pre_hook(note, with_kwargs=True)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        batch = module._apply_batch_transfer_handler(batch, torch.device("cpu"), 0)
        batch = apply_to_collection(batch, torch.Tensor, mode.from_tensor)
        # As Lightning does: a second argument is the index, whatever it is called.
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        with mode, _without_logging(module):
            module.training_step(batch, *([0] if takes_index else []))
    except _Called:
        pass
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(
            f"The training step of {type(module).__name__} could not be followed on a batch without values "
            f"({type(error).__name__}: {error}). Say what it is given instead, with --num_sequences and --num_tokens."
        ) from error
    finally:
        hook.remove()
    if not found:
        raise PlanError(
            f"The training step of {type(module).__name__} does not call its transformer ({type(transformer).__name__})"
            " as a module, so nobody can say what a step costs. Call the model itself; calls of its parts are not seen."
        )
    args, kwargs = found[0]
    num_sequences, num_tokens = anatomy.input_shape(args, kwargs)
    return FirstCall(args, kwargs, int(num_sequences), int(num_tokens), mode)

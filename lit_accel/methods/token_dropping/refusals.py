"""What token dropping cannot work with; each message says what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lit_accel.anatomy import Anatomy, anatomy_of, is_compiled
from lit_accel.anatomy.build import COMPILE_OPTIONS
from lit_accel.anatomy.hugging_face import tokens_at_a_time
from lit_accel.arguments import require_duration, require_indices, require_one_of, require_whole
from lit_accel.methods.token_dropping.dropper import Scope
from lit_accel.methods.token_dropping.plan import TokenPlan
from lit_accel.methods.token_dropping.schedule import TokenSchedule


def check_arguments(
    scope: Scope, pinned: Sequence[int] | None, growth: int | float, counts: Mapping[str, tuple[int | None, int]]
) -> None:
    """Check what a user has given, before anything is known of the model.

    Args:
        scope: Which blocks share a draw.
        pinned: Indices of blocks that always run on all tokens.
        growth: When nothing is dropped any more.
        counts: Numbers of tokens by their names, each with the least that it may be.

    Raises:
        ValueError: If something is not allowed.
    """
    require_one_of("scope", scope, get_args(Scope))
    if pinned is not None:
        require_indices("pinned", pinned)
    if scope == "input" and pinned:
        raise ValueError('pinned has no meaning with scope="input", which drops tokens before the first block.')
    require_duration("growth", growth)
    if growth == 0:
        raise ValueError("growth is 0: nothing would ever be dropped. Leave the callback out, or set start_tokens=1.0.")
    for argument, (value, least) in counts.items():
        if value is not None:
            require_whole(argument, value, least, of="tokens")


def dropping_blocks(anatomy: Anatomy, pinned: Sequence[int], scope: Scope) -> tuple[int, ...]:
    """Return the indices of the blocks that may run on some of their tokens.

    Args:
        anatomy: The model.
        pinned: Indices of blocks that always run on all; negative ones count from the last.
        scope: Which blocks share a draw.

    Raises:
        MisconfigurationException: If there are none, a pin does not exist, or the scope does not fit the model.
    """
    num_blocks, family = len(anatomy.blocks), anatomy.family
    unknown = [block.path for block in anatomy.blocks if block.attention.tile is not None and block.windows is None]
    if unknown:
        raise MisconfigurationException(
            f"The blocks of this {family} model attend within windows, and how {unknown[0]} lays them out is not "
            "known: tokens of a window can only be dropped together. Give the blocks of its anatomy `windows` (see "
            "lit_accel.anatomy.base.Windows)."
        )
    has_windows = any(block.windows is not None for block in anatomy.blocks)
    if scope == "route" and has_windows:
        raise MisconfigurationException(
            f'scope="route" has all blocks run on the same tokens, and the blocks of this {family} model cut their '
            'windows differently: there is no choice of whole windows that fits them all. Use scope="layer".'
        )
    if scope == "input":
        if has_windows:
            raise MisconfigurationException(
                f'scope="input" would leave holes in the grid of this {family} model, whose patches are merged later. '
                'Use scope="layer".'
            )
        if not anatomy.pools_tokens:
            raise MisconfigurationException(
                f'scope="input" does not bring dropped tokens back, and this {family} model needs each token at its '
                "end. "
                'It is for image classifiers of timm\'s VisionTransformer. Use scope="layer" or "route".'
            )
        return tuple(range(num_blocks))
    if wrong := [index for index in pinned if not -num_blocks <= index < num_blocks]:
        raise MisconfigurationException(
            f"pinned names block {wrong[0]}, but this {family} model has {num_blocks} blocks: 0 to {num_blocks - 1}, "
            f"or -{num_blocks} to -1 from the last."
        )
    kept = {index % num_blocks for index in pinned}
    blocks = [index for index in range(num_blocks) if index not in kept]
    whole = [index for index in blocks if _num_windows(anatomy, index) == 1]
    if len(blocks) == len(whole):
        because = f", and {len(whole)} have a single window" if whole else ""
        raise MisconfigurationException(
            f"There is no layer to drop tokens in: of the {num_blocks} blocks of this {family} model {len(kept)} "
            f"always see every token (pinned: {sorted(kept) or 'none'}){because}. Pin fewer blocks, or train a deeper "
            "model."
        )
    return tuple(index for index in blocks if index not in whole)


def _num_windows(anatomy: Anatomy, index: int) -> int | None:
    attention = anatomy.blocks[index].attention
    if attention.tile is None or anatomy.num_tokens is None:
        return None
    return anatomy.places[attention.place](1, anatomy.num_tokens) // attention.tile


def check_chunks(transformer: nn.Module, quantum: int) -> None:
    """Check that blocks which cut their tokens into chunks can cut those that are kept.

    Args:
        transformer: The transformer.
        quantum: Of what the number of kept tokens is a multiple.

    Raises:
        MisconfigurationException: If not.
    """
    chunk = tokens_at_a_time(transformer)
    if chunk and quantum % chunk:
        raise MisconfigurationException(
            f"The blocks of this {type(transformer).__name__} compute {chunk} tokens at a time "
            f"(chunk_size_feed_forward), and are to keep a multiple of {quantum} of them. Set quantum to a multiple of "
            f"{chunk}, or chunk_size_feed_forward to 0."
        )


def input_prefix(anatomy: Anatomy, keep_prefix: int | None) -> int:
    """Return how many of the first tokens are kept with ``scope="input"``.

    Args:
        anatomy: The model.
        keep_prefix: What the user chose.

    Raises:
        MisconfigurationException: If that is fewer than the model itself puts in front.
    """
    if keep_prefix is None:
        return anatomy.num_prefix_tokens
    if keep_prefix < anatomy.num_prefix_tokens:
        raise MisconfigurationException(
            f'keep_prefix is {keep_prefix}, and with scope="input" dropped tokens never come back: the '
            f"{anatomy.num_prefix_tokens} that this {anatomy.family} model puts in front, such as that for the class, "
            "must be kept. Leave keep_prefix out."
        )
    return keep_prefix


def check_windows(anatomy: Anatomy, schedule: TokenSchedule, num_prefix: int) -> None:
    """Check that nothing is asked for that windows do not have.

    Args:
        anatomy: The model.
        schedule: How many tokens are kept.
        num_prefix: The first tokens, which are always kept.

    Raises:
        MisconfigurationException: If something is.
    """
    if all(block.windows is None for block in anatomy.blocks):
        return
    asked = {
        "start_tokens as a number": isinstance(schedule.start, int),
        "max_lengths": schedule.max_lengths is not None,
        "compat": schedule.compat is not None,
        "keep_prefix": num_prefix > 0,
    }
    if wrong := [name for name, is_asked in asked.items() if is_asked]:
        raise MisconfigurationException(
            f"{' and '.join(wrong)} cannot be used with this {anatomy.family} model: it drops whole windows, whose "
            "number differs from stage to stage. Give start_tokens as a share, such as 0.25, and leave the rest out."
        )


def check_start(anatomy: Anatomy, start: int | float, num_tokens: int | None) -> None:
    """Check that a sequence is longer than what is kept of it at first.

    Args:
        anatomy: The model.
        start: Kept tokens at first; a share always fits.
        num_tokens: Tokens of a sequence, or ``None`` if that is not known.

    Raises:
        MisconfigurationException: If it is not.
    """
    if isinstance(start, float):
        return
    longest = num_tokens or anatomy.max_tokens or None
    if longest is not None and start >= longest:
        raise MisconfigurationException(
            f"start_tokens is {start}, and sequences have no more than {longest} tokens: nothing would be dropped. "
            "Give fewer tokens, or a share of the sequence such as 0.25."
        )


def check_first_batch(start: int | float, num_tokens: int) -> None:
    """Check the same on the first batch, where nothing has said before how long sequences are.

    Args:
        start: Kept tokens at first; a share always fits.
        num_tokens: Tokens of its sequences.

    Raises:
        MisconfigurationException: If they are no longer than what is kept.
    """
    if isinstance(start, int) and start >= num_tokens:
        raise MisconfigurationException(
            f"start_tokens is {start}, and the sequences of the first batch have {num_tokens} tokens: nothing would be "
            "dropped. Give fewer tokens, or a share of the sequence such as 0.25. If other batches are longer, give "
            "num_tokens."
        )


def check_interval(interval: str, frequency: int) -> None:
    """Check that Lightning steps a LayerTokenLR at every optimizer step.

    Args:
        interval: Lightning's ``interval`` of the scheduler.
        frequency: Its ``frequency``.

    Raises:
        MisconfigurationException: If it does not.
    """
    if interval != "step" or frequency != 1:
        raise MisconfigurationException(
            f"LayerTokenLR goes by optimizer steps, and Lightning is to step it every {frequency} {interval}(s). "
            'Return {"scheduler": scheduler, "interval": "step"} as the lr_scheduler from configure_optimizers.'
        )


def check_graphs(transformer: nn.Module, plan: TokenPlan) -> None:
    """Check that blocks are not called in more ways than torch compiles.

    Args:
        transformer: The transformer.
        plan: The run.

    Raises:
        MisconfigurationException: If they are.
    """
    modules = [transformer.get_submodule(block.path) for block in anatomy_of(transformer).blocks]
    compiled = [module for module in modules if is_compiled(module)]
    is_static = any(getattr(module, COMPILE_OPTIONS, {}).get("dynamic") is False for module in compiled)
    has_windows = any(block.windows is not None for block in plan.anatomy.blocks)
    # Of dynamic lengths two graphs are made; of windows, one for each number of them and each stage after all.
    if not compiled or not (is_static or has_windows):
        return
    import torch._dynamo.config

    limit = torch._dynamo.config.recompile_limit
    num_graphs = plan.num_graphs()
    if num_graphs > limit:
        fewer = "" if plan.schedule.compat else f"set max_lengths={limit}, or "
        advice = "do not compile them" if has_windows else f"{fewer}leave dynamic=False out"
        raise MisconfigurationException(
            f"The blocks are compiled, and this schedule makes {num_graphs} graphs of them; torch makes no more than "
            f"{limit} (torch._dynamo.config.recompile_limit). {advice[0].upper()}{advice[1:]}, or raise that limit."
        )


def why_nothing_was_dropped(was_called: bool, was_spared: bool) -> str:
    """Return a warning about a batch in which nothing was dropped though it was due.

    Args:
        was_called: Whether the transformer was called in it.
        was_spared: Whether a part of it was called, and trained.
    """
    if not was_called:
        return (
            "RandomLTD: the transformer was not called in a batch, so nothing was dropped or counted. Call the model "
            "itself; calls of its parts are not seen."
        )
    if was_spared:
        return (
            "RandomLTD: in a batch a part of the transformer was called besides the transformer itself, such as "
            "model.transformer(...) or forward_features(...): in that call nothing was dropped or counted. Call the "
            "model itself."
        )
    return (
        "RandomLTD dropped no token of a batch, though it is due: the model was called with a cache (use_cache=True), "
        "or its blocks as block.forward(...), which cannot be intercepted."
    )

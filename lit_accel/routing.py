"""The one place where the calls of a model's blocks are intercepted: to skip a block, or to run it on other input.

What is intercepted is the call of a block and not its ``forward``: so the decision lies outside of what
``block.compile()`` compiles, of the hooks with which FSDP2 gathers a block's parameters, and of the activation
checkpointing of recent transformers. (That of older ones and of timm calls the block again, at first without
gradients.) It is made by an attribute of the block, the one in which :meth:`torch.nn.Module.compile` keeps its compiled
call: state dicts and hooks do not see it, and copies and pickles of a module leave it out.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_accel.anatomy import anatomy_of, is_compiled


class Order(IntEnum):
    """In which order methods decide about one call of a block: the first may leave nothing to the next."""

    PROBE = 0
    SKIP = 1
    SUBSET = 2


@dataclass(frozen=True)
class BlockCall:
    """One call of one block.

    Args:
        index: Which block.
        module: The block.
        input_name: The keyword of its hidden states, unless they come first.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """

    index: int
    module: nn.Module
    input_name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def hidden_states(self) -> Tensor:
        """What the block is to work on."""
        return self.args[0] if self.args else self.kwargs[self.input_name]

    @property
    def has_cache(self) -> bool:
        """Whether it comes with keys and values of earlier tokens, as in generation."""
        # By what all caches of Hugging Face can do: some models pass them on without a keyword.
        return any(hasattr(type(value), "get_seq_length") for value in (*self.args, *self.kwargs.values()))


Run = Callable[[BlockCall], Any]
OnPart = Callable[[int, int], None]
"""Called with the index of a block and the number of tokens of each sequence that it runs on, 0 if it is skipped."""
Handler = Callable[[BlockCall, Run], Any]
"""Makes a block's output from its call; what it is given runs the block, or the next handler."""


def hidden_states_of(output: Any) -> Tensor:
    """Return the hidden states in a block's output, a tensor or a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden_states(output: Any, hidden_states: Tensor) -> Any:
    """Return a block's output with other hidden states."""
    return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states


class BlockRouting:
    """The interception of one transformer's blocks; :func:`routing_of` returns it.

    Handlers see calls in training mode only, and none with a cache: neither evaluation is touched nor generation, which
    uses one unless it is told not to.
    Nothing is intercepted while there is no handler.

    Args:
        transformer: A model with a registered anatomy.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.blocks = anatomy_of(transformer).blocks
        self.modules = [transformer.get_submodule(block.path) for block in self.blocks]
        self.is_probing = False
        """Whether what is called now measures the model and does not train it; see :meth:`probe`."""
        self.has_seen_cache = False
        """Whether a block was called with a cache where gradients are taken; whoever reads it resets it."""
        self._handlers: list[tuple[Order, Handler, Callable[[], bool]]] = []
        self._listeners: list[OnPart] = []
        # By class of the block: the number of its outputs, or None for a tensor.
        self._num_outputs: dict[type, int | None] = {}
        self._cache_hooks: list[RemovableHandle] = []
        # Weakly: it is a value in a dictionary that holds its keys weakly.
        self._transformer = weakref.ref(transformer)

    def add(self, handler: Handler, order: Order, is_idle: Callable[[], bool] = lambda: False) -> None:
        """Let a handler decide about every call of a block.

        Args:
            handler: See :data:`Handler`.
            order: Where it stands among others.
            is_idle: Says, before the model is called, that the handler will leave every block of this call as it is.
                The model is then called as its user called it, also with the cache that Hugging Face fills by default.
        """
        if not self._handlers:
            self._intercept()
        self._handlers.append((order, handler, is_idle))
        self._handlers.sort(key=lambda entry: entry[0])

    @property
    def is_idle(self) -> bool:
        """Whether a call of the model would find every block as it is."""
        return all(is_idle() for _, _, is_idle in self._handlers)

    @property
    def is_compiled(self) -> bool:
        """Whether a block is compiled."""
        return any(is_compiled(module) for module in self.modules)

    @property
    def transformer(self) -> nn.Module:
        """The transformer; whoever asks has not given it up."""
        transformer = self._transformer()
        assert transformer is not None
        return transformer

    def remove(self, handler: Handler) -> None:
        """Take a handler away; with the last one the blocks are as they were."""
        self._handlers = [entry for entry in self._handlers if entry[1] != handler]
        if not self._handlers:
            self._restore()

    def listen(self, on_part: OnPart) -> None:
        """Have something called for each block that does not run on all its tokens, at each call of it."""
        self._listeners.append(on_part)

    def unlisten(self, on_part: OnPart) -> None:
        """Undo :meth:`listen`."""
        self._listeners.remove(on_part)

    def report(self, index: int, num_tokens: int) -> None:
        """Tell the listeners that a block runs on a part of its tokens.

        Args:
            index: The block.
            num_tokens: On how many tokens of each sequence it runs; 0 if it is skipped.
        """
        for on_part in self._listeners:
            on_part(index, num_tokens)

    @contextmanager
    def probe(self, handler: Handler) -> Iterator[None]:
        """Let a handler decide about calls in evaluation mode too, and no other; for measurements.

        Args:
            handler: See :data:`Handler`.
        """
        others, self._handlers = self._handlers, []
        self.add(handler, Order.PROBE)
        self.is_probing = True
        try:
            yield
        finally:
            self.is_probing = False
            self.remove(handler)
            self._handlers = others
            if others:
                self._intercept()

    def skip(self, call: BlockCall, hidden_states: Tensor | None = None) -> Any:
        """Return what the block would return, without running it.

        Args:
            call: The call.
            hidden_states: What to return for its hidden states; default is its input itself.
        """
        self.report(call.index, 0)
        kind = type(call.module)
        if kind not in self._num_outputs:
            # Annotations lie and versions differ. This happens once, in a run that skips before it has run anything.
            with torch.no_grad(), torch.random.fork_rng():
                self._run(call)
        num_outputs = self._num_outputs[kind]
        hidden_states = call.hidden_states if hidden_states is None else hidden_states
        return hidden_states if num_outputs is None else (hidden_states, *[None] * (num_outputs - 1))

    def _run(self, call: BlockCall) -> Any:
        intercept = vars(call.module)["_compiled_call_impl"]
        output = intercept.call(*call.args, **call.kwargs)
        self._num_outputs[type(call.module)] = len(output) if isinstance(output, tuple) else None
        return output

    def _route(self, call: BlockCall) -> Any:
        # A probe sees calls with a cache too: decoders fill one in evaluation mode, and nobody reads it afterwards.
        if not self.is_probing and (call.has_cache or not call.module.training):
            # Not that of generation: it needs no gradients.
            self.has_seen_cache |= call.has_cache and call.module.training and torch.is_grad_enabled()
            return self._run(call)
        run: Run = self._run
        for _, handler, _ in reversed(self._handlers):
            run = _Bound(handler, run)
        return run(call)

    def _intercept(self) -> None:
        for index, (block, module) in enumerate(zip(self.blocks, self.modules, strict=True)):
            if not isinstance(vars(module).get("_compiled_call_impl"), _Intercept):
                module._compiled_call_impl = _Intercept(self, index, module, next(iter(block.token_dims)))
        transformer = self._transformer()
        if transformer is None or self._cache_hooks:
            return
        # The model without its head too: it may be called by itself.
        for model in {transformer, getattr(transformer, "base_model", transformer)}:
            parameters = list(inspect.signature(model.forward).parameters)
            if "use_cache" in parameters:
                hook = _NoCache(parameters.index("use_cache"), self)
                self._cache_hooks.append(model.register_forward_pre_hook(hook, with_kwargs=True))

    def _restore(self) -> None:
        for module in self.modules:
            intercept = vars(module).get("_compiled_call_impl")
            if isinstance(intercept, _Intercept):
                intercept.restore(module)
        for hook in self._cache_hooks:
            hook.remove()
        self._cache_hooks = []


class _Bound:
    """A handler with what it may run."""

    def __init__(self, handler: Handler, run: Run) -> None:
        self._handler, self._run = handler, run

    def __call__(self, call: BlockCall) -> Any:
        return self._handler(call, self._run)


class _Intercept:
    """Stands in the place of a block's call.

    Args:
        routing: Who decides.
        index: Which block it is.
        module: The block.
        input_name: The keyword of its hidden states.
    """

    def __init__(self, routing: BlockRouting, index: int, module: nn.Module, input_name: str) -> None:
        self._compiled = module._compiled_call_impl
        self.is_compiled = self._compiled is not None
        self.call: Callable[..., Any] = self._compiled or module._call_impl
        self._routing, self._index, self._module, self._input_name = routing, index, module, input_name

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._routing._route(BlockCall(self._index, self._module, self._input_name, args, kwargs))

    def restore(self, module: nn.Module) -> None:
        """Give the block its own call back."""
        if self._compiled is None:
            del module._compiled_call_impl
        else:
            module._compiled_call_impl = self._compiled


class _NoCache:
    """A forward pre-hook that turns off the cache in training, unless one was asked for; nothing in a copy of the
    model.

    Hugging Face's decoders fill one by default, in which a skipped block would leave a hole.

    Args:
        position: Where ``use_cache`` stands among the arguments of the model.
        routing: Says whether any block will be treated otherwise than usual; ``None`` in copies.
    """

    def __init__(self, position: int, routing: BlockRouting | None = None) -> None:
        self._position, self._routing = position, routing

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        is_given = len(args) > self._position or any(
            kwargs.get(name) is not None for name in ("use_cache", "past_key_values")
        )
        routing = self._routing
        if is_given or routing is None or not (module.training or routing.is_probing):
            return None
        # Compiled blocks would each become a graph of their own, by their place in the cache.
        if routing.is_idle and not routing.is_compiled:
            return None
        return args, {**kwargs, "use_cache": False}

    def __reduce__(self) -> tuple[type[_NoCache], tuple[int]]:
        return _NoCache, (self._position,)


_ROUTINGS: weakref.WeakKeyDictionary[nn.Module, BlockRouting] = weakref.WeakKeyDictionary()


def routing_of(transformer: nn.Module) -> BlockRouting:
    """Return the routing of a transformer, the same for all who ask.

    Args:
        transformer: A model with a registered anatomy.
    """
    if transformer not in _ROUTINGS:
        _ROUTINGS[transformer] = BlockRouting(transformer)
    return _ROUTINGS[transformer]

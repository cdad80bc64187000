"""Which anatomy belongs to which model class, and where in a module the transformer is."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator

from torch import nn

from lit_accel.anatomy.base import Anatomy, AnatomyError

Describe = Callable[[nn.Module], Anatomy]

# Classes are registered by their qualified name, so that no model library is imported before it is used.
_DESCRIBE: dict[str, Describe] = {}
_FAMILIES: dict[str, list[str]] = {}
_FIXED: weakref.WeakKeyDictionary[nn.Module, Anatomy] = weakref.WeakKeyDictionary()


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def register_anatomy(family: str, classes: Iterable[type | str]) -> Callable[[Describe], Describe]:
    """Register the function that describes a family of models.

    Args:
        family: The family's name, as messages and :attr:`Anatomy.family` show it.
        classes: The model classes, or their qualified names (``"package.module.Class"``). Subclasses are found
            through their bases. Registering a class again replaces its anatomy.

    Returns:
        A decorator for a function ``describe(model) -> Anatomy``.

    Example::

        @register_anatomy("my_gpt", [MyGPT])
        def describe(model: MyGPT) -> Anatomy: ...
    """

    def decorate(describe: Describe) -> Describe:
        for cls in classes:
            name = cls if isinstance(cls, str) else _qualified_name(cls)
            _DESCRIBE[name] = describe
            names = _FAMILIES.setdefault(family, [])
            if name not in names:
                names.append(name)
        return describe

    return decorate


def _describe_function(model: nn.Module) -> Describe | None:
    for cls in type(model).__mro__:
        if (describe := _DESCRIBE.get(_qualified_name(cls))) is not None:
            return describe
    return None


def _known_families() -> str:
    lines = [
        f"  {family}: {', '.join(name.rpartition('.')[2] for name in names)}"
        for family, names in sorted(_FAMILIES.items())
    ]
    return "\n".join(lines)


def _unknown(what: str) -> AnatomyError:
    return AnatomyError(
        f"{what}\nKnown families:\n{_known_families()}\n"
        "To add a model, write a function that returns its lit_accel.anatomy.Anatomy and decorate it with "
        '@lit_accel.anatomy.register_anatomy("my_family", [MyModel]).'
    )


def describe_as(model: nn.Module, anatomy: Anatomy | None) -> None:
    """Fix what :func:`anatomy_of` says of one model, as long as it lives; for one that is held in another form.

    Args:
        model: The model.
        anatomy: Its anatomy; ``None`` to look again.
    """
    if anatomy is None:
        _FIXED.pop(model, None)
    else:
        _FIXED[model] = anatomy


def anatomy_of(model: nn.Module) -> Anatomy:
    """Describe a model: its blocks, the axes of its parameters, and how to build it at another size.

    Args:
        model: A model of a registered class, such as a Hugging Face ``GPT2LMHeadModel``.

    Returns:
        Its anatomy. It holds no reference to the model's tensors.

    Raises:
        AnatomyError: If the class is unknown, or a parameter has no declared layout.
    """
    if model in _FIXED:
        return _FIXED[model]
    describe = _describe_function(model)
    if describe is None:
        raise _unknown(f"No anatomy is registered for {_qualified_name(type(model))}.")
    return describe(model)


def _transformers(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # No function inside of another that calls itself: the cycle would keep a model alive that is being replaced.
    compiled = getattr(module, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        if all(_describe_function(child) is None for child in compiled.modules()):
            return
        # Its compiled forward would go on calling the module that it was made from.
        raise AnatomyError(
            f"{path} is wrapped by torch.compile, so that it cannot be replaced by a model of another size. "
            "Leave it as it is and compile its blocks with lit_accel.anatomy.compile_blocks(model)."
        )
    if path and _describe_function(module) is not None:
        yield path, module
        return
    for name, child in module.named_children():
        yield from _transformers(f"{path}.{name}" if path else name, child)


def find_transformer(module: nn.Module) -> tuple[str, nn.Module]:
    """Find the one transformer inside a module, such as the network of a LightningModule.

    Args:
        module: Any module.

    Returns:
        The path and the outermost submodule with a registered anatomy. The path is never empty: the
        transformer must be replaceable.

    Raises:
        AnatomyError: If there is none, or more than one, or it is wrapped by ``torch.compile``.
    """
    found = list(_transformers("", module))
    if len(found) == 1:
        return found[0]
    if found:
        paths = ", ".join(f"{path} ({type(child).__name__})" for path, child in found)
        raise AnatomyError(
            f"{type(module).__name__} holds {len(found)} transformers: {paths}. lit-accel works on exactly one: keep "
            "the others outside the module, for example in a plain list."
        )
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in module.named_children()) or "nothing"
    raise _unknown(
        f"No transformer with a registered anatomy is inside {type(module).__name__}; it holds {children}."
        + ("" if children != "nothing" else " Build it in __init__ or configure_model.")
    )

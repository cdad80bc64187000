"""What jsonargparse says about arguments, cut down to what matters: the key, what was given, what is allowed.

jsonargparse reports each type of a union that a value could have been, and the whole configuration with it. Its
messages are nested by indentation; what is not understood here is passed on as it is, without what surrounds it.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from textwrap import dedent
from typing import Any

from lit_accel.arguments import did_you_mean

_UNION = "Does not validate against any of the Union subtypes"
# A value that is text could also have been one of these.
_PATHS = ("Expected a path", "Expected a dot import path")
_ONE_OF = "one of "
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "Sequence": "a list",
    "Mapping": "a mapping",
    "Iterable": "a list",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Args:
        key: Of what, with dots.
        owner: Path of the class whose argument it is; ``None`` if it is the command's own.
        text: What jsonargparse says about it.
        given: The value, as it was written; ``None`` if it does not say.
    """

    key: str
    owner: str | None
    text: str
    given: str | None

    @property
    def expects(self) -> str | None:
        """What the value may be, where that is all that is said."""
        match = re.match(r"Expected an? (?P<type>.+?)\.?$", self.text, re.DOTALL)
        return None if match is None or self.text.startswith(_PATHS) else _in_words(match["type"])

    @property
    def weight(self) -> tuple[bool, bool, int, bool]:
        """How much it says: a class that was found says more than a type, and more the deeper it is."""
        return (
            not self.text.startswith(_PATHS),
            # What is no list of callbacks is tried as a callback without a name.
            self.owner != "lightning.Callback",
            self.key.count("."),
            self.expects is None,
        )


def readable(message: str, known: Iterable[str] = ()) -> str:
    """Return a message of jsonargparse in a sentence or two.

    Args:
        message: What it says.
        known: The command's own arguments, without dashes.
    """
    return _sentence(_distil(Finding("", None, message, None)), list(known))


def _distil(finding: Finding) -> Finding:
    """Go down to what is wrong, through keys, classes and the types of a union."""
    text = _unindented(finding.text)
    if match := re.match(r'(?:Parser key|Key) "(?P<key>[^"]*)":\s*', text):
        key = f"{finding.key}.{match['key']}".strip(".")
        return _distil(replace(finding, key=key, text=text[match.end() :]))
    if match := re.match(r"Problem with given class_path '(?P<path>[^']*)':\s*", text):
        return _distil(replace(finding, owner=match["path"], text=text[match.end() :]))
    if match := re.match(r"Type .*? expects a function or a callable class: ", text):
        said, _, value = text[match.end() :].rpartition(". Got value: ")
        path = re.match(r"Namespace\(class_path='([^']+)'", value)
        given = path[1] if path else value
        return _distil(replace(finding, text=said or value, owner=given if path else finding.owner, given=given))
    if text.startswith(_UNION):
        given = text.rpartition("\nGiven value: ")[2]
        branches = text.partition("\nErrors:\n")[2].rpartition("\nGiven value type:")[0]
        if nested := re.match(r"NestedArg\(key='([^']*)', val=(.*)\)$", given, re.DOTALL):
            given = nested[2].strip("'\"")
        return _best(replace(finding, given=given), _branches(branches))
    if text.startswith("- "):
        return _best(finding, _branches(text))
    text, separator, given = text.rpartition(". Got value: ")
    return replace(finding, text=text or given, given=given if separator else finding.given)


def _unindented(text: str) -> str:
    """Take away the indentation of all lines, of which the first may have none already."""
    first, _, rest = text.strip().partition("\n")
    return f"{first}\n{dedent(rest)}".strip()


def _branches(text: str) -> list[str]:
    return re.split(r"^- ", dedent(text), flags=re.MULTILINE)[1:]


def _best(finding: Finding, branches: Sequence[str]) -> Finding:
    found = [_distil(replace(finding, text=branch)) for branch in branches]
    best = max(found, key=lambda one: one.weight, default=finding)
    if best.expects is None or best.key != finding.key:
        return best
    # Types only: a value may be of each of them.
    words = list(dict.fromkeys(one.expects for one in found if one.expects is not None and one.key == best.key))
    choices = [word.removeprefix(_ONE_OF) for word in words if word.startswith(_ONE_OF)]
    others = [word for word in words if not word.startswith(_ONE_OF)]
    said = [f"{_ONE_OF}{', '.join(choices)}"] if choices else []
    return replace(best, text=f"Expected a {' or '.join([*said, *others])}")


def _in_words(kind: str) -> str:
    """Say a type in words."""
    if match := re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", kind):
        return f"{_ONE_OF}{match[1]}"
    if match := re.fullmatch(r"tuple with (\d+) elements", kind):
        return f"a list of {match[1]} values"
    outer = kind.removeprefix("<class '").removesuffix("'>").partition("[")[0].rpartition(".")[2]
    return _TYPES.get(outer, kind)


def _sentence(finding: Finding, known: list[str]) -> str:
    key, text, given = finding.key, finding.text, finding.given
    if match := re.search(r"Option '(?P<name>[^']+)' is not accepted", text):
        return _unknown(finding, match["name"], known)
    if match := re.search(r"does not accept option '(?P<name>[^']+)'", text):
        return _unknown(finding, match["name"], known)
    if match := re.search(r"invalid choice: '(?P<name>[^']*)' \(choose from (?P<all>.*)\)", text):
        names = [*re.findall(r"\w+", match["all"]), "report"]
        return (
            f"there is no subcommand {match['name']}.{did_you_mean(match['name'], names)} There are {', '.join(names)}."
        )
    if "subcommand" in text and "not provided" in text:
        return "which subcommand? There are fit, validate, test, predict, plan and report."
    if match := re.match(r"argument (?P<name>\S+): expected one argument", text):
        return f"{match['name']} needs a value: {match['name'].rpartition('/')[2]}=VALUE."
    if "object has no attribute 'keys'" in text:
        return f"{key}.init_args must be a mapping from names of arguments to their values."
    if match := re.search(r"unrecognized arguments: (?P<all>.*)", text, re.DOTALL):
        first = match["all"].split()[0]
        name = first.lstrip("-").partition("=")[0]
        if finding.owner is None and not first.startswith("-"):
            return f"{first!r} is not understood: arguments are written --name=value.{did_you_mean(name, known)}"
        return _unknown(finding, name, known)
    if match := re.search(r"module '(?P<module>[^']+)' has no attribute '(?P<name>[^']+)'", text):
        there = _names_in(match["module"])
        return f"{key}: there is no {match['name']} in {match['module']}.{did_you_mean(match['name'], there)}"
    if match := re.search(r"No module named '(?P<name>[^']+)'", text):
        return (
            f"{key}: {given or finding.owner} cannot be imported, since there is no module {match['name']}. A class is "
            "given by its import path, such as lit_accel.tasks.CausalLM or my_module.MyModule."
        )
    if match := re.search(r"subclass of (?:<class ')?(?P<base>\w[\w.]*)", text):
        shown = _short(given and given.partition("\nSubclass types expect")[0])
        base = match["base"].rstrip(".").rpartition(".")[2]
        return (
            f"{key} is {shown}, which is no {base}. Give the import path of one, or a mapping: its class_path, and its "
            "init_args."
        )
    if "Expected a dot import path string" in text:
        return f"{key} is {_short(given)}; it is a class, given by its import path, such as lit_accel.tasks.CausalLM."
    if match := re.search(r"the following arguments are required: (?P<names>.*)", text):
        first = match["names"].split(", ")[0]
        if finding.owner is not None:
            return f"{key}: {finding.owner.rpartition('.')[2]} needs {match['names']}, which is missing."
        first = first.partition(".")[2] or first
        return f"{first} is missing. Give a --config file that has it, or --{first} itself."
    if finding.expects == "null":
        # Of what else it may be, a class or a list of them, the parser says nothing.
        return (
            f"{key} is {_short(given)}, which is none that is known. A class is given by its import path, such as "
            "lit_accel.tasks.CausalLM or lit_accel.RandomLTD, or by a mapping with its class_path and init_args."
        )
    if finding.expects is not None:
        return f"{key} is {_short(given)}; it must be {finding.expects}."
    return f"{key}: {text}" if key else text


def _unknown(finding: Finding, name: str, known: list[str]) -> str:
    """Say that there is no such argument, and which is near."""
    if finding.owner is None:
        full = name if name in known or not finding.key else f"{finding.key}.{name}"
        return f"There is no argument {full}.{did_you_mean(full, known)}"
    first = name.lstrip("-").partition(".")[0]
    # What a task or a Trainer passes itself.
    names = [
        each for each in arguments_of(finding.owner) if each not in ("params", "optimizer") or "." not in finding.key
    ]
    what = f"{finding.owner.rpartition('.')[2]} has no argument {first}"
    has = f"It has {', '.join(names)}." if names else "It has none: is its class_path missing?"
    return f"{finding.key}: {what}.{did_you_mean(first, names)} {has}"


def arguments_of(path: str) -> list[str]:
    """Return the names of a class's arguments, those of its bases included where it passes keywords on.

    Args:
        path: Import path of the class.
    """
    return list(parameters_of(class_at(path)))


def class_at(path: str) -> Any:
    """Return what lies at an import path; ``None`` if nothing does.

    Args:
        path: The import path.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def parameters_of(kind: Any) -> dict[str, inspect.Parameter]:
    """Return a class's arguments by name, those of its bases included where it passes keywords on.

    Args:
        kind: The class; what is none has no arguments.
    """
    found: dict[str, inspect.Parameter] = {}
    for cls in inspect.getmro(kind) if inspect.isclass(kind) else ():
        if "__init__" not in vars(cls):
            continue
        parameters = list(inspect.signature(vars(cls)["__init__"]).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(parameter.name, parameter)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def _names_in(module: str) -> list[str]:
    try:
        return [name for name in dir(importlib.import_module(module)) if not name.startswith("_")]
    except ImportError:
        return []


def _short(given: str | None) -> str:
    """Show a value as it was written, without the whole of a long one."""
    if given is None:
        return "something else"
    text = " ".join(given.split())
    return repr(text if len(text) <= 80 else f"{text[:77]}...")

"""The options of policies: the fields of their dataclasses, and how they are read from text."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from heatkv.core.schema import shown
from heatkv.errors import PolicyError

_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class PolicyOption:
    """A field that a policy can be made with; `kind` is its type, `default` MISSING where it has none."""

    name: str
    kind: Any
    default: Any

    def __str__(self) -> str:
        """As `heatkv policies` lists it: name=default, and what it may be where the default does not tell."""
        shown = "..." if self.default is dataclasses.MISSING else _shown(self.default)
        if self.wanted is None:
            return f"{self.name}={shown} (in Python only)"
        told = self.default not in (None, dataclasses.MISSING) and get_origin(self.kind) is not Literal
        return f"{self.name}={shown}" if told or self.wanted is None else f"{self.name}={shown} ({self.wanted})"

    @property
    def wanted(self) -> str | None:
        """What its values are called; None where they cannot be written on a command line."""
        return _wanted(self.kind)

    def parse(self, text: str, policy: str) -> Any:
        """The value that `text` says. Raises PolicyError when it is not of the option's type."""
        if self.wanted is None:
            raise PolicyError(f"option {self.name!r} of policy {policy!r} can only be set in Python")
        try:
            return _read(self.kind, text)
        except ValueError as error:
            raise PolicyError(f"{self.name} of policy {policy!r} is {self.wanted}, not {shown(text)}") from error


def options_of(policy: Any) -> dict[str, PolicyOption]:
    """What a policy class can be made with, by name."""
    if not dataclasses.is_dataclass(policy):
        return {}
    try:
        kinds = get_type_hints(policy)
    except Exception:  # a third party's annotations may name what is not imported at run time
        kinds = {}
    return {
        field.name: PolicyOption(field.name, kinds.get(field.name, Any), _default(field))
        for field in dataclasses.fields(policy)
        if field.init
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _shown(value: Any) -> str:
    """A value as `--set` reads it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "none"}


def _wanted(kind: Any) -> str | None:
    """What a value of this type is called; None for types that cannot be written on a command line."""
    if get_origin(kind) is Literal:
        return " or ".join(_shown(choice) for choice in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        names = [name for member in get_args(kind) if (name := _wanted(member)) is not None]
        return " or ".join(names) if names != ["none"] else None
    return _NAMES.get(kind)


def _read(kind: Any, text: str) -> Any:
    """The value of this type that is written so. Raises ValueError."""
    if get_origin(kind) in (Union, UnionType):
        # nearly everything can be read as text, so that comes last
        for member in sorted(get_args(kind), key=(NoneType, bool, int, float).__contains__, reverse=True):
            try:
                return _read(member, text)
            except ValueError:
                continue
    elif get_origin(kind) is Literal:
        for choice in get_args(kind):
            if _shown(choice) == text:
                return choice
    elif kind is NoneType and text.lower() == "none":
        return None
    elif kind is bool and text.lower() in _TRUTH:
        return _TRUTH[text.lower()]
    elif kind is int:
        return int(text)
    elif kind is float and math.isfinite(float(text)):
        return float(text)
    elif kind is str:
        return text
    raise ValueError(text)

"""The options of policies: the fields of their dataclasses, their types, and how they are read from text."""

from __future__ import annotations

import dataclasses
import math
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from heatkv.core.schema import shown
from heatkv.errors import PolicyError

T = TypeVar("T", int, float)

_TRUTH = {"yes": "true", "no": "false"}
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "none"}
_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class PolicyOption:
    """A field that a policy can be made with; `kind` is its type, `default` MISSING where it has none."""

    name: str
    kind: Any
    default: Any

    def __str__(self) -> str:
        """As lists of policies show it: name=default, and what it may be where the default does not tell."""
        text = f"{self.name}={'...' if self.default is dataclasses.MISSING else _text(self.default)}"
        if self.wanted is None:
            return f"{text} (in Python only)"
        clear = self.default not in (None, dataclasses.MISSING) and get_origin(self.kind) is not Literal
        return text if clear else f"{text} ({self.wanted})"

    @property
    def wanted(self) -> str | None:
        """What its values are called; None where they cannot be written as text."""
        return _wanted(self.kind)

    def parse(self, text: str, policy: str) -> Any:
        """The value that `text` says. Raises PolicyError when it is not of the option's type."""
        if self.wanted is None:
            raise PolicyError(f"option {self.name!r} of policy {policy!r} can only be set in Python")
        if text.lower() == "none" and NoneType in get_args(self.kind):
            return None
        others = tuple(kind for kind in get_args(self.kind) if kind not in (str, NoneType))
        if str in get_args(self.kind) and others:  # nearly everything can be read as text, so that comes last
            with suppress(msgspec.ValidationError):
                return msgspec.convert(text, Union[others], strict=False)  # noqa: UP007
        return self._convert(_TRUTH.get(text.lower(), text) if self.kind is bool else text, text, policy, strict=False)

    def check(self, value: Any, policy: str) -> None:
        """Raise PolicyError when the value is not of the option's type, or out of its range."""
        self._convert(value, value, policy, strict=True)

    def _convert(self, value: Any, original: Any, policy: str, strict: bool) -> Any:
        try:
            value = value if dataclasses.is_dataclass(value) else msgspec.convert(value, self.kind, strict=strict)
        except msgspec.ValidationError as error:
            wanted = self.wanted or str(error)
            raise PolicyError(f"{self.name} of policy {policy!r} is {wanted}, not {shown(original)}") from error
        except TypeError:  # a third party's annotation may be of any kind
            return value
        if isinstance(value, float) and not math.isfinite(value):
            raise PolicyError(f"{self.name} of policy {policy!r} is {self.wanted}, not {shown(original)}")
        return value


def numbers_from(text: str, kind: type[T], option: str) -> list[T]:
    """The numbers of an option that is written as 0,1,2. Raises PolicyError."""
    try:
        return msgspec.convert(text.split(","), list[kind], strict=False)  # type: ignore[valid-type]
    except msgspec.ValidationError as error:
        raise PolicyError(f"{option}={text!r}; write numbers with commas between, as 0,1") from error


def options_of(policy: Any) -> dict[str, PolicyOption]:
    """What a policy class can be made with, by name."""
    if not dataclasses.is_dataclass(policy):
        return {}
    try:
        kinds = get_type_hints(policy, include_extras=True)
    except Exception:  # a third party's annotations may name what is not imported at run time
        kinds = {}
    return {
        field.name: PolicyOption(field.name, kinds.get(field.name, Any), _default(field))
        for field in dataclasses.fields(policy)
        if field.init
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _text(value: Any) -> str:
    """A value as `parse` reads it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _wanted(kind: Any) -> str | None:
    """What a value of this type is called; None for types that cannot be written as text."""
    if get_origin(kind) is Annotated:
        kind, *limits = get_args(kind)
        bounds = [
            f" {word} {bound:g}"
            for limit in limits
            for name, word in _LIMITS.items()
            if (bound := getattr(limit, name, None)) is not None
        ]
        return f"{_wanted(kind)}{' and'.join(bounds)}"
    if get_origin(kind) is Literal:
        return " or ".join(_text(choice) for choice in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        names = [name for member in get_args(kind) if (name := _wanted(member)) is not None]
        return " or ".join(names) if names != ["none"] else None
    return _NAMES.get(kind)

"""What policies are made with: the fields of their dataclasses, listed, and read from `--set name=value`."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from heatkv.cli.options import Ranking
from heatkv.errors import PolicyError
from heatkv.registry import find_policy

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
            raise PolicyError(f"{self.name} of policy {policy!r} is {self.wanted}, not {text!r}") from error


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


def policy_options(policies: Sequence[str], ranking: Ranking) -> dict[str, dict[str, Any]]:
    """What each of these policies is made with; an option goes to those that have it, the rest is left to the policy.

    Raises PolicyError for an option that none of them has, and for values of the wrong type.
    """
    known = {name: options_of(find_policy(name)) for name in policies}
    given: dict[str, dict[str, Any]] = {name: {} for name in policies}
    if ranking.sink_scales is not None:
        for name in _having("sink_scales", known):
            given[name]["sink_scales"] = ranking.sink_scales
    for option, text in _pairs(ranking).items():
        for name in _having(option, known):
            given[name][option] = known[name][option].parse(text, name)
    return given


def _pairs(ranking: Ranking) -> dict[str, str]:
    """name -> value of every --set."""
    pairs: dict[str, str] = {}
    for text in ranking.set or []:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise PolicyError(f"cannot read --set {text!r}; write it as name=value, see `heatkv policies`")
        if name in pairs or (name == "sink_scales" and ranking.sink_scales is not None):
            raise PolicyError(f"option {name!r} is set twice")
        pairs[name] = value.strip()
    return pairs


def _having(option: str, known: Mapping[str, Mapping[str, PolicyOption]]) -> list[str]:
    """The policies that have this option."""
    having = [name for name, options in known.items() if option in options]
    if not having:
        near = difflib.get_close_matches(option, {o for options in known.values() for o in options}, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        listed = "; ".join(f"{name}: {', '.join(options) or 'none'}" for name, options in known.items())
        who = f"policy {next(iter(known))!r} has no" if len(known) == 1 else "none of these policies has an"
        raise PolicyError(f"{who} option {option!r}{hint} Options of {listed}")
    return having


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

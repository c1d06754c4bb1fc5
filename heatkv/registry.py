"""Finding policies by name: those of this package, those of installed plug-ins, those registered by hand."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import re
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from heatkv.core.schema import shown, suggest
from heatkv.errors import PolicyError

ENTRY_POINT_GROUP = "heatkv.policies"

_log = logging.getLogger("heatkv")


@dataclass(frozen=True)
class Registered:
    """A policy class under its name, and where it comes from."""

    name: str
    policy: type[Any]
    source: str


_PARTS = ("kind", "needs", "plan", "random", "source", "summary")
"""What every EvictionPolicy has; the class itself lives above this module."""

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")

_registered: dict[str, Registered] = {}
_broken: dict[str, str] = {}
_searched = False


def check_name(name: Any, what: str) -> None:
    """Raise PolicyError unless `what` may have this name: lower-case letters, digits and hyphens between them."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        wanted = "a name is lower-case letters, digits and hyphens between them, such as keep-coarse"
        raise PolicyError(f"{what} is named {shown(name)}; {wanted}")


def register(policy: type[Any]) -> type[Any]:
    """Class decorator: make a policy known under its `name`.

    Raises PolicyError for what is no such class, or when the name is missing, not of the form that `check_name` tells,
    or taken by another class.
    """
    if not isinstance(policy, type):
        raise PolicyError(f"{shown(policy)} is no class; register a subclass of heatkv.EvictionPolicy")
    check_name(getattr(policy, "name", None), policy.__qualname__)
    missing = [part for part in _PARTS if not hasattr(policy, part)]
    if missing:
        raise PolicyError(f"{policy.__qualname__} has no {', '.join(missing)}; subclass heatkv.EvictionPolicy")
    known = _registered.get(policy.name)
    if known is not None and _place(known.policy) != _place(policy):
        raise PolicyError(f"two policies are named {policy.name!r}: {known.policy!r} and {policy!r}; rename one")
    _registered[policy.name] = Registered(policy.name, policy, policy.__module__)
    return policy


def _place(policy: type[Any]) -> tuple[str, str]:
    return policy.__module__, policy.__qualname__


def _search() -> None:
    """Import every module of `heatkv.policies`, then every plug-in; a broken plug-in is noted, not raised."""
    global _searched
    if _searched:
        return
    _searched = True
    package = importlib.import_module("heatkv.policies")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"heatkv.policies.{module.name}")
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        where = entry.dist.name if entry.dist is not None else entry.value
        before = dict(_registered)
        try:
            loaded = register(entry.load())
            for name in (_registered.keys() - before) | {loaded.name}:
                _registered[name] = replace(_registered[name], source=where)
        except (Exception, SystemExit) as error:  # a plug-in may fail in any way; the others must still be found
            _registered.clear()
            _registered.update(before)  # what it had registered before it failed is not whole
            _broken[entry.name] = f"{where}: {type(error).__name__}: {error}"
            _log.warning("heatkv: the plug-in %r could not be loaded: %s", entry.name, _broken[entry.name])


def registered_policies() -> dict[str, Registered]:
    """Every known policy by name, sorted."""
    _search()
    return dict(sorted(_registered.items()))


def broken_plugins() -> dict[str, str]:
    """Entry points that could not be loaded, with the reason."""
    _search()
    return dict(_broken)


def find_policy(name: str) -> type[Any]:
    """The policy class of this name. Raises PolicyError with a suggestion when there is none."""
    policies = registered_policies()
    if name in policies:
        return policies[name].policy
    broken = f" (plug-in {name!r} is broken: {_broken[name]})" if name in _broken else ""
    raise PolicyError(f"unknown policy {name!r}{suggest(name, policies)}{broken}")

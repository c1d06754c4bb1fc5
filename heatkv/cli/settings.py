"""What policies are made with, read from `--set name=value`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from heatkv.cli.options import Ranking
from heatkv.core.schema import shown
from heatkv.errors import PolicyError
from heatkv.policies.options import PolicyOption, options_of
from heatkv.registry import find_policy


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
            raise PolicyError(f"cannot read --set {shown(text)}; write it as name=value, see `heatkv policies`")
        if name in pairs or (name == "sink_scales" and ranking.sink_scales is not None):
            raise PolicyError(f"option {shown(name)} is set twice")
        pairs[name] = value.strip()
    return pairs


def _having(option: str, known: Mapping[str, Mapping[str, PolicyOption]]) -> list[str]:
    """The policies that have this option."""
    having = [name for name, options in known.items() if option in options]
    if not having:
        near = difflib.get_close_matches(
            option[:40], {o for options in known.values() for o in options}, n=1, cutoff=0.5
        )
        hint = f"; did you mean {near[0]!r}?" if near else "."
        listed = "; ".join(f"{name}: {', '.join(options) or 'none'}" for name, options in known.items())
        who = f"policy {next(iter(known))!r} has no" if len(known) == 1 else "none of these policies has an"
        raise PolicyError(f"{who} option {shown(option)}{hint} Options of {listed}")
    return having

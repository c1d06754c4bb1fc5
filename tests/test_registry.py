"""Which classes can be registered, and under which names."""

from __future__ import annotations

from typing import Any

import pytest

import heatkv
from heatkv.errors import PolicyError
from heatkv.registry import find_policy


@pytest.mark.parametrize(
    "name", ["a,b", "a b", "a=b", "A", "-a", "a-", "a--b", "a_b", "a/b", "ü", "a\n", "--set", "a.b", "٣", "", None]
)
def test_names_that_a_command_line_cannot_tell_from_other_text(name: Any) -> None:
    named = type("Named", (heatkv.EvictionPolicy,), {"name": name})
    with pytest.raises(PolicyError, match=r"Named is named .*lower-case letters, digits and hyphens between"):
        heatkv.register(named)


def test_what_is_no_policy() -> None:
    for wrong in ("heatkv", heatkv.make_policy("heatkv"), int, heatkv.Plan, type("Bare", (), {"name": "bare"})):
        with pytest.raises(PolicyError):
            heatkv.register(wrong)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="two policies are named 'heatkv'"):
        heatkv.register(type("Other", (heatkv.StaticPolicy,), {"name": "heatkv"}))


def test_unknown_names_are_answered_with_the_closest_one() -> None:
    assert find_policy("heatkv").name == "heatkv"
    with pytest.raises(PolicyError, match=r"unknown policy 'heatvk'; did you mean 'heatkv'\? Known: "):
        find_policy("heatvk")

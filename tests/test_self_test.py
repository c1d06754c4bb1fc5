"""The self-test passes here, and finds what it is there to find."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heatkv.cli import run
from heatkv.engine.arena_cache import KVCache
from heatkv.engine.layout import ArenaLayout
from heatkv.profiling.analysis import doctor as module
from heatkv.profiling.analysis.doctor import CHECKS, self_test

ATTENTION = "attention over the arena, against all keys and a mask"


def outcomes(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, bool | None]:
    monkeypatch.setattr(module, "CHECKS", tuple(check for check in CHECKS if check.__doc__ in names))
    return {outcome.name: outcome.passed for outcome in self_test()}


def test_everything_is_as_promised(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--self-test", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["self_test"]
    assert len(told) == len(CHECKS)
    assert {check["check"]: check["passed"] for check in told if check["passed"] is not True} == (
        {} if torch.cuda.is_available() else {check.__doc__: None for check in CHECKS[-2:]}
    )


def test_a_cache_that_forgets_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    attend = KVCache.attend

    def forgetful(self: KVCache, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(self, layer, q, k, v * 1.01 if layer == 3 else v)

    monkeypatch.setattr(KVCache, "attend", forgetful)
    assert outcomes(monkeypatch, ATTENTION) == {ATTENTION: False}
    assert run(["doctor", "--self-test"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_an_arena_beyond_the_budget_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "plans of Infinity-2B at 1M, and their arena's bytes"
    assert outcomes(monkeypatch, name) == {name: True}
    lay_out = ArenaLayout.for_plan

    def wasteful(*given: Any) -> ArenaLayout:
        found = lay_out(*given)
        return replace(found, slots=2 * found.slots)

    monkeypatch.setattr(ArenaLayout, "for_plan", wasteful)
    assert outcomes(monkeypatch, name) == {name: False}


def test_whatever_a_check_raises_the_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(material: Any) -> str:
        """no luck"""
        raise ZeroDivisionError

    def fine(material: Any) -> str:
        """luck"""
        return "yes"

    monkeypatch.setattr(module, "CHECKS", (broken, fine))
    assert [(o.name, o.passed, o.told) for o in self_test()] == [
        ("no luck", False, "ZeroDivisionError: "),
        ("luck", True, "yes"),
    ]

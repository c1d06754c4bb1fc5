"""The self-test passes here, and finds what it is there to find."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from heatkv.cli import run
from heatkv.engine.arena_cache import KVCache
from heatkv.profiling.analysis import doctor


def failed_checks() -> list[str]:
    return [outcome.name for outcome in doctor.self_test() if not outcome.passed]


def test_sound_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--self-test", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["self_test"]
    assert [check["check"] for check in checks] == list(doctor.CHECKS)
    assert all(check["passed"] for check in checks)


def test_wrong_values_in_one_layer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    attend = KVCache.attend

    def forgetful(self: KVCache, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(self, layer, q, k, v * 1.01 if layer == 3 else v)

    monkeypatch.setattr(KVCache, "attend", forgetful)
    pictures = next(iter(doctor.CHECKS))
    assert failed_checks() == [pictures]
    assert run(["doctor", "--self-test"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_checks_after_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> str:
        raise ZeroDivisionError

    checks: dict[str, Callable[[torch.device], str]] = {"no luck": broken, "luck": lambda device: "yes"}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    outcomes = [(outcome.name, outcome.passed, outcome.detail) for outcome in doctor.self_test()]
    assert outcomes == [("no luck", False, "ZeroDivisionError: "), ("luck", True, "yes")]

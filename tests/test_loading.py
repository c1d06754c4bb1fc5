"""Loading VAR from files as people have them: plain, wrapped by a trainer, with prefixes, beside their VQVAE."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heatkv.errors import FormatError, HeatKVError, ModelError, ScheduleError
from heatkv.models import catalogue as models
from heatkv.models.catalogue import ModelInfo, find_weights, load_model
from heatkv.models.checkpoint import read_safetensors
from heatkv.models.class_conditional import ClassConditionalModel

GOLDEN = Path(__file__).parent / "golden" / "var"
TINY = ModelInfo("var-tiny", "var", 2, 1, 64, "256", "a test", ("tiny.pth", "tiny.safetensors"), ("vae.pth",))
"""The model of the golden set var_tiny_10s: two layers of one head at VAR's own schedule."""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    monkeypatch.setitem(models.MODELS, "var-tiny", TINY)
    return read_safetensors(GOLDEN / "var_tiny_10s_model.safetensors")


@pytest.fixture
def vae() -> dict[str, Tensor]:
    return read_safetensors(GOLDEN / "var_tiny_10s_vae.safetensors")


def check(model: Any, state: Mapping[str, Tensor]) -> None:
    assert isinstance(model, ClassConditionalModel)
    assert torch.equal(model.transformer.head.weight, state["head.weight"])
    assert model.geometry.schedule.total_tokens == 680
    assert not model.transformer.training


def test_plain_files_in_a_folder(tmp_path: Path, tiny: dict[str, Tensor], vae: dict[str, Tensor]) -> None:
    torch.save(tiny, tmp_path / "tiny.pth")
    torch.save(vae, tmp_path / "vae.pth")
    check(load_model("var-tiny", tmp_path), tiny)
    check(load_model("var-tiny", tmp_path / "tiny.pth"), tiny)
    (tmp_path / "vae.pth").rename(tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"no vae\.pth lies beside"):
        load_model("var-tiny", tmp_path)
    check(load_model("var-tiny", tmp_path, vae=tmp_path / "other.pth"), tiny)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_trainer_file_holds_both(
    tmp_path: Path, tiny: dict[str, Tensor], vae: dict[str, Tensor], prefix: str
) -> None:
    trainer = {"config": {"depth": 2}, "var_wo_ddp": {prefix + k: x for k, x in tiny.items()}, "vae_local": vae}
    torch.save({"epoch": 1, "iter": 2, "trainer": trainer, "args": {"lr": 0.1}}, tmp_path / "tiny.pth")
    check(load_model("var-tiny", tmp_path), tiny)


class Dangerous:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code in a weights file ran')",))


def test_what_does_not_fit_is_refused(tmp_path: Path, tiny: dict[str, Tensor], vae: dict[str, Tensor]) -> None:
    torch.save(vae, tmp_path / "vae.pth")
    torch.save({"x": Dangerous()}, tmp_path / "tiny.pth")
    with pytest.raises(FormatError, match="it could run code"):
        load_model("var-tiny", tmp_path)
    (tmp_path / "tiny.pth").write_bytes(pickle.dumps({"x": 1})[:-3])
    with pytest.raises(HeatKVError, match=r"tiny\.pth"):
        load_model("var-tiny", tmp_path)
    torch.save({k: x for k, x in tiny.items() if not k.startswith("blocks.1.")}, tmp_path / "tiny.pth")
    with pytest.raises(ModelError, match="has 1 layers x 1 heads of 64; var-tiny has 2 x 1 of 64"):
        load_model("var-tiny", tmp_path)
    torch.save(tiny, tmp_path / "tiny.pth")
    with pytest.raises(ModelError, match=r"var-d16 needs its weights, FoundationVision/VAR var_d16\.pth"):
        load_model("var-d16")
    with pytest.raises(ModelError, match=r"holds none of var_d16\.pth, var_d16\.safetensors"):
        load_model("var-d16", tmp_path)
    with pytest.raises(ModelError, match="var-d16 has 16 x 16 of 64"):
        load_model("var-d16", tmp_path / "tiny.pth")
    with pytest.raises(FormatError, match="cannot read"):
        load_model("var-d16", tmp_path / "absent.pth")
    with pytest.raises(ModelError, match="draws classes, not prompts"):
        load_model("var-tiny", tmp_path, prompts=["a cat"])
    with pytest.raises(ScheduleError, match="square images only"):
        load_model("var-tiny", tmp_path, ratio=2.0)
    torch.save(vae | {"quantize.embedding.weight": torch.zeros(32, 8)}, tmp_path / "vae.pth")
    with pytest.raises(ModelError, match=r"32 codes of 8 channels, the transformer draws 64 of 8; take vae\.pth"):
        load_model("var-tiny", tmp_path)


def test_the_embedded_model_takes_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="in this package"):
        load_model("emoji", tmp_path)


def test_a_sharded_folder_is_one_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert find_weights(tmp_path, replace(TINY).files) == tmp_path

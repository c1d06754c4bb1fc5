"""Infinity through the command line, from weights, VAE and text encoder in files to pictures, tables and statistics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support.tiny_models import TINY, chunked, make_infinity

from heatkv.cli import run
from heatkv.core.plan_file import load_plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import Statistics
from heatkv.generation.batches import generate
from heatkv.models import catalogue as models
from heatkv.models.catalogue import ModelInfo
from heatkv.models.text_conditional import SAMPLING
from heatkv.models.text_encoder import T5TextEncoder

INFO = ModelInfo(
    "infinity-tiny", "infinity", TINY.depth, TINY.heads, TINY.head_dim, "0.06M", "a test", ("tiny.pth",), ("vae.pth",)
)
STRIDE = 2
"""Pixels per latent position of the tiny VAE."""
FULL_BYTES = (1 + 4 + 16 + 36 + 64 + 144) * 4 * 2 * 32 * 2 * 2 * 4
"""Cached tokens of the square 0.06M schedule, layers, heads, channels, keys and values, guided rows, fp32."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformer and VAE in files, blocks in chunks of two as published."""
    folder, model = tmp_path_factory.mktemp("weights"), make_infinity()
    torch.save(chunked(model.transformer.state_dict(), 2), folder / "tiny.pth")
    torch.save({"vae": model.vae.state_dict()}, folder / "vae.pth")
    return folder


@pytest.fixture
def tiny(weights: Path, t5_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options that name model, weights and text encoder; `prompts.txt` lies in the current folder."""
    monkeypatch.setitem(models.MODELS, INFO.name, INFO)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a red dog \n")
    return ["--model", INFO.name, "--weights", str(weights), "--weights", f"text={t5_folder}"]


def pixels(path: Path | str) -> NDArray[np.int64]:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(np.int64)


def drawn(t5_folder: Path, ratio: float, texts: list[str], negative: str | None = None) -> NDArray[np.int64]:
    """What the model in memory draws, (B, H, W, 3)."""
    schedule = ScaleSchedule.infinity("0.06M", ratio)
    model = replace(make_infinity(), schedule=schedule, sampling=SAMPLING, text_encoder=T5TextEncoder(t5_folder))
    prompts = model.prompts(texts, None if negative is None else [negative] * len(texts))
    images = generate(model, prompts, model.plan(), seed=3)
    return (images.permute(0, 2, 3, 1) * 255).round().long().numpy()


def test_generate_draws_what_the_model_in_memory_draws(
    tiny: list[str], t5_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cat, dog = ["--prompt", "a cat"], ["--prompt", "a red dog"]
    assert run(["generate", *tiny, *cat, *dog, "--seed", "3", "--out", "square"]) == 0
    wanted = drawn(t5_folder, 1.0, ["a cat", "a red dog"])
    assert wanted.shape == (2, 16 * STRIDE, 16 * STRIDE, 3)
    for name, picture in zip(("0000_a_cat", "0001_a_red_dog"), wanted, strict=True):
        assert np.abs(pixels(f"square/{name}.png") - picture).max() <= 1
    assert np.abs(wanted[0] - wanted[1]).max() > 30

    capsys.readouterr()
    tall = ["--negative", "dog", "--size", "3:2", "--seed", "3"]
    assert run(["generate", *tiny, *cat, *tall, "--out", "tall"]) == 0
    (wanted,) = drawn(t5_folder, 1.5, ["a cat"], "dog")
    assert wanted.shape == (21 * STRIDE, 14 * STRIDE, 3)
    assert np.abs(pixels("tall/0000_a_cat.png") - wanted).max() <= 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("written: 1 images in tall; full")
    assert run(["generate", *tiny, *cat, "--size", "1.51", "--out", "tall"]) == 0
    error = capsys.readouterr().err
    assert "no published schedule has height/width 1.51; taking the nearest, 1.5\n" in error
    assert "in tall (1 in place of older ones); full" in error


def test_calibrate_solve_and_generate(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    measured = ["--prompts", "prompts.txt", "--out", "s.safetensors"]
    assert run(["calibrate", *tiny, *measured, "--samples", "2"]) == 0
    assert run(["calibrate", *tiny, *measured, "--samples", "1", "--append"]) == 0
    statistics = Statistics.load("s.safetensors")
    names = [sample.split(":")[2] for sample in statistics.provenance.samples]
    assert names[0] == names[2] != names[1]  # the two prompts in turn
    assert statistics.scas.shape == (4, 2, 7)
    budget = ["--model", INFO.name, "--policy", "heatkv", "--budget", "50%"]
    assert run(["solve", *budget, "--statistics", "s.safetensors", "--dtype", "float32", "--out", "plan.json"]) == 0
    plan = load_plan("plan.json")
    assert plan.bytes(2, "float32") <= FULL_BYTES / 2
    cat = ["--prompt", "a cat", "--dtype", "bfloat16"]
    assert run(["generate", *tiny, *cat, "--plan", "plan.json", "--out", "planned"]) == 0
    capsys.readouterr()
    given = ["--statistics", "s.safetensors", *budget[2:]]
    assert run(["generate", *tiny, *cat, *given, "--out", "solved"]) == 0
    assert f"the cache took {plan.bytes(2, 'bfloat16') / 2**20:.2f} MiB" in capsys.readouterr().err
    assert np.array_equal(pixels("planned/0000_a_cat.png"), pixels("solved/0000_a_cat.png"))
    ratio = ["--size", "1.5", "--out", "other"]
    assert (
        run(["generate", *tiny, *cat, *given, *ratio])
        == run(["generate", *tiny, *cat, "--plan", "plan.json", *ratio])
        == 2
    )
    lines = capsys.readouterr().err.strip().splitlines()
    assert ["the model runs 1x1,2x2,3x2," in line for line in lines] == [True, True]
    assert not Path("other").exists()
    assert run(["generate", *tiny, "--prompt", "a " * 30, "--out", "long"]) == 2
    assert "31 positions has no unconditional half: these weights hold 20" in capsys.readouterr().err


def test_compare(tiny: list[str]) -> None:
    small = ["--samples", "2", "--images", "2", "--pictures", "1", "--repeats", "1"]
    asked = ["--prompts", "prompts.txt", "--policies", "heatkv", "--budgets", "50%"]
    assert run(["compare", *tiny, *small, *asked, "--out", "out"]) == 0
    full, pruned = json.loads(Path("out/results.json").read_text())["rows"]
    assert (full["policy"], pruned["policy"]) == ("full", "heatkv")
    assert full["planned_bytes"] == full["allocated_bytes"] == FULL_BYTES
    assert pruned["planned_bytes"] == pruned["allocated_bytes"] <= pruned["budget_bytes"] == FULL_BYTES // 2
    assert full["kl"] == 0 < pruned["kl"]
    assert {path.name for path in Path("out").iterdir()} == {
        "results.json", "statistics.safetensors", "images_50percent.png", "scas.png", "scas.json", "pictures", "plans",
        "report.html",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("generate", "--weights {weights}", "--prompt"),
        ("generate", "--weights {weights} --prompt a", "needs its text encoder"),
        ("generate", "--weights {weights} --weights text={weights} --prompt a", "holds none of tokenizer.json"),
        (
            "generate",
            "--weights {weights} --weights vae={weights}/tiny.pth --weights {text} --prompt a",
            "no bitwise VAE weights",
        ),
        (
            "generate",
            "--weights {weights}/vae.pth --weights vae=x --weights {text} --prompt a",
            "they have the entries vae",
        ),
        ("compare", "--weights {weights} --prompts prompts.txt", "needs its text encoder"),
        ("calibrate", "--weights {weights} --prompts absent.txt", "absent.txt"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(
    command: str, options: str, said: str, tiny: list[str], weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = options.format(weights=weights, text=tiny[-1]).split()
    assert run([command, *tiny[:2], *words, "--out", "out"]) == 2
    out, error = capsys.readouterr()
    (line,) = error.strip().splitlines()
    assert said in line
    assert out == ""
    assert not Path("out").exists()

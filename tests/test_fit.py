"""What fits in a memory, against figures worked out by hand, and the ledger behind it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from heatkv.cli import run
from heatkv.core.budget import Budget
from heatkv.engine.arena_cache import KVCache
from heatkv.errors import HeatKVError
from heatkv.generation.loop import Generator
from heatkv.generation.micro_batches import images_at_once
from heatkv.models.catalogue import load_model, model_info
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.text_conditional import TextConditionalModel
from heatkv.policies.base import PlanningProblem
from heatkv.policies.windows import Full, Streaming
from heatkv.profiling.analysis.fit import (
    Footprint,
    drawing_bytes,
    footprint,
    largest_batch,
    largest_share,
    parse_memory,
    prompt_bytes,
    shapes,
    text_encoder_parameters,
)
from heatkv.profiling.measure.ledger import FusedAttention, TensorLedger

MEBI = 1 << 20


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_ledger_of_tensors_alive(device: str) -> None:
    given = torch.empty(MEBI // 4, device=device)
    with TensorLedger() as ledger:
        a = given + 1  # 1 MiB
        b = a.view(2, -1)  # no memory of its own
        c = b * 2  # 2 MiB alive
        del a
        assert ledger.live == 2 * MEBI
        del b  # the last view of a
        assert ledger.live == MEBI
        d = torch.cat([given, given])  # 3 MiB
        del c
        given.add_(1)
    assert ledger.peak == 3 * MEBI
    assert ledger.live == d.numel() * 4 == 2 * MEBI


def test_ledger_of_attention() -> None:
    q, v = torch.empty(2, 3, 5, 4, device="meta"), torch.empty(2, 3, 7, 6, device="meta")
    with FusedAttention(), TensorLedger() as ledger:
        out = F.scaled_dot_product_attention(q, torch.empty(2, 3, 7, 4, device="meta"), v)
    assert out.shape == (2, 3, 5, 6)
    assert ledger.peak == 2 * 3 * (5 * 6 + 7 * 4) * 4


def test_footprint_of_infinity_2b() -> None:
    info = model_info("infinity-2b")
    taken = footprint(info, 1, dtype="bfloat16")
    assert taken.rows == 2
    assert taken.full_cache == 6425 * 32 * 16 * 128 * 2 * 2 * 2
    # 2.20 G parameters, nearly all of them in 2 bytes
    assert 2 * 2.204e9 < taken.transformer < 2 * 2.204e9 + 2 * 0.15e9
    # the encoder of flan-t5-xl has 1.22 G parameters
    assert text_encoder_parameters() == 1_223_527_424
    assert taken.text_encoder == 2 * 1_223_527_424
    kept = footprint(info, 1, dtype="bfloat16", keep_text_encoder=True)
    assert kept.without_cache == taken.without_cache + taken.text_encoder
    assert taken.otherwise == taken.weights + taken.codes + taken.decoding
    # keys and values of 77 tokens, 32 layers, and 6 AdaLN vectors of both rows per layer
    assert taken.prompt == pytest.approx(77 * 2048 * 2 * 32 * 2 + 2 * 6 * 2048 * 4 * 32, rel=0.02)
    longer = footprint(info, 1, dtype="bfloat16", prompt_tokens=512)
    assert longer.prompt - taken.prompt == pytest.approx((512 - 77) * 2048 * 2 * 32 * 2, rel=0.01)
    twice = footprint(info, 2, dtype="bfloat16")
    assert (twice.transformer, twice.step, twice.decoding) == (taken.transformer, taken.step, taken.decoding)
    assert (twice.full_cache, twice.prompt, twice.codes) == (2 * taken.full_cache, 2 * taken.prompt, 2 * taken.codes)
    assert footprint(info, 1, size="0.25M").full_cache < taken.full_cache


@pytest.mark.parametrize(("images", "guided"), [(1, True), (9, False)])
def test_attention_against_a_real_cache(images: int, guided: bool) -> None:
    """Tables and room for gathered heads of a real cache, which may be too much."""
    for name, size in (("emoji", None), ("infinity-2b", "0.25M")):
        info = replace(model_info(name), layers=2)
        taken = footprint(info, images, size=size, dtype="float32", guided=guided)
        plan = Full().plan(PlanningProblem(info.geometry(size), Budget.parse("100%")))
        each = taken.rows // images
        at_once = [each * count for count in images_at_once(plan.schedule, images, 1)]
        cache = KVCache(plan, taken.rows, torch.float32, "meta", rows_at_once=at_once)
        assert cache.index_bytes == taken.tables
        coded = footprint(info, images, size=size, dtype="float32", guided=guided, code="int8")
        sinks = Streaming(sink_scales=3).plan(PlanningProblem(info.geometry(size), Budget.parse("100%")))
        mixed = KVCache(sinks, taken.rows, torch.float32, "meta", code="int8")
        assert 0.9 * coded.tables <= mixed.index_bytes <= coded.tables
        assert cache.workspace_bytes <= taken.attention - taken.tables <= max(2 * cache.workspace_bytes, 1 << 21)


def test_drawing_on_shapes_against_real_drawing() -> None:
    """From the labels to the codes, then to the pictures, of the embedded model."""
    model = load_model("emoji")
    for images in (1, 3, 8):
        generator = Generator(model, model.plan(), images, micro_batch=1)
        with FusedAttention(), TensorLedger() as ledger:
            drawn = generator.draw(list(range(images)), decode=False)
            peak = ledger.peak
            ledger.reset_peak()
            next(generator.pictures(replace(drawn, f_hat_BZhw=drawn.f_hat_BZhw[:1])))
        taken = footprint(model_info("emoji"), images, dtype="float32")
        watched = 8 * 12 * 3 * taken.rows * 6 * 4  # of the cache: scales, layers, q, k and v, rows, heads
        predicted = taken.prompt + taken.shared_prompt + taken.codes + taken.step - watched
        assert predicted == pytest.approx(peak, rel=0.01)
        assert taken.decoding == pytest.approx(ledger.peak - ledger.live, rel=0.1)


@pytest.mark.parametrize("name", ["emoji", pytest.param("var-d16", marks=pytest.mark.slow), "infinity-2b"])
def test_working_memory_by_layers_and_images(name: str) -> None:
    info = model_info(name)
    schedule = info.schedule("0.06M" if info.family == "infinity" else None)
    two, three = (shapes(info, schedule, torch.float32, layers) for layers in (2, 3))

    def working(model: ClassConditionalModel | TextConditionalModel, images: int) -> int:
        return drawing_bytes(model, images, True, 77) - prompt_bytes(model, images, True, 77)

    assert working(three, 1) == working(two, 1)
    # what is left of an image between its turns is small, and the same for every one
    further = working(two, 2) - working(two, 1)
    assert 0 < further < 0.1 * working(two, 1)
    assert working(two, 6) == pytest.approx(working(two, 1) + 5 * further, rel=0.01)


# decoder: what enters the last level, normalised in its place, and two maps of c channels; small ones are copied
@pytest.mark.parametrize(
    ("name", "size", "pixels", "channels"),
    [
        ("var-d16", None, 256 * 256, 3 * 160),
        pytest.param("var-d36", None, 512 * 512, 3 * 160, marks=pytest.mark.slow),
        ("infinity-2b", "0.25M", 512 * 512, 4 * 128),
        pytest.param("infinity-8b", "1M", 1024 * 1024, 4 * 128, marks=pytest.mark.slow),
    ],
)
def test_decoding_against_the_documented_formula(name: str, size: str | None, pixels: int, channels: int) -> None:
    taken = footprint(model_info(name), 3, size=size)
    assert taken.decoding == pytest.approx(4 * pixels * channels, rel=0.02)


SIMPLE = Footprint(1, 2, 100, 10, 0, 5, 7, 43, 30, 400)


def test_largest_share_and_batch() -> None:
    assert (SIMPLE.weights, SIMPLE.without_cache) == (110, 165)
    sinks = Fraction(1, 40)
    assert largest_share(SIMPLE, 265, sinks).share == Fraction(1, 4)
    assert largest_share(SIMPLE, 10**6, sinks).share == 1
    for memory, missing in ((175, 0), (174, 1), (10, 165)):
        found = largest_share(SIMPLE, memory, sinks)
        assert (found.share, found.cache, found.total) == (sinks, 10, 175)
        assert (found.missing, found.fits) == (missing, missing == 0)
    # 110 + 43 + images * (12 + 40) at a tenth of the cache
    for memory in (205, 256, 257, 1060, 9999):
        found = largest_batch(SIMPLE, memory, Fraction(1, 10))
        assert found.taken.images == (memory - 153) // 52
        assert found.fits
    assert largest_batch(SIMPLE, 10**12, Fraction(1, 10)).taken.images == 65536
    one = largest_batch(SIMPLE, 204, Fraction(1, 10))
    assert (one.taken.images, one.missing) == (1, 1)


@pytest.mark.parametrize("text", ["24", "10%", "lots", "-1GiB", "0", "0GiB", "5XB", "nan", ""])
def test_memory_that_is_no_size(text: str) -> None:
    with pytest.raises(HeatKVError, match=f"memory '{text}'"):
        parse_memory(text)
    assert parse_memory("1.5KiB") == 1536


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert run(["fit", *arguments, "--json"]) == code
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_largest_budget_and_batch_of_a_memory(capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--batch", "4"], ["--budget", "10%"]):
        facts = answer(capsys, "--model", "var-d16", "--memory", "2GiB", *option)
        assert facts["total_bytes"] <= facts["memory_bytes"] == 2 << 30
        assert facts["rows"] == 2 * facts["images"] >= 8


def test_memory_that_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model", "infinity-8b", "--batch", "4", "--memory"]
    facts = answer(capsys, *asked, "17GiB", code=2)
    assert facts["fits"] is False
    least = facts["least_memory_bytes"]
    assert least == facts["total_bytes"] == (17 << 30) + facts["missing_bytes"]
    assert facts["sinks_bytes"] == facts["full_cache_bytes"] * 21 // 6425
    facts = answer(capsys, *asked, f"{least}B")
    assert (facts["fits"], facts["left_bytes"], facts["missing_bytes"]) == (True, 0, 0)
    assert run(["fit", *asked, f"{least - 1}B"]) == 2
    out, error = capsys.readouterr()
    for line in ("transformer", "text encoder", "step of the largest", "cache, full", "total with that", "missing"):
        assert line in out
    assert f"it takes {least / 2**30:.2f} GiB" in error
    assert len(error.splitlines()) == 1


def test_budget_that_was_found_fits(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["fit", "--model", "infinity-8b", "--memory", "20GiB"]
    assert run(asked) == 0
    found = re.search(r"the largest budget is ([0-9.]+)%", capsys.readouterr().out)
    assert found is not None
    assert answer(capsys, *asked[1:], "--budget", f"{found[1]}%")["images"] == 1
    assert run([*asked, "--budget", f"{float(found[1]) + 0.2:.1f}%"]) == 2


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--batch", "0"], "0"), (["--batch", "65537"], "65536"), (["--batch", "2", "--budget", "10%"], "one of them"),
        (["--memory", "5XB"], "'5XB'"), (["--dtype", "int8"], "int8"), (["--budget", "120%"], "100 %"),
        (["--budget", "0.1%"], "21/6425"),
        (["--prompt-tokens", "513"], "512"), (["--budget", "auto"], "auto"), (["--cfg", "-1"], "cfg is -1"),
        (["--size", "2M"], "'2M'"),
    ],
)  # fmt: skip
def test_bad_options(arguments: list[str], value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fit", "--memory", "24GiB", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert value in error
    assert len(error.splitlines()) == 1


def test_template_of_a_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fit", "--memory", "24GiB", "--size", "1.4"]) == 0
    assert "height/width 1.4; taking the nearest, 1.333" in capsys.readouterr().err

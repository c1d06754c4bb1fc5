"""HeatKV under models of the upstream idiom (`standin_*.py`): golden runs, restoring, refusals and measuring."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.foreign import (
    KINDS,
    SCALES,
    SIDES,
    attention_of,
    draw_infinity,
    draw_var,
    dropping_plan,
    make_infinity,
    make_var,
    same,
)
from support.golden import DECODED, EMBEDDED, GUIDED_LOGITS, HALF_LOGITS, close, tensors
from support.standin_infinity import Infinity, turned
from support.standin_var import VAR, SelfAttention
from torch import Tensor, nn
from torch.nn import functional as F

import heatkv
from heatkv.attachment.attached import Attached
from heatkv.calibration.level_costs import calibrate_biases, calibrate_levels
from heatkv.calibration.measure import calibrate
from heatkv.core.geometry import CacheGeometry
from heatkv.core.levels import LevelChoices
from heatkv.core.plan import Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import Statistics
from heatkv.errors import BudgetError, HeatKVError, ModelError, PlanError, PolicyError, ScheduleError, StatisticsError
from heatkv.models.base import fingerprint
from heatkv.models.checkpoint import build_var, build_vqvae
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.sampling import SamplingSettings

HERE = Path(__file__).parent
LIMITS = {
    "logits_cond": HALF_LOGITS, "logits_uncond": HALF_LOGITS, "logits_cfg": GUIDED_LOGITS, "summed_codes": EMBEDDED,
}  # fmt: skip
CHOICES = ("tokens", "bits")


# ------------------------------------------------------------------------------------------- models and golden sets


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> tuple[Any, Callable[..., list[Tensor]], ScaleSchedule]:
    make, draw, schedule = KINDS[request.param]
    return make(), draw, schedule


Find = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture
def find(request: pytest.FixtureRequest) -> Find:
    """Folder and json of a golden set, here or below a --golden folder; a set of a model may need only some parts."""

    def found(name: str, *parts: str) -> tuple[Path, dict[str, Any]]:
        for folder in (HERE / "golden", *map(Path, request.config.getoption("--golden"))):
            for path in folder.rglob(f"{Path(name).name}.json"):
                told = json.loads(path.read_text())
                if all(told["files"][part] for part in parts):
                    return path.parent, told
        pytest.skip(f"the golden set {name} is not here; run with --golden")

    return found


def golden_var(folder: Path, told: dict[str, Any]) -> VAR:
    config = told["config"]
    sizes = (config["patch_nums"], config["depth"], config["width"], config["num_heads"])
    model = VAR(*sizes, shared_aln=config["shared_aln"], attn_l2_norm=config["attn_l2_norm"]).eval()
    state = tensors(folder, told["files"]["model"])
    state.pop("attn_bias_for_masking", None)
    model.load_state_dict(state)
    model.vae = [build_vqvae(tensors(folder, told["files"]["vae"]), config["patch_nums"])]
    return model


def golden_infinity(folder: Path, told: dict[str, Any], run: str) -> tuple[Infinity, list[tuple[int, int, int]]]:
    model = Infinity(4, 128, 2).eval()
    model.load_state_dict(tensors(folder, told["files"]["model"]))
    scales: Any = [tuple(scale) for scale in told["runs"][run]["scale_schedule"]]
    model.add_schedule(scales, (78, 52) if run == "tall_b1" else (64, 64))
    return model, scales


def check_record(record: Sequence[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    compared = 0
    for scale, told in enumerate(record):
        for name, got in told.items():
            if (wanted := expected.get(f"scale{scale}.{name}")) is None:
                continue
            compared += 1
            if name in CHOICES:
                assert torch.equal(got, wanted)
            else:
                close(got, wanted, LIMITS[name])
    assert compared >= 3 * len(record) - 3


def given_plan(told: dict[str, Any], geometry: CacheGeometry) -> Plan:
    last_read = np.array(told["last_read"])
    plan = Plan("given", geometry, last_read, 1.0, geometry.full_token_heads, told["sink_scales"])
    assert not plan.had_no_effect()
    return plan


# ------------------------------------------------------------------------------------------- golden runs


@pytest.mark.parametrize("name", ["var_tiny_saln", "var_tiny_10s", "var_tiny_l2"])
def test_golden_var_with_the_full_cache(name: str, find: Find) -> None:
    folder, told = find(name, "expected")
    model, expected = golden_var(folder, told), tensors(folder, told["files"]["expected"])
    labels, cfg = told["config"]["labels"], told["config"]["cfg"]

    def check() -> None:
        image = model.autoregressive_infer_cfg(len(labels), labels, cfg=cfg, top_k=1)
        check_record(model.record, expected)
        close(image, expected["image"], DECODED)

    check()  # the stand-in alone
    with heatkv.attach(model, "full", "100%") as attached:
        check()
        assert attached.cache.allocated_bytes == attached.plan.geometry.full_bytes(2 * len(labels), "float32")


def test_golden_var_pruned(find: Find) -> None:
    folder, told = find("var_pruned_10s")
    model = golden_var(*find(told["model_set"]))
    expected = tensors(folder, told["files"])
    plan = given_plan(told, CacheGeometry(2, 1, 64, ScaleSchedule.var(256)))
    with heatkv.attach(model, plan):
        image = model.autoregressive_infer_cfg(1, [6], cfg=1.5, top_k=1)
    check_record(model.record, expected)
    close(image, expected["image"], DECODED)


@pytest.mark.parametrize("run", ["sq_b1", "sq_b2", "tall_b1"])
def test_golden_infinity_with_the_full_cache(run: str, find: Find) -> None:
    folder, told = find("inf_tiny")
    model, scales = golden_infinity(folder, told, run)
    settings = told["runs"][run]
    expected = tensors(folder, settings["files"])
    text = [expected[f"text.{i}"] for i in range(len(settings["text_lens"]))]
    model.autoregressive_infer_cfg(scales, text, settings["cfg"], settings["tau"])
    check_record(model.record, expected)
    with heatkv.attach(model, "full", "100%", schedule=ScaleSchedule.of(scales)):
        model.autoregressive_infer_cfg(scales, text, settings["cfg"], settings["tau"])
    check_record(model.record, expected)


@pytest.mark.parametrize("name", ["infinity_pruned_sq", "infinity_pruned_tall"])
def test_golden_infinity_pruned(name: str, find: Find) -> None:
    folder, told = find(name)
    run, expected = told["run"], tensors(folder, told["files"])
    model, scales = golden_infinity(*find(told["model_set"]), run["of"])
    plan = given_plan(told, CacheGeometry(4, 2, 64, ScaleSchedule.of(scales)))
    with heatkv.attach(model, plan):
        model.autoregressive_infer_cfg(scales, [expected["text.0"]], run["cfg"], run["tau"])
    check_record(model.record, expected)


# ------------------------------------------------------------------------------------------- what attaching changes


def test_a_full_plan_changes_nothing_but_rounding(kind: Any) -> None:
    model, draw, schedule = kind
    before = draw(model)
    with heatkv.attach(model, "full", "100%", schedule=schedule):
        attached = draw(model)
    same(attached, before, 1e-4)
    after = draw(model)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_every_variant_of_attention(normalised: bool, flash: bool) -> None:
    var, infinity = make_var(attn_l2_norm=normalised), make_infinity(cos_attn=normalised, using_flash=flash)
    for module in attention_of(var):
        module.using_flash = flash
    if normalised:
        shape = (1, 1, 2, 1) if flash else (1, 2, 1, 1)
        assert attention_of(infinity)[0].scale_mul_1H11.shape == shape
    models: list[tuple[Any, Any, ScaleSchedule]] = [
        (var, draw_var, ScaleSchedule.square(SIDES)), (infinity, draw_infinity, ScaleSchedule.of(SCALES))
    ]  # fmt: skip
    for model, draw, schedule in models:
        before = draw(model)
        with heatkv.attach(model, "full", "100%", schedule=schedule):
            same(draw(model), before, 1e-4)
        with heatkv.attach(model, dropping_plan(model, schedule)):
            assert (draw(model)[1] - before[1]).abs().max() > 1e-2  # so that the line above says something


def test_scales_beyond_the_clamp() -> None:
    model = make_var()
    for module in attention_of(model):
        module.scale_mul_1H11.data += 4
    before = draw_var(model)
    with heatkv.attach(model, "full", "100%"):
        same(draw_var(model), before, 1e-3)


def test_what_follows_the_attention_is_the_modules_own() -> None:
    model = make_var()
    for module in attention_of(model):
        module.proj_drop = nn.Identity()  # as in Infinity
        module.proj.register_forward_hook(lambda _module, _inputs, out: out.tanh())
    before = draw_var(model)
    with heatkv.attach(model, "full", "100%"):
        same(draw_var(model), before, 1e-4)


def masked_attention(module: Any, cells: NDArray[np.int64], schedule: ScaleSchedule) -> Callable[..., Tensor]:
    """VAR's attention with the cells that the plan dropped hidden from the scores, over its own full cache."""

    def forward(x: Tensor, attn_bias: Tensor | None) -> Tensor:
        tokens = x.shape[1]
        held = 0 if module.cached_k is None else module.cached_k.shape[2]
        target = schedule.offsets.index(held)
        visible = torch.ones(module.num_heads, held + tokens, dtype=torch.bool)
        for head, last_reads in enumerate(cells.tolist()):
            for source in range(target):
                visible[head, schedule.slice(source)] = last_reads[source] >= target
        bias = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)[None, :, None]
        return type(module).forward(module, x, bias)

    return forward


def test_a_dropping_plan_equals_hidden_cells() -> None:
    model, schedule = make_var(), ScaleSchedule.square(SIDES)
    for seed in range(3):
        plan = dropping_plan(model, schedule, seed)
        for layer, module in enumerate(attention_of(model)):
            module.forward = masked_attention(module, plan.last_read[layer], schedule)
        expected = draw_var(model)
        for module in attention_of(model):
            del module.forward
        with heatkv.attach(model, plan) as attached:
            same(draw_var(model), expected, 1e-4)
            assert attached.cache.allocated_bytes == plan.bytes(4, "float32")
            assert attached.plan is plan


@pytest.mark.parametrize("policy", ["full", "sliding-window", "snapkv"])
def test_8_bits_under_another_model(policy: str) -> None:
    """Near what the same plan gives uncoded, in fewer bytes; also with a finished plan."""
    model = make_var()
    budget = "100%" if policy == "full" else "60%"
    with heatkv.attach(model, policy, budget) as attached:
        plain = draw_var(model)
        plain_bytes = attached.cache.allocated_bytes
    with heatkv.attach(model, policy, budget, storage="int8", attention="ragged") as attached:
        coded = draw_var(model)
        assert attached.cache.allocated_bytes == attached.plan.bytes(4, "int8/float32") < plain_bytes
        plan = attached.plan
    with heatkv.attach(model, plan, storage="int8"):
        again = draw_var(model)
    for one, other, third in zip(plain, coded, again, strict=True):
        assert torch.equal(other, third)
        assert (one - other).abs().max() <= 0.05 * one.abs().max()
    assert any(not torch.equal(one, other) for one, other in zip(plain, coded, strict=True))


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"storage": "int4"}, PlanError, "unknown storage"),
        ({"attention": "flash"}, PlanError, "unknown attention kernel"),
    ],
)
def test_options_of_the_cache_are_refused(given: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        heatkv.attach(make_var(), "full", "100%", **given)
    with pytest.raises(PolicyError, match="only go with policy="):
        heatkv.measure(make_var(), **given)


def test_the_model_keeps_no_cache_of_its_own(kind: Any) -> None:
    model, draw, schedule = kind
    seen: list[tuple[bool, Any]] = []
    for module in attention_of(model):
        module.kv_caching(True)
        module.cached_k = torch.zeros(1)  # a leftover of an image that was broken off
        module.register_forward_hook(lambda module, _, __: seen.append((module.caching, module.cached_k)))
    with heatkv.attach(model, "full", "100%", schedule=schedule):
        draw(model)
    assert seen == [(True, None)] * (len(attention_of(model)) * len(schedule))
    assert not any(module.caching for module in attention_of(model))
    draw(model)
    assert seen[-1][1] is not None  # without HeatKV it does


def test_images_of_different_rows_in_one_block(kind: Any) -> None:
    model, draw, schedule = kind
    calls: list[dict[str, Any]] = [{}, {"cfg": 0.0 if isinstance(model, VAR) else 1.0}, {}, {}]
    expected = [draw(model, **call) for call in calls]
    with heatkv.attach(model, dropping_plan(model, schedule)) as attached:
        first = draw(model)
        cache = attached.cache
        second = draw(model, **calls[1])
        assert (cache.rows, attached.cache.rows) == (4, 2)
        third, bigger = draw(model), attached.cache
        fourth = draw(model)
        assert attached.cache is bigger  # the same rows again: the same arena
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, fourth, strict=True))
    with heatkv.attach(model, "full", "100%", schedule=schedule):
        for call, wanted in zip(calls, expected, strict=True):
            same(draw(model, **call), wanted, 1e-4)
    assert second[0].shape == first[0].shape


def test_rows_do_not_see_each_other() -> None:
    model = make_var()
    with heatkv.attach(model, dropping_plan(model, ScaleSchedule.square(SIDES))):
        together = draw_var(model, [3, 7])
        model.autoregressive_infer_cfg(1, [3], cfg=1.5, g_seed=5)
        alone = model.record[0]["logits_cfg"]
        greedy = [model.autoregressive_infer_cfg(1, [label], top_k=1) for label in (3, 7)]
        both = model.autoregressive_infer_cfg(2, [3, 7], top_k=1)
    close(alone, together[0][:1], 1e-5)
    close(both, torch.cat(greedy), 1e-4)


def test_an_image_that_was_broken_off_leaves_nothing_behind() -> None:
    model, plan = make_var(), dropping_plan(make_var(), ScaleSchedule.square(SIDES))
    with heatkv.attach(model, plan) as attached:
        expected = draw_var(model)
        with broken_at(model, scale=2), pytest.raises(RuntimeError, match="broken off"):
            draw_var(model)
        assert all(torch.equal(a, b) for a, b in zip(draw_var(model), expected, strict=True))
        with broken_at(model, scale=2), pytest.raises(RuntimeError, match="broken off"):
            draw_var(model)
    with attached, pytest.raises(ModelError, match=r"without kv_caching\(True\)"):
        model.blocks[2].attn(torch.randn(4, 9, 32), None)  # what came next in the image that was broken off


@contextmanager
def broken_at(model: VAR, scale: int) -> Iterator[None]:
    """Raise in the second block of this scale."""
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == scale + 1:
            raise RuntimeError("broken off")

    handle = model.blocks[1].register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_the_original_methods_come_back(kind: Any) -> None:
    model, draw, schedule = kind
    modules = attention_of(model)
    own = modules[1]
    own.forward = mine = lambda *args, **kwargs: type(own).forward(own, *args, **kwargs)
    with pytest.raises(ModelError, match="not forward"):  # a forward without named arguments
        heatkv.attach(model, "full", "100%", schedule=schedule)
    own.forward = mine = type(own).forward.__get__(own)
    before = draw(model)

    def restored() -> bool:
        clean = [module for module in modules if module is not own]
        assert not any({"forward", "kv_caching"} & set(vars(module)) for module in clean)
        assert own.__dict__["forward"] is mine
        return all(torch.equal(a, b) for a, b in zip(draw(model), before, strict=True))

    with heatkv.attach(model, "full", "100%", schedule=schedule):
        assert {"forward", "kv_caching"} <= set(vars(modules[0]))
    assert restored()
    with pytest.raises(KeyError, match="mine"), heatkv.attach(model, "full", "100%", schedule=schedule):
        raise KeyError("mine")
    assert restored()


def test_attaching_twice_is_refused() -> None:
    model = make_var()
    before = draw_var(model)
    attached, other = heatkv.attach(model, "full", "100%"), heatkv.attach(model, "full", "100%")
    with attached:
        with pytest.raises(ModelError, match=r"blocks\[0\]\.attn is attached already"):
            heatkv.attach(model, "full", "100%")
        with pytest.raises(ModelError, match=r"blocks\[0\]\.attn is attached already"), other:
            pass
        with pytest.raises(ModelError, match="in use already"), attached:
            pass
        same(draw_var(model), before, 1e-4)  # the first one still works
    assert not any("forward" in vars(module) for module in attention_of(model))
    with other:  # one after the other is fine, also with the same object again
        same(draw_var(model), before, 1e-4)
    with attached:
        same(draw_var(model), before, 1e-4)
    # one module attached elsewhere: nothing may stay replaced on the others
    part = SimpleNamespace(blocks=[model.blocks[2]], patch_nums=SIDES)
    with heatkv.attach(part, "full", "100%"):
        with pytest.raises(ModelError, match=r"blocks\[2\]\.attn is attached already"), other:
            pass
        assert "forward" not in vars(model.blocks[0].attn)


def test_inference_mode_and_no_grad_may_alternate() -> None:
    model = make_var()
    expected = draw_var(model)
    with heatkv.attach(model, "full", "100%"):
        with torch.inference_mode():
            same(draw_var(model), expected, 1e-4)
        same(draw_var(model), expected, 1e-4)
        with torch.inference_mode():
            same(draw_var(model), expected, 1e-4)


def test_autocast_stores_keys_in_the_compute_type(kind: Any) -> None:
    model, draw, schedule = kind
    exact = draw(model)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = draw(model)[0]
        with heatkv.attach(model, "full", "100%", schedule=schedule) as attached:
            got = draw(model)[0]
    assert attached.cache.store.dtype == torch.bfloat16
    assert attached.cache.allocated_bytes == attached.plan.geometry.full_bytes(4, "bfloat16")
    rounding = (expected.double() - exact.double()).abs().max()
    assert 0 < rounding < 0.2 * exact.abs().max()
    assert (got.double() - expected.double()).abs().max() <= 2 * rounding


# ------------------------------------------------------------------------------------------- finding and planning


def test_blocks_are_found_in_order_wherever_they_are() -> None:
    model = make_infinity()
    blocks = model.unregistered_blocks
    expected = draw_infinity(model)
    schedule = ScaleSchedule.of(SCALES)
    plan = dropping_plan(model, schedule)
    with heatkv.attach(model, plan):
        pruned = draw_infinity(model)
    del model.unregistered_blocks
    shapes: list[Any] = [
        model,
        SimpleNamespace(block_chunks=[SimpleNamespace(module=blocks[:3]), SimpleNamespace(module=blocks[3:])]),
        SimpleNamespace(blocks=nn.ModuleList(blocks)),
        SimpleNamespace(unregistered_blocks=[SimpleNamespace(attn=block.sa) for block in blocks], blocks=["other"]),
    ]
    for shape in shapes:
        with heatkv.attach(shape, plan):
            model.unregistered_blocks = blocks
            same(draw_infinity(model), pruned, 0)
            del model.unregistered_blocks
    model.unregistered_blocks = blocks
    assert (pruned[1] - expected[1]).abs().max() > 1e-2


def test_the_schedule_is_read_off_a_var() -> None:
    model = make_var()
    assert heatkv.attach(model, "full", "100%").plan.schedule == ScaleSchedule.square(SIDES)
    model.patch_nums = ((1, 1), (2, 2), (3, 2))
    assert heatkv.attach(model, "full", "100%").plan.schedule.scales == ((1, 1, 1), (1, 2, 2), (1, 3, 2))
    given = ScaleSchedule.square((1, 5))
    assert heatkv.attach(model, "full", "100%", schedule=given).plan.schedule == given
    del model.patch_nums
    assert heatkv.attach(model, "full", "100%").plan.schedule == ScaleSchedule.square(SIDES)
    model.lvl_1L = torch.tensor([[0, 1, 1]])
    with pytest.raises(ScheduleError, match=r"\[1, 2\] tokens per scale, which are not all squares; pass schedule="):
        heatkv.attach(model, "full", "100%")
    del model.lvl_1L
    with pytest.raises(ScheduleError, match=r"VAR does not tell its schedule; pass schedule=.*ScaleSchedule\.var"):
        heatkv.attach(model, "full", "100%")


def test_infinity_brings_its_schedule_with_every_call() -> None:
    model = make_infinity()
    model.register_buffer("lvl_1L", torch.zeros(1, 4))  # a stray key of some checkpoints
    with pytest.raises(ScheduleError, match=r'ScaleSchedule\.infinity\("1M", 1\.0\)'):
        heatkv.attach(model, "full", "100%")
    statistics = measured(model, draw_infinity, schedule=ScaleSchedule.of(SCALES))
    assert heatkv.attach(model, "heatkv", "90%", statistics=statistics, sink_scales=1).plan.schedule.scales == tuple(
        SCALES
    )


def test_a_policy_with_its_options(kind: Any) -> None:
    model, draw, schedule = kind
    full = CacheGeometry(len(attention_of(model)), 2, 16, schedule)
    with heatkv.attach(model, "streaming", "60%", schedule=schedule, sink_scales=1) as attached:
        draw(model)
    assert attached.plan.policy == "streaming"
    assert attached.plan.settings["sink_scales"] == 1
    assert attached.plan.model == type(model).__name__
    assert 0.3 * full.full_bytes(4, "float32") < attached.cache.allocated_bytes <= 0.6 * full.full_bytes(4, "float32")


def test_a_budget_in_bytes_holds_or_is_refused() -> None:
    model = make_var()
    full = CacheGeometry(3, 2, 16, ScaleSchedule.square(SIDES)).full_bytes(2, "float32")
    limit = full * 3 // 4
    with heatkv.attach(model, "streaming", f"{limit}B", sink_scales=1) as attached:
        draw_var(model, [3])
        assert full / 2 < attached.cache.allocated_bytes <= limit
        with pytest.raises(
            BudgetError, match=rf"4 rows in torch\.float32 need \d+ bytes, the budget is {limit}.*rows=4"
        ):
            draw_var(model)
    with heatkv.attach(model, "streaming", f"{limit}B", sink_scales=1, rows=4) as attached:
        draw_var(model)
        assert attached.cache.allocated_bytes <= limit
    with heatkv.attach(model, "streaming", f"{limit // 2}B", sink_scales=1, guided=False) as attached:
        draw_var(model, [3], cfg=0)
        assert full / 4 < attached.cache.allocated_bytes <= limit // 2


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "error", "phrase"),
    [
        ({}, PolicyError, "one of: policy= with budget=, plan=, or measure=True$"),
        ({"policy": "full", "budget": "100%", "measure": True}, PolicyError, "not policy and measure together"),
        ({"measure": True, "budget": "10%"}, PolicyError, "budget only go with policy=, not with measure="),
        ({"measure": True, "sink_scales": 2}, PolicyError, "sink_scales only go with policy="),
        ({"policy": "heatkv"}, BudgetError, "policy 'heatkv' needs a budget"),
        ({"policy": "hetakv", "budget": "10%"}, PolicyError, "did you mean 'heatkv'"),
        ({"policy": "heatkv", "budget": "11%"}, PolicyError, "needs statistics of this model"),
        ({"policy": "streaming", "budget": "11%"}, BudgetError, "sink scales"),
        ({"policy": "streaming", "budget": "50%", "nonsense": 1}, PolicyError, "nonsense"),
    ],
)
def test_what_to_keep_must_be_said(call: dict[str, Any], error: type[HeatKVError], phrase: str) -> None:
    with pytest.raises(error, match=phrase):
        heatkv.attach(make_var(), **call)


def test_plans_of_other_models_are_refused() -> None:
    model = make_var()

    def plan(layers: int = 3, heads: int = 2, dim: int = 16, sides: Sequence[int] = SIDES) -> Plan:
        geometry = CacheGeometry(layers, heads, dim, ScaleSchedule.square(sides))
        last_read = np.full((layers, heads, len(sides)), len(sides) - 1)
        return Plan("given", geometry, last_read, 1.0, geometry.full_token_heads, 0)

    heatkv.attach(model, plan())
    for wrong, phrase in (
        (plan(heads=4), "3 layers x 4 heads, the model has 3 x 2"),
        (plan(layers=2), "2 layers x 2 heads, the model has 3 x 2"),
        (plan(dim=8), "head size of 8, the model has 16"),
        (plan(sides=(1, 2, 4)), "schedule 1,2,4, the model runs 1,2,3,4"),
    ):
        with pytest.raises(PlanError, match=phrase):
            heatkv.attach(model, wrong)
    with pytest.raises(PlanError, match="schedule 1,2,3,4, the model runs 1,2"):
        heatkv.attach(make_infinity(), plan=dropping_plan(make_infinity(), ScaleSchedule.square(SIDES)),
                      schedule=ScaleSchedule.square((1, 2)))  # fmt: skip


class Strange(SelfAttention):
    """A derivative that turns its keys by a table of its own."""

    def __init__(self, width: int, num_heads: int, attn_l2_norm: bool) -> None:
        super().__init__(width, num_heads, attn_l2_norm)
        self.register_buffer("freqs_cis", torch.zeros(3))
        self.q_norm = nn.LayerNorm(16)


def test_models_that_are_not_recognised_say_what_is_missing() -> None:
    def refused(model: Any, phrase: str) -> None:
        with pytest.raises(ModelError, match=phrase):
            heatkv.attach(model, "full", "100%")

    def changed(change: Callable[[Any], Any]) -> VAR:
        model = make_var()
        change(model.blocks[1].attn)
        return model

    refused(
        nn.Linear(3, 3), r"no blocks were found in Linear: HeatKV looks at model\.unregistered_blocks.*model\.blocks"
    )
    refused(
        SimpleNamespace(blocks=[nn.Linear(3, 3)]), r"blocks\[0\] \(Linear\) has no self-attention named `sa` or `attn`"
    )
    refused(
        SimpleNamespace(block_chunks=[nn.Linear(3, 3)]), r"block_chunks\[0\] .* has no list of blocks named `module`"
    )
    wrong = SimpleNamespace(blocks=[SimpleNamespace(attn=nn.Linear(3, 3))])
    refused(wrong, r"blocks\[0\]\.attn \(Linear\) is no self-attention.*it has no num_heads, head_dim.*kv_caching")
    refused(wrong, "attn_l2_norm or cos_attn$")
    refused(changed(lambda attn: delattr(attn, "q_bias")), r"blocks\[1\]\.attn .*it has no q_bias$")
    refused(changed(lambda attn: delattr(attn, "scale_mul_1H11")), "it has no scale_mul_1H11$")
    refused(changed(lambda attn: delattr(attn, "max_scale_mul")), "it has no max_scale_mul$")
    refused(
        changed(lambda attn: setattr(attn, "mat_qkv", nn.Linear(32, 64, bias=False))), "no linear layer with 3 x 32"
    )
    refused(changed(lambda attn: setattr(attn, "mat_qkv", nn.Linear(32, 96))), "a bias beside q_bias")
    strange = make_var()
    strange.blocks[2].attn = Strange(32, 2, True)
    refused(strange, r"blocks\[2\]\.attn \(Strange\) also has freqs_cis, q_norm, of which")
    uneven = make_var()
    uneven.blocks[0].attn = SelfAttention(32, 4, True)
    refused(uneven, r"differ in \(heads, head size\): \[\(2, 16\), \(4, 8\)\]")
    harmless = changed(lambda attn: setattr(attn, "attn_drop", nn.Dropout(0.1)))
    assert heatkv.attach(harmless, "full", "100%").plan.had_no_effect()
    without_norm = make_var(attn_l2_norm=False)
    assert heatkv.attach(without_norm, "full", "100%").plan.had_no_effect()
    del without_norm.blocks[0].attn.attn_l2_norm
    refused(without_norm, "it has no attn_l2_norm or cos_attn$")


@contextmanager
def first_scale(model: Any, schedule: ScaleSchedule) -> Iterator[tuple[Any, Tensor]]:
    """Attached and at the start of an image, with the first self-attention and an input that would fit."""
    with heatkv.attach(model, "full", "100%", schedule=schedule), torch.no_grad():
        for module in attention_of(model):
            module.kv_caching(True)
        yield attention_of(model)[0], torch.randn(2, 1, 32)


def test_calls_of_var_that_are_refused() -> None:
    model, schedule = make_var(), ScaleSchedule.square(SIDES)
    with first_scale(model, schedule) as (module, x):
        with pytest.raises(ModelError, match=r"blocks\[0\]\.attn was given a mask \(attn_bias\)"):
            module(x, torch.zeros(1, 1, 1, 1))
        with pytest.raises(ModelError, match="given a mask"):
            module(x, attn_bias=torch.zeros(1, 1, 1, 1))
        with pytest.raises(
            PlanError, match=r"4 tokens arrived for scale 0, which has 1 in the plan's schedule 1,2,3,4"
        ):
            module(torch.randn(2, 4, 32), None)
        with pytest.raises(PlanError, match=r"blocks\[2\]\.attn was called when blocks\[0\]\.attn was due at scale 0"):
            model.blocks[2].attn(x, None)
        model.train()
        with pytest.raises(ModelError, match=r"in training mode.*model\.eval\(\)"):
            module(x, None)
        model.eval()
        with torch.enable_grad(), pytest.raises(ModelError, match="only draws"):
            module(x, None)
        assert module(x, None).shape == (2, 1, 32)
        with pytest.raises(PlanError, match="3 rows arrived at scale 0; these images began with 2"):
            model.blocks[1].attn(torch.randn(3, 1, 32), None)
        for block in list(model.blocks)[1:]:
            block.attn(x, attn_bias=None)
        with pytest.raises(PlanError, match=r"9 tokens arrived for scale 1, which has 4"):
            module(torch.randn(2, 9, 32), None)


def test_running_outside_of_an_image_is_refused() -> None:
    model = make_var()
    x = torch.randn(2, 1, 32)
    with heatkv.attach(model, "full", "100%") as attached, torch.no_grad():
        with pytest.raises(ModelError, match="before the model has drawn its first scale"):
            _ = attached.cache
        with pytest.raises(ModelError, match=r"blocks\[0\]\.attn runs without kv_caching\(True\)"):
            model.blocks[0].attn(x, None)
        draw_var(model)
        with pytest.raises(ModelError, match=r"without kv_caching\(True\)"):
            model.blocks[0].attn(x, None)
        for block in model.blocks:
            block.attn.kv_caching(True)
        for side in SIDES:
            for block in model.blocks:
                block.attn(torch.randn(2, side * side, 32), None)
        with pytest.raises(PlanError, match=r"all 4 scales of the plan are drawn; kv_caching\(True\) starts the next"):
            model.blocks[0].attn(x, None)


def test_calls_of_infinity_that_are_refused() -> None:
    model, schedule = make_infinity(), ScaleSchedule.of(SCALES)
    told = {"scale_schedule": SCALES, "rope2d_freqs_grid": model.rope2d_freqs_grid, "scale_ind": 0}
    with first_scale(model, schedule) as (module, x):
        for error, phrase, arguments in (
            (ModelError, r"given a mask \(attn_bias_or_two_vector\)", {"attn_bias_or_two_vector": (1, 2)}),
            (ModelError, "its own attn_fn", {"attn_fn": F.scaled_dot_product_attention}),
            (PlanError, r"runs the schedule 1x1,2x2,3x2, the plan is for", {"scale_schedule": SCALES[:3]}),
            (PlanError, "scale 1 when scale 0 is due", {"scale_ind": 1}),
            (ModelError, "no table for the schedule", {"rope2d_freqs_grid": {"((1, 1, 1),)": torch.zeros(1)}}),
            (ModelError, r"is \(2, 1, 1, 1, 23, 4\); \(2, 1, 1, 1, at least 1 tokens, 8\) is needed",
             {"rope2d_freqs_grid": {str(tuple(SCALES)): torch.zeros(2, 1, 1, 1, 23, 4)}}),
            (ModelError, r"is \(2, 1, 1, 1, 0, 8\); \(2, 1, 1, 1, at least 1 tokens, 8\) is needed",
             {"rope2d_freqs_grid": {str(tuple(SCALES)): torch.zeros(2, 1, 1, 1, 0, 8)}}),
            (ModelError, r"is \(23, 8\); ", {"rope2d_freqs_grid": {str(tuple(SCALES)): torch.zeros(23, 8)}}),
            (ModelError, "fused_norm is off", {"scale_schedule": None}),
        ):  # fmt: skip
            with pytest.raises(error, match=phrase):
                module(x, **{"attn_bias_or_two_vector": None, **told, **arguments})
        with pytest.raises(ModelError, match="fused_norm is off"):
            module(x, None, None, SCALES, model.rope2d_freqs_grid)  # no scale_ind
        assert module(x, None, None, SCALES, model.rope2d_freqs_grid, scale_ind=0).shape == x.shape


def test_infinity_without_fused_norm_is_refused() -> None:
    model, schedule = make_infinity(fused_norm=False), ScaleSchedule.of(SCALES)
    phrase = r"without scale_ind or scale_schedule.*build the model with fused_norm on"
    with heatkv.attach(model, "full", "100%", schedule=schedule), pytest.raises(ModelError, match=phrase):
        draw_infinity(model)


class WithContext(SelfAttention):
    def forward(self, x: Tensor, attn_bias: Tensor | None, si: int = -1, context: Any = None) -> Tensor:
        return super().forward(x, attn_bias)


def test_arguments_that_are_not_known_are_refused_when_they_are_used() -> None:
    model = make_var()
    for block in model.blocks:
        block.attn.__class__ = WithContext
    with first_scale(model, ScaleSchedule.square(SIDES)) as (module, x):
        for arguments, name in (({"si": 0}, "si"), ({"context": x}, "context")):
            with pytest.raises(ModelError, match=f"was given {name}, which HeatKV does not know"):
                module(x, None, **arguments)
        assert module(x, None, si=-1, context=None).shape == x.shape


# ------------------------------------------------------------------------------------------- measuring


def measured(model: Any, draw: Callable[..., list[Tensor]], **options: Any) -> Statistics:
    with heatkv.measure(model, **options) as attached:
        draw(model)
    return attached.statistics()


def dense_masses(model: Any, draw: Callable[[Any], Any], schedule: ScaleSchedule, rows: int) -> NDArray[np.float64]:
    """Mass sums [l, h, t, s] of the first `rows` rows, by one softmax over the model's own cache."""
    modules = attention_of(model)
    scales = len(schedule)
    sums = np.zeros((len(modules), modules[0].num_heads, scales, scales))

    def hook(module: Any, inputs: tuple[Any, ...], told: dict[str, Any], _: Tensor) -> None:
        layer, x = modules.index(module), inputs[0].double()
        q = x @ module.mat_qkv.weight[: x.shape[-1]].double().T + module.q_bias.double()
        q = q.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        if getattr(module, "attn_l2_norm", False) or getattr(module, "cos_attn", False):
            q = F.normalize(q, dim=-1) * module.scale_mul_1H11.double().exp()
        target = schedule.offsets.index(module.cached_k.shape[2]) - 1
        if told.get("rope2d_freqs_grid"):
            table = told["rope2d_freqs_grid"][str(tuple(SCALES))][:, 0, 0, 0, schedule.slice(target)]
            q = turned(q, *table).double()
        shares = (q * module.scale @ module.cached_k.double().transpose(2, 3)).softmax(-1)[:rows]
        for source in range(target + 1):
            sums[layer, :, target, source] += shares[..., schedule.slice(source)].sum(-1).mean(-1).sum(0).numpy()

    hooks = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    draw(model)
    for handle in hooks:
        handle.remove()
    return sums


@pytest.mark.parametrize("guided", [True, False])
def test_measuring_equals_a_dense_oracle(kind: Any, guided: bool) -> None:
    model, draw, schedule = kind
    expected = dense_masses(model, draw, schedule, rows=2 if guided else 4)
    plain = draw(model)
    with heatkv.measure(model, schedule=schedule, guided=guided, seed=4, first_sample=10) as attached:
        same(draw(model), plain, 1e-4)
    statistics = attached.statistics(cfg=1.5, settings={"top_k": 0})
    assert statistics.count == (2 if guided else 4)
    np.testing.assert_allclose(statistics.mass_sum, expected, atol=1e-5)
    uniform = 1 / (1 + np.arange(len(schedule)))[:, None]
    assert np.abs(expected / statistics.count - uniform).max() > 0.02
    provenance = statistics.provenance
    assert provenance.samples[:2] == ("4:10:-", "4:11:-")
    assert (provenance.model, provenance.cfg) == (type(model).__name__, 1.5)
    assert provenance.settings == {"guided": guided, "top_k": 0}
    assert attached.plan.had_no_effect()


def own_model(folder: Path, told: dict[str, Any]) -> ClassConditionalModel:
    transformer = build_var(tensors(folder, told["files"]["model"]))
    vqvae = build_vqvae(tensors(folder, told["files"]["vae"]), told["config"]["patch_nums"])
    settings = SamplingSettings(cfg=1.5, top_k=1)
    return ClassConditionalModel("own", transformer, vqvae, settings, fingerprint(transformer))


def test_measuring_equals_calibrating_our_own_model(find: Find) -> None:
    folder, told = find("var_tiny_saln")
    own, model = own_model(folder, told), golden_var(folder, told)
    expected = calibrate(own, 5, batch=2)
    with heatkv.measure(model) as attached:
        for labels in ([0, 1], [2, 3], [4]):
            model.autoregressive_infer_cfg(len(labels), labels, cfg=1.5, top_k=1)
    statistics = attached.statistics(cfg=1.5)
    assert statistics.count == expected.count == 5
    np.testing.assert_allclose(statistics.mass_sum, expected.mass_sum, atol=1e-5)
    np.testing.assert_allclose(statistics.spread, expected.spread, atol=1e-5)
    assert expected.spread.max() > 1e-3

    assert statistics.error_sum is not None
    np.testing.assert_allclose(statistics.error_sum, expected.error_sum, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(statistics.all_mass_sum, expected.all_mass_sum, atol=1e-5)

    # each is good for the model it was measured on, ours also for another implementation of the same weights
    for known in (statistics, expected):
        assert heatkv.attach(model, "heatkv", "80%", statistics=known, sink_scales=1).plan.policy == "heatkv"


@pytest.mark.parametrize("name", ["var_tiny_saln", "var_tiny_10s"])  # shared AdaLN and one of each block's own
def test_level_costs_equal_those_of_our_own_model(find: Find, name: str) -> None:
    folder, told = find(name)
    own, model = own_model(folder, told), golden_var(folder, told)

    def draw() -> None:
        for labels in ([0, 1], [2]):
            model.autoregressive_infer_cfg(len(labels), labels, cfg=1.5, top_k=1)

    with heatkv.measure(model, "biases") as attached:
        draw()
    log_bias = attached.log_bias()
    expected_bias = calibrate_biases(own, LevelChoices(own.geometry.schedule), 3, batch=2)
    np.testing.assert_allclose(log_bias, expected_bias, atol=1e-4)
    assert np.abs(log_bias[..., 1:]).max() > 0.5
    with heatkv.measure(model, "levels", log_bias=expected_bias) as attached:
        draw()
    levels, expected = attached.level_statistics(), calibrate_levels(own, 3, log_bias=expected_bias, batch=2)
    assert levels.samples == ("0:0:-", "0:1:-", "0:2:-")
    for mine, theirs in zip(levels.joint_sum, expected.joint_sum, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=5e-3, atol=1e-6 * max(theirs.max(), 1e-9))
    np.testing.assert_allclose(levels.single_sum, expected.single_sum, rtol=5e-3, atol=1e-6)

    with heatkv.measure(model, "levels", log_bias=expected_bias, sink_scales=1) as attached:
        draw()
    assert attached.level_statistics().choices == LevelChoices(own.geometry.schedule, 1)

    # and a plan made from them runs
    with heatkv.measure(model) as attached:
        draw()
    whole = attached.statistics(cfg=1.5).with_levels(levels)
    with heatkv.attach(model, "heatkv-mr", "50%", statistics=whole) as attached:
        draw()
    assert attached.cache.allocated_bytes > 0
    assert attached.plan.coarse


def test_measuring_levels_asks_for_what_it_needs(kind: Any) -> None:
    model, _, schedule = kind
    with pytest.raises(PolicyError, match="go together"):
        heatkv.measure(model, "levels", schedule=schedule)
    with pytest.raises(PolicyError, match="sink_scales only go with policy="):
        heatkv.measure(model, "biases", schedule=schedule, sink_scales=1)
    with pytest.raises(PolicyError, match="measure='colour' is unknown"):
        heatkv.measure(model, "colour", schedule=schedule)  # type: ignore[arg-type]
    with pytest.raises(StatisticsError, match="attach with measure='biases'"):
        heatkv.measure(model, schedule=schedule).log_bias()


def test_statistics_of_other_weights_are_refused(kind: Any, tmp_path: Path) -> None:
    model, draw, schedule = kind
    statistics = measured(model, draw, schedule=schedule)
    path = tmp_path / "statistics.safetensors"
    statistics.save(path)
    loaded = Statistics.load(path)
    assert loaded.provenance == statistics.provenance
    assert loaded.provenance.cfg is None  # it was not told
    options = {"statistics": loaded, "sink_scales": 1}
    with heatkv.attach(model, "heatkv", "80%", **options):
        draw(model)
    module = attention_of(model)[-1]
    module.v_bias.data[3] += 0.1
    with pytest.raises(StatisticsError, match="measured on other weights"):
        heatkv.attach(model, "heatkv", "80%", **options)
    module.v_bias.data[3] = 0
    heatkv.attach(model, "heatkv", "80%", **options)
    with pytest.raises(StatisticsError, match="the statistics are of the schedule"):
        heatkv.attach(model, "heatkv", "80%", schedule=ScaleSchedule.square((1, 2)), **options)


def test_both_layouts_of_the_head_scales_are_the_same_weights() -> None:
    plain, flash = make_infinity(), make_infinity(using_flash=True)
    for one, other in zip(attention_of(plain), attention_of(flash), strict=True):
        state = one.state_dict()
        state["scale_mul_1H11"] = state["scale_mul_1H11"].view(1, 1, 2, 1)
        other.load_state_dict(state)
    options: dict[str, Any] = {"schedule": ScaleSchedule.of(SCALES)}
    here, there = measured(plain, draw_infinity, **options), measured(flash, draw_infinity, **options)
    assert here.provenance.fingerprint == there.provenance.fingerprint


def test_measurements_add_up_and_merge() -> None:
    model = make_var()

    def of(*batches: list[int], first_sample: int = 0) -> Statistics:
        with heatkv.measure(model, first_sample=first_sample) as attached:
            for labels in batches:
                model.autoregressive_infer_cfg(len(labels), labels, top_k=1)
        return attached.statistics(cfg=1.5)

    whole, first, second = of([1, 2], [3], [4]), of([1, 2]), of([3], [4], first_sample=2)
    merged = first.merge(second)
    assert merged.provenance.samples == whole.provenance.samples == ("0:0:-", "0:1:-", "0:2:-", "0:3:-")
    np.testing.assert_allclose(merged.mass_sum, whole.mass_sum, rtol=1e-12)
    np.testing.assert_allclose(merged.mass_square_sum, whole.mass_square_sum, rtol=1e-12)
    with pytest.raises(StatisticsError, match="in both statistics"):
        first.merge(of([3], [4]))


def test_images_that_were_broken_off_are_not_counted() -> None:
    model = make_var()
    expected = measured(model, draw_var)
    with heatkv.measure(model) as attached:
        with broken_at(model, scale=2), pytest.raises(RuntimeError, match="broken off"):
            draw_var(model)
        with pytest.raises(StatisticsError, match="no image was drawn to its last scale"):
            attached.statistics()
        draw_var(model)
        assert attached.statistics().count == 2  # also inside the block
    assert np.array_equal(attached.statistics().mass_sum, expected.mass_sum)


def test_measuring_that_cannot_be_is_refused() -> None:
    model = make_var()
    with heatkv.attach(model, "full", "100%") as attached:
        draw_var(model)
        with pytest.raises(StatisticsError, match="measure=True"):
            attached.statistics()
        draw_var(model, [3], cfg=0)  # an odd number of rows is fine where nothing is measured
    phrase = r"1 rows are not two halves.*guided=False"
    with heatkv.measure(model), pytest.raises(StatisticsError, match=phrase):
        draw_var(model, [3], cfg=0)


# ------------------------------------------------------------------------------------------- the page


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (HERE.parent / "docs" / "attach.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {"var": make_var(sides=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16))}
    for code in blocks:
        exec(code, names)
    assert isinstance(names["attached"], Attached)
    assert names["statistics"].count == 8
    assert len(names["statistics"].levels.samples) == 8
    assert tuple(names["images"].shape[:2]) == (2, 3)


@pytest.mark.parametrize(
    ("policy", "options"),
    [("snapkv", {"window": 4}), ("h2o", {}), ("adakv", {}), ("scalekv", {"drafters": "1"}), ("streaming-tokens", {})],
)
def test_dynamic_policies_run_under_a_foreign_model(policy: str, options: dict[str, Any]) -> None:
    model = make_var()
    before = draw_var(model)
    with heatkv.attach(model, policy, "100%", **options):
        same(draw_var(model), before, 1e-4)
    full = CacheGeometry(3, 2, 16, ScaleSchedule.square(SIDES)).full_bytes(4, "float32")
    with heatkv.attach(model, policy, "40%", **options) as attached:
        reduced = draw_var(model)
        assert 0.3 * full < attached.cache.allocated_bytes <= 0.4 * full
        same(draw_var(model), reduced, 1e-6)  # the next image starts anew
    assert any(not torch.equal(a, b) for a, b in zip(before, reduced, strict=True))

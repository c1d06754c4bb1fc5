"""HeatKV under models of the upstream idiom (`support.standin_*`): golden runs, restoring, refusals and measuring."""

from __future__ import annotations

import copy
import io
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
from support.golden import (
    DECODED,
    EMBEDDED,
    FOLDER,
    GUIDED_LOGITS,
    HALF_LOGITS,
    close,
    given_plan,
    load,
    tensors,
)
from support.standin_infinity import Infinity, turned
from support.standin_var import VAR, SelfAttention
from torch import Tensor, nn
from torch.nn import functional as F

import heatkv
from heatkv.attachment.attached import Attached
from heatkv.attachment.discover import find as find_model
from heatkv.calibration.level_costs import measure_biases, measure_errors
from heatkv.calibration.measure import measure_samples
from heatkv.core.geometry import CacheGeometry
from heatkv.core.levels import LevelChoices
from heatkv.core.plan import Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import Statistics
from heatkv.errors import BudgetError, HeatKVError, ModelError, PlanError, PolicyError, ScheduleError, StatisticsError
from heatkv.models.checkpoint import build_var, build_vqvae
from heatkv.models.fingerprint import fingerprint

LIMITS = {
    "logits_cond": HALF_LOGITS, "logits_uncond": HALF_LOGITS, "logits_cfg": GUIDED_LOGITS, "summed_codes": EMBEDDED,
}  # fmt: skip
SQUARE = ScaleSchedule.square(SIDES)
FULL = CacheGeometry(3, 2, 16, SQUARE)
"""Of the stand-in for VAR."""

Draw = Callable[..., list[Tensor]]
Find = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> tuple[Any, Draw, ScaleSchedule]:
    make, draw, schedule = KINDS[request.param]
    return make(), draw, schedule


# ------------------------------------------------------------------------------------------- golden runs


@pytest.fixture
def find(request: pytest.FixtureRequest) -> Find:
    """The json of a golden set and what it says, here or below a --golden folder; a set may need only some parts."""

    def found(name: str, *parts: str) -> tuple[Path, dict[str, Any]]:
        for folder in (FOLDER, *map(Path, request.config.getoption("--golden"))):
            for path in folder.rglob(f"{Path(name).name}.json"):
                content = json.loads(path.read_text())
                if all(content["files"][part] for part in parts):
                    return path, content
        pytest.skip(f"the golden set {name} is not here; run with --golden")

    return found


def golden_var(path: Path, content: dict[str, Any]) -> VAR:
    config, files = content["config"], content["files"]
    sizes = (config["patch_nums"], config["depth"], config["width"], config["num_heads"])
    model = VAR(*sizes, shared_aln=config["shared_aln"], attn_l2_norm=config["attn_l2_norm"]).eval()
    state = tensors(path.parent, files["model"])
    state.pop("attn_bias_for_masking", None)
    model.load_state_dict(state)
    model.vae = [build_vqvae(tensors(path.parent, files["vae"]), config["patch_nums"])]
    return model


def golden_infinity(path: Path, content: dict[str, Any], run: str) -> tuple[Infinity, list[tuple[int, int, int]]]:
    model = Infinity(4, 128, 2).eval()
    model.load_state_dict(tensors(path.parent, content["files"]["model"]))
    scales: Any = [tuple(scale) for scale in content["runs"][run]["scale_schedule"]]
    model.add_schedule(scales, (78, 52) if run == "tall_b1" else (64, 64))
    return model, scales


def check_record(record: Sequence[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    compared = 0
    for scale, tensors_of_scale in enumerate(record):
        for name, got in tensors_of_scale.items():
            if (wanted := expected.get(f"scale{scale}.{name}")) is not None:
                compared += 1
                close(got, wanted, LIMITS.get(name, 0))
    assert compared >= 3 * len(record) - 3


@pytest.mark.parametrize("name", ["var_tiny_saln", "var_tiny_10s", "var_tiny_l2"])
def test_golden_var_with_the_full_cache(name: str, find: Find) -> None:
    path, content = find(name, "expected")
    model, expected = golden_var(path, content), tensors(path.parent, content["files"]["expected"])
    labels, cfg = content["config"]["labels"], content["config"]["cfg"]

    def check() -> None:
        image = model.autoregressive_infer_cfg(len(labels), labels, cfg=cfg, top_k=1)
        check_record(model.record, expected)
        close(image, expected["image"], DECODED)

    check()  # the stand-in alone
    with heatkv.attach(model, "full", "100%") as attached:
        check()
        assert attached.cache.allocated_bytes == attached.plan.geometry.full_bytes(2 * len(labels), "float32")


def test_golden_var_pruned(find: Find) -> None:
    path, content = find("var_pruned_10s")
    model, expected = golden_var(*find(content["model_set"])), tensors(path.parent, content["files"])
    with heatkv.attach(model, given_plan(content, CacheGeometry(2, 1, 64, ScaleSchedule.var(256)))):
        image = model.autoregressive_infer_cfg(1, [6], cfg=1.5, top_k=1)
    check_record(model.record, expected)
    close(image, expected["image"], DECODED)


@pytest.mark.parametrize("run", ["sq_b1", "sq_b2", "tall_b1"])
def test_golden_infinity_with_the_full_cache(run: str, find: Find) -> None:
    path, content = find("inf_tiny")
    model, scales = golden_infinity(path, content, run)
    settings = content["runs"][run]
    expected = tensors(path.parent, settings["files"])
    text = [expected[f"text.{i}"] for i in range(len(settings["text_lens"]))]
    model.autoregressive_infer_cfg(scales, text, settings["cfg"], settings["tau"])
    check_record(model.record, expected)
    with heatkv.attach(model, "full", "100%", schedule=ScaleSchedule.of(scales)):
        model.autoregressive_infer_cfg(scales, text, settings["cfg"], settings["tau"])
    check_record(model.record, expected)


@pytest.mark.parametrize("name", ["infinity_pruned_sq", "infinity_pruned_tall"])
def test_golden_infinity_pruned(name: str, find: Find) -> None:
    path, content = find(name)
    run, expected = content["run"], tensors(path.parent, content["files"])
    model, scales = golden_infinity(*find(content["model_set"]), run["of"])
    with heatkv.attach(model, given_plan(content, CacheGeometry(4, 2, 64, ScaleSchedule.of(scales)))):
        model.autoregressive_infer_cfg(scales, [expected["text.0"]], run["cfg"], run["tau"])
    check_record(model.record, expected)


# ------------------------------------------------------------------------------------------- drawing under a plan


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_every_variant_of_attention(normalised: bool, flash: bool) -> None:
    var, infinity = make_var(attn_l2_norm=normalised), make_infinity(cos_attn=normalised, using_flash=flash)
    for module in attention_of(var):
        module.using_flash, module.attn_drop = flash, nn.Dropout(0.1)  # which takes no part in drawing
    models: list[tuple[Any, Any, ScaleSchedule]] = [
        (var, draw_var, SQUARE), (infinity, draw_infinity, ScaleSchedule.of(SCALES))
    ]  # fmt: skip
    for model, draw, schedule in models:
        before = draw(model)
        with heatkv.attach(model, "full", "100%", schedule=schedule):
            same(draw(model), before, 1e-4)
        with heatkv.attach(model, dropping_plan(model, schedule)):
            assert (draw(model)[1] - before[1]).abs().max() > 1e-2  # so that the line above says something
        assert all(torch.equal(a, b) for a, b in zip(draw(model), before, strict=True))


def test_scales_beyond_the_clamp() -> None:
    model = make_var()
    for module in attention_of(model):
        module.scale_mul_1H11.data += 4
    before = draw_var(model)
    with heatkv.attach(model, "full", "100%"):
        same(draw_var(model), before, 1e-3)


def test_clamp_in_half_precision() -> None:
    """In the type of the module, as the public code has it: e^4.59375 in bfloat16, which is 1.1 % below 100."""
    model = make_var().bfloat16()
    module = attention_of(model)[0]
    module.scale_mul_1H11.data += 10
    wanted = module.scale * module.scale_mul_1H11.clamp(max=module.max_scale_mul).float().exp().max().item()
    with heatkv.attach(model, "full", "100%") as attached:
        q, _, _ = attached._layers[0]._qkv(torch.randn(2, 50, module.mat_qkv.in_features, dtype=torch.bfloat16), None)
    assert q.float().norm(dim=-1).mean().item() == pytest.approx(wanted, rel=2e-3)
    assert wanted < 0.992 * 100 * module.scale


def test_copies_of_an_attached_model() -> None:
    model = make_var()
    with heatkv.attach(model, "full", "100%"):
        for copied in (copy.deepcopy, lambda one: torch.save(one, io.BytesIO())):
            with pytest.raises(ModelError, match="is attached"):
                copied(model)
        torch.save(model.state_dict(), io.BytesIO())
    copy.deepcopy(model)


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
    model = make_var()
    for seed in range(3):
        plan = dropping_plan(model, SQUARE, seed)
        for layer, module in enumerate(attention_of(model)):
            module.forward = masked_attention(module, plan.last_read[layer], SQUARE)
        expected = draw_var(model)
        for module in attention_of(model):
            del module.forward
        with heatkv.attach(model, plan) as attached:
            same(draw_var(model), expected, 1e-4)
            assert attached.cache.allocated_bytes == plan.bytes(4, "float32")
            assert attached.plan is plan


@pytest.mark.parametrize("policy", ["full", "sliding-window", "snapkv"])
def test_8_bits(policy: str) -> None:
    """Near what the same plan draws uncoded, in fewer bytes; also with a finished plan."""
    model = make_var()
    budget = "100%" if policy == "full" else "60%"
    with heatkv.attach(model, policy, budget) as attached:
        plain, plain_bytes = draw_var(model), attached.cache.allocated_bytes
    with heatkv.attach(model, policy, budget, code="int8", attention="ragged") as attached:
        coded, plan = draw_var(model), attached.plan
        assert attached.cache.allocated_bytes == plan.bytes(4, "int8/float32") < plain_bytes
    with heatkv.attach(model, plan, code="int8"):
        same(draw_var(model), coded, 0)
    assert all((a - b).abs().max() <= 0.05 * a.abs().max() for a, b in zip(plain, coded, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(plain, coded, strict=True))


@pytest.mark.parametrize(
    ("policy", "options"),
    [("snapkv", {"window": 4}), ("h2o", {}), ("adakv", {}), ("scalekv", {"drafters": "1"}), ("streaming-tokens", {})],
)
def test_dynamic_policies(policy: str, options: dict[str, Any]) -> None:
    model = make_var()
    before = draw_var(model)
    with heatkv.attach(model, policy, "100%", **options):
        same(draw_var(model), before, 1e-4)
    full = FULL.full_bytes(4, "float32")
    with heatkv.attach(model, policy, "40%", **options) as attached:
        reduced = draw_var(model)
        assert 0.3 * full < attached.cache.allocated_bytes <= 0.4 * full
        same(draw_var(model), reduced, 1e-6)  # the next image starts anew
    assert any(not torch.equal(a, b) for a, b in zip(before, reduced, strict=True))


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
    unguided: dict[str, Any] = {"cfg": 0.0 if isinstance(model, VAR) else 1.0}
    calls: list[dict[str, Any]] = [{}, unguided, {}, {}]
    with heatkv.attach(model, dropping_plan(model, schedule)) as attached:
        drawn, caches = [], []
        for call in calls:
            drawn.append(draw(model, **call))
            caches.append(attached.cache)
    assert [cache.rows for cache in caches] == [4, 2, 4, 4]
    assert caches[2] is caches[3]  # the same rows again: the same arena
    same(drawn[0], drawn[2], 0)
    same(drawn[0], drawn[3], 0)
    expected = [draw(model, **call) for call in calls]
    with heatkv.attach(model, "full", "100%", schedule=schedule):
        for call, wanted in zip(calls, expected, strict=True):
            same(draw(model, **call), wanted, 1e-4)


@contextmanager
def broken_at(model: VAR, scale: int) -> Iterator[None]:
    """The second block of this scale raises, once."""
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == scale + 1:
            raise RuntimeError("broken off")

    handle = model.blocks[1].register_forward_pre_hook(hook)
    with pytest.raises(RuntimeError, match="broken off"):
        yield
    handle.remove()


def test_an_image_that_was_broken_off_leaves_nothing_behind() -> None:
    model, plan = make_var(), dropping_plan(make_var(), SQUARE)
    with heatkv.attach(model, plan) as attached:
        expected = draw_var(model)
        with broken_at(model, scale=2):
            draw_var(model)
        same(draw_var(model), expected, 0)
        with broken_at(model, scale=2):
            draw_var(model)
    with attached, pytest.raises(ModelError, match=r"without kv_caching\(True\)"):
        model.blocks[2].attn(torch.randn(4, 9, 32), None)  # what came next in the image that was broken off


def test_the_original_methods_come_back(kind: Any) -> None:
    model, draw, schedule = kind
    modules = attention_of(model)
    own = modules[1]
    own.forward = mine = type(own).forward.__get__(own)
    before = draw(model)

    def check_restored() -> None:
        assert not any({"forward", "kv_caching"} & set(vars(module)) for module in modules if module is not own)
        assert own.__dict__["forward"] is mine
        same(draw(model), before, 0)

    with heatkv.attach(model, "full", "100%", schedule=schedule):
        assert {"forward", "kv_caching"} <= set(vars(modules[0]))
    check_restored()
    with pytest.raises(KeyError, match="mine"), heatkv.attach(model, "full", "100%", schedule=schedule):
        raise KeyError("mine")
    check_restored()


def test_attaching_twice_is_refused() -> None:
    model = make_var()
    before = draw_var(model)
    attached, other = heatkv.attach(model, "full", "100%"), heatkv.attach(model, "full", "100%")
    with attached:
        with pytest.raises(ModelError, match="attached already"):
            heatkv.attach(model, "full", "100%")
        for second, said in ((other, r"blocks\[0\]\.attn is attached already"), (attached, "in use already")):
            with pytest.raises(ModelError, match=said), second:
                pass
        same(draw_var(model), before, 1e-4)  # the first one still works
    for again in (other, attached):  # one after the other is fine, also with the same object again
        with again:
            same(draw_var(model), before, 1e-4)
    # one module attached elsewhere: nothing may stay replaced on the others
    with heatkv.attach(SimpleNamespace(blocks=[model.blocks[2]], patch_nums=SIDES), "full", "100%"):
        with pytest.raises(ModelError, match=r"blocks\[2\]\.attn is attached already"), other:
            pass
        assert "forward" not in vars(model.blocks[0].attn)


def test_inference_mode_and_no_grad_may_alternate() -> None:
    model = make_var()
    expected = draw_var(model)
    with heatkv.attach(model, "full", "100%"):
        for inference in (True, False, True):
            with torch.inference_mode(inference):
                same(draw_var(model), expected, 1e-4)


def test_autocast_stores_keys_in_the_compute_type(kind: Any) -> None:
    model, draw, schedule = kind
    exact = draw(model)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = draw(model)[0]
        with heatkv.attach(model, "full", "100%", schedule=schedule) as attached:
            got = draw(model)[0]
    assert attached.cache.allocated_bytes == attached.plan.geometry.full_bytes(4, "bfloat16")
    rounding = (expected.double() - exact.double()).abs().max()
    assert 0 < rounding < 0.2 * exact.abs().max()
    assert (got.double() - expected.double()).abs().max() <= 2 * rounding


# ------------------------------------------------------------------------------------------- finding and planning


def test_blocks_are_found_in_order_wherever_they_are() -> None:
    model = make_infinity()
    blocks = model.unregistered_blocks
    plan = dropping_plan(model, ScaleSchedule.of(SCALES))
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


def test_the_schedule_is_the_models_or_is_asked_for() -> None:
    model = make_var()
    assert heatkv.attach(model, "full", "100%").plan.schedule == SQUARE
    model.patch_nums = ((1, 1), (2, 2), (3, 2))
    assert heatkv.attach(model, "full", "100%").plan.schedule.scales == ((1, 1, 1), (1, 2, 2), (1, 3, 2))
    other = ScaleSchedule.square((1, 5))
    assert heatkv.attach(model, "full", "100%", schedule=other).plan.schedule == other
    del model.patch_nums
    assert heatkv.attach(model, "full", "100%").plan.schedule == SQUARE
    del model.lvl_1L
    infinity = make_infinity()
    infinity.register_buffer("lvl_1L", torch.zeros(1, 4))  # a stray key of some checkpoints
    for without in (model, infinity):
        with pytest.raises(ScheduleError, match=r"pass schedule=.*ScaleSchedule\.var"):
            heatkv.attach(without, "full", "100%")
    statistics = measured(infinity, draw_infinity, schedule=ScaleSchedule.of(SCALES))
    plan = heatkv.attach(infinity, "heatkv", "90%", statistics=statistics, sink_scales=1).plan
    assert plan.schedule.scales == tuple(SCALES)


def test_a_budget_in_bytes_holds_or_is_refused() -> None:
    model, full = make_var(), FULL.full_bytes(2, "float32")
    limit = full * 3 // 4
    with heatkv.attach(model, "streaming", f"{limit}B", sink_scales=1) as attached:
        draw_var(model, [3])
        assert full / 2 < attached.cache.allocated_bytes <= limit
        with pytest.raises(PlanError, match=rf"4 rows in float32 .* \d+ bytes, the budget of the plan is {limit}"):
            draw_var(model)
    with heatkv.attach(model, "streaming", f"{limit}B", sink_scales=1, rows=4) as attached:
        draw_var(model)
        assert attached.cache.allocated_bytes <= limit
    with heatkv.attach(model, "streaming", f"{limit // 2}B", sink_scales=1, guided=False) as attached:
        draw_var(model, [3], cfg=0)
        assert full / 4 < attached.cache.allocated_bytes <= limit // 2


# ------------------------------------------------------------------------------------------- refusals


def whole_plan(layers: int = 3, heads: int = 2, dim: int = 16, sides: Sequence[int] = SIDES) -> Plan:
    geometry = CacheGeometry(layers, heads, dim, ScaleSchedule.square(sides))
    last_read = np.full((layers, heads, len(sides)), len(sides) - 1)
    return Plan("given", geometry, last_read, 1.0, geometry.full_token_heads, 0)


def drawn(attached: Attached, model: VAR) -> None:
    """A picture without guidance, so of one row."""
    with attached:
        draw_var(model, [3], cfg=0)


REFUSED_CALLS: list[tuple[type[HeatKVError], str, Callable[[Any], Any]]] = [
    (BudgetError, "heatkv", lambda model: heatkv.attach(model, "heatkv")),
    (PolicyError, "heatkv", lambda model: heatkv.attach(model, "hetakv", "10%")),
    (PolicyError, "statistics", lambda model: heatkv.attach(model, "heatkv", "60%", sink_scales=1)),
    (PolicyError, "None", lambda model: heatkv.attach(model, None)),  # type: ignore[arg-type]
    (PolicyError, "nonsense", lambda model: heatkv.attach(model, "streaming", "50%", nonsense=1)),
    (PolicyError, "budget", lambda model: heatkv.attach(model, whole_plan(), "50%")),
    (HeatKVError, "int4", lambda model: heatkv.attach(model, "full", "100%", code="int4")),
    (PlanError, "flash", lambda model: heatkv.attach(model, "full", "100%", attention="flash")),
    (PlanError, "4 heads", lambda model: heatkv.attach(model, whole_plan(heads=4))),
    (PlanError, "2 layers", lambda model: heatkv.attach(model, whole_plan(layers=2))),
    (PlanError, "head size of 8", lambda model: heatkv.attach(model, whole_plan(dim=8))),
    (PlanError, "1,2,4", lambda model: heatkv.attach(model, whole_plan(sides=(1, 2, 4)))),
    (PolicyError, "colour", lambda model: heatkv.measure(model, "colour")),  # type: ignore[arg-type]
    (PolicyError, "log_bias", lambda model: heatkv.measure(model, "levels")),
    (StatisticsError, "log_bias", lambda model: heatkv.measure(model, "levels", log_bias=np.zeros(3))),
    (StatisticsError, "'biases'", lambda model: heatkv.measure(model).log_bias()),
    (StatisticsError, "at least 1", lambda model: heatkv.measure(model).statistics()),
    (StatisticsError, "1 rows", lambda model: drawn(heatkv.measure(model), model)),
    (ModelError, "before", lambda model: heatkv.attach(model, "full", "100%").cache),
]  # fmt: skip


@pytest.mark.parametrize(("error", "said", "call"), REFUSED_CALLS)
def test_calls_that_are_refused(error: type[HeatKVError], said: str, call: Callable[[Any], Any]) -> None:
    with pytest.raises(error, match=said):
        call(make_var())


class Strange(SelfAttention):
    """A derivative that turns its keys by a table of its own."""

    def __init__(self) -> None:
        super().__init__(32, 2, True)
        self.register_buffer("freqs_cis", torch.zeros(3))
        self.q_norm = nn.LayerNorm(16)


class Unnamed(SelfAttention):
    def forward(self, *args: Any) -> Tensor:
        return super().forward(*args)


def changed(**attributes: Any) -> VAR:
    """With attributes of the attention of its second block replaced, or removed where they are None."""
    model = make_var()
    for name, value in attributes.items():
        delattr(model.blocks[1].attn, name) if value is None else setattr(model.blocks[1].attn, name, value)
    return model


def replaced(attention: nn.Module) -> VAR:
    model = make_var()
    model.blocks[1].attn = attention
    return model


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear(3, 3), r"no blocks were found in Linear: .*model\.unregistered_blocks.*model\.blocks"),
        (SimpleNamespace(blocks=[nn.Linear(3, 3)]), r"blocks\[0\] \(Linear\) has no self-attention"),
        (SimpleNamespace(blocks=[SimpleNamespace(attn=nn.Linear(3, 3))]), "no num_heads, .* attn_l2_norm or cos_attn"),
        (changed(q_bias=None), r"blocks\[1\]\.attn .*it has no q_bias$"),
        (changed(scale_mul_1H11=None), "it has no scale_mul_1H11$"),
        (changed(max_scale_mul=None), "it has no max_scale_mul$"),
        (changed(attn_l2_norm=None), "it has no attn_l2_norm or cos_attn$"),
        (changed(mat_qkv=nn.Linear(32, 96)), r"mat_qkv\.bias"),
        (replaced(Strange()), r"blocks\[1\]\.attn \(Strange\) also has freqs_cis, q_norm, of which"),
        (replaced(Unnamed(32, 2, True)), "named arguments"),
        (replaced(SelfAttention(32, 4, True)), r"differ in \(heads, head size\): \[\(2, 16\), \(4, 8\)\]"),
    ],
)
def test_models_that_are_not_recognised(model: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        heatkv.attach(model, "full", "100%")


@contextmanager
def first_scale(model: Any, schedule: ScaleSchedule) -> Iterator[tuple[Any, Tensor]]:
    """Attached and at the start of an image, with the first self-attention and an input that would fit."""
    with heatkv.attach(model, "full", "100%", schedule=schedule), torch.no_grad():
        for module in attention_of(model):
            module.kv_caching(True)
        yield attention_of(model)[0], torch.randn(2, 1, 32)


class WithContext(SelfAttention):
    def forward(self, x: Tensor, attn_bias: Tensor | None, si: int = -1, context: Any = None) -> Tensor:
        return super().forward(x, attn_bias)


def test_forwards_of_var_that_are_refused() -> None:
    model = make_var()
    for block in model.blocks:
        block.attn.__class__ = WithContext
    x = torch.randn(2, 1, 32)
    with heatkv.attach(model, "full", "100%"), pytest.raises(ModelError, match=r"without kv_caching\(True\)"):
        model.blocks[0].attn(x, None)
    with first_scale(model, SQUARE) as (module, x):
        for said, arguments in (("attn_bias", {"attn_bias": x}), ("si", {"si": 0}), ("context", {"context": x})):
            with pytest.raises(ModelError, match=f"was given {said},"):
                module(x, **{"attn_bias": None, **arguments})
        for wrong, called in ((torch.randn(2, 4, 32), module), (x, model.blocks[2].attn)):
            with pytest.raises(PlanError, match="scale 0"):
                called(wrong, None)
        with torch.enable_grad(), pytest.raises(ModelError, match="only draws"):
            module(x, None)
        model.train()
        with pytest.raises(ModelError, match="training mode"):
            module(x, None)
        model.eval()
        assert module(x, None, si=-1, context=None).shape == (2, 1, 32)
        with pytest.raises(PlanError, match="3 rows"):
            model.blocks[1].attn(torch.randn(3, 1, 32), None)
        for block in list(model.blocks)[1:]:
            block.attn(x, attn_bias=None)
        for side in SIDES[1:]:
            for block in model.blocks:
                block.attn(torch.randn(2, side * side, 32), None)
        with pytest.raises(PlanError, match="scale 4"):  # all are drawn
            module(x, None)


def test_forwards_of_infinity_that_are_refused() -> None:
    model, schedule = make_infinity(), ScaleSchedule.of(SCALES)
    rotary = {"scale_schedule": SCALES, "rope2d_freqs_grid": model.rope2d_freqs_grid, "scale_ind": 0}
    refused: list[tuple[type[HeatKVError], str, dict[str, Any]]] = [
        (ModelError, "attn_bias_or_two_vector", {"attn_bias_or_two_vector": (1, 2)}),
        (ModelError, "attn_fn", {"attn_fn": F.scaled_dot_product_attention}),
        (PlanError, "1x1,2x2,3x2", {"scale_schedule": SCALES[:3]}),
        (PlanError, "scale 1", {"scale_ind": 1}),
        (ModelError, "fused_norm", {"scale_schedule": None}),
    ]
    with first_scale(model, schedule) as (module, x):
        for error, said, arguments in refused:
            with pytest.raises(error, match=said):
                module(x, **{"attn_bias_or_two_vector": None, **rotary, **arguments})
        assert module(x, None, None, SCALES, model.rope2d_freqs_grid, scale_ind=0).shape == x.shape
    model = make_infinity(fused_norm=False)
    with heatkv.attach(model, "full", "100%", schedule=schedule), pytest.raises(ModelError, match="fused_norm on"):
        draw_infinity(model)


# ------------------------------------------------------------------------------------------- measuring


def measured(model: Any, draw: Draw, **options: Any) -> Statistics:
    with heatkv.measure(model, **options) as attached:
        draw(model)
    return attached.statistics()


def dense_masses(model: Any, draw: Draw, schedule: ScaleSchedule, rows: int) -> NDArray[np.float64]:
    """Mass sums [l, h, t, s] of the first `rows` rows, by one softmax over the model's own cache."""
    modules = attention_of(model)
    scales = len(schedule)
    sums = np.zeros((len(modules), modules[0].num_heads, scales, scales))

    def hook(module: Any, inputs: tuple[Any, ...], named: dict[str, Any], _: Tensor) -> None:
        layer, x = modules.index(module), inputs[0].double()
        q = x @ module.mat_qkv.weight[: x.shape[-1]].double().T + module.q_bias.double()
        q = q.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        q = F.normalize(q, dim=-1) * module.scale_mul_1H11.double().exp()
        target = schedule.offsets.index(module.cached_k.shape[2]) - 1
        if named.get("rope2d_freqs_grid"):
            table = named["rope2d_freqs_grid"][str(tuple(SCALES))][:, 0, 0, 0, schedule.slice(target)]
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
def test_measured_mass_equals_a_dense_oracle(kind: Any, guided: bool) -> None:
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


def test_measured_statistics_equal_those_of_our_own_model(find: Find) -> None:
    found = find("var_tiny_saln")
    (_, own), model = load(found[0]), golden_var(*found)
    expected = measure_samples(own, range(5))
    with heatkv.measure(model) as attached:
        for labels in ([0, 1], [2, 3], [4]):
            model.autoregressive_infer_cfg(len(labels), labels, cfg=own.sampling.cfg, top_k=1)
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
def test_measured_level_costs_equal_those_of_our_own_model(find: Find, name: str) -> None:
    found = find(name)
    (_, own), model = load(found[0]), golden_var(*found)

    def draw() -> None:
        for labels in ([0, 1], [2]):
            model.autoregressive_infer_cfg(len(labels), labels, cfg=own.sampling.cfg, top_k=1)

    with heatkv.measure(model, "biases") as attached:
        draw()
    log_bias = attached.log_bias()
    choices = LevelChoices(own.geometry.schedule)
    expected_bias = measure_biases(own, choices, range(3))
    np.testing.assert_allclose(log_bias, expected_bias, atol=1e-4)
    assert np.abs(log_bias[..., 1:]).max() > 0.5
    with heatkv.measure(model, "levels", log_bias=expected_bias) as attached:
        draw()
    levels, expected = attached.level_statistics(), measure_errors(own, choices, expected_bias, range(3))
    assert levels.samples == ("0:0:-", "0:1:-", "0:2:-")
    for mine, theirs in zip(levels.joint_sum, expected.joint_sum, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=5e-3, atol=1e-6 * max(theirs.max(), 1e-9))
    np.testing.assert_allclose(levels.single_sum, expected.single_sum, rtol=5e-3, atol=1e-6)
    with heatkv.measure(model, "levels", log_bias=expected_bias, sink_scales=1) as attached:
        draw()
    assert attached.level_statistics().choices == LevelChoices(own.geometry.schedule, 1)


def test_statistics_of_other_weights_are_refused(kind: Any, tmp_path: Path) -> None:
    model, draw, schedule = kind
    statistics = measured(model, draw, schedule=schedule)
    statistics.save(tmp_path / "statistics.safetensors")
    loaded = Statistics.load(tmp_path / "statistics.safetensors")
    assert loaded.provenance == statistics.provenance
    options = {"statistics": loaded, "sink_scales": 1}
    with heatkv.attach(model, "heatkv", "80%", **options):
        draw(model)
    module = attention_of(model)[-1]
    module.v_bias.data[3] += 0.1
    with pytest.raises(StatisticsError, match="other weights"):
        heatkv.attach(model, "heatkv", "80%", **options)
    module.v_bias.data[3] = 0
    with pytest.raises(StatisticsError, match="schedule"):
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


def test_unguided_images_are_not_half_measured() -> None:
    model = make_var()
    with heatkv.measure(model), pytest.raises(StatisticsError, match="guided=False"):
        draw_var(model, [3, 5, 1, 2], cfg=0)
    with heatkv.measure(model, guided=False) as attached:
        draw_var(model, [3, 5, 1, 2], cfg=0)
    assert attached.statistics().count == 4


def test_statistics_of_an_attached_model_serve_its_own(tmp_path: Path) -> None:
    """They are of the same weights, so that nothing is measured twice."""
    foreign = make_var()
    with heatkv.measure(foreign) as attached:
        draw_var(foreign, [3, 5])
    statistics = attached.statistics()
    transformer = build_var(foreign.state_dict())
    statistics.check_fingerprint(f"{fingerprint(transformer)}-0")
    with torch.no_grad():
        foreign.blocks[0].ffn.fc1.weight[1, 1] += 1e-3  # not of the attention
    with pytest.raises(StatisticsError, match="other weights"):
        statistics.check_fingerprint(find_model(foreign).fingerprint())


def test_measurements_add_up_and_merge() -> None:
    model = make_var()

    def statistics(*batches: list[int], first_sample: int = 0) -> Statistics:
        with heatkv.measure(model, first_sample=first_sample) as attached:
            for labels in batches:
                model.autoregressive_infer_cfg(len(labels), labels, top_k=1)
        return attached.statistics(cfg=1.5)

    whole, first, second = statistics([1, 2], [3], [4]), statistics([1, 2]), statistics([3], [4], first_sample=2)
    merged = first.merge(second)
    assert merged.provenance.samples == whole.provenance.samples == ("0:0:-", "0:1:-", "0:2:-", "0:3:-")
    np.testing.assert_allclose(merged.mass_sum, whole.mass_sum, rtol=1e-12)
    np.testing.assert_allclose(merged.mass_square_sum, whole.mass_square_sum, rtol=1e-12)


def test_images_that_were_broken_off_are_not_counted() -> None:
    model = make_var()
    expected = measured(model, draw_var)
    with heatkv.measure(model) as attached:
        with broken_at(model, scale=2):
            draw_var(model)
        with pytest.raises(StatisticsError, match="no image was drawn to its last scale"):
            attached.statistics()
        draw_var(model)
        assert attached.statistics().count == 2  # also inside the block
    assert np.array_equal(attached.statistics().mass_sum, expected.mass_sum)


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "attach.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {"var": make_var(sides=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16))}
    for code in blocks:
        exec(code, names)
    assert isinstance(names["attached"], Attached)
    assert names["statistics"].count == 8
    assert len(names["statistics"].levels.samples) == 8
    assert tuple(names["images"].shape[:2]) == (2, 3)

"""Numbers that are not finite are found where they arise; attention at the largest temperature; the same bits.

Shapes: R rows, H heads, N tokens of the running scale, D head size, M keys.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import SEEDS
from support.attention import check_close, dense
from support.foreign import draw_var, make_var
from support.public_sampler import PublicSampler
from support.tape import TapeRunner
from support.tiny_models import features, small_classes, small_prompts
from torch import Tensor

import heatkv
from heatkv.calibration.level_costs import level_choices, measure_biases
from heatkv.calibration.measure import MeasuringCache, measure_samples
from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.io import read_json
from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.attention import triton_launch
from heatkv.engine.open_cache import open_cache
from heatkv.engine.turns import Rows
from heatkv.engine.watch import Watch, finite, naming_samples, run_deterministically
from heatkv.errors import HeatKVError, NumericsError
from heatkv.generation.loop import Generator
from heatkv.models.base import ImageModel
from heatkv.models.emoji import WEIGHTS, load
from heatkv.models.sampling import RecordedTokens, cumulative_in_fixed_point, cut_logits
from heatkv.models.text_conditional import Prompt
from heatkv.models.text_encoder import T5TextEncoder
from heatkv.models.var import MAX_LOG_SCALE, FeedForward
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.testing.material import AttentionInput, made_up_inputs, made_up_problem

GEOMETRY = CacheGeometry(2, 3, 16, ScaleSchedule.square((1, 2, 3, 5)))
ROWS = 2
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SINKS = {"heatkv": {"sink_scales": 1}, "streaming": {"sink_scales": 1}}
"""So that little more than the first scale can be dropped from schedules as small as these."""
needs_triton = pytest.mark.skipif(
    triton_launch.missing("cpu", torch.float32, 16) is not None, reason="Triton's interpreter is not here"
)


def opened(policy: str, dtype: torch.dtype = torch.float32, rows: int = ROWS, **how: Any) -> Any:
    made = make_policy(policy, **SINKS.get(policy, {}))
    plan = made.plan(made_up_problem(made, GEOMETRY, Budget.parse("60%" if policy != "full" else "100%"), 0))
    return open_cache(plan, rows, dtype, **how)


def run(cache: Any, inputs: Sequence[Sequence[AttentionInput]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    cache.reset()
    return [
        cache.attend(layer, *(part.to(dtype) for part in (x.q_RHND, x.k_RHND, x.v_RHND)))
        for of_scale in inputs
        for layer, x in enumerate(of_scale)
    ]


# ------------------------------------------------------------------------------ numbers that are not finite


@pytest.mark.parametrize("policy", ["full", "heatkv", "heatkv-mr", "snapkv", "adakv"])
def test_one_number_is_named(policy: str) -> None:
    cache, numbers = opened(policy), itertools.cycle([("q", math.nan), ("k", math.inf), ("v", -math.inf)])
    for scale, layer, row, head, token in ((0, 0, 0, 0, 0), (2, 1, 1, 2, 4), (3, 1, 0, 0, 7), (3, 0, 1, 1, 24)):
        which, value = next(numbers)
        inputs = made_up_inputs(GEOMETRY, ROWS, 1)
        getattr(inputs[scale][layer], f"{which}_RHND")[row, head, token, 5] = value
        run(cache, inputs)
        with pytest.raises(NumericsError, match=f"^{which} of layer {layer}, head {head}, scale {scale}, row {row}:"):
            cache.check()
        with pytest.raises(NumericsError, match="image 0:"):
            cache.check(images=1)
    run(cache, made_up_inputs(GEOMETRY, ROWS, 2))  # other images
    cache.check()


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        (torch.float16, {"attention": "triton"}),
        (torch.bfloat16, {"code": "int8"}),
        (torch.float16, {"code": "fp8"}),
    ],
)
def test_16_bits_other_kernels_and_codes(dtype: torch.dtype, how: dict[str, str]) -> None:
    cache, inputs = opened("heatkv", dtype, **how), made_up_inputs(GEOMETRY, ROWS, 1)
    inputs[1][1].k_RHND[1, 0, 3, 0] = math.inf
    with np.errstate(invalid="ignore"):  # numpy, which interprets Triton, would warn
        run(cache, inputs, dtype)
    with pytest.raises(NumericsError, match=r"^k of layer 1, head 0, scale 1, row 1: not finite") as caught:
        cache.check()
    assert ("float16 holds nothing above 65504" in str(caught.value)) == (dtype is torch.float16)


def test_the_first_place_with_all_that_is_broken_there() -> None:
    cache, inputs = opened("full"), made_up_inputs(GEOMETRY, ROWS, 1)
    inputs[3][0].v_RHND[:] = math.nan
    for x in vars(inputs[2][1]).values():
        x[1] = math.nan
    run(cache, inputs)
    wanted = "^q and k and v of layer 1, heads 0, 1, 2, scale 2, row 1: not finite.*: the output of layer 0;"
    with pytest.raises(NumericsError, match=wanted):
        cache.check()
    inputs[2][0].q_RHND[:, 1:, 0] = math.nan
    run(cache, inputs)
    with pytest.raises(NumericsError, match=r"^q of layer 0, heads 1, 2, scale 2, rows 0, 1: not finite"):
        cache.check()


@settings(max_examples=25)
@given(seed=SEEDS, dtype=st.sampled_from(list(TYPES.values())), largest=st.sampled_from([1e-7, 1.0, 6e4]))
def test_finite_numbers_of_any_size_raise_no_alarm(seed: int, dtype: torch.dtype, largest: float) -> None:
    cache, rng = opened("full", dtype), np.random.default_rng(seed)
    inputs = made_up_inputs(GEOMETRY, ROWS, seed)
    for of_scale in inputs:
        for x in of_scale:
            sign = int(rng.integers(3)) - 1  # also all of one sign, whose sum would overflow in 16 bits
            x.v_RHND.copy_(x.v_RHND if sign == 0 else torch.full_like(x.v_RHND, sign * largest))
    run(cache, inputs, dtype)
    cache.check()


@pytest.mark.parametrize(("policy", "runner"), [("full", None), ("snapkv", TapeRunner)])
def test_broken_weights_while_drawing(policy: str, runner: Callable[[], TapeRunner] | None) -> None:
    model = small_classes()
    plan = model.plan(policy, "60%" if policy != "full" else "100%")
    generator = Generator(model, plan, 2, runner=None if runner is None else runner())
    for _ in range(3):
        generator.draw([1, 2])
    layer = list(model.transformer.layers())[1]
    layer.attn.mat_qkv.weight[32 + 8, 3] = math.nan  # of a key of head 1, whose size is 8
    with pytest.raises(NumericsError, match=r"^k of layer 1, head 1, scale 0, images 0, 1: not finite") as caught:
        generator.draw([1, 2])
    assert caught.value.image == 0
    layer.attn.mat_qkv.weight[32 + 8, 3] = 0
    assert bool(generator.draw([1, 2]).images.isfinite().all())  # type: ignore[union-attr]


def test_a_broken_class_and_broken_logits() -> None:
    model = small_classes()
    model.transformer.class_emb.weight[7] = math.nan
    generator = Generator(model, model.full_plan(), 3)
    for sampler in (PublicSampler(torch.Generator().manual_seed(0), model.sampling), None):
        wanted = r"layer 0, heads 0, 1, 2, 3, scale 0, image 1: .*: the class or prompt that is drawn"
        with pytest.raises(NumericsError, match=wanted) as caught:
            generator.draw([3, 7, 4], sampler=sampler)
        assert caught.value.image == 1
    generator.draw([3, 6, 4])
    model.transformer.head.bias[0] = math.inf
    with pytest.raises(NumericsError, match=r"^the logits of scale 0, images 0, 1, 2: not finite"):
        generator.draw([3, 6, 4])


def biases(model: ImageModel[Any], samples: range) -> None:
    measure_biases(model, level_choices(model.geometry.schedule, 2), samples)


@pytest.mark.parametrize("measure", [measure_samples, biases])
def test_calibration_names_the_sample(measure: Any) -> None:
    model = small_classes()
    model.transformer.class_emb.weight[5] = math.nan
    with pytest.raises(
        NumericsError, match=r"^sample 0:5:5: q and k and v of layer 0, heads 0, 1, 2, 3, scale 0, image 1"
    ):
        measure(model, range(4, 8))
    measure(model, range(4, 5))


def test_broken_drop_errors() -> None:
    """From a residual stream of zeros, with queries, keys and values as they should be."""
    plan = make_policy("full").plan(PlanningProblem(GEOMETRY, Budget.parse("100%")))
    cache = MeasuringCache(plan, ROWS, 1, output_weights=[torch.ones(3, 8, 16)] * 2)
    cache.reset()
    wanted = "^sample a: the drop error of layer 1, head 0, target scale 2, source 0, image 0 is not finite"
    with pytest.raises(NumericsError, match=wanted), naming_samples(["a"]):  # noqa: PT012
        for scale, of_scale in enumerate(made_up_inputs(GEOMETRY, ROWS, 0)):
            for layer, x in enumerate(of_scale):
                residual = torch.ones(ROWS, x.q_RHND.shape[2], 8)
                residual[1] *= (scale, layer) != (2, 1)
                cache.see(layer, residual, torch.ones(ROWS, 1, 8))
                cache.attend(layer, x.q_RHND, x.k_RHND, x.v_RHND)


def test_broken_weights_of_an_attached_model() -> None:
    model = make_var()
    wanted = r"^q of layer 1, head 0, scale 0, images 0, 1: not finite"
    with heatkv.attach(model, "streaming", "60%", sink_scales=1):
        draw_var(model)
        model.blocks[1].attn.mat_qkv.weight.data[0, 0] = math.nan
        with pytest.raises(NumericsError, match=wanted):
            model.autoregressive_infer_cfg(2, (3, 7), top_k=1)
    with pytest.raises(NumericsError, match=wanted), heatkv.attach(model, "streaming", "60%", sink_scales=1):
        draw_var(model)  # fails amid the image, in the model's own sampler


@pytest.mark.parametrize("name", ["transformer.blocks.3.attn.proj.bias", "vqvae.decoder.conv_out.weight"])
def test_broken_weights_at_loading(name: str, tmp_path: Path) -> None:
    state = load_file(WEIGHTS)
    state[name].view(-1)[1] = math.nan
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(NumericsError, match=rf"weights are not all finite: {name.split('.', 1)[1]} "):
        load(tmp_path / "broken.safetensors")


@pytest.mark.parametrize("dtype", [*TYPES.values(), torch.float64, torch.float8_e4m3fn])
def test_a_tensor_is_finite_when_all_of_it_is(dtype: torch.dtype) -> None:
    x = torch.full((3, 1000), 100.0).to(dtype)
    assert finite(x)
    if dtype is not torch.float8_e4m3fn:
        assert finite(torch.full((3, 1000), torch.finfo(dtype).max, dtype=dtype))
        x[2, 5] = math.inf
        assert not finite(x)
    x[2, 5] = math.nan
    assert not finite(x)
    assert finite(torch.arange(3))


def test_images_that_run_apart_are_named() -> None:
    watch, rows = Watch(GEOMETRY, 6, torch.float32, torch.device("cpu")), Rows(2, 1, 2)
    x_RHND = torch.zeros(4, GEOMETRY.heads, 1, GEOMETRY.head_dim)
    broken_RHND = x_RHND.clone()
    broken_RHND[3] = math.nan  # the second half of the last of three images
    watch.see(1, 0, x_RHND, broken_RHND, x_RHND, rows)
    found = watch.first(3)
    assert found is not None
    assert (found[0], found[1].image) == (1, 2)
    assert "k of layer 0" in str(found[1])


def test_overflowing_text_features() -> None:
    encoder, out = T5TextEncoder.__new__(T5TextEncoder), torch.zeros(2, 3, 4)
    tokens = SimpleNamespace(input_ids=torch.zeros(2, 3), attention_mask=torch.ones(2, 3), to=lambda device: tokens)
    out[1, 2, 0] = math.inf
    encoder._tokenizer, encoder._kept = Mock(return_value=tokens), Mock(return_value=(out,), dtype=torch.float16)
    with pytest.raises(NumericsError, match="not finite for 'a red dog'; float16 holds nothing above 65504"):
        encoder.encode(["a cat", "a red dog"])
    out[1, 2, 0] = 0
    assert len(encoder.encode(["a cat", "a red dog"])) == 2


# -------------------------------------------------------------------------- attention at a temperature of 100

ALIKE, OPPOSITE, MIXED = "alike", "opposite", "mixed"


def adversarial(kind: str, seed: int, dtype: torch.dtype, largest: float) -> list[list[AttentionInput]]:
    """Queries of length 100 and keys of length 1 in the same direction or in opposite ones, values up to `largest`."""
    rng, u_D = np.random.default_rng(seed), torch.nn.functional.normalize(torch.ones(GEOMETRY.head_dim), dim=0)
    inputs = []
    for tokens in GEOMETRY.schedule.tokens:
        inputs.append([])
        for _ in range(GEOMETRY.layers):
            shape = (ROWS, GEOMETRY.heads, tokens, 1)
            q_sign, k_sign = (torch.from_numpy(rng.choice([-1.0, 1.0], shape)).float() for _ in range(2))
            if kind != MIXED:
                q_sign, k_sign = torch.ones(shape), torch.full(shape, 1.0 if kind == ALIKE else -1.0)
            v = torch.from_numpy(rng.uniform(-largest, largest, (*shape[:3], GEOMETRY.head_dim))).float()
            qkv = (x.to(dtype).float() for x in (100 * q_sign * u_D, k_sign * u_D, v))
            inputs[-1].append(AttentionInput(v[..., 0], *qkv))
    return inputs


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("how", "kind"),
    [
        *(("ragged", kind) for kind in (ALIKE, OPPOSITE, MIXED)),
        *((how, MIXED) for how in ("triton", "snapkv", "adakv", "biased")),
    ],
)
def test_logits_of_100_and_minus_100(how: str, dtype: torch.dtype, kind: str) -> None:
    """As many digits as weights and values in 16 bits have: products, sums and exponentials are in fp32."""
    inputs = adversarial(kind, 3, dtype, 6e4)
    if how in ("snapkv", "adakv"):
        policy = make_policy(how)
        plan = policy.plan(made_up_problem(policy, GEOMETRY, Budget.parse("100%"), 0))
        cache: Any = open_cache(plan, ROWS, dtype)
    else:
        cache = opened("full", dtype, attention="triton" if how == "triton" else "ragged")
    if how == "biased":  # a mask, as coarse cells and padded heads have, here of zeros
        for of_target in cache._steps:
            for at, step in enumerate(of_target):
                reads = tuple(
                    dataclasses.replace(g, bias_GM=torch.zeros(g.size, g.held)) if g.held else g for g in step.reads
                )
                of_target[at] = dataclasses.replace(step, reads=reads)
    images = [[(x.q_RHND, x.k_RHND, x.v_RHND) for x in of_scale] for of_scale in inputs]
    check_close(run(cache, inputs, dtype), dense(opened("full").plan, images), 6e4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("family", "dtype"), [("classes", torch.float16), ("prompts", torch.float16)])
def test_models_at_the_clamp_and_with_a_large_residual_stream(family: str, dtype: torch.dtype) -> None:
    """Temperatures beyond the clamp, and gates that lead the residual stream far beyond float16, which it is not in."""
    model: Any = small_classes() if family == "classes" else small_prompts()
    label = 3 if family == "classes" else Prompt(features(5))
    for block in model.transformer.layers():
        attention = block.attn if family == "classes" else block.sa
        attention.scale_mul_1H11.fill_(MAX_LOG_SCALE + 3)
        attention.proj.bias.add_(100.0)
        if family == "classes":
            block.ada_lin[1].bias[: 2 * 32].fill_(1e4)
        else:
            block.ada_gss[:, :, :2].fill_(1e4)

    model.transformer.set_compute_dtype(dtype)
    largest: list[float] = []
    generator = Generator(model, model.full_plan(), 1)
    with model.adapter.watching(lambda _layer, residual, _gate: largest.append(float(residual.abs().max()))):
        drawn = generator.draw(
            [label], observe=lambda _, x: largest.append(0.0 if bool(x.isfinite().all()) else math.nan)
        )
    assert drawn.images is not None
    assert bool(drawn.images.isfinite().all())
    assert max(largest) > 1e6
    assert not any(map(math.isnan, largest))


def test_overflow_in_float16_but_not_in_bfloat16() -> None:
    model = small_classes()
    ffn = next(model.transformer.layers()).ffn
    ffn.fc1.weight.mul_(1e4)
    ffn.fc2.weight.mul_(1e4)
    model.transformer.set_compute_dtype(torch.float16)
    with pytest.raises(NumericsError, match=r"of layer 1, heads 0.*the output of layer 0; float16.*bfloat16"):
        Generator(model, model.full_plan(), 1).draw([3])
    model.transformer.set_compute_dtype(torch.bfloat16)
    Generator(model, model.full_plan(), 1).draw([3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gelu_of_large_numbers_in_16_bits(dtype: torch.dtype) -> None:
    """Its cube is beyond float16 from 40 on, but is never taken in it."""
    ffn = FeedForward(4, 4).requires_grad_(False)
    for linear in (ffn.fc1, ffn.fc2):
        linear.weight.copy_(torch.eye(4))
        linear.bias.zero_()
    ffn.to(dtype)
    x = torch.tensor([[[60000.0, 300.0, -300.0, -60000.0]]])
    assert torch.equal(ffn(x).float(), x.clamp(min=0).to(dtype).float())


# ----------------------------------------------------------------------------- batches and threads

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01}
"""Of the largest logit, see docs/numerics.md."""
CODED = 5e-3
"""The same, where a code may be rounded the other way."""


def logits_of(
    model: ImageModel[Any], plan: Any, labels: Sequence[Any], samples: Sequence[int], tokens: Any = None, **how: Any
) -> tuple[list[Tensor], Any]:
    seen: list[Tensor] = []
    sampler = None if tokens is None else RecordedTokens(tokens)
    drawn = Generator(model, plan, len(labels), **how).draw(
        labels, samples=samples, sampler=sampler, observe=lambda _, x: seen.append(x)
    )
    return seen, drawn


@pytest.mark.parametrize(
    ("policy", "how", "dtype"),
    [
        ("full", {}, "float32"),
        ("full", {}, "float16"),
        ("streaming", {"code": "int8"}, "bfloat16"),
        ("adakv", {}, "bfloat16"),
        ("h2o", {}, "float32"),
    ],
)
def test_images_of_any_batch(policy: str, how: dict[str, str], dtype: str) -> None:
    model = small_classes()
    model.transformer.set_compute_dtype(TYPES[dtype])
    made = make_policy(policy, **SINKS.get(policy, {}))
    budget = Budget.parse("100%" if policy == "full" else "60%")
    storage = "/".join([*how.values(), dtype])
    plan = made.plan(made_up_problem(made, model.geometry, budget, 0, storage=storage))
    labels, tolerance = [3, 8, 21], max(TOLERANCE[dtype], CODED if how else 0)
    together, drawn = logits_of(model, plan, labels, range(3), **how)
    for image, label in enumerate(labels):
        tokens = [of_scale[image : image + 1] for of_scale in drawn.tokens]
        alone, single = logits_of(model, plan, [label], [image], tokens, **how)
        for one, other in zip(together, alone, strict=True):
            assert float((one[image] - other[0]).abs().max()) <= tolerance * float(other.abs().max())
        assert float((drawn.images[image] - single.images[0]).abs().max()) <= 1e-4  # of the same tokens


@pytest.mark.parametrize(("policy", "dtype"), [("full", "float32"), ("snapkv", "bfloat16")])
def test_images_of_one_thread_and_two(policy: str, dtype: str) -> None:
    model = small_classes()
    model.transformer.set_compute_dtype(TYPES[dtype])
    plan = model.plan(policy, "100%" if policy == "full" else "60%", **SINKS.get(policy, {}))
    one, drawn = logits_of(model, plan, [3, 8], range(2))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        two, others = logits_of(model, plan, [3, 8], range(2), drawn.tokens)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, two, strict=True):
        assert float((a - b).abs().max()) <= TOLERANCE[dtype] * float(a.abs().max())
    assert float((drawn.images - others.images).abs().max()) <= 1e-4


# ----------------------------------------------------------------------------- the same bits every time


@settings(max_examples=20)
@given(seed=SEEDS, top_p=st.sampled_from([0.3, 0.9, 0.97]))
def test_sums_in_fixed_point_cut_what_sums_in_floating_point_cut(seed: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((4, 512), generator=generator) * 3
    ascending, order = logits.sort(dim=-1)
    shares = ascending.softmax(dim=-1)
    exact = shares.double().cumsum(dim=-1)
    sums = cumulative_in_fixed_point(shares)
    assert float((sums - exact).abs().max()) <= 512 * 2.0**-41
    outside = sums <= 1 - top_p
    outside[:, -1] = False
    cut = torch.isinf(cut_logits(logits, 0, top_p)).gather(-1, order)
    near = (exact - (1 - top_p)).abs() < 1e-5
    assert torch.equal(cut | near, outside | near)


def test_a_setting_of_cublas_that_is_not_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(HeatKVError, match=r"CUBLAS_WORKSPACE_CONFIG is ':0:0'.*unset it"):
        run_deterministically()
    assert not torch.are_deterministic_algorithms_enabled()


RUN = """
import sys, torch
torch.set_num_threads(1)
from heatkv.cli import run
for command in {commands}:
    assert run(["--deterministic", *command.format(out=sys.argv[1]).split()]) == 0, command
assert torch.are_deterministic_algorithms_enabled()
"""
COMMANDS = [
    "generate --label pizza --policy snapkv --budget 20% --out {out}",
    "calibrate --samples 2 --levels fisher,samples=1 --out {out}/s.safetensors",
    "compare --policies heatkv,h2o --budgets 20% --statistics {out}/s.safetensors --images 2 --pictures 2 --repeats 1 "
    "--out {out}/compared",
    "profile --policies streaming --budgets 20% --repeats 1 --in-process --out {out}/profiled",
]
MEASURED = {
    "latency_ms", "timed", "memory", "load", "matrix_product_1024_fp32_one_thread_ms", "graph_latency_ms",
    "device_peak_bytes", "nvml_bytes",
}  # fmt: skip
"""Times, what else the machine does, and the memory of its process: never twice the same."""


def without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_measured(x) for name, x in value.items() if name not in MEASURED}
    return [without_measured(x) for x in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        subprocess.run([sys.executable, "-c", RUN.format(commands=COMMANDS), str(tmp_path / name)], check=True)
    names = {str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert {"0000_pizza.png", "s.safetensors", "compared/results.json", "profiled/results.json"} <= names
    assert sum(name.endswith(".png") for name in names) >= 6
    for name in names:
        one, other = tmp_path / "one" / name, tmp_path / "other" / name
        if Path(name).name == "results.json":
            first, second = (read_json(path) for path in (one, other))
            assert first["environment"]["deterministic"] is True
            assert without_measured(first) == without_measured(second)
        elif Path(name).stem != "report":  # which shows times
            assert one.read_bytes() == other.read_bytes(), name

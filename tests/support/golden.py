"""Golden sets, what public code computes: opening them, and holding runs of ours against every tensor in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.arena_cache import Attend, KVCache
from heatkv.models import infinity
from heatkv.models.checkpoint import build_bsq, build_infinity, build_var, build_vqvae, read_checkpoint
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.sampling import BitSamplingSettings, SamplingSettings
from heatkv.models.text_conditional import Prompt, TextConditionalModel
from heatkv.policies.base import PlanningProblem
from heatkv.policies.windows import Full
from support.public_sampler import PublicSampler
from tools.emoji.train import TeacherForcing

FOLDER = Path(__file__).parents[1] / "golden"
"""The sets that are part of the checkout."""

# absolute limits, from the README of the golden vectors
EMBEDDED, HIDDEN, HALF_LOGITS, GUIDED_LOGITS, DECODED = 1e-5, 1e-4, 5e-5, 3e-4, 1e-4


def tensors(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    return {key: value for name in names for key, value in read_checkpoint(folder / name).items()}


def close(got: Tensor, expected: Tensor, limit: float) -> None:
    assert got.shape == expected.shape
    assert (got.double() - expected.double()).abs().max().item() <= limit


def load(path: Path) -> tuple[dict[str, Any], ClassConditionalModel]:
    told = json.loads(path.read_text())
    transformer = build_var(tensors(path.parent, told["files"]["model"]), heads=told["config"]["num_heads"])
    vqvae = build_vqvae(tensors(path.parent, told["files"]["vae"]), told["config"]["patch_nums"])
    settings = SamplingSettings(cfg=told["config"]["cfg"], top_k=1)
    return told, ClassConditionalModel(told["name"], transformer, vqvae, settings)


def full_plan(model: ClassConditionalModel) -> Plan:
    return Full().plan(PlanningProblem(model.geometry, Budget.parse("100%")))


def given_plan(told: dict[str, Any], geometry: CacheGeometry) -> Plan:
    """The plan that a pruned set was made under."""
    plan = Plan(
        policy="given",
        geometry=geometry,
        last_read=np.array(told["last_read"]),
        budget=1.0,
        budget_token_heads=geometry.full_token_heads,
        sink_scales=told["sink_scales"],
    )
    assert not plan.had_no_effect()
    return plan


def model_set(path: Path, told: dict[str, Any]) -> Path:
    """The set whose weights the set at `path` uses: beside it, or of this folder."""
    folders = (path.parents[1], FOLDER)
    return next(found for folder in folders if (found := folder / f"{told['model_set']}.json").exists())


class Recording(Attend):
    """A cache that also remembers every layer-0 key and value, and the inputs and outputs of the model around it."""

    def __init__(self, cache: KVCache) -> None:
        self.cache, self.keys, self.values = cache, [], []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer == 0:
            self.keys.append(k)
            self.values.append(v)
        return self.cache.attend(layer, q, k, v)


def check_scales(model: ClassConditionalModel, labels: list[int], plan: Plan, expected: dict[str, Tensor]) -> None:
    """Run greedily under `plan` and compare every tensor of every scale that the set has."""
    settings, transformer = model.sampling, model.transformer
    rows = len(labels) * settings.rows_per_image
    cache = Recording(KVCache(plan, rows))
    drawing = model.begin(labels, settings)
    compared = 0
    for scale in range(len(transformer.schedule)):
        got = {"block_input": drawing.input()}
        hidden = transformer.hidden(drawing.input(), drawing._condition, cache)
        logits = transformer.logits(hidden, drawing._condition)
        got |= {"hidden": hidden, "logits_cond": logits[: len(labels)], "logits_uncond": logits[len(labels) :]}
        got["logits_cfg"] = settings.guide(logits, scale, len(transformer.schedule))
        tokens = PublicSampler(torch.Generator(), settings).choose(scale, got["logits_cfg"])
        assert torch.equal(tokens, expected[f"scale{scale}.tokens"])
        drawing.accept(tokens)
        got["f_hat"] = drawing.f_hat
        if scale + 1 < len(transformer.schedule):
            got["next_map"] = model.vqvae.quantize.next_map(drawing.f_hat, scale + 1)
        limits = {
            "block_input": HIDDEN, "hidden": HIDDEN, "logits_cond": HALF_LOGITS, "logits_uncond": HALF_LOGITS,
            "logits_cfg": GUIDED_LOGITS, "f_hat": EMBEDDED, "next_map": EMBEDDED,
        }  # fmt: skip
        for name, limit in limits.items():
            if f"scale{scale}.{name}" in expected:
                close(got[name], expected[f"scale{scale}.{name}"], limit)
                compared += 1
    assert compared >= 2 * len(transformer.schedule)
    for name, stored in (("k", cache.keys), ("v", cache.values)):
        if f"layer0.cached_{name}_final" in expected:
            wanted = expected[f"layer0.cached_{name}_final"]
            close(torch.cat(stored, dim=2)[:, :, : wanted.shape[2]], wanted, HIDDEN)
    if "image" in expected:
        close(model.decode(drawing.f_hat), expected["image"], DECODED)


def infinity_model(path: Path, told: dict[str, Any], run: dict[str, Any], schedule: list[Any]) -> TextConditionalModel:
    """The set's model with the schedule and the guidance of one of its runs, greedy."""
    transformer = build_infinity(tensors(path.parent, told["files"]["model"]))
    vae = build_bsq(tensors(path.parent, told["files"]["vae"]))
    settings = BitSamplingSettings(cfg=run["cfg"], tau=run["tau"], top_k=1)
    scales = ScaleSchedule.of(schedule)
    assert scales == ScaleSchedule.infinity(run["pn"], run["h_div_w"])
    return TextConditionalModel(told["name"], transformer, vae, scales, settings)


def prompts_of(run: dict[str, Any], expected: dict[str, Tensor]) -> list[Prompt]:
    prompts = [Prompt(expected[f"text.{i}"], expected.get(f"neg_text.{i}")) for i, _ in enumerate(run["text_lens"])]
    assert [len(prompt.features_ME) for prompt in prompts] == run["text_lens"]
    assert [len(p.negative_ME) for p in prompts if p.negative_ME is not None] == run.get("neg_lens", [])
    return prompts


def run_of(
    path: Path, told: dict[str, Any], name: str
) -> tuple[TextConditionalModel, list[Prompt], Plan, dict[str, Tensor]]:
    """A run of the set; one that holds logits only has the prompts of the run that it repeats."""
    run = told["runs"][name]
    expected = tensors(path.parent, run["files"])
    model = infinity_model(path, told, run, run["scale_schedule"])
    same = tensors(path.parent, told["runs"][name.removesuffix("_ca_bf16")]["files"])
    prompts = prompts_of(run, {key: x for key, x in same.items() if "text." in key})
    return model, prompts, model.plan(), expected


def recorded_bits(model: TextConditionalModel, expected: dict[str, Tensor], scale: int) -> Tensor:
    """The bits of a scale in the order in which they are drawn, (B, N*K)."""
    on_grid_BZhw = expected[f"scale{scale}.bits"][:, 0].permute(0, 3, 1, 2)
    return torch.nn.functional.pixel_unshuffle(on_grid_BZhw, model.patch).permute(0, 2, 3, 1).flatten(1).long()


def check_infinity_run(
    model: TextConditionalModel,
    prompts: list[Prompt],
    plan: Plan,
    expected: dict[str, Tensor],
    half_logits: float = HALF_LOGITS,
    guided_logits: float = GUIDED_LOGITS,
    replay: bool = False,
) -> None:
    """Run greedily under `plan`, or on the recorded bits, and compare every tensor that the set has."""
    transformer, settings, batch, scales = model.transformer, model.sampling, len(prompts), len(model.schedule)
    left = {name for name in expected if "text." not in name}

    def compare(name: str, got: Tensor, limit: float) -> None:
        if name in left:
            close(got, expected[name], limit)
            left.remove(name)

    cache = Recording(KVCache(plan, batch * settings.rows_per_image))
    drawing = model.begin(prompts, settings)
    text, text_SC = transformer.project_text(drawing._texts(prompts))
    compare("cond_BD", text.pooled_RC, EMBEDDED)
    read = slice(None) if text.mask_R11M is None else text.mask_R11M.flatten()
    compare("ca_kv", text_SC[text.at_RM.flatten()[read]], EMBEDDED)
    inputs = [drawing.input()[:batch]]
    rotations = [infinity.rotation_table(model.schedule, scale, transformer.config.head_dim) for scale in range(scales)]
    for scale, (_, height, width) in enumerate(model.schedule.scales):
        at = f"scale{scale}."
        compare(f"{at}block_input", drawing.input(), HIDDEN)
        hidden = transformer.hidden(drawing.input(), drawing._condition, rotations[scale], cache)
        logits = transformer.logits(hidden, drawing._condition)
        guided = settings.guide(logits, scale, scales)
        compare(f"{at}hidden", hidden, HIDDEN)
        compare(f"{at}logits_cond", logits[:batch], half_logits)
        compare(f"{at}logits_uncond", logits[batch:], half_logits)
        compare(f"{at}logits_cfg", guided, guided_logits)
        recorded = recorded_bits(model, expected, scale)
        bits = PublicSampler(torch.Generator(), settings).choose(scale, guided.reshape(batch, -1, 2))
        assert replay or torch.equal(bits, recorded)
        on_grid = drawing.on_latent_grid(recorded.view(batch, height, width, -1))
        compare(f"{at}bits", on_grid[:, None], 0)
        drawing.accept(recorded)
        compare(f"{at}summed_codes", drawing.f_hat, EMBEDDED)
        if scale + 1 < scales:
            compare(f"{at}next_input", drawing.next_codes(), EMBEDDED)
            inputs.append(drawing.input()[:batch])
    for name, stored in (("k", cache.keys), ("v", cache.values)):
        compare(f"layer0.cached_{name}_prefix", torch.cat(stored, dim=2)[:, :, :57], HIDDEN)
    if any(name.startswith("image") for name in left):
        image = model.decode(drawing.f_hat)
        compare("image_m1_1", image * 2 - 1, DECODED)
        pixels = (image * 255).to(torch.uint8).permute(0, 2, 3, 1).flip(-1)
        levels = (pixels.int() - expected["image_uint8_bgr"].int()).abs()
        assert levels.max() <= 1
        assert (levels > 0).float().mean() < 0.01
        compare("image_uint8_bgr", pixels, 1)
    if "tf.logits" in left:
        condition = transformer.condition([(prompt.features_ME, len(prompt.features_ME)) for prompt in prompts])
        forced = transformer(torch.cat(inputs, 1), condition, torch.cat(rotations, 1), TeacherForcing(model.schedule))
        compare("tf.logits", forced, HALF_LOGITS)
    assert not left


def pruned_infinity(
    path: Path, told: dict[str, Any]
) -> tuple[TextConditionalModel, list[Prompt], Plan, dict[str, Tensor]]:
    model_path, expected = model_set(path, told), tensors(path.parent, told["files"])
    model = infinity_model(model_path, json.loads(model_path.read_text()), told["run"], told["scale_schedule"])
    return model, prompts_of(told["run"], expected), given_plan(told, model.geometry), expected


def replays(
    path: Path, dtype: torch.dtype
) -> Iterator[tuple[ClassConditionalModel | TextConditionalModel, Sequence[Any], Plan, dict[str, Tensor]]]:
    """(model, what it draws, plan, expected tensors) of every run of a set."""
    told = json.loads(path.read_text())
    if "runs" in told:
        for name, run in told["runs"].items():
            if not run.get("ca_bf16") or dtype == torch.bfloat16:  # its own rounding is as coarse as bfloat16
                yield run_of(path, told, name)
    elif told["project"].startswith("FoundationVision/Infinity"):
        yield pruned_infinity(path, told)
    else:
        model_told, model = load(model_set(path, told) if "model_set" in told else path)
        files = told["files"] if "model_set" in told else told["files"]["expected"]
        plan = given_plan(told, model.geometry) if "model_set" in told else full_plan(model)
        yield model, model_told["config"]["labels"], plan, tensors(path.parent, files)

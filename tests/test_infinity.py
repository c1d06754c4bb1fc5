"""Infinity: rotary positions, weights in every layout, prompts, bits, guidance and drawing, on small random models."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import stats
from support.public_sampler import PublicSampler
from support.tiny_models import SHORT_SCHEDULE, TINY, draw_logits, features, make_infinity
from torch import Tensor

from heatkv.core.schedule import ScaleSchedule
from heatkv.errors import FormatError, ModelError
from heatkv.generation.loop import Generator, generate
from heatkv.models.bsq import BSQ_D32, BSQ_D56, BitwiseVAE, BSQConfig, code_values, resize
from heatkv.models.catalogue import MODELS, ModelInfo, load_infinity
from heatkv.models.checkpoint import (
    bsq_config,
    build_bsq,
    build_infinity,
    infinity_config,
    infinity_state,
    read_checkpoint,
)
from heatkv.models.infinity import (
    INFINITY_2B,
    INFINITY_8B,
    CrossAttention,
    Infinity,
    InfinityConfig,
    rope_positions,
    rotate,
    rotation_table,
)
from heatkv.models.sampling import BitSamplingSettings, CommonRandomSampler
from heatkv.models.text_conditional import Prompt, TextConditionalModel
from heatkv.models.text_encoder import T5TextEncoder
from heatkv.models.vqvae import ResidualBlock

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def tiny() -> TextConditionalModel:
    return make_infinity()


# ------------------------------------------------------------------------------------------------ positions


def test_positions_are_those_of_every_published_template() -> None:
    templates = json.loads((DATA / "infinity_rope_indices.json").read_text())["templates"]
    assert len(templates) == 15
    for name, template in templates.items():
        for size in ScaleSchedule.infinity_sizes():
            positions = rope_positions(ScaleSchedule.infinity(size, float(name)))
            wanted = list(zip(template["rows"], template["cols"], strict=True))[: len(positions)]
            assert [(list(rows), list(columns)) for rows, columns in positions] == wanted
    assert len(rope_positions(ScaleSchedule.infinity("1M", 1.0))) == 13


def test_another_schedule_takes_the_nearest_template() -> None:
    rows, columns = rope_positions(ScaleSchedule.of([(1, 1), (4, 3), (8, 6)]))[2]
    assert rows == tuple(range(0, 72, 9))  # the template 4:3 ends with 72 x 54
    assert columns == tuple(range(0, 54, 9))


@pytest.mark.parametrize("head_dim", [8, 96, 128])
def test_rotation_makes_attention_depend_on_distances_alone(head_dim: int) -> None:
    schedule = ScaleSchedule.infinity("0.06M", 1.0)
    table = rotation_table(schedule, 4, head_dim)  # 8 x 8, positions in steps of 8
    q, k = torch.randn(2, head_dim, generator=torch.Generator().manual_seed(1)).double()
    turned_q, turned_k = (rotate(x.expand(64, -1), table.double()).view(8, 8, -1) for x in (q, k))
    products = torch.einsum("abd,cfd->abcf", turned_q, turned_k)
    for down, right in ((0, 0), (2, 0), (0, 3), (1, -2)):
        seen = [
            products[r, s, r + down, s + right]
            for r in range(8)
            for s in range(8)
            if 0 <= r + down < 8 and 0 <= s + right < 8
        ]
        torch.testing.assert_close(torch.stack(seen), seen[0].expand(len(seen)), rtol=0, atol=1e-4)
    assert products.std() > 0.1  # and it does depend on them


def test_rows_turn_the_first_half_of_the_channels() -> None:
    schedule = ScaleSchedule.infinity("0.06M", 1.0)
    x = torch.ones(4, 8)
    by_token = rotate(x, rotation_table(schedule, 1, 8)).view(2, 2, 8)
    assert torch.equal(by_token[0, 0], torch.ones(8))
    assert torch.equal(by_token[0, 1, :4], torch.ones(4))
    assert torch.equal(by_token[1, 0, 4:], torch.ones(4))
    pair = complex(1, 1) * complex(math.cos(32), math.sin(32))  # row 1 of 2 lies at 32 of 64; first frequency is 1
    assert by_token[1, 0, :2].tolist() == pytest.approx([pair.real, pair.imag], abs=1e-5)


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("name", "config", "count"),
    [("infinity-2b", INFINITY_2B, 2_204_564_032), ("infinity-8b", INFINITY_8B, 8_375_791_824)],
)
def test_public_sizes_have_the_parameters_their_tables_add_up_to(name: str, config: InfinityConfig, count: int) -> None:
    info = MODELS[name]
    with torch.device("meta"):
        model = Infinity(config)
    assert (config.depth, config.heads, config.head_dim) == (info.layers, info.heads, info.head_dim)
    assert sum(p.numel() for p in model.parameters()) == count
    assert config.mlp_hidden == 256 * round(4 * config.width / 256)
    assert infinity_config(model.state_dict()) == config


@pytest.mark.parametrize(("config", "count", "stride"), [(BSQ_D32, 65_092_355, 16), (BSQ_D56, 48_484_611, 8)])
def test_public_decoders_have_the_parameters_their_tables_add_up_to(config: BSQConfig, count: int, stride: int) -> None:
    with torch.device("meta"):
        vae = BitwiseVAE(config)
    assert sum(p.numel() for p in vae.decoder.parameters()) == count
    assert config.stride == stride
    assert bsq_config(vae.state_dict()) == config


def test_a_width_that_cannot_be_rotated_is_refused() -> None:
    with pytest.raises(ModelError, match="gives 6 channels a head"):
        replace(TINY, width=60, heads=10)
    with pytest.raises(ModelError, match="not a multiple of the 3 pooling heads"):
        replace(TINY, pool_heads=3)


# ------------------------------------------------------------------------------------------------ weights


def chunked(state: dict[str, Tensor], per_chunk: int) -> dict[str, Tensor]:
    """The same tensors under the names of a model built in chunks."""
    out = {}
    for name, tensor in state.items():
        parts = name.split(".", 2)
        if parts[0] == "blocks":
            chunk, block = divmod(int(parts[1]), per_chunk)
            name = f"block_chunks.{chunk}.module.{block}.{parts[2]}"
        out[name] = tensor
    return out


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return Infinity(TINY).state_dict()


@pytest.mark.parametrize("per_chunk", [None, 1, 2, 4])
def test_blocks_load_from_both_layouts(state: dict[str, Tensor], per_chunk: int | None) -> None:
    given_state = state if per_chunk is None else chunked(state, per_chunk)
    strays = dict.fromkeys(
        ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "text_proj_for_sos.ca.zero_k_bias"),
        torch.zeros(1),
    )
    model = build_infinity(given_state | strays)
    assert model.config == TINY
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_scales_made_for_another_kernel_are_reshaped(state: dict[str, Tensor]) -> None:
    other = {name: x.transpose(1, 2) if name.endswith("scale_mul_1H11") else x for name, x in state.items()}
    assert other["blocks.0.sa.scale_mul_1H11"].shape == (1, 1, 2, 1)
    loaded = build_infinity(chunked(other, 2)).state_dict()
    assert torch.equal(loaded["blocks.3.sa.scale_mul_1H11"], state["blocks.3.sa.scale_mul_1H11"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("head.bias"), r"missing head\.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda s: s.update(pos_start=torch.zeros(1, 2, 64)), r"pos_start is \(1, 2, 64\), not \(1, 1, 64\)"),
        (lambda s: s.pop("word_embed.weight"), r"no Infinity transformer weights: word_embed\.weight is missing"),
        (
            lambda s: s.update({"blocks.1.ca_gamma": torch.zeros(64)}),
            r"gain on cross attention \(blocks\.1\.ca_gamma\)",
        ),
        (lambda s: s.update({"class_emb.weight": torch.zeros(3, 64)}), "classes instead of text"),
        (lambda s: s.update({"block_chunks.0.module.0.ada_gss": torch.zeros(1)}), "both in chunks and without"),
        (lambda s: s.clear(), "they have the entries none"),
    ],
)
def test_weights_that_do_not_fit_are_named(state: dict[str, Tensor], change: Callable[[Any], None], said: str) -> None:
    changed = dict(state)
    change(changed)
    with pytest.raises(ModelError, match=said):
        build_infinity(changed)


def test_a_chunk_that_lacks_a_block_is_not_counted_over(state: dict[str, Tensor]) -> None:
    short = {name: x for name, x in chunked(state, 2).items() if not name.startswith("block_chunks.0.module.1.")}
    with pytest.raises(ModelError, match=r"missing blocks\.1\."):
        build_infinity(short)


@pytest.mark.parametrize(("last", "average"), [("gpt_fsdp", "gpt_ema_fsdp"), ("gpt_wo_ddp", "gpt_ema_for_vis")])
def test_trainer_files_hold_both_models(
    tmp_path: Path, tiny: TextConditionalModel, state: dict[str, Tensor], last: str, average: str
) -> None:
    blurred = {name: x + 1 for name, x in state.items()}
    inner = {"config": {"a": 1}, "vae_local": tiny.vae.state_dict(), last: chunked(state, 2), average: blurred}
    torch.save({"args": {}, "epoch": 3, "arch": "gpt", "trainer": inner}, tmp_path / "ar-ckpt-giter1-last.pth")
    content = read_checkpoint(tmp_path / "ar-ckpt-giter1-last.pth")
    assert torch.equal(build_infinity(content).head.weight, state["head.weight"])
    assert torch.equal(build_infinity(content, average=True).head.weight, state["head.weight"] + 1)
    assert build_bsq(content).config == tiny.vae.config
    torch.save({last: state}, tmp_path / "slim.pth")
    assert torch.equal(build_infinity(read_checkpoint(tmp_path / "slim.pth")).pos_start, state["pos_start"])


def test_vae_files_are_read_in_both_spellings() -> None:
    torch.manual_seed(1)
    vae = BitwiseVAE(BSQConfig(6, 32, (1, 2, 2)))
    plain = vae.state_dict()
    deeper = {}
    for name, x in plain.items():
        parts = name.split(".")
        parts.insert(-1, "norm" if "norm" in parts[-2] else "conv")
        deeper[".".join(parts)] = x
    assert "decoder.up.1.upsample.conv.conv.weight" in deeper
    assert "decoder.norm_out.norm.bias" in deeper
    assert "encoder.down.1.block.0.nin_shortcut.conv.weight" in deeper
    skipped = {
        "quantizer.lfq.mask": torch.zeros(6),
        "image_disc.conv.weight": torch.zeros(1),
        "quantize.x": torch.ones(1),
    }
    for content in (plain, deeper, {"vae": deeper | skipped, "ema": {name: x + 1 for name, x in deeper.items()}}):
        model = build_bsq(content)
        assert model.config == vae.config
        assert all(torch.equal(x, plain[name]) for name, x in model.state_dict().items())
    half = {name: x for name, x in plain.items() if name.startswith("decoder.")}
    decoder = build_bsq({name: x.half() for name, x in half.items()})
    assert {x.dtype for x in decoder.parameters()} == {torch.float32}
    with pytest.raises(ModelError, match="without its encoder"):
        decoder.latent(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ModelError, match=r"missing decoder\.mid\.block_1\.conv1\.bias"):
        build_bsq({name: x for name, x in half.items() if name != "decoder.mid.block_1.conv1.bias"})


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_sharded_folders(tmp_path: Path, state: dict[str, Tensor], kind: str) -> None:
    write: Any = save_file if kind.endswith("safetensors") else torch.save
    stem, suffix = kind.split(".")
    shards: list[dict[str, Tensor]] = [{}, {}]
    for i, (name, x) in enumerate(chunked(state, 2).items()):
        shards[i % 2][name] = x.contiguous()
    files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    index = {"weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard}}
    for file, shard in zip(files, shards, strict=True):
        write(shard, tmp_path / file)
    (tmp_path / f"{kind}.index.json").write_text(json.dumps(index))
    loaded = build_infinity(read_checkpoint(tmp_path))
    assert all(torch.equal(x, state[name]) for name, x in loaded.state_dict().items())

    lost = next(iter(shards[1]))
    write({name: x for name, x in shards[1].items() if name != lost}, tmp_path / files[1])
    with pytest.raises(FormatError, match=f"lacks {lost}"):
        read_checkpoint(tmp_path)
    (tmp_path / files[1]).unlink()
    with pytest.raises(FormatError, match=f"cannot read .*{files[1]}"):
        read_checkpoint(tmp_path)
    (tmp_path / f"{kind}.index.json").write_text(json.dumps({"weight_map": {"x": "../x.bin"}}))
    with pytest.raises(FormatError, match="not a file of its folder"):
        read_checkpoint(tmp_path)
    (tmp_path / f"{kind}.index.json").write_text("[]")
    with pytest.raises(FormatError, match="no weight_map"):
        read_checkpoint(tmp_path)


def test_a_folder_with_one_file_and_one_with_none(tmp_path: Path, state: dict[str, Tensor]) -> None:
    with pytest.raises(FormatError, match="neither model"):
        read_checkpoint(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert read_checkpoint(tmp_path).keys() == state.keys()
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").unlink()
    assert read_checkpoint(tmp_path).keys() == state.keys()


class _Executed:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def test_files_that_are_no_weights_are_refused(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"trainer": _Executed()}, "harmful.pth")
    with pytest.raises(FormatError, match="could run code"):
        read_checkpoint("harmful.pth")
    assert not Path("executed").exists()
    torch.save(state, "whole.pth")
    Path("cut.pth").write_bytes(Path("whole.pth").read_bytes()[:-3000])
    Path("empty.pth").write_bytes(b"")
    Path("text.pth").write_text("weights")
    torch.save([torch.zeros(1)], "list.pth")
    for name in ("cut.pth", "empty.pth", "text.pth", "list.pth", "absent.pth"):
        with pytest.raises(FormatError, match=name):
            read_checkpoint(name)


def test_a_vae_of_another_model_is_refused(tiny: TextConditionalModel) -> None:
    with torch.device("meta"):
        two_b, eight_b = Infinity(replace(INFINITY_2B, depth=1)), Infinity(replace(INFINITY_8B, depth=1))
        d32, d56 = BitwiseVAE(BSQ_D32, encoder=False), BitwiseVAE(BSQ_D56, encoder=False)
    for transformer, wrong, right, file in (
        (two_b, d56, d32, r"infinity_vae_d32reg\.pth"),
        (eight_b, d32, d56, r"infinity_vae_d56_f8_14_patchify\.pth"),
    ):
        with pytest.raises(ModelError, match=file):
            replace(tiny, transformer=transformer, vae=wrong)
        model = replace(tiny, transformer=transformer, vae=right)
        assert model.vae.config.stride * model.patch == 16  # pixels per token


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (ScaleSchedule.square(range(1, 17)), "16 scales, these weights have embeddings for 15"),
        (ScaleSchedule.square((2, 4)), "does not start at 1x1"),
        (ScaleSchedule.of([(1, 1, 1), (2, 2, 2)]), "more than one frame"),
    ],
)
def test_schedules_the_model_cannot_run_are_refused(
    tiny: TextConditionalModel, schedule: ScaleSchedule, said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        replace(tiny, schedule=schedule)


def test_loading_by_name(tmp_path: Path, tiny: TextConditionalModel) -> None:
    info = ModelInfo("infinity-tiny", "infinity", TINY.depth, TINY.heads, TINY.head_dim, "0.06M", "here")
    weights, vae = tmp_path / "weights.pth", tmp_path / "infinity_vae.pth"
    torch.save(chunked(tiny.transformer.state_dict(), 2), weights)
    torch.save({"vae": tiny.vae.state_dict()}, vae)
    model = load_infinity(info, weights, vae, ratio=1.5)
    assert model.geometry == info.geometry(ratio=1.5)
    assert model.fingerprint == tiny.fingerprint
    half = load_infinity(info, weights, vae, dtype=torch.bfloat16, size="0.06M")
    assert half.compute_dtype == torch.bfloat16
    assert half.fingerprint == tiny.fingerprint
    elsewhere = load_infinity(info, weights, vae, device="meta")
    assert {x.device.type for m in (elsewhere.transformer, elsewhere.vae) for x in m.parameters()} == {"meta"}
    assert elsewhere.device.type == "meta"
    with pytest.raises(ModelError, match="has 4 layers x 2 heads of 32; infinity-2b has 32 x 16 of 128"):
        load_infinity(MODELS["infinity-2b"], weights, vae)
    with pytest.raises(ModelError, match=r"take infinity_vae_d32reg\.pth"):
        load_infinity(info, weights, vae.rename(tmp_path / "infinity_vae_d32.pth"))


def test_half_precision_is_for_the_large_matrices_only(state: dict[str, Tensor]) -> None:
    stored = {name: x.to(torch.bfloat16) for name, x in state.items()}
    model = build_infinity(stored, torch.float16)
    half = {name for name, x in model.named_parameters() if x.dtype == torch.float16}
    assert all(x.dtype in (torch.float16, torch.float32) for x in model.parameters())
    assert {name.split(".", 2)[2] for name in half} == {
        f"{part}.{kind}"
        for part in ("sa.proj", "ca.mat_q", "ca.proj", "ffn.fc1", "ffn.fc2")
        for kind in ("weight", "bias")
    } | {"sa.mat_qkv.weight", "ca.mat_kv.weight"}
    raw = build_infinity(stored, dtype=None)
    assert {x.dtype for x in raw.parameters()} == {torch.bfloat16}
    assert raw.head.weight.data_ptr() == stored["head.weight"].data_ptr()  # not copied


# ------------------------------------------------------------------------------------------------ prompts


def test_prompts_of_other_lengths_leave_a_prompt_alone(tiny: TextConditionalModel) -> None:
    prompts = [
        Prompt(features(4)),
        Prompt(features(9), features(15)),
        Prompt(features(1), features(2)),
        Prompt(features(20)),
    ]
    drawn = Generator(tiny, tiny.plan(), 4).draw(prompts, seed=3)
    together = draw_logits(tiny, prompts, drawn.tokens)
    for i, prompt in enumerate(prompts):
        alone = draw_logits(tiny, [prompt], tuple(bits[i : i + 1] for bits in drawn.tokens))
        for mixed, single in zip(together, alone, strict=True):
            torch.testing.assert_close(mixed[i : i + 1], single, rtol=0, atol=1e-4)


def test_a_prompt_and_its_negative_matter(tiny: TextConditionalModel) -> None:
    base = Prompt(features(5), features(7))
    bits = Generator(tiny, tiny.plan(), 1).draw([base]).tokens
    reference = draw_logits(tiny, [base], bits)
    changed = features(5).clone()
    changed[4] += 1  # the last position is read, too
    for other in (Prompt(changed, features(7)), Prompt(features(5), features(7, seed=1)), Prompt(features(5))):
        assert (draw_logits(tiny, [other], bits)[0] - reference[0]).abs().max() > 1e-3
    learnt = Prompt(features(5), tiny.transformer.unconditional(5).clone())
    for given_, default in zip(
        draw_logits(tiny, [learnt], bits), draw_logits(tiny, [Prompt(features(5))], bits), strict=True
    ):
        assert torch.equal(given_, default)


def test_prompts_that_do_not_fit_are_refused(tiny: TextConditionalModel) -> None:
    for bad in (torch.zeros(3, 25), torch.zeros(0, 24), torch.zeros(24)):
        with pytest.raises(ModelError, match="do not fit tiny"):
            tiny.begin([Prompt(bad)], tiny.sampling)
    with pytest.raises(ModelError, match="21 positions has no unconditional half: these weights hold 20"):
        tiny.begin([Prompt(features(21))], tiny.sampling)
    tiny.begin([Prompt(features(21), features(3))], tiny.sampling)
    tiny.begin([Prompt(features(21))], BitSamplingSettings(cfg=1))
    with pytest.raises(ModelError, match="without a text encoder"):
        tiny.prompts(["a cat"])


def test_what_is_no_prompt_is_refused(tiny: TextConditionalModel) -> None:
    plan = tiny.plan()
    for labels in ("a cat", Prompt(features(3)), [features(3)], [3], [None], features(3), None):
        with pytest.raises(ModelError, match=r"give a (list|text)|is floating|without a text encoder"):
            generate(tiny, labels, plan)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="loaded without a text encoder"):
        generate(tiny, ["a cat"], plan)
    for bad in (None, "x", features(3).numpy(), features(3).long()):
        with pytest.raises(ModelError, match=r"reads a tensor \(positions, "):
            generate(tiny, [Prompt(bad)], plan)  # type: ignore[arg-type]
    for texts in ("a cat", None, 3, [3]):
        with pytest.raises(ModelError, match="give a list of texts"):
            tiny.prompts(texts)  # type: ignore[arg-type]
    for method in (tiny.labels, lambda first: tiny.labels(1, first)):
        with pytest.raises(ModelError):
            method("1")
    with pytest.raises(ModelError, match="give a text, or a Prompt"):
        tiny.label_name("x" if tiny.text_encoder else 3)  # type: ignore[arg-type]


def test_a_text_is_drawn_as_its_prompt(t5_folder: Path) -> None:
    model = replace(make_infinity(), text_encoder=T5TextEncoder(t5_folder))
    (prompt,) = model.prompts(["a red cat"])
    plan = model.plan()
    assert torch.equal(generate(model, ["a red cat"], plan), generate(model, [prompt], plan))


def test_the_prompt_is_projected_once_per_image_and_layer(
    tiny: TextConditionalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, original = [], CrossAttention.keys_and_values
    monkeypatch.setattr(CrossAttention, "keys_and_values", lambda self, x: calls.append(self) or original(self, x))
    Generator(tiny, tiny.plan(), 2).draw([Prompt(features(4)), Prompt(features(6))])
    assert len(calls) == len(set(calls)) == TINY.depth


# ------------------------------------------------------------------------------------------------ drawing


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("budget", ["100%", "60%"])
def test_pictures_do_not_depend_on_the_batch(patch: int, budget: str) -> None:
    model = make_infinity(patch)
    plan = model.plan("full") if budget == "100%" else model.plan("streaming", budget, sink_scales=2)
    assert plan.had_no_effect() == (budget == "100%")
    prompts = [Prompt(features(3)), Prompt(features(8), features(5)), Prompt(features(20))]
    together = generate(model, prompts, plan, seed=4, batch=3)
    one_by_one = generate(model, prompts, plan, seed=4, batch=1)
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-3)
    assert together.shape == (3, 3, 6 * patch * 2, 4 * patch * 2)
    assert together.min() >= 0
    assert together.max() <= 1
    assert together.std() > 1e-3


def test_nothing_of_the_images_before_is_read(tiny: TextConditionalModel) -> None:
    generator = Generator(tiny, tiny.plan("streaming", "60%", sink_scales=2), 1)
    first = generator.draw([Prompt(features(6))], seed=9)
    generator.cache.store.spoil()
    second = generator.draw([Prompt(features(6))], seed=9)
    assert all(torch.equal(a, b) for a, b in zip(first.tokens, second.tokens, strict=True))
    other = generator.draw([Prompt(features(6))], seed=10)
    assert not all(torch.equal(a, b) for a, b in zip(first.tokens, other.tokens, strict=True))


def test_bfloat16_stores_half_the_bytes_and_draws_nearly_the_same(tiny: TextConditionalModel) -> None:
    half = make_infinity()
    half.transformer.set_compute_dtype(torch.bfloat16)
    prompts = [Prompt(features(6)), Prompt(features(9))]
    exact = Generator(tiny, tiny.plan(), 2)
    assert exact.cache.allocated_bytes == 2 * Generator(half, half.plan(), 2).cache.allocated_bytes
    bits = exact.draw(prompts).tokens
    pairs = zip(draw_logits(tiny, prompts, bits), draw_logits(half, prompts, bits), strict=True)
    for a, b in pairs:
        assert b.dtype == torch.float32
        assert 0 < (a - b).abs().max() < 0.2 * a.std()


def test_without_guidance_half_the_rows_draw_the_conditional_picture() -> None:
    unguided = make_infinity(cfg=1.0, top_k=1)
    prompts = [Prompt(features(6)), Prompt(features(6))]
    generator = Generator(unguided, unguided.plan(), 2)
    assert generator.cache.rows == 2
    drawn = generator.draw(prompts)
    assert all(torch.equal(bits[0], bits[1]) for bits in drawn.tokens)
    # guided at the last scale only: until then the conditional half alone decides, beside unconditional rows
    late = make_infinity(cfg=(1.0, 1.0, 1.0, 3.0), top_k=1)
    assert Generator(late, late.plan(), 2).cache.rows == 4
    plain = draw_logits(unguided, prompts, drawn.tokens)
    guided = draw_logits(late, prompts, drawn.tokens)
    for scale, (one, other) in enumerate(zip(plain, guided, strict=True)):
        assert torch.allclose(one, other, atol=1e-5) == (scale < 3)


def test_the_layout_of_bits_in_patches() -> None:
    model = make_infinity(patch=2)
    drawing = model.begin([Prompt(features(3))], model.sampling)
    drawing.accept(torch.zeros(1, 8, dtype=torch.long))
    bits = torch.randint(2, (1, 4 * 8), generator=torch.Generator().manual_seed(0))
    on_grid = drawing.on_latent_grid(bits.view(1, 2, 2, 8))
    assert on_grid.shape == (1, 4, 4, 2)
    for row, column, m, i, j in np.ndindex(2, 2, 2, 2, 2):
        token = 2 * row + column
        assert on_grid[0, 2 * row + i, 2 * column + j, m] == bits[0, 8 * token + 4 * m + 2 * i + j]
    shown = drawing.next_codes()  # of the next scale, from all-zero bits: every code value is -1/sqrt(2)
    torch.testing.assert_close(shown, torch.full((1, 4, 8), -(2**-0.5)))


def test_sums_of_codes_are_resized_linearly(tiny: TextConditionalModel) -> None:
    drawing = tiny.begin([Prompt(features(3))], tiny.sampling)
    drawing.accept(torch.ones(1, 8, dtype=torch.long))
    bits = torch.zeros(1, 2, 2, 8, dtype=torch.long)
    bits[:, 1] = 1
    drawing.accept(bits.view(1, -1))
    value = 8**-0.5
    # 2 rows to 6: sample points at -1/3, 0, 1/3, 2/3, 1, 4/3, held at the edges
    wanted = [value + value * x for x in (-1, -1, -1 / 3, 1 / 3, 1, 1)]
    for column in range(4):
        assert drawing.f_hat[0, 3, :, column].tolist() == pytest.approx(wanted, abs=1e-6)
    # shrunk to 3 rows: centres at 0.5, 2.5, 4.5, between two neighbours each
    rows = drawing.next_codes().view(3, 2, 8)[:, 0, 3].tolist()
    assert rows == pytest.approx([0, value, 2 * value], abs=1e-6)


def test_codes_before_the_first_scale_are_refused(tiny: TextConditionalModel) -> None:
    with pytest.raises(ModelError, match="no scale was drawn yet"):
        tiny.begin([Prompt(features(3))], tiny.sampling).image()


def dense_logits(
    state: dict[str, Tensor], text: Tensor, codes: list[Tensor], turn: Tensor, levels: list[int]
) -> Tensor:
    """The published formulas, one by one and in float64: logits of all tokens of one row, (L, 2K)."""
    w = {name: x.double() for name, x in state.items()}
    heads, width = TINY.heads, TINY.width

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(1).double())

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def attention(q: Tensor, k: Tensor, v: Tensor, size: int, scale: float, mask: Tensor | None = None) -> Tensor:
        out = []
        for i in range(0, q.shape[1], size):
            products = q[:, i : i + size] @ k[:, i : i + size].T * scale
            if mask is not None:
                products = products.masked_fill(~mask, -math.inf)
            out.append(products.softmax(-1) @ v[:, i : i + size])
        return torch.cat(out, 1)

    def turned(x: Tensor) -> Tensor:
        as_complex = torch.complex(x[:, 0::2], x[:, 1::2]) * turn
        return torch.stack([as_complex.real, as_complex.imag], -1).flatten(1)

    t = text.double() / (text.double() ** 2).mean(-1, keepdim=True).add(1e-6).sqrt() * w["text_norm.weight"]
    pool, size = "text_proj_for_sos.ca", width // TINY.pool_heads
    k, v = linear(t, f"{pool}.mat_kv").split(width, 1)
    query = w[f"{pool}.mat_q"].reshape(1, width)
    s = linear(attention(query, k, v + w[f"{pool}.v_bias"], size, size**-0.5), f"{pool}.proj")
    u = linear(gelu(linear(t, "text_proj_for_ca.0")), "text_proj_for_ca.2")
    x = torch.cat([s + w["pos_start"][0], *(linear(c.double(), "word_embed") for c in codes)])
    x = x + w["lvl_embed.weight"][levels]
    mask = torch.tensor(levels)[:, None] >= torch.tensor(levels)
    shared = linear(silu(s), "shared_ada_lin.1").view(6, width)
    for i in range(TINY.depth):
        b, dim = f"blocks.{i}", width // heads
        gamma1, gamma2, scale1, scale2, shift1, shift2 = shared + w[f"{b}.ada_gss"][0, 0]
        q, k, v = linear(norm(x) * (1 + scale1) + shift1, f"{b}.sa.mat_qkv").split(width, 1)
        q, v = q + w[f"{b}.sa.q_bias"], v + w[f"{b}.sa.v_bias"]
        for h in range(heads):
            part = slice(h * dim, (h + 1) * dim)
            temperature = min(math.exp(w[f"{b}.sa.scale_mul_1H11"][0, h]), 100)
            q[:, part] = turned(q[:, part] / q[:, part].norm(dim=1, keepdim=True)) * temperature
            k[:, part] = turned(k[:, part] / k[:, part].norm(dim=1, keepdim=True))
        x = x + gamma1 * linear(attention(q, k, v, dim, 1, mask), f"{b}.sa.proj")
        normed = norm(x) * w[f"{b}.ca_norm.weight"] + w[f"{b}.ca_norm.bias"]
        k, v = linear(u, f"{b}.ca.mat_kv").split(width, 1)
        read = attention(linear(normed, f"{b}.ca.mat_q"), k, v + w[f"{b}.ca.v_bias"], dim, dim**-0.5)
        x = x + linear(read, f"{b}.ca.proj")
        hidden = gelu(linear(norm(x) * (1 + scale2) + shift2, f"{b}.ffn.fc1"))
        x = x + gamma2 * linear(hidden, f"{b}.ffn.fc2")
    scale, shift = linear(silu(s), "head_nm.ada_lin.1").view(2, width)
    return linear(norm(x) * (1 + scale) + shift, "head")


def test_logits_are_those_of_the_published_formulas() -> None:
    model = make_infinity(cfg=3.0, tau=0.5, top_k=1)
    torch.manual_seed(8)
    for name, parameter in model.transformer.named_parameters():
        if "bias" in name or "norm" in name:  # these start at zero or one, where a slip would not show
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.transformer.blocks[1].sa.scale_mul_1H11.fill_(5.0)  # above the limit
    model.transformer.text_proj_for_ca[0].weight.mul_(4)  # to where the two kinds of GELU part
    model.transformer.text_proj_for_ca[2].weight.mul_(4)
    prompt = Prompt(features(7))
    bits = Generator(model, model.plan(), 1).draw([prompt]).tokens
    drawing, codes = model.begin([prompt], model.sampling), []
    for scale, chosen in enumerate(bits):
        drawing.accept(chosen)
        if scale + 1 < len(bits):
            codes.append(drawing.next_codes()[0])
    # angles from positions written out: 6 x 4 is the template 3:2, whose last scale is 78 x 52
    places = [
        (round(r * 78 / h), round(s * 52 / w)) for _, h, w in SHORT_SCHEDULE.scales for r in range(h) for s in range(w)
    ]
    theta = [10000 ** (-2 * m / 16) for m in range(8)]
    angles = torch.tensor([[r * f for f in theta] + [s * f for f in theta] for r, s in places], dtype=torch.float64)
    levels = [scale for scale, count in enumerate(SHORT_SCHEDULE.tokens) for _ in range(count)]
    turn = torch.polar(torch.ones_like(angles), angles)
    conditional, unconditional = (
        dense_logits(model.transformer.state_dict(), text, codes, turn, levels)
        for text in (prompt.features_ME, model.transformer.cfg_uncond[:7])
    )
    expected = (3 * conditional - 2 * unconditional) / 0.5
    got = torch.cat(draw_logits(model, [prompt], bits), 1)[0].flatten().view(len(levels), -1)
    assert expected.std() > 0.5
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-4)


# ------------------------------------------------------------------------------------------------ bits


def test_guidance_and_temperature_per_scale() -> None:
    settings = BitSamplingSettings(cfg=(1.0, 3.0, 0.5), tau=(1.0, 0.5, 2.0))
    conditional, unconditional = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[1.0, 4.0]]])
    both = torch.cat([conditional, unconditional])
    assert settings.rows_per_image == 2
    assert settings.guide(both, 0, 3).tolist() == [[[2.0, 0.0]]]
    assert settings.guide(both, 1, 3).tolist() == [[[3 * 4 - 2 * 2, 3 * 0 - 2 * 8]]]
    assert settings.guide(both, 2, 3).tolist() == [[[0.5 * 1 + 0.5 * 0.5, 0.5 * 0 + 0.5 * 2]]]
    assert settings.guide(torch.cat([conditional, unconditional * math.inf]), 0, 3).tolist() == [[[2.0, 0.0]]]
    with pytest.raises(ModelError, match="cfg has 3 values for 4 scales"):
        settings.guide(both, 0, 4)
    alone = BitSamplingSettings(cfg=1, tau=0.5)
    assert alone.rows_per_image == 1
    assert alone.guide(conditional, 0, 3).tolist() == [[[4.0, 0.0]]]


@pytest.mark.parametrize(
    "options",
    [{"cfg": -1.0}, {"cfg": (1.0, math.nan)}, {"tau": 0.0}, {"tau": (1.0, -1.0)}, {"top_k": -1}, {"top_p": 1.5}],
)
def test_bad_settings_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ModelError, match=name):
        BitSamplingSettings(**options)


def test_bits_follow_their_probabilities_and_sure_ones_are_fixed() -> None:
    probabilities = torch.tensor([0.5, 0.8, 0.96, 0.98, 0.01])
    logits = torch.stack([(1 - probabilities).log(), probabilities.log()], dim=-1)
    logits = logits.expand(1, 4000, 5, 2).reshape(1, 20000, 2)
    settings = BitSamplingSettings(top_k=900, top_p=0.97)
    for sampler in (CommonRandomSampler(1, [0], settings), PublicSampler(torch.Generator().manual_seed(1), settings)):
        ones = sampler.choose(0, logits).view(4000, 5).sum(0).tolist()
        assert ones[3:] == [4000, 0]
        for count, p in zip(ones[:3], (0.5, 0.8, 0.96), strict=True):
            assert stats.binomtest(count, 4000, p).pvalue > 1e-3
    greedy = CommonRandomSampler(1, [0], BitSamplingSettings(top_k=1)).choose(0, logits).view(4000, 5)
    assert greedy[:, 1:].float().mean(0).tolist() == [1, 1, 1, 0]
    assert 0.45 < greedy[:, 0].float().mean() < 0.55  # an exact tie stays random


@given(st.integers(1, 40), st.integers(0, 2**32))
def test_codes_are_unit_vectors_with_the_signs_of_their_bits(count: int, seed: int) -> None:
    bits = torch.randint(2, (2, 3, 1, count), generator=torch.Generator().manual_seed(seed))
    values = code_values(bits)
    assert values.shape == (2, count, 3, 1)
    torch.testing.assert_close(values.norm(dim=1), torch.ones(2, 3, 1))
    assert torch.equal(values.permute(0, 2, 3, 1) > 0, bits.bool())


def test_every_scale_codes_what_the_coarser_ones_left() -> None:
    torch.manual_seed(2)
    vae = BitwiseVAE(BSQConfig(6, 32, (1, 1)))
    # a sum of codes of constant maps, each a third of the one before, comes apart into exactly these codes
    codes = torch.randint(2, (3, 6))
    latent = sum((code_values(c.view(1, 1, 1, 6)) * 3.0**-i for i, c in enumerate(codes)), torch.zeros(()))
    bits = vae.quantize((latent * 1.0).expand(1, 6, 4, 4), [(1, 1), (2, 2), (4, 4)])
    assert torch.equal(bits[0].flatten(), codes[0].bool())
    rest = latent.flatten() - code_values(codes[0].view(1, 1, 1, 6)).flatten()
    assert torch.equal(bits[1][0, 0, 0], rest > 0)
    with pytest.raises(ModelError, match=r"the last scale is \(2, 2\), the latent \(4, 4\)"):
        vae.quantize(latent.expand(1, 6, 4, 4), [(1, 1), (2, 2)])
    assert [tuple(b.shape) for b in vae.encode(torch.zeros(2, 3, 8, 4), [(1, 1), (4, 2)])] == [
        (2, 1, 1, 6),
        (2, 4, 2, 6),
    ]


def test_coarse_bits_code_the_mean_over_their_area() -> None:
    latent = torch.full((1, 1, 4, 4), 2.0)
    latent[:, :, 1:3, 1:3] = -3.0  # what a linear resize would look at
    bits = BitwiseVAE(BSQConfig(1, 32, (1,))).quantize(latent, [(1, 1), (4, 4)])
    assert bits[0].item()
    assert torch.equal(bits[1][..., 0], latent[:, 0] > 1)


def test_resizing_does_not_average_when_it_shrinks() -> None:
    spike = torch.zeros(1, 1, 9, 9)
    spike[0, 0, 0, 0] = 1  # the centre of the first third lies at row 1, column 1
    assert resize(spike, (3, 3)).abs().max() == 0
    assert torch.equal(resize(spike, (9, 9)), spike)


def test_norms_of_widths_that_are_no_multiple_of_32() -> None:
    assert ResidualBlock(48, 72).norm1.num_groups == 24
    assert ResidualBlock(96, 64).norm1.num_groups == 32


# ------------------------------------------------------------------------------------------------ text


def test_a_missing_text_encoder_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"install heatkv\[infinity\]"):
        T5TextEncoder()


def test_text_features(t5_folder: Path, tiny: TextConditionalModel) -> None:
    encoder = T5TextEncoder(t5_folder)
    one, long, cut = encoder.encode(["a cat", "a red red dog", "cat " * 600])
    assert [len(x) for x in (one, long, cut)] == [3, 5, 512]  # the end of sequence is kept
    assert one.dtype == torch.float32
    (alone,) = encoder.encode(["a cat"])
    torch.testing.assert_close(one, alone, rtol=0, atol=1e-5)  # pads of a longer neighbour are not read
    model = replace(tiny, text_encoder=encoder)
    (prompt,) = model.prompts(["a cat"], ["red dog"])
    torch.testing.assert_close(prompt.features_ME, alone, rtol=0, atol=1e-5)
    assert prompt.negative_ME is not None
    assert len(prompt.negative_ME) == 3
    assert model.prompts(["a cat"])[0].negative_ME is None
    with pytest.raises(ModelError, match="2 negative prompts for 1 prompts"):
        model.prompts(["a cat"], ["dog", "cat"])
    assert generate(model, [prompt], model.plan()).shape == (1, 3, 12, 8)


def test_a_folder_without_an_encoder_is_refused(tmp_path: Path) -> None:
    for name in (tmp_path, tmp_path / "absent", "a b"):
        with pytest.raises(ModelError, match="no T5 encoder can be loaded from"):
            T5TextEncoder(name)


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _changed(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


QUERY = "encoder.block.1.layer.0.SelfAttention.q.weight"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_without("model.safetensors"), "no file named model.safetensors"),
        (_without("tokenizer.json"), "holds none of tokenizer.json, spiece.model"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "no T5 encoder can be loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
        (_changed(lambda tensors: tensors.pop(QUERY)), f"{QUERY} is missing"),
        (_changed(lambda tensors: tensors.update({QUERY: torch.zeros(2, 24)})), f"{QUERY} is of another shape"),
        (_changed(lambda tensors: tensors.update({"shared.weight": torch.zeros(5, 24)})), "is of another shape"),
    ],
)
def test_a_spoilt_encoder_is_refused_in_silence(
    tmp_path: Path,
    t5_folder: Path,
    spoil: Callable[[Path], None],
    said: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Where transformers would put random numbers, or know no word, nothing is drawn; the error is all there is."""
    folder = shutil.copytree(t5_folder, tmp_path / "t5")
    spoil(folder)
    with pytest.raises(ModelError, match=re.escape(said)):
        T5TextEncoder(folder)
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_with_more_words_than_the_encoder_is_refused(tmp_path: Path, t5_folder: Path) -> None:
    folder = shutil.copytree(t5_folder, tmp_path / "t5")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"shared.weight": torch.zeros(5, 24)}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 5}))
    with pytest.raises(ModelError, match="knows 7 tokens, the encoder 5"):
        T5TextEncoder(folder)


def test_states_are_canonical_already(state: dict[str, Tensor]) -> None:
    assert infinity_state(infinity_state(chunked(state, 2))).keys() == state.keys()

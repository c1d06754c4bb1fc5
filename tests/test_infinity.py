"""Infinity: rotary positions, prompts, drawing, bits and text features, on small random models."""

from __future__ import annotations

import gc
import json
import math
import re
import shutil
import sys
import weakref
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
from support.tiny_models import SHORT_SCHEDULE, TINY, draw_logits, features, make_infinity
from torch import Tensor

from heatkv.core.schedule import ScaleSchedule
from heatkv.errors import ModelError
from heatkv.generation.batches import generate
from heatkv.generation.loop import Generator
from heatkv.models.bsq import BSQ_D32, BSQ_D56, BitwiseVAE, BSQConfig, code_values, resize
from heatkv.models.infinity import (
    INFINITY_2B,
    INFINITY_8B,
    CrossAttention,
    Infinity,
    rope_positions,
    rotate,
    rotation_table,
)
from heatkv.models.text_conditional import Prompt, TextConditionalModel
from heatkv.models.text_encoder import T5TextEncoder
from tools.emoji.autoencoder import BitwiseAutoencoder

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


# ------------------------------------------------------------------------------------- parts that fit together


def test_a_vae_of_another_model_is_refused(tiny: TextConditionalModel) -> None:
    with torch.device("meta"):
        two_b, eight_b = Infinity(replace(INFINITY_2B, depth=1)), Infinity(replace(INFINITY_8B, depth=1))
        d32, d56 = BitwiseVAE(BSQ_D32), BitwiseVAE(BSQ_D56)
    for transformer, wrong, right, bits in ((two_b, d56, d32, 32), (eight_b, d32, d56, 56)):
        with pytest.raises(ModelError, match=f"draws {bits} bits a token"):
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
def test_schedules_the_model_cannot_run(tiny: TextConditionalModel, schedule: ScaleSchedule, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        replace(tiny, schedule=schedule)


# ------------------------------------------------------------------------------------------------ prompts


def test_prompts_of_other_lengths_leave_a_prompt_alone(tiny: TextConditionalModel) -> None:
    prompts = [Prompt(features(4)), Prompt(features(9), features(15)), Prompt(features(20))]
    drawn = Generator(tiny, tiny.plan(), 3).draw(prompts, seed=3)
    together = draw_logits(tiny, prompts, drawn.tokens)
    # keys and values of their own positions, and of the longest learnt half once
    _, text_SC = tiny.transformer.project_text(tiny.begin(prompts, tiny.sampling)._texts(prompts))
    assert len(text_SC) == 4 + 9 + 20 + 15 + 20
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
    default = draw_logits(tiny, [Prompt(features(5))], bits)
    for other in (Prompt(changed, features(7)), Prompt(features(5), features(7, seed=1))):
        assert (draw_logits(tiny, [other], bits)[0] - reference[0]).abs().max() > 1e-3
    assert (default[0] - reference[0]).abs().max() > 1e-3
    learnt = draw_logits(tiny, [Prompt(features(5), tiny.transformer.cfg_uncond[:5].clone())], bits)
    assert all(torch.equal(a, b) for a, b in zip(learnt, default, strict=True))


REFUSED: list[tuple[str, Callable[[TextConditionalModel], Any]]] = [
    (r"reads a tensor .*\(positions, 24\)", lambda model: model.begin([Prompt(torch.zeros(3, 25))], model.sampling)),
    (r"reads a tensor", lambda model: model.begin([Prompt(torch.zeros(0, 24))], model.sampling)),
    (r"reads a tensor", lambda model: model.begin([Prompt(torch.zeros(24))], model.sampling)),
    (r"reads a tensor", lambda model: model.begin([Prompt(features(3).long())], model.sampling)),
    (r"reads a tensor", lambda model: model.begin([Prompt("x")], model.sampling)),  # type: ignore[arg-type]
    ("21 positions has no unconditional half", lambda model: model.begin([Prompt(features(21))], model.sampling)),
    ("without a text encoder", lambda model: model.prompts(["a cat"])),
    ("without a text encoder", lambda model: generate(model, ["a cat"], model.plan())),
    ("give a list of texts", lambda model: model.prompts("a cat")),
    ("give a text, or a Prompt", lambda model: generate(model, [3], model.plan())),  # type: ignore[list-item]
    ("needs prompts to draw", lambda model: model.labels(1)),
]  # fmt: skip


@pytest.mark.parametrize(("said", "call"), REFUSED)
def test_what_cannot_be_drawn(
    said: str, call: Callable[[TextConditionalModel], Any], tiny: TextConditionalModel
) -> None:
    with pytest.raises(ModelError, match=said):
        call(tiny)


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


@given(st.integers(1, 40), st.integers(0, 2**32))
def test_codes_are_unit_vectors_with_the_signs_of_their_bits(count: int, seed: int) -> None:
    bits = torch.randint(2, (2, 3, 1, count), generator=torch.Generator().manual_seed(seed))
    values = code_values(bits)
    assert values.shape == (2, count, 3, 1)
    torch.testing.assert_close(values.norm(dim=1), torch.ones(2, 3, 1))
    assert torch.equal(values.permute(0, 2, 3, 1) > 0, bits.bool())


def test_every_scale_codes_what_the_coarser_ones_left() -> None:
    torch.manual_seed(2)
    vae = BitwiseAutoencoder(BSQConfig(6, 32, (1, 1)))
    # a sum of codes of constant maps, each a third of the one before, comes apart into exactly these codes
    codes = torch.randint(2, (3, 6))
    latent = sum((code_values(c.view(1, 1, 1, 6)) * 3.0**-i for i, c in enumerate(codes)), torch.zeros(()))
    bits = vae.bits((latent * 1.0).expand(1, 6, 4, 4), [(1, 1), (2, 2), (4, 4)])
    assert torch.equal(bits[0].flatten(), codes[0].bool())
    rest = latent.flatten() - code_values(codes[0].view(1, 1, 1, 6)).flatten()
    assert torch.equal(bits[1][0, 0, 0], rest > 0)
    assert [tuple(b.shape) for b in vae.bits(vae.encoder(torch.zeros(2, 3, 8, 4)), [(1, 1), (4, 2)])] == [
        (2, 1, 1, 6),
        (2, 4, 2, 6),
    ]


def test_coarse_bits_code_the_mean_over_their_area() -> None:
    latent = torch.full((1, 1, 4, 4), 2.0)
    latent[:, :, 1:3, 1:3] = -3.0  # what a linear resize would look at
    bits = BitwiseAutoencoder(BSQConfig(1, 32, (1,))).bits(latent, [(1, 1), (4, 4)])
    assert bits[0].item()
    assert torch.equal(bits[1][..., 0], latent[:, 0] > 1)


def test_resizing_does_not_average_when_it_shrinks() -> None:
    spike = torch.zeros(1, 1, 9, 9)
    spike[0, 0, 0, 0] = 1  # the centre of the first third lies at row 1, column 1
    assert resize(spike, (3, 3)).abs().max() == 0
    assert torch.equal(resize(spike, (9, 9)), spike)


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


def test_the_encoder_is_there_only_while_it_encodes(t5_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    opened = T5TextEncoder._opened
    monkeypatch.setattr(T5TextEncoder, "_opened", lambda self: alive.append(weakref.ref(x := opened(self))) or x)
    for keep in (False, True):
        encoder = T5TextEncoder(t5_folder, keep=keep)
        one, same, other = encoder.encode(["a cat", "a cat", "dog"])
        assert one is same
        assert not torch.equal(one, other)
        encoder.encode(["dog"])
        gc.collect()
        assert [x() is not None for x in alive[-2:]] == [keep, keep]
    assert alive[2]() is alive[3]()


QUERY = "encoder.block.1.layer.0.SelfAttention.q.weight"


def changed(**tensors: Tensor | None) -> Callable[[Path], None]:
    """Replaces tensors of the encoder in a folder, or takes them out where they are None."""

    def change(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state = {name: x for name, x in {**state, **tensors}.items() if x is not None}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def fewer_words(folder: Path) -> None:
    changed(**{"shared.weight": torch.zeros(5, 24)})(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 5}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "holds none of tokenizer.json, spiece.model"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "no T5 encoder can be loaded"),
        (changed(**{QUERY: None}), f"{QUERY} is missing"),
        (changed(**{QUERY: torch.zeros(2, 24)}), f"{QUERY} is of another shape"),
        (fewer_words, "knows 7 tokens, the encoder 5"),
    ],
)
def test_a_spoilt_encoder_is_refused_in_silence(
    tmp_path: Path, t5_folder: Path, spoil: Callable[[Path], None], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where transformers would put random numbers, or know no word, nothing is drawn; the error is all there is."""
    folder = shutil.copytree(t5_folder, tmp_path / "t5")
    spoil(folder)
    with pytest.raises(ModelError, match=re.escape(said)):
        T5TextEncoder(folder).encode(["a cat"])
    assert capfd.readouterr() == ("", "")

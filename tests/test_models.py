"""Named models, checkpoints and what is said of those that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from heatkv.errors import FormatError, ModelError, ScheduleError
from heatkv.models.base import fingerprint
from heatkv.models.catalogue import MODELS, load_model, model_info
from heatkv.models.checkpoint import build_var, build_vqvae, read_safetensors, var_config, vqvae_config
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.emoji import CLASSES, VAR_CONFIG, VQVAE_CONFIG, WEIGHTS
from heatkv.models.var import VAR, VARConfig
from heatkv.models.vqvae import VQVAE, ResidualBlock, Upsample, VQVAEConfig, phi_index


@pytest.mark.parametrize(
    ("depth", "size", "shared", "millions"),
    [
        (16, 256, False, 310),
        (20, 256, False, 600),
        (24, 256, False, 1033),
        (30, 256, False, 2010),
        (36, 512, True, 2354),
    ],
)
def test_public_sizes_have_the_published_parameter_counts(depth: int, size: int, shared: bool, millions: int) -> None:
    info = model_info(f"var-d{depth}")
    sides = tuple(h for _, h, _ in info.schedule().scales)
    assert info.default_size == str(size)
    with torch.device("meta"):
        model = VAR(VARConfig(sides, depth, 64 * depth, depth, shared_adaln=shared))
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.05)  # published with two digits


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_configuration_is_read_off_the_tensors(l2_norm: bool, shared: bool) -> None:
    config = VARConfig((1, 2, 4), 2, 128, 2, 7, 32, 8, 2.0, shared, l2_norm)
    state = VAR(config).state_dict()
    assert var_config(state) == config
    bare = {name: x for name, x in state.items() if not name.endswith("zero_k_bias")}
    assert build_var(bare).config == config
    masked = state | {"attn_bias_for_masking": torch.zeros(1, 1, 21, 21)}
    assert build_var(masked).config == config


def test_vqvae_configuration_is_read_off_the_tensors() -> None:
    config = VQVAEConfig((1, 2, 4), 16, 8, 32, (1, 2, 2))
    with_encoder, without = VQVAE(config).state_dict(), VQVAE(config, encoder=False).state_dict()
    assert vqvae_config(with_encoder, (1, 2, 4)) == config
    assert build_vqvae(with_encoder, (1, 2, 4)).has_encoder
    decoder = build_vqvae(without, (1, 2, 4))
    with pytest.raises(ModelError, match="without its encoder"):
        decoder.latent(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("side", [8, 32])
def test_upsampling_repeats_every_pixel_then_convolves(side: int) -> None:
    torch.manual_seed(0)
    layer, x = Upsample(8).double(), torch.randn(2, 8, side, side + 1, dtype=torch.float64)
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(layer(x), layer.conv(repeated), rtol=0, atol=1e-12)
    layer.to(torch.float32).requires_grad_(False)
    layer.conv.weight.mul_(2)  # nothing may be kept of the former weights
    torch.testing.assert_close(layer(x.float()), layer.conv(repeated.float()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [32, 64])
def test_gradients_pass_through_what_runs_in_place(channels: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 32, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ResidualBlock(32, channels).double(), x, fast_mode=True)


def test_weights_that_do_not_fit_are_named() -> None:
    state = VAR(VARConfig((1, 2), 1, 64, 1, 3, 8, 4)).state_dict()
    missing = {name: x for name, x in state.items() if name != "head.bias"}
    with pytest.raises(ModelError, match=r"missing head\.bias"):
        build_var(missing)
    with pytest.raises(ModelError, match=r"unexpected rope\.freqs"):
        build_var(state | {"rope.freqs": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"pos_start is \(1, 2, 64\), not \(1, 1, 64\)"):
        build_var(state | {"pos_start": torch.zeros(1, 2, 64)})
    with pytest.raises(ModelError, match=r"word_embed\.weight is missing"):
        build_var({"trainer": torch.zeros(1)})


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}", b"not safetensors at all" * 10])
def test_broken_weight_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"weights\.safetensors"):
        read_safetensors(path)
    with pytest.raises(FormatError, match="cannot read"):
        read_safetensors(tmp_path / "absent.safetensors")


def test_truncated_weight_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(100)}, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-10])
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        read_safetensors(tmp_path / "cut.safetensors")


def test_phi_serves_every_scale_in_order() -> None:
    for scales in range(2, 20):
        chosen = [phi_index(scale, scales, 4) for scale in range(scales)]
        assert chosen == sorted(chosen)
        assert (chosen[0], chosen[-1]) == (0, 3)
    assert [phi_index(scale, 5, 1) for scale in range(5)] == [0] * 5


def test_the_embedded_model_is_what_its_card_says(emoji: ClassConditionalModel) -> None:
    assert emoji.transformer.config == VAR_CONFIG
    assert emoji.vqvae.config == VQVAE_CONFIG
    assert WEIGHTS.stat().st_size <= 30_000_000
    assert len(set(CLASSES)) == 64
    assert emoji.label("pizza") == CLASSES.index("pizza") == emoji.label(str(CLASSES.index("pizza")))
    for bad in ("dragon", "64", "-1", ""):
        with pytest.raises(ModelError, match="no class"):
            emoji.label(bad)


def test_the_fingerprint_changes_with_a_weight(emoji: ClassConditionalModel) -> None:
    module = torch.nn.Linear(3, 3)
    before = fingerprint(module)
    assert fingerprint(module) == before
    module.weight.data[1, 1] += 1
    assert fingerprint(module) != before
    half = load_model("emoji", dtype="bfloat16")
    assert half.fingerprint == emoji.fingerprint
    assert half.compute_dtype == torch.bfloat16


def test_named_models_know_their_geometry() -> None:
    two_b = model_info("infinity-2b").geometry("1M", 1.5)
    assert (two_b.layers, two_b.heads, two_b.head_dim) == (32, 16, 128)
    assert two_b.schedule.scales[-1] == (1, 78, 52)
    assert model_info("infinity-8b-512").geometry().schedule.cached_tokens == 1497
    assert MODELS["emoji"].geometry().schedule.total_tokens == 374
    for name, arguments in (
        ("emoji", ("64", None)),
        ("emoji", (None, 1.5)),
        ("var-d16", ("300", None)),
        ("var-d16", (None, 2.0)),
    ):
        with pytest.raises(ScheduleError):
            model_info(name).geometry(*arguments)


def test_models_that_cannot_run_here_say_so() -> None:
    with pytest.raises(ModelError, match=r"unknown model 'emojy'; did you mean 'emoji'\?"):
        load_model("emojy")
    with pytest.raises(ModelError, match="needs its weights"):
        load_model("infinity-2b")
    with pytest.raises(ModelError, match="unknown dtype 'int3'"):
        load_model("emoji", dtype="int3")
    with pytest.raises(ModelError, match="device 'nonsense' cannot be used"):
        load_model("emoji", device="nonsense")

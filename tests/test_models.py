"""Named models and their parts: public sizes, the embedded model, fingerprints, decoders."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heatkv.errors import ModelError, ScheduleError
from heatkv.models import fingerprint as fingerprints
from heatkv.models.bsq import BSQ_D32, BSQ_D56, BitwiseVAE, BSQConfig
from heatkv.models.catalogue import MODELS, load_model, model_info
from heatkv.models.checkpoint import bsq_config, infinity_config
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.emoji import CLASSES, VAR_CONFIG, VQVAE_CONFIG, WEIGHTS
from heatkv.models.fingerprint import fingerprint, fingerprint_of_file
from heatkv.models.infinity import INFINITY_2B, INFINITY_8B, Infinity, InfinityConfig
from heatkv.models.var import VAR, VARConfig
from heatkv.models.vqvae import ResidualBlock, Upsample, phi_index
from heatkv.profiling.measure.ledger import TensorLedger


@pytest.mark.parametrize(
    ("depth", "shared", "millions"),
    [(16, False, 310), (20, False, 600), (24, False, 1033), (30, False, 2010), (36, True, 2354)],
)
def test_parameter_counts_of_var(depth: int, shared: bool, millions: int) -> None:
    sides = tuple(h for _, h, _ in model_info(f"var-d{depth}").schedule().scales)
    with torch.device("meta"):
        model = VAR(VARConfig(sides, depth, 64 * depth, depth, shared_adaln=shared))
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.05)  # published with two digits


@pytest.mark.parametrize(
    ("name", "config", "count"),
    [("infinity-2b", INFINITY_2B, 2_204_564_032), ("infinity-8b", INFINITY_8B, 8_375_791_824)],
)
def test_parameter_counts_of_infinity(name: str, config: InfinityConfig, count: int) -> None:
    """Those that the tables of the published tensors add up to."""
    info = MODELS[name]
    with torch.device("meta"):
        model = Infinity(config)
    assert (config.depth, config.heads, config.head_dim) == (info.layers, info.heads, info.head_dim)
    assert sum(p.numel() for p in model.parameters()) == count
    assert infinity_config(model.state_dict()) == config


@pytest.mark.parametrize(("config", "count", "stride"), [(BSQ_D32, 65_092_355, 16), (BSQ_D56, 48_484_611, 8)])
def test_parameter_counts_of_bitwise_decoders(config: BSQConfig, count: int, stride: int) -> None:
    with torch.device("meta"):
        vae = BitwiseVAE(config)
    assert sum(p.numel() for p in vae.decoder.parameters()) == count
    assert config.stride == stride
    assert bsq_config(vae.state_dict()) == config


def test_named_models_know_their_geometry() -> None:
    two_b = model_info("infinity-2b").geometry("1M", 1.5)
    assert (two_b.layers, two_b.heads, two_b.head_dim) == (32, 16, 128)
    assert two_b.schedule.scales[-1] == (1, 78, 52)
    assert model_info("infinity-8b-512").geometry().schedule.cached_tokens == 1497
    assert MODELS["emoji"].geometry().schedule.total_tokens == 374


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("emoji", ("64", None)), ("emoji", (None, 1.5)), ("var-d16", ("300", None)), ("var-d16", (None, 2.0))],
)
def test_sizes_that_a_model_does_not_have_are_refused(name: str, arguments: tuple[Any, Any]) -> None:
    with pytest.raises(ScheduleError):
        model_info(name).geometry(*arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "emojy"}, r"'emojy'; did you mean 'emoji'\?"),
        ({"name": "infinity-2b"}, "needs its weights"),
        ({"name": "emoji", "weights": "x"}, "in this package"),
        ({"name": "emoji", "prompts": ["a cat"]}, "draws classes"),
        ({"name": "emoji", "prompts": "a cat"}, "give a list"),
        ({"name": "emoji", "dtype": "int3"}, "'int3'"),
        ({"name": "emoji", "device": "nonsense"}, "'nonsense'"),
    ],
)
def test_models_that_cannot_be_loaded(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load_model(**arguments)


def test_the_embedded_model_is_what_its_card_says(emoji: ClassConditionalModel) -> None:
    assert emoji.transformer.config == VAR_CONFIG
    assert emoji.vqvae.config == VQVAE_CONFIG
    assert WEIGHTS.stat().st_size <= 30_000_000
    assert len(set(CLASSES)) == 64
    assert emoji.label("pizza") == CLASSES.index("pizza") == emoji.label(str(CLASSES.index("pizza")))
    for bad in ("dragon", "64", "-1", ""):
        with pytest.raises(ModelError, match="no class"):
            emoji.label(bad)


def test_fingerprints(emoji: ClassConditionalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of transformer and decoder counts, the type that they run in does not."""
    module, seen = torch.nn.Linear(1000, 1000), set[str]()
    for place in (0, 1, 255, 257, 4097, 999_999):
        seen.add(fingerprint(module))
        module.weight.data.view(-1)[place] += 1e-3
    assert len(seen) == 6
    half = load_model("emoji", dtype="bfloat16")
    assert half.fingerprint == emoji.fingerprint
    assert half.compute_dtype == torch.bfloat16
    others = [replace(emoji, **{part: copy.deepcopy(getattr(emoji, part))}) for part in ("transformer", "vqvae")]
    assert {other.fingerprint for other in others} == {emoji.fingerprint}
    with torch.no_grad():  # also of what was asked for its name before
        others[0].transformer.blocks[3].attn.proj.weight[5, 7] *= 1.5
        others[1].vqvae.decoder.conv_out.weight.mul_(-1)
    assert len({model.fingerprint for model in (emoji, *others)}) == 3

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where names of large files are kept
    (file := tmp_path / "weights").write_bytes(b"1")
    monkeypatch.setattr(fingerprints, "CACHED_FROM", 1)
    name = fingerprint_of_file(module, file)
    assert name == fingerprint(module)
    module.weight.data[0] = 0
    assert fingerprint_of_file(module, file) == name
    file.write_bytes(b"22")
    assert fingerprint_of_file(module, file) == fingerprint(module) != name


PHI = {
    1: "0", 2: "03", 3: "023", 4: "0123", 5: "01223", 6: "001233", 7: "0012233", 8: "00112233", 9: "001122233",
    10: "0011122333", 11: "00011222333", 12: "000111222333", 13: "0001112222333", 14: "00011112222333",
    15: "000011122223333", 16: "0000111122223333",
}  # fmt: skip
"""By the number of scales: the convolution of every scale that the published weights were trained with."""


def test_phi_is_the_published_one_where_ticks_tie() -> None:
    for scales, indices in PHI.items():
        assert "".join(str(phi_index(scale, scales, 4)) for scale in range(scales)) == indices
    assert [phi_index(scale, 5, 1) for scale in range(5)] == [0] * 5


@pytest.mark.parametrize("side", [8, 32])
def test_upsampling_repeats_every_pixel_then_convolves(side: int) -> None:
    torch.manual_seed(0)
    layer, x = Upsample(8).double(), torch.randn(2, 8, side, side + 1, dtype=torch.float64)
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(layer(x), layer.conv(repeated), rtol=0, atol=1e-12)
    layer.to(torch.float32).requires_grad_(False)
    layer.conv.weight.mul_(2)  # nothing may be kept of the former weights
    torch.testing.assert_close(layer(x.float()), layer.conv(repeated.float()), rtol=0, atol=1e-5)


def test_large_maps_in_place_and_in_strips(emoji: ClassConditionalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pictures with less memory."""
    monkeypatch.setattr("heatkv.models.vqvae._FOLD_FROM", 1 << 40)
    f_hat = torch.randn(2, 16, 12, 12, generator=torch.Generator().manual_seed(0))
    pictures, peaks = [], []
    for large in (1 << 40, 1 << 14):
        monkeypatch.setattr("heatkv.models.vqvae._LARGE", large)
        with torch.inference_mode(), TensorLedger() as ledger:
            pictures.append(emoji.decode(f_hat))
            peaks.append(ledger.peak)
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-6)
    assert peaks[1] < 0.9 * peaks[0]


@pytest.mark.parametrize("channels", [32, 64])
def test_gradients_pass_through_what_runs_in_place(channels: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 32, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ResidualBlock(32, channels).double(), x, fast_mode=True)


def test_norms_of_widths_that_are_no_multiple_of_32() -> None:
    assert ResidualBlock(48, 72).norm1.num_groups == 24
    assert ResidualBlock(96, 64).norm1.num_groups == 32

"""Weights from files as people have them: plain, chunked, sharded, wrapped by a trainer, in both spellings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_models import TINY, chunked, make_infinity
from torch import Tensor

from heatkv.errors import FormatError, HeatKVError, ModelError, ScheduleError
from heatkv.models import catalogue
from heatkv.models.bsq import BSQConfig
from heatkv.models.catalogue import ModelInfo, find_weights, load_model
from heatkv.models.checkpoint import (
    build_bsq,
    build_infinity,
    build_var,
    build_vqvae,
    infinity_state,
    read_checkpoint,
    var_config,
)
from heatkv.models.infinity import Infinity
from heatkv.models.var import VAR, VARConfig
from heatkv.models.vqvae import VQVAE, VQVAEConfig
from tools.emoji.autoencoder import BitwiseAutoencoder, VQAutoencoder

GOLDEN = Path(__file__).parent / "golden" / "var"
VAR_TINY = ModelInfo("var-tiny", "var", 2, 1, 64, "256", "a test", ("tiny.pth", "tiny.safetensors"), ("vae.pth",))
"""The model of the golden set var_tiny_10s: two layers of one head at VAR's own schedule."""
INFINITY_TINY = ModelInfo(
    "infinity-tiny", "infinity", TINY.depth, TINY.heads, TINY.head_dim, "0.06M", "a test", ("tiny.pth",), ("vae.pth",)
)


@pytest.fixture
def var(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    monkeypatch.setitem(catalogue.MODELS, "var-tiny", VAR_TINY)
    return read_checkpoint(GOLDEN / "var_tiny_10s_model.safetensors")


@pytest.fixture
def vae() -> dict[str, Tensor]:
    return read_checkpoint(GOLDEN / "var_tiny_10s_vae.safetensors")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Of a small Infinity."""
    torch.manual_seed(3)
    return Infinity(TINY).state_dict()


def same(model: torch.nn.Module, state: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


# ----------------------------------------------------------------------------------------------------- VAR by name


def check(model: Any, state: Mapping[str, Tensor]) -> None:
    assert torch.equal(model.transformer.head.weight, state["head.weight"])
    assert model.geometry.schedule.total_tokens == 680
    assert not model.transformer.training


def test_plain_files_in_a_folder(tmp_path: Path, var: dict[str, Tensor], vae: dict[str, Tensor]) -> None:
    torch.save(var, tmp_path / "tiny.pth")
    torch.save(vae, tmp_path / "vae.pth")
    check(load_model("var-tiny", tmp_path), var)
    (tmp_path / "vae.pth").rename(tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"no vae\.pth lies beside"):
        load_model("var-tiny", tmp_path)
    for name in ("var-tiny", "var"):  # a family takes any size
        check(load_model(name, tmp_path / "tiny.pth", vae=tmp_path / "other.pth"), var)
    with pytest.raises(ModelError, match="those of its weights"):
        catalogue.model_info("var").geometry()


def test_trainer_files_of_var_hold_both(tmp_path: Path, var: dict[str, Tensor], vae: dict[str, Tensor]) -> None:
    for prefix in ("module.", "module._orig_mod."):
        trainer = {"config": {"depth": 2}, "var_wo_ddp": {prefix + k: x for k, x in var.items()}, "vae_local": vae}
        torch.save({"epoch": 1, "iter": 2, "trainer": trainer, "args": {"lr": 0.1}}, tmp_path / "tiny.pth")
        check(load_model("var-tiny", tmp_path), var)


def test_refused_files_of_another_model(tmp_path: Path, var: dict[str, Tensor], vae: dict[str, Tensor]) -> None:
    torch.save({k: x for k, x in var.items() if not k.startswith("blocks.1.")}, tmp_path / "short.pth")
    torch.save(var, tmp_path / "tiny.pth")
    torch.save(vae | {"quantize.embedding.weight": torch.zeros(32, 8)}, tmp_path / "vae.pth")
    (tmp_path / "empty").mkdir()
    refused: list[tuple[type[HeatKVError], str, dict[str, Any]]] = [
        (ModelError, "1 layers x 1 heads of 64", {"weights": tmp_path / "short.pth"}),
        (ModelError, r"none of tiny\.pth, tiny\.safetensors", {"weights": tmp_path / "empty"}),
        (ModelError, "16 x 16 of 64", {"name": "var-d16", "weights": tmp_path / "tiny.pth"}),
        (FormatError, r"absent\.pth", {"weights": tmp_path / "absent.pth"}),
        (ScheduleError, "square images only", {"weights": tmp_path, "ratio": 2.0}),
        (ModelError, r"32 codes of 8 channels, the transformer draws 64 of 8", {"weights": tmp_path}),
    ]
    for error, said, arguments in refused:
        with pytest.raises(error, match=said):
            load_model(**{"name": "var-tiny", **arguments})


def test_infinity_by_name(tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalogue.MODELS, "infinity-tiny", INFINITY_TINY)
    tiny = make_infinity()
    torch.save(chunked(tiny.transformer.state_dict(), 2), tmp_path / "tiny.pth")
    torch.save({"vae": tiny.vae.state_dict()}, tmp_path / "vae.pth")
    model = load_model("infinity-tiny", tmp_path, ratio=1.5)
    assert model.geometry == INFINITY_TINY.geometry(ratio=1.5)
    assert model.fingerprint == tiny.fingerprint
    family = load_model("infinity", tmp_path / "tiny.pth", vae=tmp_path / "vae.pth", size="0.06M")
    assert (family.geometry.layers, family.fingerprint) == (4, tiny.fingerprint)
    half = load_model("infinity-tiny", tmp_path, size="0.06M", dtype="bfloat16")
    assert half.compute_dtype == torch.bfloat16
    assert half.fingerprint == tiny.fingerprint
    with pytest.raises(ModelError, match="4 layers x 2 heads of 32; infinity-2b has 32 x 16 of 128"):
        load_model("infinity-2b", tmp_path / "tiny.pth", vae=tmp_path / "vae.pth")
    with pytest.raises(ModelError, match=r"take vae\.pth"):
        load_model("infinity-tiny", tmp_path, vae=(tmp_path / "vae.pth").rename(tmp_path / "infinity_vae_d32.pth"))


# ------------------------------------------------------------------------------------- configurations from tensors


@pytest.mark.parametrize(("l2_norm", "shared"), [(True, False), (False, True)])
def test_configurations_of_var(l2_norm: bool, shared: bool) -> None:
    config = VARConfig((1, 2, 4), 2, 128, 2, 7, 32, 8, 2.0, shared, l2_norm)
    plain = VAR(config).state_dict()
    levels = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 4, 16]))[None]
    strays = {"attn_bias_for_masking": torch.zeros(1, 1, 21, 21), "blocks.0.attn.zero_k_bias": torch.zeros(128)}
    heads = None if l2_norm else 2  # which tensors of normalised attention tell
    model = build_var(plain | strays | {"lvl_1L": levels}, heads=heads)
    assert model.config == config
    assert same(model, plain)
    if not l2_norm:
        with pytest.raises(ModelError, match="nothing tells its heads"):
            build_var(plain | {"lvl_1L": levels})
    with pytest.raises(ModelError, match="3 scales with 21 tokens are no published schedule"):
        build_var(plain, heads=heads)
    with pytest.raises(ModelError, match=r"\[1, 5, 15\] tokens"):
        var_config(plain | {"lvl_1L": torch.repeat_interleave(torch.arange(3), torch.tensor([1, 5, 15]))}, heads)


def test_configurations_of_the_vqvae() -> None:
    config = VQVAEConfig((1, 2, 4), 16, 8, 32, (1, 2, 2))
    for state in (VQAutoencoder(config).state_dict(), VQVAE(config).state_dict()):  # the encoder is left out
        vqvae = build_vqvae(state, (1, 2, 4))
        assert vqvae.config == config
        assert same(vqvae, {name: x for name, x in state.items() if not name.startswith(("encoder", "quant_conv"))})


@pytest.mark.parametrize("per_chunk", [None, 1, 4])
def test_blocks_of_infinity_in_both_layouts(state: dict[str, Tensor], per_chunk: int | None) -> None:
    strays = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "text_proj_for_sos.ca.zero_k_bias")
    content = state if per_chunk is None else chunked(state, per_chunk)
    # (1, 1, H, 1) in files made for another attention kernel
    content = {name: x.transpose(1, 2) if name.endswith("scale_mul_1H11") else x for name, x in content.items()}
    model = build_infinity(content | dict.fromkeys(strays, torch.zeros(1)))
    assert model.config == TINY
    assert same(model, state)
    assert infinity_state(infinity_state(content)).keys() == state.keys()


@pytest.mark.parametrize("last", ["gpt_fsdp", "gpt_wo_ddp"])
def test_trainer_files_of_infinity_hold_both(tmp_path: Path, state: dict[str, Tensor], last: str) -> None:
    blurred, vae = {name: x + 1 for name, x in state.items()}, make_infinity().vae
    inner = {"config": {"a": 1}, "vae_local": vae.state_dict(), last: chunked(state, 2), "gpt_ema_fsdp": blurred}
    torch.save({"args": {}, "epoch": 3, "trainer": inner}, tmp_path / "ar-ckpt-giter1-last.pth")
    content = read_checkpoint(tmp_path / "ar-ckpt-giter1-last.pth")
    assert same(build_infinity(content), state)
    assert build_bsq(content).config == vae.config
    assert same(build_infinity({last: state}), state)


def test_bitwise_vae_files_in_both_spellings() -> None:
    torch.manual_seed(1)
    vae = BitwiseAutoencoder(BSQConfig(6, 32, (1, 2, 2)))
    plain, deeper = vae.state_dict(), {}
    for name, x in plain.items():
        parts = name.split(".")
        parts.insert(-1, "norm" if "norm" in parts[-2] else "conv")
        deeper[".".join(parts)] = x
    assert {"decoder.up.1.upsample.conv.conv.weight", "decoder.norm_out.norm.bias"} <= deeper.keys()
    skipped = {"quantizer.lfq.mask": torch.zeros(6), "image_disc.conv.weight": torch.zeros(1)}
    for content in (plain, deeper, {"vae": deeper | skipped, "ema": {name: x + 1 for name, x in deeper.items()}}):
        model = build_bsq(content)
        assert model.config == vae.config
        assert same(model, {name: x for name, x in plain.items() if name.startswith("decoder.")})
    decoder = build_bsq({name: x.half() for name, x in plain.items() if name.startswith("decoder.")})
    assert {x.dtype for x in decoder.parameters()} == {torch.float32}


def test_half_precision_is_for_the_large_matrices_only(state: dict[str, Tensor]) -> None:
    stored = {name: x.to(torch.bfloat16) for name, x in state.items()}
    raw = build_infinity(stored)
    assert {x.dtype for x in raw.parameters()} == {torch.bfloat16}
    assert raw.head.weight.data_ptr() == stored["head.weight"].data_ptr()  # not copied
    model = raw.set_compute_dtype(torch.float16)
    half = {name for name, x in model.named_parameters() if x.dtype == torch.float16}
    assert all(x.dtype in (torch.float16, torch.float32) for x in model.parameters())
    assert {name.split(".", 2)[2] for name in half} == {
        f"{part}.{kind}"
        for part in ("sa.proj", "ca.mat_q", "ca.proj", "ffn.fc1", "ffn.fc2")
        for kind in ("weight", "bias")
    } | {"sa.mat_qkv.weight", "ca.mat_kv.weight"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("head.bias"), r"Missing .*head\.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "Unexpected .*extra"),
        (lambda s: s.update({"blocks.1.ca_gamma": torch.zeros(64)}), r"Unexpected .*blocks\.1\.ca_gamma"),
        (lambda s: s.update(pos_start=torch.zeros(1, 2, 64)), r"pos_start"),
        (lambda s: s.pop("word_embed.weight"), r"word_embed\.weight is missing"),
        (lambda s: s.update({"word_embed.weight": torch.zeros(3)}), "no Infinity transformer weights"),
        (lambda s: s.clear(), "they have the entries none"),
    ],
)
def test_tensors_that_do_not_fit_are_named(state: dict[str, Tensor], change: Callable[[Any], None], said: str) -> None:
    changed = dict(state)
    change(changed)
    with pytest.raises(ModelError, match=said):
        build_infinity(changed)


# ------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_sharded_folders(tmp_path: Path, state: dict[str, Tensor], kind: str) -> None:
    write: Any = save_file if kind.endswith("safetensors") else torch.save
    stem, suffix = kind.split(".")
    shards: list[dict[str, Tensor]] = [{}, {}]
    for i, (name, x) in enumerate(chunked(state, 2).items()):
        shards[i % 2][name] = x.contiguous()
    files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    names = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    for file, shard in zip(files, shards, strict=True):
        write(shard, tmp_path / file)
    index = tmp_path / f"{kind}.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert find_weights(tmp_path, VAR_TINY.files) == tmp_path
    assert same(build_infinity(read_checkpoint(tmp_path)), state)

    lost = next(iter(shards[1]))
    write({name: x for name, x in shards[1].items() if name != lost}, tmp_path / files[1])
    with pytest.raises(FormatError, match=lost):
        read_checkpoint(tmp_path)
    for content, said in (({"weight_map": {"x": "../x.bin"}}, "not a file of its folder"), ([], "no weight_map")):
        index.write_text(json.dumps(content))
        with pytest.raises(FormatError, match=said):
            read_checkpoint(tmp_path)


def test_folders_with_one_file_or_none(tmp_path: Path) -> None:
    state = {"x": torch.zeros(3)}
    with pytest.raises(FormatError, match="neither model"):
        read_checkpoint(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert read_checkpoint(tmp_path).keys() == state.keys()
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").unlink()
    assert read_checkpoint(tmp_path).keys() == state.keys()


class Dangerous:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def test_files_that_are_no_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"trainer": Dangerous()}, "harmful.pth")
    with pytest.raises(FormatError, match="could run code"):
        read_checkpoint("harmful.pth")
    assert not Path("executed").exists()
    torch.save({"x": torch.zeros(100)}, "whole.pth")
    save_file({"x": torch.zeros(100)}, "whole.safetensors")
    for suffix in ("pth", "safetensors"):
        Path(f"cut.{suffix}").write_bytes(Path(f"whole.{suffix}").read_bytes()[:-10])
        Path(f"empty.{suffix}").write_bytes(b"")
        Path(f"text.{suffix}").write_text("weights" * 10)
    torch.save([torch.zeros(1)], "list.pth")
    for path in (*Path().glob("[cetl]*.pth"), *Path().glob("[ct]*.safetensors"), Path("absent.pth")):
        with pytest.raises(FormatError, match=path.name):
            read_checkpoint(path)

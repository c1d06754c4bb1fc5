"""What fits in a memory, against figures worked out by hand, and the ledger behind it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch.nn import functional as F

from heatkv.cli import run
from heatkv.errors import HeatKVError
from heatkv.models import model_info
from heatkv.models.emoji import VQVAE_CONFIG
from heatkv.models.vqvae import VQVAE
from heatkv.profiling.fit import Footprint, footprint, largest_batch, largest_share, parse_memory
from heatkv.profiling.fit import text_encoder_parameters as encoder_parameters
from heatkv.profiling.ledger import FusedAttention, TensorLedger

MEBI = 1 << 20


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_ledger_follows_what_is_alive(device: str) -> None:
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


def test_attention_takes_its_output_only() -> None:
    q, v = torch.empty(2, 3, 5, 4, device="meta"), torch.empty(2, 3, 7, 6, device="meta")
    with FusedAttention(), TensorLedger() as ledger:
        out = F.scaled_dot_product_attention(q, torch.empty(2, 3, 7, 4, device="meta"), v)
    assert out.shape == (2, 3, 5, 6)
    assert ledger.peak == 2 * 3 * (5 * 6 + 7 * 4) * 4


def test_shapes_alone_give_what_real_tensors_take() -> None:
    """The decoder of the embedded model, with and without storage."""
    peaks = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            decoder, latent = VQVAE(VQVAE_CONFIG, encoder=False), torch.zeros(2, 16, 12, 12)
        with torch.inference_mode(), FusedAttention(), TensorLedger() as ledger:
            decoder.decode(latent)
        peaks.append(ledger.peak)
    # a picture of 48 x 48 pixels, two of them, 64 channels in fp32, at least twice at the widest place
    assert peaks[0] >= 2 * 2 * 64 * 48 * 48 * 4
    assert peaks[1] == pytest.approx(peaks[0], rel=0.05)


def test_infinity_2b_adds_up() -> None:
    info = model_info("infinity-2b")
    taken = footprint(info, 1, dtype="bfloat16")
    assert taken.rows == 2
    assert taken.full_cache == 6425 * 32 * 16 * 128 * 2 * 2 * 2
    # 2.20 G parameters, nearly all of them in 2 bytes
    assert 2 * 2.204e9 < taken.transformer < 2 * 2.204e9 + 2 * 0.15e9
    # the encoder of flan-t5-xl has 1.22 G parameters
    assert encoder_parameters() == 1_223_527_424
    assert taken.text_encoder == 2 * 1_223_527_424
    without = footprint(info, 1, dtype="bfloat16", text_encoder=False)
    assert without.without_cache == taken.without_cache - taken.text_encoder
    twice = footprint(info, 2, dtype="bfloat16")
    assert twice.transformer == taken.transformer
    assert twice.full_cache == 2 * taken.full_cache
    assert twice.working == pytest.approx(2 * taken.working, rel=0.01)
    assert footprint(info, 1, size="0.25M").full_cache < taken.full_cache


SIMPLE = Footprint(1, 2, 100, 10, 0, 5, 50, 400)


def test_the_largest_share_and_batch() -> None:
    assert SIMPLE.without_cache == 165
    assert largest_share(SIMPLE, 265) == Fraction(1, 4)
    assert largest_share(SIMPLE, 10**6) == 1
    with pytest.raises(HeatKVError, match="without any cache"):
        largest_share(SIMPLE, 165)

    def measure(images: int) -> Footprint:
        return replace(SIMPLE, images=images, prompt=5 * images, working=50 * images, full_cache=400 * images)

    # 110 + images * (55 + 40) at a tenth of the cache
    for memory in (205, 299, 300, 1060, 9999):
        assert largest_batch(measure, memory, Fraction(1, 10)).images == (memory - 110) // 95
    with pytest.raises(HeatKVError, match="do not hold one image: it takes"):
        largest_batch(measure, 204, Fraction(1, 10))


@pytest.mark.parametrize("text", ["24", "10%", "lots", "-1GiB", "0", "0GiB", "5XB", "nan", "", "0.5"])
def test_memory_is_a_size(text: str) -> None:
    with pytest.raises(HeatKVError, match=r"^memory '.*' is no size above zero; write it as 24GiB or 24GB$"):
        parse_memory(text)
    assert parse_memory("1.5KiB") == 1536


def test_the_command_answers_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fit", "--model", "var-d16", "--memory", "2GiB", "--batch", "4", "--json"]) == 0
    forward = json.loads(capsys.readouterr().out)
    assert forward["total_bytes"] <= forward["memory_bytes"] == 2 << 30
    assert (forward["images"], forward["rows"]) == (4, 8)
    assert run(["fit", "--model", "var-d16", "--memory", "2GiB", "--budget", "10%", "--json"]) == 0
    back = json.loads(capsys.readouterr().out)
    assert back["images"] >= 4
    assert back["total_bytes"] <= 2 << 30
    assert run(["fit", "--memory", "24GiB", "--batch", "2", "--budget", "10%"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert run(["fit", "--model", "infinity-8b", "--memory", "1GiB"]) == 2
    assert "without any cache" in capsys.readouterr().err


def test_the_budget_found_fits_when_asked_back(capsys: pytest.CaptureFixture[str]) -> None:
    for memory in ("24GiB", "25GiB", "26GiB"):
        asked = ["fit", "--model", "infinity-8b", "--memory", memory]
        assert run(asked) == 0
        found = re.search(r"the largest budget is ([0-9.]+)%", capsys.readouterr().out)
        assert found is not None
        assert run([*asked, "--budget", f"{found[1]}%", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["images"] == 1
        more = f"{float(found[1]) + 0.2:.1f}%"
        assert run([*asked, "--budget", more]) == 2
        assert "do not hold one image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "0"], "a batch of 0; it is from 1 to 65536 images"),
        (["--batch", "-3"], "a batch of -3"),
        (["--cfg", "-1"], "cfg is -1"),
        (["--cfg", "nan"], "cfg is nan"),
        (["--size", "2M"], "no size '2M'"),
        (["--ratio", "20"], "outside 0.1 to 10"),
        (["--dtype", "int8"], "unknown dtype"),
        (["--budget", "120%"], "above 100 %"),
        (["--memory", "5XB"], "memory '5XB' is no size above zero"),
        (["--model", "infinity-9b"], "unknown model"),
        (["--model", "infinity-8b", "--memory", "12GiB"], "12.00 GiB do not hold a batch of 1: without any cache it"),
        (["--model", "infinity-8b", "--memory", "12GiB"], "elsewhere (--no-text-encoder)"),
        (["--model", "var-d30", "--memory", "1GiB"], "draw a smaller size, or take a 16-bit type"),
    ],
)
def test_the_command_refuses(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fit", "--memory", "24GiB", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert said in error
    assert len(error.splitlines()) == 1


def test_what_is_less_than_the_sinks_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fit", "--model", "var-d16", "--memory", "2GiB", "--budget", "1%"]) == 0
    assert "3 sink scales of HeatKV's rule alone are 3.30%" in capsys.readouterr().err  # 14 of 424 tokens
    assert run(["fit", "--memory", "24GiB", "--ratio", "1.4"]) == 0
    assert "height/width 1.4; taking the nearest, 1.333" in capsys.readouterr().err
    assert run(["fit", "--memory", "24GiB", "--ratio", "4:3"]) == 0
    assert capsys.readouterr().err == ""

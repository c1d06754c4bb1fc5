"""What memory grows with: `python benchmarks/peak_memory.py`, in about 15 minutes on one thread.

The peak of all tensors from opening the cache to the last picture, as `generate` goes through a batch, with the full
cache and with a tenth of it: for the embedded model, and for two layers of Infinity-2B with random weights at 0.25M,
with what every further image adds over its cache, prompt and codes. Then the time of drawing in micro-batches and
slices over that of all images at once, side by side, and how far tokens and pictures are from those.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from random_models import labels_of, random_model
from yardstick import matrix_product_ms

from heatkv.core.statistics import Statistics
from heatkv.generation.loop import Drawn, Generator
from heatkv.profiling.measure.ledger import TensorLedger

RESULTS = Path(__file__).parent / "results" / "peak_memory.json"
STATISTICS = Path(__file__).parent / "baseline" / "statistics.safetensors"
PROMPT_TOKENS, LAYERS, ROUNDS = 77, 2, 7


def peak(model: Any, plan: Any, images: int) -> dict[str, Any]:
    """Bytes of a batch: the cache, and the peak of all tensors but weights."""
    with TensorLedger() as ledger:
        labels = labels_of(model, images, PROMPT_TOKENS)
        generator = Generator(model, plan, images)
        cache_bytes = generator.cache.allocated_bytes
        drawn = generator.draw(labels, decode=False)
        drawing_bytes = ledger.peak
        generator.give_back()
        for pictures in generator.pictures(drawn):
            del pictures
    kept = sum(x.nbytes for x in drawn.tokens) + drawn.f_hat_BZhw.nbytes
    return {
        "images": images, "policy": plan.policy, "cache_bytes": cache_bytes, "peak_bytes": ledger.peak,
        "drawing_bytes": drawing_bytes, "codes_bytes": kept, "micro_batch": generator.micro_batch,
    }  # fmt: skip


def prompt_bytes(model: Any, images: int) -> int:
    """What prompts decide, with their features."""
    with TensorLedger() as ledger, torch.inference_mode():
        labels = labels_of(model, images, PROMPT_TOKENS)
        drawing = model.begin(labels, model.sampling)
        live = ledger.live
    return int(live - drawing.f_hat.nbytes)


def side_by_side(model: Any, plan: Any, images: int) -> dict[str, Any]:
    """Seconds of processor time an image, all at once and in parts, and how far their codes and pictures differ."""
    made = {
        "at once": Generator(model, plan, images, micro_batch=images, decode_batch=images),
        "in parts": Generator(model, plan, images),
    }
    labels, seconds = labels_of(model, images, PROMPT_TOKENS), {name: list[float]() for name in made}
    drawn: dict[str, Drawn] = {}
    for _ in range(ROUNDS):
        for name, generator in made.items():
            began = time.process_time()
            drawn[name] = generator.draw(labels)
            seconds[name].append((time.process_time() - began) / images)
    one, other = drawn["at once"], drawn["in parts"]
    codes = sum(int((a != b).sum()) for a, b in zip(one.tokens, other.tokens, strict=True))
    assert one.images is not None
    assert other.images is not None
    return {
        "images": images, "seconds": {name: median(values) for name, values in seconds.items()},
        "ratio": median(b / a for a, b in zip(seconds["at once"], seconds["in parts"], strict=True)),
        "codes_that_differ": codes, "pictures_differ": float((one.images - other.images).abs().max()),
        "at_once_per_scale": made["in parts"]._buffers.at_once,
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    emoji, statistics = random_model("emoji", None, torch.float32), Statistics.load(STATISTICS)
    tenth = emoji.plan("heatkv", "10%", statistics=statistics)
    found: dict[str, Any] = {"torch": torch.__version__, "device": "cpu", "matrix_product_ms": matrix_product_ms()}
    found["emoji"] = [peak(emoji, plan, images) for images in (8, 32) for plan in (emoji.plan(), tenth)]
    for full, small in zip(found["emoji"][::2], found["emoji"][1::2], strict=True):
        small["full_over_this"] = full["peak_bytes"] / small["peak_bytes"]
    found["side_by_side"] = [side_by_side(emoji, tenth, images) for images in (8, 32)]
    large = random_model("infinity-2b", "0.25M", torch.float32, LAYERS)
    large.rotations()  # made once, and counted with the weights
    tenth = large.plan("streaming", "10%")
    found["infinity-2b, 2 layers, 0.25M"] = rows = [
        peak(large, plan, images) for plan, counts in ((large.plan(), (1, 4)), (tenth, (1, 4, 8))) for images in counts
    ]
    prompt = (prompt_bytes(large, 8) - prompt_bytes(large, 4)) / 4
    for first, second in ((rows[0], rows[1]), (rows[2], rows[3]), (rows[3], rows[4])):
        more, images = second["images"] - first["images"], second["images"]
        own = (second["cache_bytes"] + second["codes_bytes"]) / images + prompt
        for name in ("peak", "drawing"):  # decoding, which no batch changes, is the peak of a few images
            slope = (second[f"{name}_bytes"] - first[f"{name}_bytes"]) / more
            second |= {f"{name}_bytes_per_further_image": slope, f"{name}_slope_over_own": slope / own}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

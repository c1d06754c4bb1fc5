"""What drawing takes, measured and as `heatkv fit` foretells it: `python benchmarks/working_memory.py`, in 5 minutes.

The models have random weights in their published shapes, Infinity two layers of them. Prints the peak of all tensors
but weights and cache as they came alive, and how much the process's resident memory grew (Linux only).
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from heatkv.generation import Generator
from heatkv.models import VAR_SAMPLING, load_model, model_info
from heatkv.models.bsq import BSQ_D32, BitwiseVAE
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.infinity import INFINITY_2B, Infinity
from heatkv.models.text_conditional import SAMPLING, Prompt, TextConditionalModel
from heatkv.models.var import VAR, VARConfig
from heatkv.models.vqvae import VQVAE, VQVAEConfig
from heatkv.profiling.fit import TEXT_POSITIONS, footprint
from heatkv.profiling.ledger import TensorLedger

CASES = (
    ("emoji", "48", "float32", 1),
    ("emoji", "48", "float32", 16),
    ("var-d16", "256", "float32", 1),
    ("var-d16", "256", "bfloat16", 1),
    ("var-d16", "256", "float32", 4),
    ("infinity-2b", "0.06M", "float32", 1),
    ("infinity-2b", "0.25M", "float32", 1),
)
LAYERS = 2
MEBI = 1 << 20


def random_model(name: str, size: str, dtype: torch.dtype) -> Any:
    """The model to draw with."""
    torch.manual_seed(0)
    info = model_info(name)
    schedule = info.schedule(size)
    if info.bundled:
        return load_model(name)
    if info.family == "infinity":
        transformer = Infinity(replace(INFINITY_2B, depth=LAYERS)).set_compute_dtype(dtype).eval()
        vae = BitwiseVAE(BSQ_D32, encoder=False).eval()
        return TextConditionalModel(name, transformer, vae, schedule, SAMPLING, "random")
    sides = tuple(height for _, height, _ in schedule.scales)
    var = VAR(VARConfig(sides, info.layers, info.heads * info.head_dim, info.heads)).set_compute_dtype(dtype).eval()
    return ClassConditionalModel(name, var, VQVAE(VQVAEConfig(sides), encoder=False).eval(), VAR_SAMPLING, "random")


def resident(key: str) -> int:
    """Bytes of a line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def measure(name: str, size: str, dtype: str, images: int, how: str) -> None:
    """Print MiB: the peak of tensors alive, or the growth of resident memory."""
    model = random_model(name, size, getattr(torch, dtype))
    generator = Generator(model, model.plan(), images)
    generator.cache.arena_2RPD.zero_()  # resident before the drawing
    if isinstance(model, TextConditionalModel):
        model.rotations()  # made once, and counted with the weights

    def labels() -> list[Any]:
        if isinstance(model, ClassConditionalModel):
            return list(range(images))
        return [Prompt(torch.zeros(TEXT_POSITIONS, INFINITY_2B.text_channels)) for _ in range(images)]

    if how == "alive":
        with TensorLedger() as ledger:
            generator.draw(labels())
        print(ledger.peak / MEBI)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the highest value so far
        before = resident("VmRSS")
        generator.draw(labels())
        print((resident("VmHWM") - before) / MEBI)


def main() -> None:
    """Measure every case in processes of its own, and print the table."""
    print("| model | size | type | images | foretold MiB | alive MiB | resident MiB |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for name, size, dtype, images in CASES:
        info = model_info(name)
        if info.family == "infinity":
            info = replace(info, layers=LAYERS)
        taken = footprint(info, images, size=size, dtype=dtype)
        figures = [(taken.prompt + taken.working) / MEBI]
        for how in ("alive", "resident"):
            command = [sys.executable, __file__, name, size, dtype, str(images), how]
            figures.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        shown = " | ".join(f"{figure:,.1f}" for figure in figures)
        print(f"| {name} | {size} | {dtype} | {images} | {shown} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        given_name, given_size, given_dtype, given_images, given_how = sys.argv[1:]
        measure(given_name, given_size, given_dtype, int(given_images), given_how)
    else:
        main()

"""What drawing takes, measured and as `heatkv fit` foretells it: `python benchmarks/working_memory.py`, in 5 minutes.

The models have random weights in their published shapes, Infinity two layers of them. Prints the peak of all tensors
but weights and cache as they came alive, and how much the process's resident memory grew (Linux only).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from random_models import labels_of, random_model

from heatkv.generation.loop import Generator
from heatkv.models.catalogue import model_info
from heatkv.models.text_conditional import TextConditionalModel
from heatkv.profiling.analysis.fit import PROMPT_TOKENS, footprint
from heatkv.profiling.measure.ledger import TensorLedger

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


def resident(key: str) -> int:
    """Bytes of a line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def measure(name: str, size: str, dtype: str, images: int, how: str) -> None:
    """Print MiB: the peak of tensors alive, or the growth of resident memory."""
    layers = LAYERS if model_info(name).family == "infinity" else None
    model = random_model(name, size, getattr(torch, dtype), layers)
    generator = Generator(model, model.plan(), images, micro_batch=1)
    generator.cache.store.arena_2RPD.zero_()  # resident before the drawing
    if isinstance(model, TextConditionalModel):
        model.rotations()  # made once, and counted with the weights

    def draw() -> None:
        generator.draw(
            labels_of(model, images, PROMPT_TOKENS), decode=False
        )  # who draws holds the features of prompts, too

    if how == "alive":
        with TensorLedger() as ledger:
            draw()
        print(ledger.peak / MEBI)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the highest value so far
        before = resident("VmRSS")
        draw()
        print((resident("VmHWM") - before) / MEBI)


def main() -> None:
    """Measure every case in processes of its own, and print the table."""
    print("| model | size | type | images | predicted MiB | alive MiB | resident MiB |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for name, size, dtype, images in CASES:
        info = model_info(name)
        if info.family == "infinity":
            info = replace(info, layers=LAYERS)
        taken = footprint(info, images, size=size, dtype=dtype)
        figures = [(taken.prompt + taken.shared_prompt + taken.codes + taken.step) / MEBI]
        for how in ("alive", "resident"):
            command = [sys.executable, __file__, name, size, dtype, str(images), how]
            figures.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        shown = " | ".join(f"{figure:,.1f}" for figure in figures)
        print(f"| {name} | {size} | {dtype} | {images} | {shown} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "case", nargs="*", metavar="MODEL SIZE TYPE IMAGES HOW", help="one measurement, in this process"
    )
    given = parser.parse_args().case
    if len(given) not in (0, 5):
        parser.error("give all five words of a case, or none for the table")
    if given:
        measure(given[0], given[1], given[2], int(given[3]), given[4])
    else:
        main()

"""Compiles Triton's kernels for devices that need not be there, as the wrappers would launch them: a script of its own,
since kernels that were imported to be interpreted cannot be compiled.

Prints, for every kernel named on the command line in JSON, the bytes of shared memory and of the stack (spilled
registers) that it takes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from heatkv.engine.attention import triton_jit, triton_launch
from heatkv.engine.attention.triton_launch import HeldTokens

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
}


class Recorder:
    """Stands in for a kernel and notes what it was launched with."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.args, self.options = args, options

        return launch


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launched(kernel: str, dtype: str, head_dim: int, plain: bool, codes: str | None) -> tuple[Any, Recorder]:
    """The kernel, and what its wrapper gives it."""
    recorder = Recorder()
    triton_launch._jit = lambda: SimpleNamespace(attention_kernel=recorder, append_kernel=recorder)
    rows, heads, tokens, slots, listed = 2, 16, 4096, 10000, 5000
    of = getattr(torch, dtype)
    q_RHND = meta(rows, tokens, 3, heads, head_dim, dtype=of).unbind(2)[0].transpose(1, 2)
    arena = meta(2, rows, slots, head_dim, dtype=of) if plain else None
    coded = (
        (meta(2, rows, slots, head_dim, dtype=getattr(torch, codes)), meta(2, rows, slots, dtype=torch.bfloat16))
        if codes
        else None
    )
    if kernel == "append":
        heads_K, slots_KN = meta(7, dtype=torch.int32), meta(7, tokens, dtype=torch.int32)
        triton_launch.append_kept(q_RHND, q_RHND, heads_K, slots_KN, *(coded or (arena,)))
        return triton_jit.append_kernel, recorder
    held = HeldTokens(
        meta(listed, dtype=torch.int32),
        meta(1, heads, dtype=torch.int32),
        meta(1, heads, dtype=torch.int32),
        meta(listed, dtype=torch.float32),
    )
    triton_launch.fused_attention(
        q_RHND, q_RHND, q_RHND, None if arena is None else (arena, held), None if coded is None else (*coded, held)
    )
    return triton_jit.attention_kernel, recorder


def compiled(kernel: Any, launch: Recorder, capability: int) -> dict[str, int]:
    """Compile as a launch on that device would."""
    given = dict(zip(kernel.arg_names, launch.args, strict=False))
    given |= {name: x for name, x in launch.options.items() if name in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for at, parameter in enumerate(kernel.params):
        x = given[parameter.name]
        if isinstance(x, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[x.dtype]}"
            attributes[at,] = [["tt.divisibility", 16]]
        elif x is None or parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[at,] = x
        else:
            signature[parameter.name] = "i64" if x >= 1 << 31 else "i32"
            if x % 16 == 0 and not parameter.do_not_specialize:
                attributes[at,] = [["tt.divisibility", 16]]
    options = {name: x for name, x in launch.options.items() if name not in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return {"shared": binary.metadata.shared, "stack": int(stack)}


if __name__ == "__main__":
    assert isinstance(tl.max, triton.runtime.JITFunction), "run this without TRITON_INTERPRET"
    told = []
    for capability, *case in json.loads(sys.argv[1]):
        told.append(compiled(*launched(*case), capability))
    print(json.dumps(told))

"""Compile the Triton kernels for devices that need not be there, and note registers, spills and shared memory.

    python -m vicinal.measure.triton_kernels --devices sm90 gfx942 --out benchmarks/results/triton-compile.json

Which variants there are follows from the problems: for each the tiles are chosen for the device, the launches are
recorded on the meta device, and every recorded kernel is compiled as Triton would compile it for those arguments.
The table is written after every kernel. With `--resume` what it has of the same kernels and the same Triton is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vicinal.measure import sources
from vicinal.ops.backend import Inputs
from vicinal.ops.packing import layout_of, pack_tables
from vicinal.ops.triton import launch
from vicinal.ops.triton.backward import backward
from vicinal.ops.triton.choose import DEVICES, Device, choices, choose_all
from vicinal.ops.triton.plan import pack
from vicinal.pattern import Full, Near, Same, Window, bounds, heads, union
from vicinal.pattern.bounds import AnyPattern

_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages")


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: where the variants of the kernels come from."""

    name: str
    grid: tuple[int, ...]
    pattern: AnyPattern
    head_dim: int
    heads: int = 4
    kv_heads: int = 4
    value_dim: int | None = None
    has_bias: bool = False
    extra_tokens: int = 0
    is_padded: bool = False


def _near(kernel_size: tuple[int, ...], stride: tuple[int, ...] | int = 1) -> tuple[Near, ...]:
    steps = (stride,) * len(kernel_size) if isinstance(stride, int) else stride
    return tuple(Near(size, stride=step) for size, step in zip(kernel_size, steps, strict=True))


CASES = (
    Case("NAT stage 1", (56, 56), Near(7), 32, heads=2, kv_heads=2),
    Case("NAT stage 1, bias", (56, 56), Near(7), 32, heads=2, kv_heads=2, has_bias=True),
    Case("NAT stage 4", (7, 7), Near(7), 32, heads=16, kv_heads=16),
    Case("DiNAT stage 1, dilated", (56, 56), Near(7, dilation=8), 32, heads=2, kv_heads=2),
    Case("Swin, shifted", (56, 56), Window(7, shift=3), 32, has_bias=True),
    Case("HunyuanVideo", (30, 48, 80), _near((18, 24, 24)), 128, heads=24, kv_heads=24),
    Case("HunyuanVideo, strided", (30, 48, 80), _near((18, 24, 24), (16, 8, 8)), 128, heads=24, kv_heads=24),
    Case("HunyuanVideo with text", (30, 48, 80), _near((18, 24, 24)), 128, heads=24, kv_heads=24, extra_tokens=256),
    Case("FLUX 4K", (256, 256), Near(80), 128, heads=24, kv_heads=24),
    Case("FLUX 4K, strided", (256, 256), Near(80, stride=16), 128, heads=24, kv_heads=24),
    Case("sequence", (32768,), Near(2048), 128, heads=8, kv_heads=2),
    Case("head groups", (64, 64), heads(Near(7), Near(7, dilation=8)), 64),
    Case("criss-cross union", (32, 32), union(Near(3), Near(5, dilation=3)), 64),
    Case("wrapping", (32, 64), (Near(7), Near(7, border="wrap")), 64),
    Case("padded batch", (48, 48), Near(7), 64, is_padded=True, extra_tokens=4),
    Case("head dim 1", (40,), Near(5), 1),
    Case("head dim 80", (32, 32), Near(9), 80),
    Case("head dim 96, values 48", (32, 32), Near(9), 96, value_dim=48),
    Case("head dim 256", (32, 32), Near(9), 256),
    Case("head dim 32, values 256", (32, 32), Near(9), 32, value_dim=256),
    Case("union on three axes, text", (8, 16, 16), union(Near(3), (Full(), Same(), Same())), 128, extra_tokens=8),
    Case("head dim 256, bias and text", (8, 16, 16), Near(5), 256, has_bias=True, extra_tokens=16),
)
"""Problems whose variants are compiled: those that are benchmarked, and one of each feature."""


def launches(case: Case, dtype: torch.dtype, device: Device) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels that a forward and a backward of a case launch, with their arguments."""
    table = bounds(case.pattern, case.grid)
    value_dim = case.head_dim if case.value_dim is None else case.value_dim
    costs = choose_all(table, case.head_dim, value_dim, dtype, device, has_bias=case.has_bias)
    plan = pack(choices(costs))
    layout = dataclasses.replace(layout_of(table, case.heads), plan=plan)
    if case.is_padded:
        groups = tuple(
            dataclasses.replace(
                group, members=tuple(tuple(dataclasses.replace(a, step=0) for a in m) for m in group.members)
            )
            for group in layout.groups
        )
        layout = dataclasses.replace(layout, groups=groups)

    def make(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    inputs = Inputs(
        query=make(2, *case.grid, case.heads, case.head_dim),
        key=make(2, *case.grid, case.kv_heads, case.head_dim),
        value=make(2, *case.grid, case.kv_heads, value_dim),
        tables=make(2 if case.is_padded else 1, pack_tables(table).shape[1], kind=torch.int32),
        bias=make(sum(layout.bias_sizes)) if case.has_bias else None,
        extra_key=make(2, case.extra_tokens, case.kv_heads, case.head_dim) if case.extra_tokens else None,
        extra_value=make(2, case.extra_tokens, case.kv_heads, value_dim) if case.extra_tokens else None,
        extra_lengths=make(2, kind=torch.int64) if case.is_padded else None,
        layout=layout,
        scale=case.head_dim**-0.5,
    )
    begin = len(launch.RECORDS)
    out, lse = launch.forward(inputs)
    backward(inputs, out, lse, torch.empty_like(out), torch.empty_like(lse), [True] * 6)
    found = launch.RECORDS[begin:]
    del launch.RECORDS[begin:]
    return found


def compile_launch(kernel: Any, arguments: dict[str, Any], device: Device) -> Any:
    """Compile a kernel for a device as a launch with these arguments would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    hints: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(kernel.params):
        value, name = arguments[parameter.name], parameter.name
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
        if isinstance(value, torch.Tensor) or (special and isinstance(value, int) and value % 16 == 0):
            hints[(place,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", device.capability, 32) if device.kind == "cuda" else GPUTarget("hip", "gfx942", 64)
    options = {name: arguments[name] for name in _OPTIONS if name in arguments}
    return triton.compile(ASTSource(kernel, signature, constants, hints), target=target, options=options)


def resources(compiled: Any, device: Device) -> dict[str, int]:
    """Registers of a thread, bytes it spills, and shared memory of a program."""
    shared = int(compiled.metadata.shared)
    if device.kind == "hip":
        text = compiled.asm["amdgcn"]
        counts = {name: int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1]) for name in ("vgpr_count", "vgpr_spill_count")}
        return {"registers": counts["vgpr_count"], "spilled": 4 * counts["vgpr_spill_count"], "shared": shared}
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    stack, registers = (int(re.findall(rf"{name}:(\d+)", told.stdout)[-1]) for name in ("STACK", "REG"))
    return {"registers": registers, "spilled": stack, "shared": shared}


Row = dict[str, Any]


def table(
    cases: Sequence[Case], dtypes: Sequence[torch.dtype], devices: Sequence[str], known: Mapping[str, Row] | None = None
) -> Iterator[Row]:
    """A row for each kernel variant of each problem, compiled once for each device.

    `known` are rows of an earlier run, by their variants, which are given back as they are.
    """
    known = known or {}
    seen: set[str] = set()
    for name in devices:
        for case in cases:
            for dtype in dtypes:
                for kernel, arguments in launches(case, dtype, DEVICES[name]):
                    variant = _variant(name, kernel, arguments)
                    if variant in seen:
                        continue
                    seen.add(variant)
                    about = {
                        "device": name,
                        "case": case.name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "kernel": _kernel_name(kernel, arguments),
                    }
                    yield known.get(variant) or {**about, **_compiled(kernel, arguments, name), "variant": variant}


def _compiled(kernel: Any, arguments: dict[str, Any], name: str) -> Row:
    """What a launch comes to once compiled; `compile_s` is processor time, next to nothing where Triton remembers."""
    begin, device = _processor_seconds(), DEVICES[name]
    found = resources(compile_launch(kernel, arguments, device), device)
    return {
        "block": [arguments.get("BLOCK_M", 0), arguments.get("BLOCK_N", 0)],
        **{option: arguments[option] for option in _OPTIONS if option in arguments},
        **found,
        "fits": found["shared"] <= device.shared_bytes,
        "compile_s": round(_processor_seconds() - begin, 2),
    }


def _processor_seconds() -> float:
    """Of this process and of the tools it has called."""
    return sum(os.times()[:4])


def _kernel_name(kernel: Any, arguments: dict[str, Any]) -> str:
    gradient = arguments.get("IS_GRADIENT")
    return kernel.__name__ + ("" if gradient is None else "[gradient]" if gradient else "[forward]")


def _variant(name: str, kernel: Any, arguments: dict[str, Any]) -> str:
    """What Triton compiles apart, in a few letters."""
    parts: list[tuple[Any, ...]] = []
    special = {parameter.name for parameter in kernel.params if not parameter.do_not_specialize}
    for argument, value in sorted(arguments.items()):
        if isinstance(value, torch.Tensor):
            parts.append((argument, value.dtype))
        elif argument.isupper() or argument in _OPTIONS or value is None:
            parts.append((argument, value))
        elif isinstance(value, int):
            parts.append((argument, argument in special and (value == 1, value % 16 == 0), value >= 1 << 31))
    return hashlib.sha256(repr((name, kernel.__name__, *parts)).encode()).hexdigest()[:12]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m vicinal.measure.triton_kernels", description=__doc__)
    parser.add_argument("--devices", nargs="+", default=list(DEVICES), choices=list(DEVICES))
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16", "float32"])
    parser.add_argument("--cases", nargs="+", default=None, help="names of problems; all by default")
    parser.add_argument("--out", type=Path, default=None, help="where to write the table as JSON")
    parser.add_argument("--resume", action="store_true", help="keep what that table has of the same kernels")
    chosen = parser.parse_args(arguments)
    known = _known(chosen.out) if chosen.resume and chosen.out is not None and chosen.out.exists() else {}
    cases = [case for case in CASES if chosen.cases is None or case.name in chosen.cases]
    rows: dict[str, Row] = {}
    for row in table(cases, [getattr(torch, name) for name in chosen.dtypes], chosen.devices, known):
        rows[row["variant"]] = row
        if row["variant"] not in known:
            print(json.dumps(row), flush=True)
            if chosen.out is not None:
                write(chosen.out, [*rows.values(), *(row for variant, row in known.items() if variant not in rows)])
    if chosen.out is not None:  # without what earlier choices of these problems came to
        names = (chosen.devices, chosen.dtypes, [case.name for case in cases])
        others = [row for row in known.values() if not _is_of(row, *names)]
        write(chosen.out, [*rows.values(), *others])
    return 0 if all(row["fits"] for row in rows.values()) else 1


def _is_of(row: Row, devices: Sequence[str], dtypes: Sequence[str], cases: Sequence[str]) -> bool:
    return row["device"] in devices and row["dtype"] in dtypes and row["case"] in cases


def _head() -> Row:
    import triton

    return {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "kernels": sources.digest("ops/triton/kernels"),
        "ran_on_a_gpu": False,
    }


def _known(path: Path) -> dict[str, Row]:
    """The rows of a table by their variants; none where it is of other kernels or another Triton."""
    found = json.loads(path.read_text())
    rows: list[Row] = found.pop("rows")
    return {row["variant"]: row for row in rows} if found == _head() else {}


def write(path: Path, rows: list[Row]) -> None:
    """The table as JSON, a row a line."""
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(json.dumps(_head())[:-1] + ', "rows": [\n' + lines + "\n]}\n")


if __name__ == "__main__":
    sys.exit(main())

"""The machine and what it can do at best: its description without names or paths, and peaks measured in the run."""

from __future__ import annotations

import os
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")
_GEMM_SIZE = 2048
_COPY_BYTES = 256 << 20


def describe(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What a reader needs to judge the figures; nothing that identifies the machine or its owner."""
    info = _cpu_info()
    described: dict[str, Any] = {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cpu_family": " ".join(info[key] for key in ("cpu family", "model") if key in info),
        "architecture": platform.machine(),
        "logical_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in _FLAGS if flag in f" {info.get('flags', info.get('Features', ''))} ".split()],
        "memory_gb": _memory_gb(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 1e9, 1)}
        described |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    return described


def _cpu_info() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo, or nothing on other systems."""
    path = pathlib.Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    entries: dict[str, str] = {}
    for line in path.read_text(errors="replace").splitlines():
        name, _, entry = line.partition(":")
        if name.strip():
            entries.setdefault(name.strip(), entry.strip())
    return entries


def _memory_gb() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)


def gemm_gflops(dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, float]:
    """The rate of a large matrix product by each library that torch has for it, in GFLOP/s: its best of some runs.

    On some processors MKL's float32 product runs far below what oneDNN's reaches, so both are asked.
    """
    left, right = (torch.randn(_GEMM_SIZE, _GEMM_SIZE).to(device, dtype) for _ in range(2))
    calls: dict[str, Callable[[], Any]] = {"torch.matmul": lambda: left @ right}
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if left.device.type == "cpu" else None
    if onednn is not None and torch.backends.mkldnn.is_available():
        calls["oneDNN"] = lambda: onednn(left, right, None, "none", [], "")
    rates = {}
    for name, call in calls.items():
        try:
            rates[name] = 2 * _GEMM_SIZE**3 / _best_seconds(call, left.device) / 1e9
        except RuntimeError:  # this build's oneDNN has no such kernel; the other library remains
            continue
    return rates


def copy_gb_per_second(device: str | torch.device = "cpu") -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _best_seconds(lambda: target.copy_(source), source.device) / 1e9


def _best_seconds(call: Callable[[], Any], device: torch.device, seconds: float = 1.0, least: int = 5) -> float:
    """The fastest of the calls that fit in some seconds: a peak is what the machine does when it is left alone."""
    begin, best, done = time.perf_counter(), float("inf"), 0
    call()
    while done < least or time.perf_counter() - begin < seconds:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, done = min(best, time.perf_counter() - start), done + 1
    return best


def peaks(dtypes: Sequence[torch.dtype], device: str | torch.device = "cpu") -> dict[str, Any]:
    """The best matrix product for each dtype, by which library, and the bandwidth of memory."""
    found: dict[str, Any] = {"gemm": {}, "copy_gb_per_second": round(copy_gb_per_second(device), 1)}
    for dtype in dtypes:
        rates = gemm_gflops(dtype, device)
        best = max(rates, key=lambda name: rates[name])
        found["gemm"][str(dtype).removeprefix("torch.")] = {
            "gflops": round(rates[best], 1),
            "by": best,
            "all": {name: round(rate, 1) for name, rate in rates.items()},
        }
    return found

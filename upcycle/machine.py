"""The machine a run is on: what it is, what its matrix products reach, and an allocator setting for CPU runs."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from functools import lru_cache
from pathlib import Path

# glibc's mallopt parameters, <malloc.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Tell glibc to keep big freed blocks instead of giving them back to the kernel; True where it took effect.

    Activations and logits are freed and allocated every step; with the default every one of them is paged in anew,
    which made a small model's training step 1.4 times slower. Call before torch allocates. CPU runs on glibc only.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except OSError:
        return False
    settings = ((M_MMAP_THRESHOLD, 2**31 - 1), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 * 2**20))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)


def describe() -> dict[str, str | int | float]:
    """Processor, cores this process may use, memory in bytes, operating system."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@lru_cache(maxsize=4)
def matmul_peak_flops(precision: str, device: str = "cpu", size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of square matrix products in `precision` ("fp32" or "bf16"): the best of several, measured now."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        torch.mm(a, b)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best

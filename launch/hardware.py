"""Accelerators by name, for plans: what they hold and reach, from their makers' data sheets. Nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass

from upcycle.config import nearest

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator, or one process's share of a machine without any.

    memory: bytes. bf16, fp32: FLOP/s of dense matrix products (fp32 without TF32). link: bytes per second, each way, to
    the others of its machine. runtime: bytes that the driver, libraries and their workspaces take before a model is there. cpu: memory
    that is never written takes no room there, and processes exchange by gloo, which copies what it scatters.
    """

    memory: int
    bf16: float
    fp32: float
    link: float
    runtime: int = 1_500_000_000
    cpu: bool = False


def _of_sheet(gib: float, bf16: float, fp32: float, link: float) -> Device:
    """bf16, fp32: TFLOP/s; link: GB/s."""
    return Device(int(gib * GIB), bf16 * 1e12, fp32 * 1e12, link * 1e9)


# NVLink, or AMD's links, of the SXM and OAM forms; PCIe 4.0 x16 where there is neither.
DEVICES = {
    "a100-40": _of_sheet(40, 312, 19.5, 300),
    "a100-80": _of_sheet(80, 312, 19.5, 300),
    "h100-80": _of_sheet(80, 989, 67, 450),
    "h200-141": _of_sheet(141, 989, 67, 450),
    "b200-180": _of_sheet(180, 2250, 75, 900),
    "l40s-48": _of_sheet(48, 362, 91.6, 32),
    "mi300x-192": _of_sheet(192, 1307, 163.4, 448),
    "rtx4090-24": _of_sheet(24, 165, 82.6, 32),
}
CPU = "cpu"
CPU_RUNTIME = 150_000_000  # that a process grows by with its first steps, whatever the model: docs/planning.md
CPU_LINK = 2e9  # gloo's, between processes of one machine


def check_name(name: str) -> None:
    """Raises ValueError: no device of that name."""
    known = [*DEVICES, CPU]
    if name not in known:
        raise ValueError(f"gpu={name}: expected one of {', '.join(known)}{nearest(name, known)}")


def device(name: str, processes: int) -> Device:
    """The device that launch.gpu names; `cpu`: this machine, shared by `processes` of them."""
    if name == CPU:
        from upcycle.machine import describe, matmul_peak_flops

        bf16, fp32 = (matmul_peak_flops(precision) / processes for precision in ("bf16", "fp32"))
        return Device(int(describe()["memory_bytes"]) // processes, bf16, fp32, CPU_LINK, CPU_RUNTIME, cpu=True)
    return DEVICES[name]

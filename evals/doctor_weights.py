"""The weights of a mixture, streamed one tensor at a time: largest value by role, what is not finite, and their hash."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evals.doctor_case import Finding
from upcycle.checkpoint import Checkpoint, tensor_sha256
from upcycle.optim import group_of
from upcycle.proof import weights_sha256

FP16_MAX = 65504.0
NEAR_FP16_MAX = FP16_MAX / 8  # three doublings: a matrix product of such weights overflows in fp16 long before


@dataclass(frozen=True)
class Weights:
    """largest: |weight| of each group of parameters (optim.group_of). broken: tensors with NaN or infinity."""

    largest: dict[str, float]
    broken: list[str]
    dtypes: list[str]
    sha256: str


def survey(directory: Path) -> Weights:
    """Memory: one tensor. Raises ValueError: see `Checkpoint`."""
    stored = Checkpoint(directory)
    largest, broken, hashes, dtypes = dict[str, float](), [], {}, set()
    for name in stored.names:
        tensor = stored.get(name)
        group, found = group_of(name), tensor.abs().max().item() if tensor.numel() else 0.0
        hashes[name] = tensor_sha256(tensor)
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        if not tensor.isfinite().all():
            broken.append(name)
        else:
            largest[group] = max(largest.get(group, 0.0), found)
    return Weights(largest, broken, sorted(dtypes), weights_sha256(hashes))


def weights(found: Weights) -> Finding:
    """Are all weights numbers, and far from the end of fp16's range?"""
    top = max(found.largest.values(), default=0.0)
    listed = ", ".join(f"{group} {value:.3g}" for group, value in found.largest.items())
    said = f"largest |weight|: {listed} ({', '.join(found.dtypes)})"
    if found.broken:
        shown = ", ".join(found.broken[:3]) + (f" and {len(found.broken) - 3} more" if len(found.broken) > 3 else "")
        do = "never use these weights: go back to the assembly or a snapshot, with a lower train.lr; with assemble.dtype=float16, write bfloat16"
        return Finding("weights", "bad", f"NaN or infinity in {shown}", len(found.broken), "0 tensors", do)
    large = top >= NEAR_FP16_MAX
    do = "keep assemble.dtype=bfloat16 or float32, and never cast to fp16; weight decay (train.optimizer.weight_decay) holds weights down"
    return Finding(
        "weights", "look" if large else "ok", said, top, f"below {NEAR_FP16_MAX:g} (fp16 ends at {FP16_MAX:g})",
        do if large else "",
    )  # fmt: skip

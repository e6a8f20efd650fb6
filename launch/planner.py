"""What a stage needs of each process before it is started: memory, traffic, time; and what to change where it does not fit.

Bytes of weights, gradients and moments follow from shapes alone, and are those that an engine holds; what the step itself keeps is
traced (upcycle/footprint.py). docs/planning.md has the rules, and how far plans were from what runs took.
Sizes: P parameters, T those that train, N ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from launch.hardware import Device
from upcycle.config import TrainConfig
from upcycle.cost import Shape
from upcycle.footprint import Footprint
from upcycle.optim import decays_by_name, group_of

# Elements: DeepSpeed's reduce_bucket_size, stage3_max_live_parameters and stage3_prefetch_bucket_size.
BUCKET, LIVE, FETCHED = 500_000_000, 1_000_000_000, 50_000_000
ALIGNMENT = 2  # DeepSpeed pads flat buffers to multiples of this times N
FP32 = 4
OVERLAPS = ("ddp", "zero3", "fsdp2")  # exchanges run beside the backward


@dataclass(frozen=True)
class Held:
    """Bytes that the rank with most of them holds through a whole step, paddings included.

    copies: fp32 weights once more (ZeRO updates those). buffers: for exchanges: buckets, and whole weights of layers. host: what
    `launch.offload` keeps out of the device, in none of the others.
    """

    weights: int
    gradients: int
    moments: int
    copies: int = 0
    buffers: int = 0
    host: int = 0

    @property
    def on_device(self) -> int:
        return self.weights + self.gradients + self.moments + self.copies + self.buffers


@dataclass(frozen=True)
class Group:
    """The processes of a stage: their strategy, how many, on what.

    link: bytes per second, each way, of the slowest link between them. utilisation: the share of the device's peak that a step's
    arithmetic reaches.
    """

    strategy: str
    ranks: int
    device: Device
    link: float
    utilisation: float
    offload: bool = False


@dataclass(frozen=True)
class Needs:
    """Of one training stage: bytes of the rank that needs most, and what an optimizer step and the whole stage take.

    activations: see `Footprint`. peak: all of it together, with the runtime's own. checkpoint: the
    tensors of one checkpoint, of all ranks together. sent: by a rank in a step.
    """

    parameters: int
    held: Held
    activations: int
    peak: int
    checkpoint: int
    sent: int
    flops: float
    step_seconds: float
    steps: int

    @property
    def hours(self) -> float:
        return self.steps * self.step_seconds / 3600


def needs(shape: Shape, found: Footprint, train: TrainConfig, group: Group) -> Needs:
    """shape: of the same model as `found`."""
    rounds = max(1, train.batch_sequences // (group.ranks * train.micro_batch_sequences))
    held = held_bytes(found, group, rounds)
    flops = train.batch_tokens * shape.step_flops_per_token(train.sequence_length, train.micro_batch_sequences)
    sent = sent_bytes(found, group, rounds)
    passes = 4 / 3 if train.gradient_checkpointing else 1.0  # layers run forward once more
    computing = passes * flops / (group.ranks * getattr(group.device, train.precision) * group.utilisation)
    exchanging = sent / group.link
    return Needs(
        parameters=found.numel(),
        held=held,
        activations=found.activations,
        peak=peak_bytes(found, held, group),
        checkpoint=checkpoint_bytes(found),
        sent=sent,
        flops=flops,
        step_seconds=max(computing, exchanging) if group.strategy in OVERLAPS else computing + exchanging,
        steps=train.steps,
    )


def held_bytes(found: Footprint, group: Group, rounds: int = 1) -> Held:
    """Of micro-batches in `rounds` of a step. Of the engines: PlainEngine (single, ddp), ShardedEngine (fsdp2), ZeroEngine (zero1, zero2, zero3)."""
    every, trained = FP32 * found.numel(), FP32 * found.numel(found.trained)
    if group.strategy in ("single", "ddp"):
        # DDP's gradients lie in its buckets; those of micro-batches that exchange nothing lie apart until the last one.
        buckets = trained if group.strategy == "ddp" and group.ranks > 1 and rounds > 1 else 0
        return Held(every, trained, 2 * FP32 * found.numel(found.ever_trained), buffers=buckets)
    own = FP32 * share(found, found.trained, group)
    moments = 2 * FP32 * share(found, found.ever_trained, group)
    if group.strategy == "fsdp2":
        return Held(FP32 * share(found, found.shapes, group), own, moments, buffers=_gathered(found, group))
    bucket = FP32 * (min(BUCKET, found.numel(found.trained)) if group.device.cpu else BUCKET)
    if group.strategy == "zero3":
        weights = FP32 * share(found, found.shapes, group)
        buffers = _copies(group) * bucket + _gathered(found, group)
        if group.offload:
            return Held(0, 0, 0, buffers=buffers, host=weights + own + moments + own)
        return Held(weights, own, moments, own, buffers)
    gradients = own if group.strategy == "zero2" else trained
    if group.offload:
        return Held(every, gradients - own, 0, buffers=2 * bucket, host=own + moments + own)
    # Gradients as they come, once more while they are exchanged, and those of its own part, flat, for the update.
    return Held(every, gradients, moments, own, 2 * bucket + own)


def share(found: Footprint, names: Iterable[str], group: Group) -> int:
    """Elements of these parameters on the rank with most of them, paddings included."""
    if group.strategy == "zero3":
        return sum(math.ceil(found.numel([name]) / group.ranks) for name in names)
    if group.strategy == "fsdp2":
        return sum(_cut(found.shapes[name], group.ranks) for name in names)
    flat: dict[tuple[str, bool], int] = {}  # a buffer for each of the optimizer's groups
    for name in names:
        key = group_of(name), decays_by_name(name, found.shapes[name])
        flat[key] = flat.get(key, 0) + found.numel([name])
    return sum(math.ceil(size / (ALIGNMENT * group.ranks)) * ALIGNMENT for size in flat.values())


def _cut(shape: tuple[int, ...], ranks: int) -> int:
    """Elements of the first rank's part; see `sharded.sharded`."""
    first, *rest = shape
    if len(rest) >= 2 and first % ranks and any(size % ranks == 0 for size in rest):
        return math.prod(shape) // ranks
    return math.ceil(first / ranks) * math.prod(rest)


def _gathered(found: Footprint, group: Group) -> int:
    """Bytes of what is there whole for a while: under zero3 weights up to DeepSpeed's limit and one layer, and those being fetched; under fsdp2 the
    weights of a layer, of the next one and of all outside the layers, and the gradients of the largest of these while they are scattered."""
    layer = max(found.layers.values(), default=0)
    outside = found.numel() - sum(found.layers.values())
    if group.strategy == "zero3":
        return FP32 * (min(found.numel(), LIVE + layer) + min(found.numel(), FETCHED))
    return FP32 * (min(found.numel(), 2 * layer + outside) + _copies(group) * max(layer, outside))


def _copies(group: Group) -> int:
    """Of gradients that are being scattered: as they come, in the order of ranks and, by gloo, once more."""
    return 3 if group.device.cpu else 2


def peak_bytes(found: Footprint, held: Held, group: Group) -> int:
    """All at once. Gradients come while activations go, but an allocator seldom has the room of one in a piece for the
    other. After the backward the norms of gradients square one tensor at a time, which may be more than all activations were."""
    largest = FP32 * max(found.numel([name]) for name in found.trained)
    return held.on_device + max(found.activations, largest) + group.device.runtime


def checkpoint_bytes(found: Footprint) -> int:
    """Tensors of one checkpoint (snapshot.py): weights and kept buffers, two moments, and a count of updates for each parameter."""
    return FP32 * (found.numel() + 2 * found.numel(found.ever_trained) + len(found.ever_trained)) + found.buffers


def sent_bytes(found: Footprint, group: Group, rounds: int) -> int:
    """Bytes that a rank sends in a step, by rings: an all-reduce of x bytes sends 2x(N−1)/N, a gather or a scatter x(N−1)/N.

    ddp, zero1: gradients once a step; zero2: with every micro-batch; both ZeRO's gather updated weights. zero3, fsdp2: of every
    micro-batch, weights for the forward and for the backward, and gradients scattered.
    """
    part = (group.ranks - 1) / group.ranks
    every, trained = FP32 * found.numel() * part, FP32 * found.numel(found.trained) * part
    return int(
        {
            "single": 0.0,
            "ddp": 2 * trained,
            "zero1": 2 * trained + trained,
            "zero2": rounds * 2 * trained + trained,
            "zero3": rounds * (2 * every + trained),
            "fsdp2": rounds * (2 * every + trained),
        }[group.strategy]
    )

"""Where TIES cuts a task vector: the size that exactly k entries reach, found without sorting them all. Pure functions; fp32.

numpy compares and counts here: torch takes seven times as long to compare, and five to count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

BLOCK = 2**17  # entries that are looked at together: a handful of blocks stays in a core's cache
SAMPLED = 2**15  # entries that say about where the cut is
DEVIATIONS = 5.0  # how far from there it may lie at first, in standard deviations of a rank in the sample


def count(of: np.ndarray) -> int:
    return int(np.count_nonzero(of))


def places(entries: int, block: int = BLOCK) -> Iterator[slice]:
    """The blocks of a flat tensor."""
    for start in range(0, entries, block):
        yield slice(start, min(start + block, entries))


@dataclass(frozen=True)
class Tau:
    """τ = θ − θ_0 of one tensor, in fp32, made block by block of both as stored, which are flat."""

    values: Tensor
    base: Tensor

    def __len__(self) -> int:
        return self.values.numel()

    def of(self, place: slice) -> Tensor:
        return self.values[place].float() - self.base[place].float()

    def blocks(self, block: int = BLOCK) -> Iterator[Tensor]:
        return (self.of(place) for place in places(len(self), block))

    def sizes(self) -> Iterator[np.ndarray]:
        return (block.abs_().cpu().numpy() for block in self.blocks())


@dataclass(frozen=True)
class Cut:
    """What is larger than `size` stays, and of what is as large the first `equals` in memory; None stands for all of it."""

    size: float
    equals: int | None = None

    def trimmed(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The blocks of τ, which come in order of memory, with 0 in place of what does not stay."""
        left = self.equals
        for block in blocks:
            if self.size == 0:  # all but zeros stays
                yield block
            elif left is None:
                yield hardshrink(block, float(np.nextafter(np.float32(self.size), np.float32(0))))
            else:
                kept = hardshrink(block, self.size)
                if left:
                    equal = np.flatnonzero(block.abs().cpu().numpy() == np.float32(self.size))[:left]
                    where = torch.from_numpy(equal).to(block.device)
                    kept[where] = block[where]
                    left -= len(equal)
                yield kept


def cut(tau: Tau, density: float) -> Cut:
    """Where exactly k = max(1, ⌊density · entries⌋) entries of τ stay, whatever the values.

    A sample says between which two sizes to cut; one pass over τ counts what is above them and collects what is between. Where
    the cut does not lie there, the next two are further apart, until they take in everything.
    """
    keep = max(1, int(Fraction(str(density)) * len(tau)))  # 0.29 of 100 is 29, which floats make 28.999…
    if keep >= len(tau):
        return Cut(0.0)
    step = max(1, len(tau) // SAMPLED) | 1  # odd: no width of a matrix is
    sample = Tau(tau.values[::step], tau.base[::step]).of(slice(None)).abs().cpu().numpy()
    share, deviations = keep / len(tau), DEVIATIONS
    while True:
        low, high = _ends(sample, share, deviations)
        if (found := _between(tau, keep, low, high)) is not None:
            return found
        if low < 0 and high == np.inf:
            return Cut(0.0)  # what is no number has no size
        deviations *= 4


def _ends(sample: np.ndarray, share: float, deviations: float) -> tuple[np.float32, np.float32]:
    """Two sizes of the sample between which its share begins; -1 and infinity beyond its ends."""
    middle, wide = len(sample) * (1 - share), 1 + deviations * (len(sample) * share * (1 - share)) ** 0.5
    first, last = int(middle - wide), int(middle + wide) + 1
    sample.partition((max(first, 0), min(last, len(sample) - 1)))
    low = sample[first] if first >= 0 else np.float32(-1)
    return low, sample[last] if last < len(sample) else np.float32(np.inf)


def _between(tau: Tau, keep: int, low: np.float32, high: np.float32) -> Cut | None:
    """The cut, if it is at one of these sizes or between them."""
    above, parts = 0, []
    for sizes in tau.sizes():
        reaches = sizes >= high
        above += count(reaches)
        parts.append(sizes[(sizes > low) ^ reaches])
    inside = np.concatenate(parts)
    if above < keep <= above + len(inside):
        inside.partition(len(inside) - (keep - above))
        size = inside[len(inside) - (keep - above)]
        return _cut(size, keep, above + count(inside > size), count(inside == size))
    size = high if keep <= above else low  # entries that equal an end of the bracket: zeros, most often
    counts = [(count(sizes > size), count(sizes == size)) for sizes in tau.sizes()]
    return _cut(size, keep, sum(more for more, _ in counts), sum(equal for _, equal in counts))


def _cut(size: np.float32, keep: int, above: int, equals: int) -> Cut | None:
    """None: the cut is at another size."""
    if not above < keep <= above + equals:
        return None
    return Cut(float(size), None if keep == above + equals else keep - above)

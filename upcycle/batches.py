"""Batches of token windows as a pure function of (proportions, rng_seed, step): nothing to save, nothing to replay.

Sample n of a run (step s takes samples s·B to s·B + B - 1) is placed in two stages:
1. Which domain: samples come in blocks of BLOCK. In a block, domain d owns exactly m_d slots, spread evenly.
2. Which window of it: the domain's own counter j walks a keyed permutation of its windows, a new one every epoch.
The permutation is keyed by rng_seed, domain and epoch only, so runs that share rng_seed walk the same stream of a
domain, whatever their proportions; `skip_tokens` starts a run where an earlier one stopped.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
from pathlib import Path

import numpy as np

BLOCK = 10_000
FEISTEL_ROUNDS = 6


def run_key(*parts: object) -> int:
    """64 bits that depend on every part: one key per (purpose, rng_seed, domain), or domains would draw alike."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "little")


def random_words(key: int, counter: int, count: int) -> np.ndarray:
    """uint64 words of Philox keyed by (key, counter). `random_raw` is stable over numpy versions; methods are not."""
    return np.random.Philox(key=np.array([key, counter], dtype=np.uint64)).random_raw(count)


def mixed(words: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, an invertible hash of 64-bit words."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def permuted(positions: np.ndarray, size: int, round_keys: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of range(size) sends `positions`, without ever storing the permutation.

    A Feistel network permutes the smallest 4^h >= size; results past `size` are sent through again (cycle walking,
    Black & Rogaway 2002), fewer than four times on average.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    result = positions.astype(np.uint64)
    walking = np.ones(len(result), dtype=bool)
    while walking.any():
        left, right = result[walking] >> half_bits, result[walking] & mask
        for round_key in round_keys:
            left, right = right, left ^ (mixed(right + round_key) & mask)
        result[walking] = (left << half_bits) | right
        walking = result >= size
    return result.astype(np.int64)


def slot_counts(proportions: dict[str, float]) -> dict[str, int]:
    """Slots of each domain in every block, in sorted order of names; largest remainders, so they sum to BLOCK."""
    total = sum(proportions.values())
    exact = {name: BLOCK * proportions[name] / total for name in sorted(proportions)}
    counts = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    for name in by_remainder[: BLOCK - sum(counts.values())]:
        counts[name] += 1
    vanished = [name for name in counts if proportions[name] > 0 and counts[name] == 0]
    if vanished:
        raise ValueError(
            f"proportions of {', '.join(vanished)} are below 1 in {BLOCK}, too small to be drawn; "
            "raise them, or set them to 0"
        )
    return counts


@functools.lru_cache(maxsize=4)
def block_slots(counts: tuple[tuple[str, int], ...], rng_seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """For each slot of a block: the index of its domain in `counts`, and its rank among that domain's slots."""
    starts = [
        (random_words(run_key("slots", rng_seed, name), block, 1)[0] >> np.uint64(11)) * 2.0**-53 for name, _ in counts
    ]
    positions = [(np.arange(count) + start) / max(count, 1) for (_, count), start in zip(counts, starts, strict=True)]
    order = np.argsort(np.concatenate(positions), kind="stable")
    domains = np.repeat(np.arange(len(counts)), [count for _, count in counts])[order]
    ranks = np.concatenate([np.arange(count) for _, count in counts])[order]
    return domains, ranks


def consumed_tokens(
    proportions: dict[str, float], rng_seed: int, sequence_length: int, sequences: int
) -> dict[str, int]:
    """Tokens of each domain in the first `sequences` samples of a run: exact, for the next run's `skip_tokens`."""
    counts = slot_counts(proportions)
    blocks, rest = divmod(sequences, BLOCK)
    domains, _ = block_slots(tuple(counts.items()), rng_seed, blocks)
    partial = np.bincount(domains[:rest], minlength=len(counts))
    return {
        name: sequence_length * (blocks * count + int(extra))
        for (name, count), extra in zip(counts.items(), partial, strict=True)
    }


class TokenArray:
    """One split of a tokenised domain, memory-mapped: `tokens`, `offsets` (documents + 1) and UTF-8 `bytes`.

    Raises ValueError if a file is missing or there are fewer than `sequence_length` tokens.
    """

    def __init__(self, directory: Path, split: str = "train", sequence_length: int = 1) -> None:
        paths = [Path(directory) / f"{split}.{part}.npy" for part in ("tokens", "offsets", "bytes")]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise ValueError(
                f"{directory} lacks {', '.join(missing)}; tokenise the domain (data.tokenize_domain) first"
            )
        self.tokens, self.offsets, self.bytes = (np.load(path, mmap_mode="r") for path in paths)
        if len(self.tokens) < sequence_length:
            raise ValueError(
                f"{paths[0]} has {len(self.tokens)} tokens, fewer than one sequence of {sequence_length}; "
                "add documents, raise the split's share or shorten sequence_length"
            )

    def __len__(self) -> int:
        return len(self.tokens)


class Batches:
    """`batch(step)` is (B, S) token ids; the same for any number of ranks, after any restart, in any order of steps.

    skip_tokens: what earlier runs with the same rng_seed took of each domain (`consumed_tokens`), rounded up to whole
    windows. It prevents repeats only if those runs had the same sequence_length: windows of another length differ.
    Raises ValueError for a domain in `proportions` without a directory.
    """

    def __init__(
        self,
        directories: dict[str, Path],
        proportions: dict[str, float],
        sequence_length: int,
        batch_sequences: int,
        rng_seed: int,
        skip_tokens: dict[str, int] | None = None,
        split: str = "train",
        max_epochs: float = 4.0,
    ) -> None:
        self.proportions = {name: share for name, share in proportions.items() if share > 0}
        check_names(self.proportions, directories)
        self.sequence_length, self.batch_sequences = sequence_length, batch_sequences
        self.rng_seed, self.max_epochs = rng_seed, max_epochs
        self.counts = tuple(slot_counts(self.proportions).items())
        self.arrays = {name: TokenArray(directories[name], split, sequence_length) for name, _ in self.counts}
        skipped = skip_tokens or {}
        self.start_windows = {name: -(-skipped.get(name, 0) // sequence_length) for name, _ in self.counts}

    def batch(self, step: int) -> np.ndarray:
        """Token ids of one step, int64 (B, S)."""
        samples = step * self.batch_sequences + np.arange(self.batch_sequences)
        batch = np.empty((self.batch_sequences, self.sequence_length), dtype=np.int64)
        domains, counters = self.placed(samples)
        for index, (name, _) in enumerate(self.counts):
            rows = np.flatnonzero(domains == index)
            tokens = self.arrays[name].tokens
            for row, window in zip(rows, self.windows(name, counters[rows]), strict=True):
                batch[row] = tokens[window * self.sequence_length : (window + 1) * self.sequence_length]
        return batch

    def domains(self, step: int) -> np.ndarray:
        """(2, B) of one step: the index of each sequence's domain in `counts`, and the same dealt anew among its sequences."""
        domains, _ = self.placed(step * self.batch_sequences + np.arange(self.batch_sequences))
        order = np.argsort(
            random_words(run_key("domains dealt anew", self.rng_seed), step, len(domains)), kind="stable"
        )
        return np.stack([domains, domains[order]])

    def placed(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The domain index of each sample, and its number among that domain's samples since step 0."""
        domains, counters = np.empty_like(samples), np.empty_like(samples)
        slots = np.array([count for _, count in self.counts])
        for block in np.unique(samples // BLOCK):
            inside = samples // BLOCK == block
            block_domains, ranks = block_slots(self.counts, self.rng_seed, int(block))
            slot = samples[inside] - block * BLOCK
            domains[inside] = block_domains[slot]
            counters[inside] = block * slots[block_domains[slot]] + ranks[slot]
        return domains, counters

    def windows(self, name: str, counters: np.ndarray) -> np.ndarray:
        """Window numbers of a domain's samples: a permutation of all its windows in every epoch."""
        total = len(self.arrays[name]) // self.sequence_length
        epochs, positions = np.divmod(counters + self.start_windows[name], total)
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            round_keys = random_words(run_key("windows", self.rng_seed, name), int(epoch), FEISTEL_ROUNDS)
            inside = epochs == epoch
            result[inside] = permuted(positions[inside], total, round_keys)
        return result

    def epochs(self, steps: int) -> dict[str, float]:
        """How often `steps` steps, and what was skipped before them, go through each domain."""
        sequences = steps * self.batch_sequences
        taken = consumed_tokens(self.proportions, self.rng_seed, self.sequence_length, sequences)
        return {
            name: (self.start_windows[name] + taken[name] // self.sequence_length)
            / (len(array) // self.sequence_length)
            for name, array in self.arrays.items()
        }

    def check(self, steps: int) -> list[str]:
        """One warning for each domain that `steps` steps would repeat more than max_epochs times."""
        return [
            f"{name}: {epochs:.1f} epochs of {len(self.arrays[name]):,} tokens exceed max_epochs={self.max_epochs:g}; "
            "add documents, train on fewer tokens or lower its proportion"
            for name, epochs in self.epochs(steps).items()
            if epochs > self.max_epochs
        ]


def check_names(proportions: dict[str, float], directories: dict[str, Path]) -> None:
    """Raises ValueError if there is nothing to draw, or a domain to draw from that has no directory."""
    if not proportions:
        raise ValueError("proportions name no domain with a share above 0; give at least one")
    for name in proportions:
        if name not in directories:
            near = difflib.get_close_matches(name, directories, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(sorted(directories)[:5])}"
            raise ValueError(f"proportions name the domain {name!r}, which has no data; {hint}")

"""The bootstrap over documents: how far a measured number would move had other documents of the same kind been tested.

Pure numpy. Legend: R resamples, M models, N documents of one domain. A document is the unit that is resampled, because
its tokens depend on each other; all models see the same resampled documents, so differences of models are paired.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

CHUNK_DRAWS = 2_000_000  # document draws held in memory at a time (16 MB of indices)


def generator(rng_seed: int, domain: str) -> np.random.Generator:
    """A Philox stream keyed by (rng_seed, domain): adding or reordering domains changes no other domain's draws."""
    key = np.array([rng_seed, zlib.crc32(domain.encode())], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def bootstrap_nats_per_token(
    nats_MN: np.ndarray, tokens_N: np.ndarray, samples: int, rng: np.random.Generator
) -> np.ndarray:
    """Nats per token of each model on each of `samples` resamples of one domain's documents: float64 [R, M].

    x_rm = Σ_n c_rn · nats_mn / Σ_n c_rn · tokens_n,   c_r: how often N draws with replacement drew each document
    """
    documents = len(tokens_N)
    rows = max(1, CHUNK_DRAWS // documents)
    chunks = []
    for start in range(0, samples, rows):
        count = min(rows, samples - start)
        drawn_RN = rng.integers(0, documents, size=(count, documents))
        drawn_RN += documents * np.arange(count)[:, None]
        times_RN = np.bincount(drawn_RN.ravel(), minlength=count * documents).reshape(count, documents)
        chunks.append((times_RN @ nats_MN.T) / (times_RN @ tokens_N)[:, None])
    return np.concatenate(chunks)


def bootstrap_domains(
    nats: Mapping[str, np.ndarray], tokens: Mapping[str, np.ndarray], samples: int, rng_seed: int
) -> dict[str, np.ndarray]:
    """`bootstrap_nats_per_token` of every domain, each resampled on its own (stratified): {domain: [R, M]}.

    nats: {domain: [M, N] nats of each document under each model}; tokens: {domain: [N] tokens of each document}.
    """
    return {
        domain: bootstrap_nats_per_token(nats[domain], tokens[domain], samples, generator(rng_seed, domain))
        for domain in nats
    }


def mean_over_domains(draws: Mapping[str, np.ndarray], domains: Sequence[str]) -> np.ndarray:
    """Unweighted mean over `domains` of nats per token, resample by resample: [R, M]."""
    return np.mean([draws[domain] for domain in domains], axis=0)


def percentile_interval(draws_R: np.ndarray, level: float = 0.95) -> list[float]:
    """[low, high]: the central `level` of the draws (percentile bootstrap)."""
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(draws_R, [tail, 100 - tail])
    return [float(low), float(high)]

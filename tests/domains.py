"""Tiny tokenised domains on disk, without text: for tests of training and evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.tiny import VOCAB

EOS = 2


def write_tokens(directory: Path, documents: int = 40, rng_seed: int = 0, low: int = 3, high: int = VOCAB) -> Path:
    """Documents of 5 to 40 random tokens from [low, high), each ended by EOS, in all three splits."""
    directory.mkdir(parents=True)
    for number, split in enumerate(("train", "valid", "test")):
        rng = np.random.default_rng([rng_seed, number])
        texts = [rng.integers(low, high, rng.integers(5, 40)) for _ in range(documents)]
        tokens = np.concatenate([np.append(text, EOS) for text in texts]).astype(np.uint16)
        np.save(directory / f"{split}.tokens.npy", tokens)
        np.save(directory / f"{split}.offsets.npy", np.cumsum([0] + [len(text) + 1 for text in texts]).astype(np.int64))
        np.save(directory / f"{split}.bytes.npy", np.array([3 * len(text) for text in texts], dtype=np.int64))
    return directory


def two_domains(root: Path) -> dict[str, Path]:
    """ "low" and "high": disjoint halves of the vocabulary."""
    return {
        "low": write_tokens(root / "low", rng_seed=1, high=VOCAB // 2),
        "high": write_tokens(root / "high", rng_seed=2, low=VOCAB // 2),
    }

"""How a stream of tokens is cut into windows: of S tokens each, every token but the stream's first predicted once.

Windows begin every `stride` tokens. In the first one all tokens are predicted, in the others the last `stride`; so with
stride S no token is read twice, and with a smaller one each has at least S - stride tokens before it. Where the first tokens
of every window are skipped, those that no other window predicts are not predicted at all. Shapes: W windows.
"""

from __future__ import annotations

import numpy as np

from upcycle.losses import IGNORED


def window_starts(predictions: int, sequence_length: int, stride: int) -> np.ndarray:
    """(W,) where the windows begin that predict from each of the stream's first `predictions` tokens; at least one."""
    return np.arange(0, max(predictions - sequence_length, 0) + stride, stride)


def first_counted(starts_W: np.ndarray, sequence_length: int, stride: int, skip: int = 0) -> np.ndarray:
    """(W,) the first place in the stream that each window predicts from. skip: none of its first so many."""
    return starts_W + np.where(starts_W == 0, skip, np.maximum(sequence_length - stride, skip))


def cut(values_T: np.ndarray, starts_W: np.ndarray, sequence_length: int) -> np.ndarray:
    """(W, S) the values of each window; 0 beyond the end."""
    index_WS = starts_W[:, None] + np.arange(sequence_length)
    last = len(values_T) - 1
    return np.where(index_WS <= last, values_T[np.minimum(index_WS, last)], 0)


def inputs_and_labels(
    tokens_T: np.ndarray, starts_W: np.ndarray, sequence_length: int, stride: int, skip: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(W, S) int64 tokens, padded with 0, and the token after each, IGNORED where it is not predicted here or there is none."""
    inputs_WS = cut(tokens_T[:-1], starts_W, sequence_length).astype(np.int64)
    labels_WS = cut(tokens_T[1:], starts_W, sequence_length).astype(np.int64)
    index_WS = starts_W[:, None] + np.arange(sequence_length)
    counted_WS = index_WS >= first_counted(starts_W, sequence_length, stride, skip)[:, None]
    counted_WS &= index_WS < len(tokens_T) - 1
    return inputs_WS, np.where(counted_WS, labels_WS, IGNORED)

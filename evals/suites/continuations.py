"""Questions from held-out documents: a context, the passage that follows it, and passages from other documents.

    context      the end of the text before a word's end, at most `context_characters`
    choices      the `continuation_characters` that follow, and as many from K − 1 places in other documents of the domain

Every choice begins where a word ended, with white space, so that byte-level and sentence-piece tokenizers cut there and
lm-eval, which encodes context and choice together and drops as many tokens as the context alone has, scores all of the
choice and nothing else. All choices have the same number of characters, which is what lm-eval's acc_norm divides by: the
two accuracies are equal here. The right answer stands at each of the K places equally often, so whoever always picks one
place, or, as lm-eval does among equals, the first, has 1/K.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from evals.statistics import generator
from upcycle.config import ContinuationsConfig
from upcycle.data import near_duplicate_clusters
from upcycle.store import ignore


class Passage(NamedTuple):
    source: int  # near duplicates are one source
    context: str
    continuation: str


def passages(text: str, source: int, config: ContinuationsConfig) -> Iterator[Passage]:
    """The text cut into passages one after another, each beginning at a word; what does not fill one is left out."""
    words = [(word.start(), word.end()) for word in re.finditer(r"\S+", text)]
    starts, ends = [start for start, _ in words], [end for _, end in words]
    word = 0
    while word < len(words):
        start = starts[word]
        cut = ends[max(word, bisect_right(ends, start + config.context_characters) - 1)]
        stop = cut + config.continuation_characters
        if stop > len(text):
            return
        if cut - start <= config.context_characters and text[cut:stop].strip():
            yield Passage(source, text[start:cut], text[cut:stop])
        word = bisect_left(starts, stop)


def make_questions(
    texts: Sequence[str],
    domain: str,
    config: ContinuationsConfig,
    near_duplicate_similarity: float,
    advance: Callable[..., None] = ignore,
) -> list[dict[str, Any]]:
    """Rows of `source`, `context`, `choices` (K texts) and `answer` (the right one's place), in random order.

    Wrong choices come from other sources: no near duplicate of the document is among them, nor a copy of the right one.
    Raises ValueError: too few documents for that.
    """
    clusters = near_duplicate_clusters(texts, near_duplicate_similarity, config.rng_seed, advance)
    pool = [one for n, text in enumerate(texts) for one in passages(text, int(clusters[n]), config)]
    rng = generator(config.rng_seed, domain)
    rows = []
    for place, chosen in enumerate(rng.permutation(len(pool))[: config.questions]):
        right = pool[chosen]
        wrong: dict[str, None] = {}
        for other in rng.permutation(len(pool)):
            if pool[other].source != right.source and pool[other].continuation != right.continuation:
                wrong[pool[other].continuation] = None
            if len(wrong) == config.choices - 1:
                break
        choices, answer = list(wrong), place % config.choices
        if len(choices) < config.choices - 1:
            break
        choices.insert(answer, right.continuation)
        rows.append({"source": right.source, "context": right.context, "choices": choices, "answer": answer})
    if len(rows) < min(config.questions, max(1, len(pool))):
        length = config.context_characters + config.continuation_characters
        raise ValueError(
            f"domain {domain}: its {len(texts)} held-out documents hold {len(pool)} passages of {length} characters, from "
            f"{len({one.source for one in pool})} that are not near duplicates; expected enough for {config.choices} "
            "different choices, all but one from other documents. Give the domain more text (max_bytes, test_fraction), or "
            "lower tasks.continuations.choices or the characters of a passage"
        )
    return rows


def clustered_error(correct_N: np.ndarray, source_N: np.ndarray) -> float | None:
    """Standard error of the mean of `correct` over N questions, of which those from one source depend on each other:

        SE² = G / (G − 1) · Σ_g (Σ_{n in g} (c_n − mean c))² / N²

    G: sources. With one question a source it is lm-eval's own, √(Σ (c − mean)² / (N − 1) / N). None for one source.
    """
    _, group_N = np.unique(source_N, return_inverse=True)
    sums_G = np.bincount(group_N, weights=correct_N - correct_N.mean())
    G, N = len(sums_G), len(correct_N)
    return None if G < 2 else float(np.sqrt(G / (G - 1) * (sums_G**2).sum()) / N)

"""Where words begin: whether a token starts a word, continues one, or does neither. Read from the tokenizer's texts.

The text of a token is what the tokenizer decodes it to alone, with a leading `▁` (SentencePiece) as a space. A token whose
text, after white space, begins with a letter or digit

    starts a word      if there was white space, or the token before does not end in a letter or digit ("(" + "foo")
    continues a word   if there was none, and the token before does

All others (punctuation, white space, special tokens, parts of a character of several bytes) do neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

STARTS, CONTINUES, NEITHER = range(3)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each of these tokens stands for."""
    pieces = tokenizer.convert_ids_to_tokens([int(one) for one in ids])
    return [
        piece.replace("▁", " ") if piece is not None and piece.startswith("▁") else tokenizer.decode([int(one)])
        for one, piece in zip(ids, pieces, strict=True)
    ]


def parts_of_words(rows_T: np.ndarray, texts: Sequence[str], special: Sequence[bool]) -> np.ndarray:
    """(T,) of STARTS, CONTINUES and NEITHER, of a stream of T tokens; the first has none before it.

    rows_T: each token's place in `texts`. special: of each text, whether it is no text but a sign for the model.
    """
    bare = ["" if sign else text.lstrip() for text, sign in zip(texts, special, strict=True)]
    begins = np.array([text[:1].isalnum() for text in bare], dtype=bool)
    ends = np.array([text[-1:].isalnum() and not sign for text, sign in zip(texts, special, strict=True)], dtype=bool)
    spaced = np.array([len(short) < len(text) for short, text in zip(bare, texts, strict=True)], dtype=bool)
    inside_T = np.concatenate([[False], ends[rows_T[:-1]]])
    goes_on_T = inside_T & ~spaced[rows_T]
    return np.where(~begins[rows_T], NEITHER, np.where(goes_on_T, CONTINUES, STARTS))

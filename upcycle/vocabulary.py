"""Which tokens a tokenizer knows, under which numbers, and in which order it merges them. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What tokenizer.json says besides its words. Padding and truncation are each caller's own; the template adds BOS and EOS.
SETTINGS = ("normalizer", "pre_tokenizer", "post_processor")


@dataclass(frozen=True)
class Vocabulary:
    """The words of one tokenizer file. `content` is all that counts; two that differ read text as other tokens.

    ids: token -> number (with its score, in a unigram model), added tokens among them; empty where `file` is not read.
    merges: pairs in the order of their rank. settings: the rest of tokenizer.json that touches text.
    """

    file: str
    ids: dict[str, Any] = field(default_factory=dict)
    merges: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    raw: str | None = None

    @property
    def sha256(self) -> str:
        content = [sorted(self.ids.items()), self.merges] if self.raw is None else self.raw
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def vocabularies(directory: Path) -> dict[str, Vocabulary]:
    """What `directory` says about its tokens, by the kind of file: "words" (tokenizer.json, else vocab.json and
    merges.txt) and "pieces" (tokenizer.model, by its bytes). Two directories are compared by a kind that both have.
    """
    found = {}
    if (directory / "tokenizer.json").is_file():
        found["words"] = _of_tokenizer_json(directory / "tokenizer.json")
    elif (directory / "vocab.json").is_file():
        found["words"] = _of_vocab_json(directory)
    if (directory / "tokenizer.model").is_file():
        found["pieces"] = _by_bytes(directory / "tokenizer.model")
    return found


def _by_bytes(path: Path) -> Vocabulary:
    return Vocabulary(path.name, raw=hashlib.sha256(path.read_bytes()).hexdigest())


def _of_tokenizer_json(path: Path) -> Vocabulary:
    """Words and merges only: padding, the order of added tokens and white space differ between savings of one tokenizer."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
        model, added = parsed["model"], parsed.get("added_tokens") or []
        words = model["vocab"]
        if isinstance(words, list):  # unigram: the place is the number, and scores decide how a text is cut
            ids = {token: [number, score] for number, (token, score) in enumerate(words)}
        else:
            ids = dict(words)
        for token in added:
            ids.setdefault(token["content"], token["id"])
        merges = _pairs(model.get("merges") or [])
        settings = {name: parsed.get(name) for name in SETTINGS}
        rest = {name: value for name, value in model.items() if name not in ("vocab", "merges")}
    except (ValueError, KeyError, TypeError, AttributeError):  # a layout that nobody here knows
        return _by_bytes(path)
    return Vocabulary(path.name, ids, merges, settings | {f"model.{name}": value for name, value in rest.items()})


def _of_vocab_json(directory: Path) -> Vocabulary:
    try:
        ids = dict(json.loads((directory / "vocab.json").read_text(encoding="utf-8")))
        for token, number in _json(directory / "added_tokens.json").items():
            ids.setdefault(token, number)
        for number, token in _json(directory / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
            ids.setdefault(token["content"], int(number))
        merges = directory / "merges.txt"
        lines = merges.read_text(encoding="utf-8").split("\n") if merges.is_file() else []
    except (ValueError, KeyError, TypeError, AttributeError):
        return _by_bytes(directory / "vocab.json")
    return Vocabulary("vocab.json", ids, _pairs(line for line in lines if line and not line.startswith("#version")))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _pairs(merges: Iterable[str | list[str]]) -> tuple[str, ...]:
    """Merges as "left right": newer files hold pairs, older ones this."""
    return tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in merges)


def differences(theirs: Vocabulary, ours: Vocabulary) -> list[str]:
    """What makes two tokenizers read text as other tokens, in words; empty if nothing does."""
    if theirs.sha256 == ours.sha256:
        return []
    if theirs.raw or ours.raw:
        return [f"{theirs.file} differs; experts must read the same tokens"]
    found = []
    odd = sorted(token for token in {*theirs.ids, *ours.ids} if theirs.ids.get(token) != ours.ids.get(token))
    if odd:
        shown = ", ".join(
            f"{token!r} is {theirs.ids.get(token, 'absent')}, expected the seed's {ours.ids.get(token, 'absent')}"
            for token in odd[:3]
        )
        found.append(f"{theirs.file} has {len(odd)} other token{'s' * (len(odd) > 1)} ({shown})")
    if theirs.merges != ours.merges:
        pairs = zip((*theirs.merges, None), (*ours.merges, None), strict=False)
        rank, (left, right) = next((rank, pair) for rank, pair in enumerate(pairs) if pair[0] != pair[1])
        found.append(
            f"{theirs.file} has other merges from number {rank} on ({left or 'none'!r}, expected the seed's "
            f"{right or 'none'!r})"
        )
    return found


def other_settings(theirs: Vocabulary, ours: Vocabulary) -> list[str]:
    """Names of the settings of two tokenizer.json that differ; what is off and what is absent are the same."""
    if theirs.file != ours.file or not theirs.settings or not ours.settings:
        return []
    names = sorted({*theirs.settings, *ours.settings})
    return [name for name in names if (theirs.settings.get(name) or None) != (ours.settings.get(name) or None)]

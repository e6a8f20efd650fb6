"""What a report rests on: evaluation directories and training artifacts, read and refused where they disagree."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np

from upcycle.durable import read_object, reading
from upcycle.store import TIMING

CURVE_POINTS = 200
METRICS = "metrics.jsonl"
FIGURES = ("tokens", "lr", "loss", "cross_entropy")  # of a row, where it has them


@dataclass(frozen=True)
class Evaluation:
    """What one model scored: `evaluation.json`, and for each domain the nats, tokens and bytes of its documents."""

    summary: dict[str, Any]
    nats: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]
    bytes: dict[str, np.ndarray]


def first_names(names: Sequence[str]) -> str:
    """The first five of `names`, and how many there are beyond them."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def load_evaluation(name: str, directory: Path, domains: Sequence[str]) -> Evaluation:
    """Read an evaluation directory; raises ValueError unless its two files agree and every sum is finite."""
    path, arrays_path = directory / "evaluation.json", directory / "documents.npz"
    summary = read_object(path, "domains", "split", "sequence_length")
    with reading(path):
        for total in summary["domains"].values():
            float(total["nats"]), int(total["tokens"])
    if missing := [domain for domain in domains if domain not in summary["domains"]]:
        raise ValueError(
            f"the evaluation of {name} lacks the domains {first_names(missing)}; it has "
            f"{first_names(list(summary['domains']))}. Evaluate {name} on every domain of the report ({directory})."
        )
    with reading(arrays_path), _arrays(arrays_path) as arrays:
        nats, tokens, sizes = (
            {domain: arrays[f"{domain}.{unit}"].astype(np.float64) for domain in domains}
            for unit in ("nats", "tokens", "bytes")
        )
    for domain in domains:
        _check_sums(f"the evaluation of {name} on {domain}", nats[domain], tokens[domain], summary["domains"][domain])
    return Evaluation(summary, nats, tokens, sizes)


def _arrays(path: Path) -> np.lib.npyio.NpzFile:
    """np.load of an archive, which takes any other file for a pickle."""
    if path.exists() and not is_zipfile(path):
        raise ValueError("not a whole .npz")
    return np.load(path)


def _check_sums(where: str, nats: np.ndarray, tokens: np.ndarray, total: Mapping[str, Any]) -> None:
    """Raise ValueError unless the documents add up to finite totals, and to those of evaluation.json."""
    if not math.isfinite(nats.sum()) or tokens.sum() <= 0:
        raise ValueError(
            f"{where}: {nats.sum()} nats over {tokens.sum():.0f} tokens, expected finite nats and at least one token. "
            "The model diverged or the domain is empty; train it at a lower learning rate or leave its row out."
        )
    # 1e-4: evaluators may add a batch's nats in float32
    if not math.isclose(nats.sum(), total["nats"], rel_tol=1e-4) or tokens.sum() != total["tokens"]:
        raise ValueError(
            f"{where}: documents.npz adds up to {nats.sum():.6g} nats over {tokens.sum():.0f} tokens, evaluation.json "
            f"says {total['nats']:.6g} over {total['tokens']}. The files are of different runs; evaluate it again."
        )


def check_same_test(scores: Mapping[str, Evaluation]) -> None:
    """Raise ValueError unless all models were scored on the same documents, token by token, in the same windows."""
    first, *others = scores
    expected = scores[first]
    for name in others:
        score = scores[name]
        for setting in ("split", "sequence_length", "stride", "skip_first"):
            if score.summary.get(setting) != expected.summary.get(setting):
                raise ValueError(
                    f"{name} was evaluated with {setting}={score.summary.get(setting)}, {first} with "
                    f"{expected.summary.get(setting)}; they cannot be compared. Evaluate both with the same {setting}."
                )
        for domain, tokens in expected.tokens.items():
            if not np.array_equal(tokens, score.tokens[domain]):
                raise ValueError(
                    f"{name} was evaluated on {len(score.tokens[domain])} documents ({score.tokens[domain].sum():.0f} "
                    f"tokens) of {domain}, {first} on {len(tokens)} ({tokens.sum():.0f} tokens); paired comparison "
                    "needs the same documents under the same tokenizer. Evaluate both on the same test set."
                )


def read_seconds(directory: Path) -> float:
    """Wall time of a stage, from its timing.json."""
    found = read_object(directory / TIMING)
    with reading(directory / TIMING):
        return float(found["seconds"])


def row_of(line: str) -> dict[str, Any]:
    """A line of metrics.jsonl. Raises ValueError: it is no step's figures."""
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError("no figures of a step")
    for name in FIGURES:
        if not isinstance(row.get(name, 0), int | float):
            raise ValueError(f"{name}={row[name]!r} is no number")
    return row


def read_rows(directory: Path, trained: bool = False) -> list[dict[str, Any]]:
    """The steps of a stage's metrics.jsonl in order, each as last logged (a resumed run logs some twice); none without it.

    Raises ValueError: a line is no step's; a stage that `trained` has no rows.
    """
    path, rows, number = directory / METRICS, {}, 0
    if not trained and not path.exists():
        return []
    with reading(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        if trained and not lines:
            raise ValueError("no rows, expected one for each step of the training")
    for number, line in enumerate(lines, 1):
        with reading(path.with_name(f"{METRICS}, line {number}")):
            row = row_of(line)
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def curve_of(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """[[tokens, nats per token], ...] of a stage's steps, averaged within at most `CURVE_POINTS` bins.

    Cross-entropy where the log has it, else the loss.
    """
    losses = [(row.get("tokens"), row.get("cross_entropy", row.get("loss"))) for row in rows]
    known = [
        (tokens, loss) for tokens, loss in losses if tokens is not None and loss is not None and math.isfinite(loss)
    ]
    points = np.array(known, dtype=np.float64).reshape(-1, 2)
    bins = np.array_split(points, min(CURVE_POINTS, len(points))) if len(points) else []
    return [[float(value) for value in part.mean(axis=0)] for part in bins]


def read_ablation(directory: Path, domains: Sequence[str]) -> dict[str, Any]:
    """Nats per token of `domains`, in their order: `whole`, and of each of `experts` as `removed` (None where that cannot be) and `forced`."""
    path = directory / "ablation.json"
    found = read_object(path, "max_tokens", "whole", "experts")

    def rate(of: Mapping[str, Any] | None) -> dict[str, float] | None:
        return None if of is None else {name: of[name]["nats"] / of[name]["tokens"] for name in domains}

    with reading(path):
        experts = {
            name: {"removed": rate(one["removed"]), "forced": rate(one["forced"])}
            for name, one in found["experts"].items()
        }
        return {"max_tokens": found["max_tokens"], "whole": rate(found["whole"]), "experts": experts}

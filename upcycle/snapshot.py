"""Training checkpoints: weights, moments and position, from which a run goes on bit for bit. safetensors only.

    checkpoints/step-00000200/{model-00000, optimizer-00000, rng-00000, model-00001, ...}.safetensors, state.json

Every rank writes what it holds, as flat ranges of named tensors, so nothing is gathered, and any other number of ranks
and any other strategy can read from it just what it needs. The directory gets its name when everything in it is on disk;
state.json carries the hashes of the other files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from upcycle.durable import sync, write_json
from upcycle.engine import STEP, Part, PlainEngine
from upcycle.store import KEPT
from upcycle.team import Team

PREFIX, PARTIAL = "step-", ".partial"


def save_snapshot(root: Path, step: int, engine: PlainEngine, keep: int, keep_every: int | None = None) -> None:
    """Write the state after `step` steps, every rank its own part; then drop all but the newest `keep` snapshots and those of multiples of
    `keep_every` steps, which stay when the stage is done."""
    team = engine.team
    final = root / f"{PREFIX}{step:08d}"
    partial = final.with_name(final.name + PARTIAL)
    if team.leads:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    team.wait()
    partial.mkdir(parents=True, exist_ok=True)  # a file system of several machines may show it late
    weights = _named([*engine.weights(), *engine.buffers()])
    files = {"model": weights, "optimizer": _named(engine.moments()), "rng": _random_states()}
    hashes = {}
    for kind, tensors in files.items():
        path = partial / f"{kind}-{team.rank:05d}.safetensors"
        save_file(tensors, path)
        sync(path)
        hashes[path.name] = _sha256(path)
    gathered = {name: digest for found in team.gather(hashes) for name, digest in found.items()}
    if team.leads:
        write_json(partial / "state.json", {"step": step, "ranks": team.size, "sha256": gathered})
        if keep_every and step % keep_every == 0:
            (partial / KEPT).touch()
        os.replace(partial, final)
        sync(root)
        for old in snapshots(root)[:-keep]:
            if not (old / KEPT).exists():
                _drop(old)
    team.wait()


def _named(parts: Iterable[Part]) -> dict[str, Tensor]:
    return {f"{part.name}|{part.key}|{part.start}": part.values.cpu().contiguous() for part in parts}


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _drop(path: Path) -> None:
    """Renamed first, so that a crash in the middle never leaves half a snapshot under a whole one's name."""
    dropped = path.with_name(path.name + PARTIAL)
    shutil.rmtree(dropped, ignore_errors=True)
    path.rename(dropped)
    shutil.rmtree(dropped)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def snapshots(root: Path) -> list[Path]:
    """Complete snapshots, oldest first."""
    return sorted(path for path in root.glob(f"{PREFIX}*") if PARTIAL not in path.name)


class Snapshot:
    """A whole snapshot, open for reading by ranges."""

    def __init__(self, path: Path, step: int):
        self.path, self.step = path, step
        self._parts: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for file in sorted([*path.glob("model-*.safetensors"), *path.glob("optimizer-*.safetensors")]):
            handle = safe_open(file, framework="pt")
            for entry in handle.keys():
                name, key, start = entry.rsplit("|", 2)
                (size,) = handle.get_slice(entry).get_shape()
                self._parts.setdefault((name, key), []).append((int(start), int(start) + size, handle, entry))
        for parts in self._parts.values():
            parts.sort(key=lambda part: part[:2])

    def read(self, name: str, key: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor `key` ("weight", "exp_avg", ...) of parameter `name`."""
        pieces, at = [], start
        for first, last, handle, entry in self._parts.get((name, key), []):
            if first <= at < min(last, stop):
                pieces.append(handle.get_slice(entry)[at - first : min(last, stop) - first])
                at = min(last, stop)
        if at != stop and start != stop:
            raise ValueError(
                f"{self.path}: {key} of {name} ends at element {at}, expected {stop}; it is of another model, or of another "
                "version of this package: remove it to start over"
            )
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else torch.empty(0)

    def steps_of(self, name: str) -> float:
        """How often the optimizer has updated that parameter; 0 for never."""
        return self.read(name, STEP, 0, 1).item() if (name, STEP) in self._parts else 0.0

    def restore_random_states(self, team: Team) -> None:
        """Of the same rank; ranks that were not there when it was written keep what they were started with."""
        path = self.path / f"rng-{team.rank:05d}.safetensors"
        if not path.is_file():
            return
        states = load_file(path)
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])


def newest_snapshot(root: Path, team: Team, say: Any) -> Snapshot | None:
    """The newest snapshot whose files hash to what was written; damaged ones are dropped. Every rank checks its share."""
    while found := team.share(snapshots(root)):
        path = found[-1]
        state = _state(path)
        names = sorted(state.get("sha256", {}))
        mine = names[team.rank :: team.size]
        whole = (
            bool(names)
            and path.name == f"{PREFIX}{state.get('step', -1):08}"
            and all(_is(path / name, state["sha256"][name]) for name in mine)
        )
        if all(team.gather(whole)):
            return Snapshot(path, state["step"])
        if team.leads:
            say(f"{path.name}: damaged (its hash does not match); dropped, going back to the snapshot before it")
            _drop(path)
        team.wait()
    return None


def _state(path: Path) -> dict:
    try:
        return json.loads((path / "state.json").read_text())
    except (OSError, ValueError):
        return {}


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and _sha256(path) == digest

"""Training checkpoints: weights, optimizer and position, from which a run goes on bit for bit. safetensors only.

    checkpoints/step-00000200/{model.safetensors, optimizer.safetensors, state.json}

The directory gets its name when everything in it is on disk; state.json carries the hash of the other two files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from upcycle.durable import atomic_directory, write_json
from upcycle.store import Run

PREFIX = "step-"


def save_snapshot(root: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> None:
    """Write the state after `step` steps; then drop all but the newest `keep` snapshots."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[id(parameter)]}|{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    final = root / f"{PREFIX}{step:08d}"
    with atomic_directory(final) as out:
        save_file(weights, out / "model.safetensors")
        save_file(moments, out / "optimizer.safetensors")
        save_file({"cpu": torch.get_rng_state()}, out / "rng.safetensors")
        write_json(out / "state.json", {"step": step, "sha256": _hashes(out)})
    for old in snapshots(root)[:-keep]:
        _drop(old)


def _drop(path: Path) -> None:
    """Renamed first, so that a crash in the middle never leaves half a snapshot under a whole one's name."""
    dropped = path.with_name(path.name + ".partial")
    shutil.rmtree(dropped, ignore_errors=True)
    path.rename(dropped)
    shutil.rmtree(dropped)


def _hashes(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.file_digest(path.open("rb"), "sha256").hexdigest()
        for path in sorted(directory.glob("*.safetensors"))
    }


def snapshots(root: Path) -> list[Path]:
    """Complete snapshots, oldest first."""
    return sorted(path for path in root.glob(f"{PREFIX}*") if not path.name.endswith(".partial"))


def restore_newest(root: Path, model: nn.Module, optimizer: torch.optim.Optimizer, run: Run) -> int:
    """Load the newest snapshot whose files hash to what was written; returns its step, 0 if there is none."""
    for path in reversed(snapshots(root)):
        try:
            state = json.loads((path / "state.json").read_text())
            whole = state["sha256"] == _hashes(path)
        except (OSError, ValueError):
            whole = False
        if whole:
            _load(path, model, optimizer)
            return state["step"]
        run.say(f"{path.name}: damaged (its hash does not match); dropped, going back to the snapshot before it")
        _drop(path)
    return 0


def _load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in load_file(path / "model.safetensors").items():
            parameters[name].copy_(value)
    moments: dict[str, dict[str, Tensor]] = {}
    for full_name, value in load_file(path / "optimizer.safetensors").items():
        name, key = full_name.rsplit("|", 1)
        moments.setdefault(name, {})[key] = value
    optimizer.state.clear()
    for name, state in moments.items():
        optimizer.state[parameters[name]] = state
    torch.set_rng_state(load_file(path / "rng.safetensors")["cpu"])

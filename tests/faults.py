"""Kill a run at random moments, and damage its checkpoints, until it has had enough; after each it goes on, and in the end nothing differs.

    python -m tests.faults --kills 100 [--rng-seed 1] [--processes 2] [--json FILE]

A round is a whole small run from an empty directory: text, tokens, seed, branches, soup, assembly, mixture, dense continuation, evaluation, report.
Signals are SIGKILL and SIGTERM, to the command and all that it started; after a part of them a file of the newest checkpoint is cut short or has one bit
turned. What a round leaves is compared with a run that nothing disturbed: every byte of every artifact, but for times.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.test_kills import SMALL, contents, served

SETTINGS = [*SMALL, "launch.checkpoint_steps=1", "launch.keep_checkpoints=2", "track.progress=false"]
MEAN_SECONDS = 1.0  # between a start and the signal
DAMAGE = 0.3  # so often a checkpoint is damaged as well, where there is one
TIMES = ("seconds", "parallel_seconds", "machine", "provenance", "created")  # what two reports can't share
DRAWN = (".html", ".svg", ".png")  # drawn from report.json, times and all


def undisturbed(path: Path) -> dict[str, Any]:
    """What a run left under `path`, by artifact, less times."""
    found = {
        artifact.name: contents(artifact) for artifact in (path / "artifacts").iterdir() if artifact.name[0] != "."
    }
    for name, files in found.items():
        if name.startswith("report-"):
            kept = {file: value for file, value in files.items() if not file.endswith(DRAWN)}
            found[name] = kept | {"report.json": _timeless(json.loads(files["report.json"]))}
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(one) for key, one in value.items() if key not in TIMES}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Artifacts and files that are not alike."""
    odd = [f"{name} is on one side only" for name in sorted(found.keys() ^ expected.keys())]
    for name in sorted(found.keys() & expected.keys()):
        ours, theirs = found[name], expected[name]
        odd += [f"{name}/{file}" for file in sorted({*ours, *theirs}) if ours.get(file) != theirs.get(file)]
    return odd


def damage(root: Path, draw: random.Random) -> str | None:
    """Cut short, or turn one bit of, a file of the newest checkpoint of what is in training; which it was."""
    steps = sorted(path for path in root.glob("artifacts/*.partial/checkpoints/step-*") if path.suffix != ".partial")
    files = [file for file in steps[-1].iterdir() if file.stat().st_size] if steps else []
    if not files:
        return None
    file = draw.choice(sorted(files))
    data = bytearray(file.read_bytes())
    place = draw.randrange(len(data))
    if draw.random() < 0.5:
        data = data[:place]
    else:
        data[place] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return f"{steps[-1].parent.parent.name}/{steps[-1].name}/{file.name}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--rng-seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    settings, mean = list(SETTINGS), MEAN_SECONDS
    if chosen.processes > 1:
        settings += ["launch=accelerate", "launch.config=zero2", f"launch.processes={chosen.processes}"]
        mean *= 6  # a group takes long to start
    found = run(chosen.kills, random.Random(chosen.rng_seed), settings, mean)
    found |= {"rng_seed": chosen.rng_seed, "processes": chosen.processes}
    print(json.dumps(found, indent=1))
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(found["differences"]))


def run(kills: int, draw: random.Random, settings: list[str], mean: float) -> dict[str, Any]:
    """Rounds until there were so many kills; what happened, and what differs."""
    counted: Counter[str] = Counter()
    stages: Counter[str] = Counter()
    odd: list[str] = []
    start = time.monotonic()
    with served() as upcycle, tempfile.TemporaryDirectory() as place:
        reference = Path(place) / "reference"
        reference.mkdir()
        assert upcycle(*settings, cwd=reference) == 0, (reference / "log").read_text()
        expected = undisturbed(reference)
        while counted["kills"] < kills:
            where = Path(place) / f"round-{counted['rounds']}"
            where.mkdir()
            status = 1
            while status != 0:
                sent = draw.choice((signal.SIGKILL, signal.SIGTERM))
                after = (draw.expovariate(1 / mean), int(sent)) if counted["kills"] < kills else None
                status = upcycle(*settings, cwd=where, after=after)
                said = (where / "log").read_text(errors="replace")
                counted["damaged checkpoints noticed"] += said.count("damaged (")
                if status == 0:
                    continue
                if after is None or "upcycle: " in said.replace("upcycle: stopped", ""):
                    raise AssertionError(f"round {counted['rounds']} does not go on: exit status {status}\n{said}")
                counted["kills"] += 1
                counted[signal.Signals(sent).name] += 1
                stages.update({path.name.split("-")[0] for path in where.glob("artifacts/*.partial")} or {"between"})
                if draw.random() < DAMAGE and damage(where, draw):
                    counted["damaged checkpoints"] += 1
            odd += differences(undisturbed(where), expected)
            counted["rounds"] += 1
            print(
                f"{counted['kills']} of {kills} kills, round {counted['rounds']} done, {len(odd)} differences",
                flush=True,
            )
            shutil.rmtree(where)
    figures = {
        name: counted[name]
        for name in ("rounds", "kills", "SIGKILL", "SIGTERM", "damaged checkpoints", "damaged checkpoints noticed")
    }
    return figures | {
        "in stages": dict(sorted(stages.items())),
        "seconds": round(time.monotonic() - start),
        "differences": odd,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

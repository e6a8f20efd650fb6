"""Kill a run at random moments, and damage its checkpoints, until it has had enough; after each it goes on, and in the end nothing differs.

    python -m tests.faults --kills 100 [--rng-seed 1] [--json FILE]

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
from datetime import date
from pathlib import Path
from typing import Any

from tests.test_kills import SMALL, contents, served
from upcycle.stopping import AGAIN, TERMINATED
from upcycle.store import RECORD

SETTINGS = [*SMALL, "launch.checkpoint_steps=1", "launch.keep_checkpoints=2", "track.progress=false"]
SHARE = 0.6  # of the time of an undisturbed run: the latest moment of a signal, so that rounds get on and all stages have their kills
DAMAGE = 0.3  # so often a checkpoint is damaged as well, where there is one
TIMES = ("seconds", "parallel_seconds", "machine", "provenance", "created")  # what two reports can't share
ENDS = {signal.SIGKILL: {-signal.SIGKILL}, signal.SIGTERM: {-signal.SIGTERM, TERMINATED, AGAIN}}  # exit statuses
FIGURES = ("rounds", "kills", "SIGKILL", "SIGTERM", "damaged checkpoints", "damaged checkpoints noticed")
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
    """Cut short, or turn one bit of, a file of the newest checkpoint of what is in training; which it was. None where nothing is."""
    steps = sorted(path for path in root.glob("artifacts/*.partial/checkpoints/step-*") if path.suffix != ".partial")
    if (
        not steps or (steps[-1].parent.parent / RECORD).exists()
    ):  # the latter is whole, and its checkpoints are not read again
        return None
    file = draw.choice(sorted(steps[-1].glob("*.safetensors")))
    data = bytearray(file.read_bytes())
    place = draw.randrange(len(data))
    if draw.random() < 0.5:
        data = data[:place]
    else:
        data[place] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return f"{steps[-1].parent.parent.name}/{steps[-1].name}/{file.name}"


def sentence(found: dict[str, Any]) -> str:
    """As README.md and docs/cluster.md have it."""
    counts = f"{found['kills']} kills ({found['SIGKILL']} SIGKILL, {found['SIGTERM']} SIGTERM)"
    stages = ", ".join(f"{name} {count}" for name, count in found["in stages"].items())
    return (
        f"{found['date']}: {counts} over {found['rounds']} runs, {found['damaged checkpoints']} damaged checkpoints, all "
        f"{found['damaged checkpoints noticed']} noticed; {len(found['differences'])} differences. What was unfinished at a kill: {stages}."
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--rng-seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    found = run(chosen.kills, random.Random(chosen.rng_seed), SETTINGS)
    found |= {"date": date.today().isoformat(), "rng_seed": chosen.rng_seed}
    print(json.dumps(found, indent=1))
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(found["differences"]))


def run(kills: int, draw: random.Random, settings: list[str]) -> dict[str, Any]:
    """Rounds until there were so many kills; what happened, and what differs."""
    counted: Counter[str] = Counter()
    stages: Counter[str] = Counter()
    odd: list[str] = []
    begun = time.monotonic()
    with served() as upcycle, tempfile.TemporaryDirectory() as place:
        reference = Path(place) / "reference"
        reference.mkdir()
        assert upcycle(*settings, cwd=reference) == 0, (reference / "log").read_text()
        longest = (time.monotonic() - begun) * SHARE
        expected = undisturbed(reference)
        while counted["kills"] < kills:
            where = Path(place) / f"round-{counted['rounds']}"
            where.mkdir()
            status, damaged = 1, None
            while status != 0:
                sent = draw.choice((signal.SIGKILL, signal.SIGTERM))
                spared = damaged or counted["kills"] >= kills  # a damaged checkpoint is to be read
                status = upcycle(*settings, cwd=where, after=None if spared else (draw.uniform(0, longest), int(sent)))
                said = (where / "log").read_text(errors="replace")
                counted["damaged checkpoints noticed"] += said.count("damaged (")
                damaged = None
                if status == 0:
                    continue
                if spared or status not in ENDS[sent]:
                    raise AssertionError(f"round {counted['rounds']} does not go on: exit status {status}\n{said}")
                counted["kills"] += 1
                counted[signal.Signals(sent).name] += 1
                stages.update({path.name.split("-")[0] for path in where.glob("artifacts/*.partial")} or {"between"})
                damaged = damage(where, draw) if draw.random() < DAMAGE else None
                counted["damaged checkpoints"] += damaged is not None
            odd += differences(undisturbed(where), expected)
            counted["rounds"] += 1
            print(f"{counted['kills']} of {kills} kills, round {counted['rounds']}, {len(odd)} differences", flush=True)
            shutil.rmtree(where)
    figures = {name: counted[name] for name in FIGURES}
    return figures | {
        "in stages": dict(sorted(stages.items())), "seconds": round(time.monotonic() - begun), "differences": odd,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Kill a run at random moments, and damage its checkpoints, until it has had enough; after each it goes on, and in the end nothing differs.

    python -m tests.faults --kills 100 [--processes 2] [--rng-seed 1] [--json FILE]

A round is a whole small run from an empty directory: text, tokens, seed, branches, soup, assembly, mixture, dense continuation, evaluation, report. With
--processes 2 groups of two processes train and evaluate; such a run is smaller, for every stage starts four processes. Signals are SIGKILL and SIGTERM: to
all processes of the run, to the command alone, or to one rank alone. A kill that leaves a process running is an error. After a part of them a file of the
newest checkpoint is cut short or has one bit turned. What a round leaves is compared with a run that nothing disturbed: every byte of every artifact,
kept checkpoints too, but for times.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import psutil

from tests.test_kills import SMALL, contents, served
from upcycle.stopping import AGAIN, TERMINATED
from upcycle.store import RECORD

SETTINGS = [*SMALL, "launch.checkpoint_steps=1", "launch.keep_checkpoints=2", "track.progress=false"]
PAIR = [
    *SETTINGS, "~branches.law", "soup=false", "dense=null", "branch.micro_batch_sequences=4", "launch.keep_every=3", "launch=accelerate",
    "launch.config=ddp", "launch.processes=2", "launch.threads=1",
]  # fmt: skip
CHOICES = {1: SETTINGS, 2: PAIR}
# Of the time of an undisturbed run: the latest moment of a signal, so that rounds get on and all stages have their kills.
SHARES = {1: 0.6, 2: 0.3}
VICTIMS = {1: ("all",), 2: ("driver", "rank", "all")}
DAMAGE = 0.3  # so often a checkpoint is damaged as well, where there is one
PATIENCE = 20.0  # seconds in which what a killed run has started must be gone
TIMES = ("seconds", "parallel_seconds", "machine", "provenance", "created")  # what two reports can't share
DEAD, ASKED = {-signal.SIGKILL}, {-signal.SIGTERM, TERMINATED, AGAIN}
ENDS = {  # exit statuses of the command by victim and signal; 2: it says that its group has ended
    ("all", signal.SIGKILL): DEAD, ("driver", signal.SIGKILL): DEAD, ("rank", signal.SIGKILL): {2},
    ("all", signal.SIGTERM): ASKED, ("driver", signal.SIGTERM): ASKED, ("rank", signal.SIGTERM): {2, AGAIN},
}  # fmt: skip
FIGURES = ("rounds", "kills", "SIGKILL", "SIGTERM", "damaged checkpoints", "damaged checkpoints noticed")
DRAWN = (".html", ".svg", ".png")  # drawn from report.json, times and all


# What a run leaves ----------------------------------------------------------------------------------------------------


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


# Kills and damage -----------------------------------------------------------------------------------------------------


def members(where: Path) -> list[psutil.Process]:
    """All processes of the run in `where` but this one: it is their working directory, which children inherit, also those of a session of their own."""
    return [
        process
        for process in psutil.process_iter(["pid", "ppid", "cwd", "status", "cmdline"])
        if process.info["cwd"] == str(where.resolve())
        and process.info["status"] != psutil.STATUS_ZOMBIE
        and process.info["pid"] != os.getpid()
    ]


def rank_of(process: psutil.Process) -> int | None:
    """Its rank in the group that makes a stage; None of a driver or launcher, or of one that has just ended."""
    try:
        rank = process.environ().get("RANK")
        return int(rank) if rank is not None and "launch.pipeline" in process.cmdline() else None
    except psutil.Error:
        return None


def strike(found: list[psutil.Process], victim: str, rank: int, sent: int, draw: random.Random) -> str:
    """Send a signal to those of a run's processes; whom it went to: where no group is at work there is no rank, and the driver gets it."""
    numbers = {process.pid for process in found}
    ranks = [process for process in found if rank_of(process) == rank]
    drivers = [process for process in found if process.info["ppid"] not in numbers]
    hit = victim if victim != "rank" or ranks else "driver"
    targets = {"rank": ranks, "driver": drivers, "all": draw.sample(found, len(found))}[hit]
    for process in targets:
        try:
            process.send_signal(sent)
        except psutil.NoSuchProcess:  # others of the run ended it in between
            continue
    return hit


def left_running(where: Path) -> list[str]:
    """Command lines of processes of the run in `where` that have not ended in time."""
    deadline = time.monotonic() + PATIENCE
    while (found := members(where)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [f"{process.pid} {' '.join(process.info['cmdline'] or [])[:200]}" for process in found]


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


# Rounds ---------------------------------------------------------------------------------------------------------------


@dataclass
class Rounds:
    """So many kills over as many runs as it takes. upcycle: as `served` gives it. longest: seconds of a start before its signal, at most."""

    upcycle: Callable[..., int]
    settings: list[str]
    kills: int
    longest: float
    victims: tuple[str, ...]
    draw: random.Random
    counted: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)

    def round(self, where: Path) -> None:
        """One run from nothing to its end, killed on the way."""
        status, damaged = 1, None
        while status != 0:
            spared = bool(damaged) or self.counted["kills"] >= self.kills  # a damaged checkpoint is to be read
            sent = self.draw.choice((signal.SIGKILL, signal.SIGTERM))
            status, hit = self._start(where, None if spared else sent)
            said = (where / "log").read_text(errors="replace")
            self.counted["damaged checkpoints noticed"] += said.count("damaged (")
            damaged = None
            if hit is not None:
                self._count(where, hit, sent)
                self._check(status, hit, sent, said, left_running(where))
            elif status != 0:
                raise AssertionError(f"round {self.counted['rounds']} does not go on: exit status {status}\n{said}")
            if status != 0 and self.draw.random() < DAMAGE:
                damaged = damage(where, self.draw)
            self.counted["damaged checkpoints"] += damaged is not None
        self.counted["rounds"] += 1

    def _start(self, where: Path, sent: int | None) -> tuple[int, str | None]:
        """The command's exit status, and whom the signal `sent` went to, if it came in time."""
        ended, hit = threading.Event(), list[str]()
        seconds, victim, rank = (
            self.draw.uniform(0, self.longest),
            self.draw.choice(self.victims),
            self.draw.randrange(2),
        )

        def wait_and_strike() -> None:
            ended.wait(seconds)
            while not ended.is_set() and not hit:
                if found := members(where):  # it is not there in its first moments
                    hit.append(strike(found, victim, rank, sent or 0, self.draw))
                else:
                    ended.wait(0.05)

        thread = threading.Thread(target=wait_and_strike)
        if sent is not None:
            thread.start()
        try:
            status = self.upcycle(*self.settings, cwd=where)
        finally:
            ended.set()
            if sent is not None:
                thread.join()
        return status, hit[0] if hit else None

    def _count(self, where: Path, hit: str, sent: signal.Signals) -> None:
        self.counted.update(("kills", sent.name, hit))
        self.stages.update({path.name.split("-")[0] for path in where.glob("artifacts/*.partial")} or {"between"})

    def _check(self, status: int, hit: str, sent: signal.Signals, said: str, left: list[str]) -> None:
        """Status 0: the signal met a rank whose work was done."""
        expected = ENDS[hit, sent] | ({0} if hit == "rank" else set())
        clear = status != 2 or ("ended without finishing it" in said and "the same command goes on from there" in said)
        if left or status not in expected or not clear:
            raise AssertionError(
                f"{sent.name} to {hit}: exit status {status}, expected one of {sorted(expected)}, with 2 what to do; left running: {left}\n{said}"
            )


def run(kills: int, draw: random.Random, processes: int = 1) -> dict[str, Any]:
    """Rounds until there were so many kills; what happened, and what differs."""
    odd: list[str] = []
    begun = time.monotonic()
    with served() as upcycle, tempfile.TemporaryDirectory() as place:
        reference = Path(place) / "reference"
        reference.mkdir()
        assert upcycle(*CHOICES[processes], cwd=reference) == 0, (reference / "log").read_text()
        longest = (time.monotonic() - begun) * SHARES[processes]
        rounds = Rounds(upcycle, CHOICES[processes], kills, longest, VICTIMS[processes], draw)
        expected = undisturbed(reference)
        while rounds.counted["kills"] < kills:
            where = Path(place) / f"round-{rounds.counted['rounds']}"
            where.mkdir()
            rounds.round(where)
            odd += differences(undisturbed(where), expected)
            print(
                f"{rounds.counted['kills']} of {kills} kills, {rounds.counted['rounds']} runs, {len(odd)} differences",
                flush=True,
            )
            shutil.rmtree(where)
    figures = {"processes": processes} | {name: rounds.counted[name] for name in (*FIGURES, *VICTIMS[processes])}
    return figures | {
        "in stages": dict(sorted(rounds.stages.items())), "seconds": round(time.monotonic() - begun), "differences": odd,
    }  # fmt: skip


def in_short(found: dict[str, Any]) -> str:
    """As README.md has it."""
    counts = f"{found['kills']} kills ({found['SIGKILL']} SIGKILL, {found['SIGTERM']} SIGTERM"
    if found["processes"] > 1:
        counts += (
            f"; {found['driver']} of the command alone, {found['rank']} of one rank, {found['all']} of all processes"
        )
    runs = "1 run" if found["rounds"] == 1 else f"{found['rounds']} runs"
    damaged = f"{found['damaged checkpoints']} damaged checkpoints, {found['damaged checkpoints noticed']} noticed"
    if not found["damaged checkpoints"]:
        damaged = "no checkpoint damaged"
    return f"{counts}) over {runs}, {damaged}; {len(found['differences'])} differences"


def sentence(found: dict[str, Any]) -> str:
    """As docs/cluster.md has it."""
    stages = ", ".join(f"{name} {count}" for name, count in found["in stages"].items())
    return (
        f"{found['date']}, processes: {found['processes']}: {in_short(found)}. What was unfinished at a kill: {stages}."
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--processes", type=int, choices=sorted(CHOICES), default=1)
    parser.add_argument("--rng-seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="a file of such records by number of processes, which gets this one")
    chosen = parser.parse_args(arguments)
    found = run(chosen.kills, random.Random(chosen.rng_seed), chosen.processes)
    found |= {"date": date.today().isoformat(), "rng_seed": chosen.rng_seed}
    print(json.dumps(found, indent=1))
    if chosen.json:
        records = json.loads(chosen.json.read_text()) if chosen.json.exists() else {}
        chosen.json.write_text(json.dumps(records | {str(chosen.processes): found}, indent=1) + "\n")
    return int(bool(found["differences"]) or found["damaged checkpoints"] != found["damaged checkpoints noticed"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Assembling and merging checkpoints: whole processes against mergekit's, and in process against `cp`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from evals.benchmarks.rows import Row, compared, unscored
from evals.benchmarks.shapes import largest
from evals.benchmarks.sides import LAST_WORDS, Bench, SideFailed, environment

BRANCHES = ("code", "law", "math")
DENSITY = 0.5
OURS = {  # what one types in Python; sys.argv[1] holds the arguments
    "assemble": "import json, sys, upcycle; upcycle.assemble(**json.loads(sys.argv[1]))",
    "merge": "import json, sys, upcycle; upcycle.merge_models(**json.loads(sys.argv[1]))",
}


@dataclass(frozen=True)
class Ended:
    """A process that ended well: its wall time, and its largest resident memory."""

    seconds: float
    peak_bytes: int


def whole_process(command: Sequence[str], bench: Bench) -> Ended:
    """Raises SideFailed: another exit status than 0, or no such program."""
    errors = bench.folder / "errors.txt"
    os.sync()
    start = time.perf_counter()
    with errors.open("w") as file:
        try:
            process = subprocess.Popen(command, env=environment(bench.threads), stdout=file, stderr=file)
        except OSError as error:
            raise SideFailed(
                f"{command[0]} did not start ({error.strerror}); mergekit is in the extra `test`"
            ) from None
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        words = errors.read_text(errors="replace").strip()[-LAST_WORDS:]
        raise SideFailed(f"{Path(command[0]).name} ended with exit status {process.returncode}: {words}")
    return Ended(time.perf_counter() - start, used.ru_maxrss * 1024)


def models_of(bench: Bench, exact: bool = False) -> Path:
    """Four checkpoints of the largest size, written once a run; `exact`: whose merge hangs on no rounding. Raises SideFailed."""
    folder = bench.folder / ("exact" if exact else "models")
    if f"bytes of {folder}" not in bench.known:  # one that could not be written is tried again by the next benchmark
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        config = {"folder": str(folder), "sizes": largest(bench.quick).seed, "exact": exact}
        bench.known[f"bytes of {folder}"] = bench.once("checkpoints:write_models", config)["bytes"]
    return folder


def program(name: str) -> str:
    """A script installed beside this Python."""
    return str(Path(sysconfig.get_path("scripts")) / name)


Command = Callable[[Path], list[str]]  # of a directory to write into


def duel(
    bench: Bench,
    name: str,
    sides: Mapping[str, Command],
    check: str,
    note: str,
    exact: Mapping[str, Command] | None = None,
) -> Row:
    """Whole processes in turn, each into a new directory; the tensors of the last ones are compared.

    sides: "ours" and "peer". check: the function of checkpoints.py that compares them. exact: whose tensors are compared instead.
    """
    case, made = largest(bench.quick).name, {"ours": bench.folder / "ours", "peer": bench.folder / "peer"}
    found: dict[str, list[Ended]] = {"ours": [], "peer": []}
    try:
        for number in range(bench.rounds):
            for side, command in list(sides.items())[:: -1 if number % 2 else 1]:
                shutil.rmtree(made[side], ignore_errors=True)
                found[side].append(whole_process(command(made[side]), bench))
        for side, command in (exact or {}).items():
            shutil.rmtree(made[side], ignore_errors=True)
            whole_process(command(made[side]), bench)
        same = bench.once(f"checkpoints:{check}", {side: str(path) for side, path in made.items()})
        if same["problem"]:
            raise SideFailed(f"the two made different tensors: {same['problem']}")
    except SideFailed as error:
        return unscored(name, case, "s", str(error))
    memory = [median(one.peak_bytes for one in found[side]) / 2**30 for side in ("ours", "peer")]
    limit = f"peak memory {memory[0]:.2f} GiB, the peer's {memory[1]:.2f}"
    seconds = [[one.seconds for one in found[side]] for side in ("ours", "peer")]
    return compared(name, case, *seconds, "s", less_is_better=True, checked="same tensors", limit=limit, note=note)


def ours_of(call: str, bench: Bench, models: Path, **arguments: Any) -> Command:
    given = {"seed": str(models / "seed"), "branches": {name: str(models / name) for name in BRANCHES}} | arguments
    return lambda out: [sys.executable, "-c", OURS[call], json.dumps(given | {"out": str(out)})]


def mergekit(name: str, plan: Mapping[str, Any], bench: Bench, *options: str) -> Command:
    file = bench.folder / f"{name}-{Path(plan['base_model']).parent.name}.json"  # which is YAML too
    file.write_text(json.dumps(plan))
    return lambda out: [program(name), str(file), str(out), *options]


def assembly_mergekit(bench: Bench) -> Iterator[Row]:
    """FrankenMoE with random routers, mergekit-moe's own recipe; ours without its proof, then with it."""
    models = models_of(bench)
    experts = [{"source_model": str(models / name)} for name in ("seed", *BRANCHES)]
    plan = {"base_model": str(models / "seed"), "gate_mode": "random", "dtype": "bfloat16", "experts": experts}
    theirs = mergekit("mergekit-moe", plan, bench)
    for name, prove in (("assembly_mergekit", False), ("assembly_mergekit_proved", True)):
        ours = ours_of("assemble", bench, models, method="frankenmoe_random", prove=prove)
        note = "ours proves what it wrote, which mergekit does not" if prove else "prove=false: neither proves anything"
        yield duel(bench, name, {"ours": ours, "peer": theirs}, "same_mixture", note)


def ties_mergekit(bench: Bench) -> Iterator[Row]:
    """TIES of three branches around a seed."""

    def sides(models: Path) -> dict[str, Command]:
        each = [{"model": str(models / name), "parameters": {"weight": 1.0, "density": DENSITY}} for name in BRANCHES]
        plan = {"merge_method": "ties", "models": each, "base_model": str(models / "seed"), "dtype": "bfloat16"}
        plan |= {"parameters": {"lambda": 1.0, "normalize": True}}
        return {
            "ours": ours_of("merge", bench, models, method="ties", density=DENSITY),
            "peer": mergekit("mergekit-yaml", plan, bench, "--no-write-model-card"),
        }

    yield duel(bench, "ties_mergekit", sides(models_of(bench)), "same_model", "", sides(models_of(bench, exact=True)))


def against_cp(bench: Bench) -> Iterator[Row]:
    """Bytes read and written a second, in process, against copying the same four checkpoints."""
    for name, how in (("assembly_cp", "assemble"), ("ties_cp", "ties")):
        size, unit, copied = largest(bench.quick), "bytes/s", []
        config = {"models": str(models_of(bench)), "out": str(bench.folder / "made"), "how": how}
        side = bench.side("checkpoints:InProcess", config, keeps_freed_memory=True)
        rates: list[float] = []
        try:
            with side:
                side.ask("measure")  # imports, and the files into the page cache
                for _ in range(bench.rounds):
                    rates.append(side.ask("measure")["rate"])
                    copied.append(_copying(bench))
            best = f"cp moves {median(copied) / 1e9:.1f} GB/s from and to the page cache"
            yield compared(name, size.name, rates, copied, unit, checked="nothing: cp only copies", limit=best)
        except SideFailed as error:
            yield unscored(name, size.name, unit, str(error))


def _copying(bench: Bench) -> float:
    """Bytes/s that `cp` reads and writes, without sharing blocks."""
    target = bench.folder / "copied"
    shutil.rmtree(target, ignore_errors=True)
    models = models_of(bench)
    ended = whole_process(["cp", "-r", "--reflink=never", str(models), str(target)], bench)
    return 2 * bench.known[f"bytes of {models}"] / ended.seconds


BENCHMARKS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "assembly_mergekit": assembly_mergekit,
    "ties_mergekit": ties_mergekit,
    "against_cp": against_cp,
}

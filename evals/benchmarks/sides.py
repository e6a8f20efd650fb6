"""What is compared runs in processes of its own, one side each, which measure in turn: A B A B.

A side is a function of this package that sets something up from a JSON config and returns an object; the object's methods are
what it can be asked: `measure`, `profile`. Answers are JSON too. A side sleeps while another one measures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# What would give a side another allocator or other threads than a user has who sets nothing.
SET_BY_HAND = (
    "MALLOC_", "LD_PRELOAD", "OMP_", "MKL_", "KMP_", "GOMP_", "GLIBC_TUNABLES", "TOKENIZERS_PARALLELISM", "RAYON_", "ATEN_",
    "TORCHINDUCTOR_", "ONEDNN_", "DNNL_", "THP_",
)  # fmt: skip
LAST_WORDS = 300  # characters of a failed side's error output
FRESH_ROUNDS = 2


class SideFailed(RuntimeError):
    """A side ended by itself, or does not compute what it should; the message says which and why."""


@dataclass
class Bench:
    """What every benchmark gets. folder: for its files, removed afterwards. rounds: how often each side measures.

    quick: sizes that only show that everything runs. threads: of every side; None: as many as torch takes by itself.
    """

    folder: Path
    quick: bool = False
    rounds: int = 5
    threads: int | None = None
    say: Callable[[str], None] = lambda text: None
    known: dict[str, Any] = field(default_factory=dict)  # what was measured once and is asked for again

    def rounds_of(self, held: bool) -> int:
        """Fewer where every turn has to set its side up anew."""
        return self.rounds if held else min(self.rounds, FRESH_ROUNDS)

    def side(self, function: str, config: Mapping[str, Any], keeps_freed_memory: bool = False) -> Side:
        """function: `module:name` below evals.benchmarks. keeps_freed_memory: with the allocator setting of `upcycle`."""
        return Side(f"evals.benchmarks.{function}", config, keeps_freed_memory, environment(self.threads))

    def once(self, function: str, config: Mapping[str, Any]) -> Any:
        """What a side that only sets something up answers. Raises SideFailed."""
        with self.side(function, config) as side:
            return side.ready()


def environment(threads: int | None, **more: str) -> dict[str, str]:
    """Of a process that is measured: this one's without what a user does not set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SET_BY_HAND)}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"} | (
        {} if threads is None else dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
    )
    return kept | own | more


class Side:
    """A process that measures when it is asked; it starts with the first question."""

    def __init__(self, function: str, config: Mapping[str, Any], keeps_freed_memory: bool, env: Mapping[str, str]):
        self.function, self.config, self.env = function, dict(config), dict(env)
        self.keeps_freed_memory = keeps_freed_memory
        self._process: subprocess.Popen[str] | None = None
        self._said: dict[str, Any] = {}

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def ready(self) -> dict[str, Any]:
        """What the side said when it had set itself up. Raises SideFailed."""
        if self._process is None:
            self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (closed by `close`)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "evals.benchmarks.sides", self.function, json.dumps(self.config)]
                + ["keep"] * self.keeps_freed_memory,
                env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            )  # fmt: skip
            self._said = self._answer()
        return self._said

    def ask(self, what: str) -> dict[str, Any]:
        """Raises SideFailed."""
        self.ready()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `_answer` says how it ended
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._errors.seek(0)
        words = self._errors.read().strip()[-LAST_WORDS:]
        self.close()
        raise SideFailed(f"{self.function} ended with exit status {status}: {words}")

    def close(self) -> None:
        """End the process; a later question starts another one."""
        if self._process is None:
            return
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()
        self._errors.close()
        self._process = None


@dataclass
class Rounds:
    """What the sides of one comparison said. answers: of each side by round. failed: why a side has no more of them."""

    ready: dict[str, dict[str, Any]]
    answers: dict[str, list[dict[str, Any]]]
    failed: dict[str, str]

    def of(self, side: str, what: str) -> list[float]:
        """One figure of every round. Raises SideFailed: the side has failed."""
        if side in self.failed:
            raise SideFailed(self.failed[side])
        return [answer[what] for answer in self.answers[side]]

    def pair(self, ours: str, peer: str, what: str) -> tuple[list[float], list[float]]:
        return self.of(ours, what), self.of(peer, what)


def alternate(sides: Mapping[str, Side], rounds: int, held: bool = True) -> Rounds:
    """Ask every side in turn, `rounds` times, every other time backwards. A side that fails is left out of the rounds that follow.

    held: the processes stay between their turns; else each turn is a fresh one, and memory holds one side at a time.
    """
    found = Rounds({}, {name: [] for name in sides}, {})
    try:
        for number in range(rounds):
            for name, side in list(sides.items())[:: -1 if number % 2 else 1]:
                if name in found.failed:
                    continue
                try:
                    found.ready[name] = side.ready()
                    found.answers[name].append(side.ask("measure"))
                except SideFailed as error:
                    found.failed[name] = str(error)
                if not held:
                    side.close()
    finally:
        for side in sides.values():
            side.close()
    return found


def main(arguments: Sequence[str]) -> None:
    """A side's process: one line of JSON when it is ready, then one for each line of its input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if "keep" in arguments[2:]:
        from upcycle.machine import keep_freed_memory

        if not keep_freed_memory():
            raise SystemExit("the allocator setting is glibc's, and did not take effect here")
    from importlib import import_module

    module, name = arguments[0].split(":")
    side = getattr(import_module(module), name)(json.loads(arguments[1]))
    print(json.dumps(getattr(side, "about", side)), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(getattr(side, line.strip())()), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

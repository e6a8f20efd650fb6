"""Artifacts: what a stage makes, under a key that says exactly what it was made from. No torch.

A stage is `function(config, *, out, run, **inputs)`, a pure function of its config and its input directories. Its key
hashes the function's name and version, the config, the content of outside files, and the keys of its inputs; nothing
about who runs it, where or how often it saves. The same key is never computed twice.

    artifacts/<stage>-<key8>.partial/   being made; a crash leaves this, and the next run goes on from it
    artifacts/<stage>-<key8>/           finished: `stage.json` was written last, then the directory was renamed
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from upcycle.durable import sync, write_json
from upcycle.team import ALONE, Team

RECORD, TIMING = "stage.json", "timing.json"
RESUMABLE = ("checkpoints", "metrics.jsonl", TIMING)  # what an interrupted attempt may leave to the next one
KEPT = "kept"  # in a checkpoint that stays when its stage is done
COMMIT = "COMMIT"  # beside a copy of the package: the commit that it is of
FAILED = "failed.json"  # why the last attempt ended, if by an error
LIBRARIES = ("upcycle", "torch", "transformers", "accelerate", "datasets", "numpy")


def ignore(*_args: object, **_kwargs: object) -> None:
    """For callers who want no progress."""


@dataclass(frozen=True)
class Run:
    """What a stage may use of the outside. Nothing here changes a result, so nothing here is part of a key.

    say: print a line. advance: report progress, `advance(done, total, **figures)`. record: keep a row of metrics. saved: call it after a snapshot.
    checkpoint_steps, checkpoint_seconds: save at least this often (None: never for that reason).
    team: the processes that make the stage together.
    """

    say: Callable[[str], None] = print
    advance: Callable[..., None] = ignore
    record: Callable[[dict], None] = ignore
    checkpoint_steps: int | None = None
    checkpoint_seconds: float | None = 60.0
    keep_checkpoints: int = 1
    keep_every: int | None = None
    saved: Callable[[], None] = ignore
    team: Team = ALONE


@dataclass(frozen=True)
class Artifact:
    """One stage of a run, computed or not. `inputs` are artifacts, or dicts of artifacts by name."""

    name: str
    function: Callable[..., None]
    config: Any
    inputs: Mapping[str, Any]
    key: str
    path: Path
    outside: Mapping[str, Any] = field(default_factory=dict)

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")

    @property
    def together(self) -> bool:
        """Whether all processes of a group make it together; else the first one does, and the others wait."""
        return getattr(self.function, "together", False)

    @property
    def finished(self) -> bool:
        return (self.path / RECORD).is_file()

    @property
    def state(self) -> str:
        """ "done", "partial at step n", "partial" or "missing"."""
        if self.finished:
            return "done"
        if not self.partial.is_dir():
            return "missing"
        steps = [path.name.removeprefix("step-") for path in self.partial.glob("checkpoints/step-*") if path.is_dir()]
        numbers = [int(step) for step in steps if step.isdigit()]
        return f"partial at step {max(numbers)}" if numbers else "partial"

    def parents(self) -> Iterator[Artifact]:
        for value in self.inputs.values():
            yield from value.values() if isinstance(value, Mapping) else [value]

    def seconds(self) -> float:
        """Wall-clock seconds the stage took, over all its attempts."""
        return json.loads((self.path / TIMING).read_text())["seconds"]


class Store:
    """The artifacts under `root`, and the stages declared so far, in order.

    `stage` only declares, so a recipe can be planned, run, or turned into jobs; `make` computes.
    """

    def __init__(self, root: Path | str):
        self.root = Path(root).absolute()
        self.stages: dict[str, Artifact] = {}
        self.foreign: dict[str, str] = {}

    def stage(
        self,
        name: str,
        function: Callable[..., None],
        config: Any,
        content: Any = None,
        outside: Mapping[str, Any] | None = None,
        **inputs: Any,
    ) -> Artifact:
        """Declare a stage. `content` identifies outside data and enters the key; `outside` is passed on but does not.

        Raises ValueError: another stage of this run has that name and is not the same.
        """
        key = _key(function, config, content, inputs)
        path = self.root / f"{name.replace('/', '-')}-{key[:8]}"
        artifact = Artifact(name, function, config, inputs, key, path, outside or {})
        if name in self.stages and self.stages[name].key != key:
            raise ValueError(f"stage {name!r} is declared twice with different settings; give one another name")
        self.stages[name] = artifact
        return artifact

    def make(self, artifact: Artifact, run: Run) -> bool:
        """Compute an artifact unless it is finished; True if this call computed it. Every rank of run.team calls it.

        Raises ValueError: an input is missing; the processes of the group were started with different settings.
        """
        if len(keys := set(run.team.gather((artifact.name, artifact.key[:8])))) > 1:
            shown = ", ".join(f"{name} {key}" for name, key in sorted(keys))
            raise ValueError(
                f"the processes of this group are to make different things ({shown}), expected one; start each with the same "
                "settings"
            )
        if run.team.share(artifact.finished):
            if run.team.leads:
                _drop_snapshots(artifact)  # left by a crash right after the renaming
                self._note_foreign(artifact)
            return False
        if missing := list(dict.fromkeys(parent.name for parent in artifact.parents() if not parent.finished)):
            raise ValueError(
                f"stage {artifact.name!r} needs {', '.join(missing)}, which "
                f"{'is' if len(missing) == 1 else 'are'} not finished; run that first (stage={missing[0]}) or run the "
                "whole experiment"
            )
        with self._lock(artifact, run) if run.team.leads else nullcontext():
            if run.team.share(artifact.finished):  # another process made it while we waited
                return False
            self._compute(artifact, run)
        return True

    def _lock(self, artifact: Artifact, run: Run) -> AcquireReturnProxy:
        """Two processes that want the same artifact wait instead of racing; the lock of a dead process is free."""
        locks = self.root / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{artifact.path.name}.lock")
        try:
            return lock.acquire(timeout=1)
        except Timeout:
            run.say("another process is making it; waiting")
            return lock.acquire()

    def _compute(self, artifact: Artifact, run: Run) -> None:
        partial, team = artifact.partial, run.team
        if not team.share((partial / RECORD).is_file()):  # else whole: an attempt before lacked the renaming only
            if team.leads:
                _clear(partial)
            team.wait()
            if team.leads or artifact.together:
                self._call(artifact, run if artifact.together else replace(run, team=ALONE))
            team.wait()
        if team.leads:
            self._finish(artifact)
        team.wait()

    def _call(self, artifact: Artifact, run: Run) -> None:
        """Call the stage's function in every process that makes it; the first one keeps the record."""
        partial, leads = artifact.partial, run.team.leads
        inputs = {
            name: {k: v.path for k, v in value.items()} if isinstance(value, Mapping) else value.path
            for name, value in artifact.inputs.items()
        }
        clock = _Clock(partial / TIMING)
        run = replace(run, saved=clock.save) if leads else run
        try:
            artifact.function(artifact.config, out=partial, run=run, **artifact.outside, **inputs)
        except BaseException as error:
            if leads:
                with suppress(OSError):  # a full disk must not hide why the stage failed
                    clock.save()
                    if isinstance(error, Exception):
                        write_json(partial / FAILED, {"error": f"{type(error).__name__}: {error}"})
            raise
        run.team.wait()
        if leads:
            clock.save()
            for path in partial.rglob("*"):
                sync(path)
            write_json(partial / RECORD, record_of(artifact))

    def _finish(self, artifact: Artifact) -> None:
        os.replace(artifact.partial, artifact.path)
        sync(self.root)
        _drop_snapshots(artifact)  # not before: a crash must not need them again

    def _note_foreign(self, artifact: Artifact) -> None:
        made_by = json.loads((artifact.path / RECORD).read_text())["made_by"]
        if made_by != provenance():
            now = provenance()
            changes = [
                f"{name} {made_by.get(name)} (now {now[name]})" for name in now if made_by.get(name) != now[name]
            ]
            self.foreign[artifact.name] = ", ".join(changes)


def _clear(partial: Path) -> None:
    """Leave of an interrupted attempt what the next one can go on from."""
    partial.mkdir(parents=True, exist_ok=True)
    for path in partial.iterdir():
        if path.name not in RESUMABLE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _drop_snapshots(artifact: Artifact) -> None:
    """All but those that are to stay."""
    root = artifact.path / "checkpoints"
    for path in root.glob("*"):
        if not (path / KEPT).exists():
            shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # something stays in it, or it is not there
        root.rmdir()


class _Clock:
    """Seconds a stage took over all its attempts; saved with every snapshot, so that a killed attempt counts too."""

    def __init__(self, path: Path):
        self.path, self.start = path, time.monotonic()
        self.earlier = json.loads(path.read_text())["seconds"] if path.is_file() else 0.0

    def save(self) -> None:
        write_json(self.path, {"seconds": self.earlier + time.monotonic() - self.start})


def versioned(number: int, together: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a stage function with the version of its results; raise it whenever they change for the same config.

    together: every process of a group calls it (`run.team`), and each does its share.
    """

    def mark(function: Callable[..., None]) -> Callable[..., None]:
        function.version, function.together = number, together  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return mark


def _plain(config: Any) -> Any:
    """Dataclasses as dicts, through nested dicts."""
    if isinstance(config, Mapping):
        return {key: _plain(value) for key, value in config.items()}
    return asdict(config) if is_dataclass(config) and not isinstance(config, type) else config


def _key(function: Callable[..., None], config: Any, content: Any, inputs: Mapping[str, Any]) -> str:
    keys = {
        name: {k: v.key for k, v in value.items()} if isinstance(value, Mapping) else value.key
        for name, value in inputs.items()
    }
    version = function.version  # pyright: ignore[reportFunctionMemberAccess]
    identity = [function.__name__, version, _plain(config), content, keys]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def record_of(artifact: Artifact) -> dict[str, Any]:
    """What an artifact is made from, and by what: its `stage.json`."""
    return {
        "stage": artifact.name,
        "function": artifact.function.__name__,
        "version": artifact.function.version,  # pyright: ignore[reportFunctionMemberAccess]
        "key": artifact.key,
        "config": _plain(artifact.config),
        "inputs": {parent.name: parent.key for parent in artifact.parents()},
        "made_by": provenance(),
    }


@lru_cache(maxsize=2)
def provenance(more: tuple[str, ...] = ()) -> dict[str, str]:
    """Versions of Python, of the libraries that decide results and of `more`, and the commit of this package's checkout."""
    found = {"python": platform.python_version(), "commit": commit()}
    for library in LIBRARIES + more:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found


def commit() -> str:
    """The checkout's commit, with "+" when tracked files differ from it; "release" outside a checkout; of a copy that was made for a job, what it was
    copied from."""
    root = Path(__file__).resolve().parent.parent
    if (root / COMMIT).is_file():
        return (root / COMMIT).read_text()
    if not (root / ".git").exists():
        return "release"
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip()[:12] + ("+" if dirty.stdout.strip() else "")

"""`upcycle prune`: artifacts that no run here refers to, shown, and with --yes removed."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout

from launch.plan import human
from launch.status import found_runs, read_manifest, read_settings
from upcycle.store import RECORD

PARTIAL, GONE = ".partial", ".removed"
ARTIFACT = re.compile(r"[\w.-]+-[0-9a-f]{8}(\.partial|\.removed)?")


def prune(arguments: list[str]) -> int:
    """0; 2 for what the user can mend, and then nothing is removed."""
    try:
        if not set(arguments) <= {"--yes"} or len(arguments) > 1:
            raise ValueError(f"prune: got {' '.join(arguments)}, expected nothing, or --yes to remove what it shows")
        stores = referred(found_runs([]))
        if not stores:
            raise ValueError(
                "prune: no run here, so nothing says which artifacts are needed; start it where runs/ lies"
            )
        unneeded = [(path, size_of(path)) for store, names in stores.items() for path in idle(store, names)]
    except (ValueError, OSError) as error:
        print(f"upcycle: {error}", file=sys.stderr)
        return 2
    for path, size in unneeded:
        print(f"{human(size, 'B'):>8}  {path}")
    total = human(sum(size for _, size in unneeded), "B")
    if "--yes" not in arguments:
        print(f"{len(unneeded)} artifacts, {total}, that no run refers to{'; --yes removes them' if unneeded else ''}")
        return 0
    needed = referred(found_runs([]))  # once more: summing up takes a while, and a run may have begun
    still = [path for path, _ in unneeded if path in idle(path.parent, needed.get(path.parent, set()))]
    removed = [path for path in still if remove(path)]
    print(f"{len(removed)} of {len(unneeded)} artifacts removed, {total} in all")
    return 0


def referred(runs: Iterable[Path]) -> dict[Path, set[str]]:
    """Of each store that runs here use, the artifacts that they refer to. Raises ValueError: a run's files are damaged."""
    stores: dict[Path, set[str]] = {}
    for run in runs:
        store = Path(str(read_settings(run)["artifacts"])).absolute()
        stores.setdefault(store, set()).update(read_manifest(run).values())
    return stores


def idle(store: Path, names: set[str]) -> list[Path]:
    """The artifacts in a store, unfinished ones too, that are not among `names` and that nobody is making."""
    found = [path for path in sorted(store.glob("*")) if path.is_dir() and is_artifact(path)]
    return [path for path in found if path.name.removesuffix(PARTIAL) not in names and not in_use(store, path)]


def is_artifact(path: Path) -> bool:
    """Whether this directory is one that the store has made, whole or not, or half removed."""
    if ARTIFACT.fullmatch(path.name) is None:
        return False
    return path.suffix in (PARTIAL, GONE) or (path / RECORD).is_file()


def in_use(store: Path, path: Path) -> bool:
    """Whether a process holds the lock of that artifact."""
    lock = store / ".locks" / f"{path.name.removesuffix(PARTIAL)}.lock"
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def remove(path: Path) -> bool:
    """Renamed first, so that a crash in the middle leaves nothing that looks finished. False where another process was faster."""
    gone = path.with_name(path.name.removesuffix(GONE) + GONE)
    try:
        if gone != path:
            shutil.rmtree(gone, ignore_errors=True)
            path.rename(gone)
    except FileNotFoundError:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return True

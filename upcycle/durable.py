"""Files that are whole or absent, whatever moment a crash picks. Standard library only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

REMAKE = "remove that artifact's directory; the next run makes it again"
HASH_CACHE = Path("~/.cache/upcycle/hashes.json")


def sync(path: Path) -> None:
    """Make a file's contents, or a directory's names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: object, sort_keys: bool = True) -> None:
    """Write, fsync, rename: a reader sees the old file or the whole new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two processes may write the same file
    temporary.write_text(json.dumps(value, indent=1, sort_keys=sort_keys) + "\n")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


@contextmanager
def reading(path: Path, fix: str = REMAKE) -> Iterator[None]:
    """What a file that is missing or damaged raises in the block, as one ValueError: the file, what is wrong, `fix`."""
    try:
        yield
    except FileNotFoundError:
        said = "there is no such file"
    except json.JSONDecodeError as error:
        said = f"not whole JSON ({error})"
    except KeyError as error:
        said = f"lacks {error}"
    except (ValueError, TypeError, AttributeError, LookupError, EOFError, ArithmeticError, BadZipFile) as error:
        said = f"damaged ({error})"
    else:
        return
    raise ValueError(f"{path}: {said}; {fix}")


def read_object(path: Path, *keys: str, fix: str = REMAKE) -> dict[str, Any]:
    """A JSON file's object, with at least `keys`. Raises ValueError: the file is missing or damaged, with `fix`."""
    with reading(path, fix):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"got {type(found).__name__}, expected an object")
        if lacking := [key for key in keys if key not in found]:
            raise KeyError(lacking[0])
        return found


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """A directory to fill, which gets its name `final` only when the block ends without an error."""
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{final.name}.partial-", dir=final.parent))
    partial.chmod(0o755)  # mkdtemp's is for its owner alone
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for path in partial.rglob("*"):
        sync(path)
    os.replace(partial, final)
    sync(final.parent)


def file_hashes(files: Sequence[Path], cache: Path | None = None) -> list[str]:
    """SHA-256 of each file's content. A file whose size, mtime and inode are as remembered is not read again.

    cache: the JSON file that remembers, HASH_CACHE unless given. It only saves time: one that is absent, damaged or
    cannot be written changes no result.
    """
    cache = (cache or HASH_CACHE).expanduser()
    known, changed, hashes = _remembered(cache), False, []
    for file in files:
        status, name = file.stat(), str(file.absolute())
        state = [status.st_size, status.st_mtime_ns, status.st_ino]
        entry = known.get(name)
        if not (isinstance(entry, list) and len(entry) == 4 and entry[:3] == state):
            with file.open("rb") as stream:
                entry = known[name] = [*state, hashlib.file_digest(stream, "sha256").hexdigest()]
            changed = True
        hashes.append(entry[3])
    if changed:
        with suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache, known)
    return hashes


def _remembered(cache: Path) -> dict[str, list]:
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):  # absent, not readable, empty, cut short or not text
        return {}
    return known if isinstance(known, dict) else {}

"""kill -9 at the worst moments of every stage; the next run ends with the same bytes.

A server imports the heavy libraries once and forks a child per command, so a case costs a stage and not a start of
Python. The child replaces one function by one that kills the process (SIGKILL, so nothing is cleaned up) when it is
called for a path that matches; then it calls `launch.cli.main`, as `python -m launch.cli` does.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.test_launch import ROOT, TINY

SMALL = [
    *TINY, "~branches.math", "~mixtures.btx", "~mixtures.btx_top1", "~mixtures.btx_random", "~mixtures.bam_shared_kv",
]  # fmt: skip
HEAVY = (
    "accelerate", "datasets", "datasketch", "deepspeed", "hydra", "matplotlib.pyplot", "pyarrow.parquet", "torch",
    "safetensors.torch", "scipy.sparse.csgraph", "torch._dynamo", "transformers.models.llama.modeling_llama",
)  # fmt: skip
TIMES = ("tokens_per_second", "peak_share")  # columns of metrics.jsonl that no two runs share

# function: (where it is bound, which of its arguments is the path that is written or removed)
FUNCTIONS = {
    "replace": (("os.replace", "os.rename"), 1),
    "rmtree": (("shutil.rmtree",), 0),
    "save_file": (("safetensors.torch.save_file", "transformers.modeling_utils.safe_save_file"), 1),
    "write_shard": (("upcycle.checkpoint.write_shard",), 0),
    "savez": (("numpy.savez",), 0),
    "open_memmap": (("numpy.lib.format.open_memmap",), 0),
    "write_table": (("pyarrow.parquet.write_table",), 1),
    "write_text": (("pathlib.Path.write_text",), 0),
    "save_tokenizer": (("transformers.PreTrainedTokenizerFast._save_pretrained",), 1),
}
FINISH = ("before", "replace", r"artifacts/[\w-]+$")  # all files are there, stage.json too; only the name is not

# stage: the moments, as (when, function, path); `before` the call, `after` it, or `torn`: half of the file is written
CASES = {
    "documents/code": [("torn", "write_table", "valid.parquet"), FINISH],
    "tokenizer": [("before", "save_tokenizer", ""), FINISH],
    "tokens/code": [("after", "open_memmap", "train.tokens"), FINISH],
    "seed": [
        ("torn", "save_file", r"step-0*3.*optimizer"),
        ("before", "replace", r"artifacts/.*/stage.json$"),
        ("before", "rmtree", r"checkpoints/step-\d+$"),
        FINISH,
    ],
    "branch/code": [("halfway", "rmtree", r"step-"), ("before", "replace", r"step-0*2$"), FINISH],
    "soup": [("torn", "write_shard", "artifacts/soup"), FINISH],
    "assemble/bam": [("torn", "write_shard", "artifacts/assemble"), ("before", "replace", r"proof\.json$"), FINISH],
    "mix/bam": [("torn", "write_shard", r"\.partial/shard"), ("torn", "save_file", r"step-0*2.*model"), FINISH],
    "dense": [("halfway", "rmtree", r"step-"), ("after", "replace", FINISH[2])],
    "eval/bam": [("torn", "savez", ""), FINISH],
    "report": [("torn", "write_text", r"report\.html"), FINISH],
}


# The server ---------------------------------------------------------------------------------------------------------


def plant(when: str, function: str, pattern: str) -> None:
    """Make this process die at that moment."""
    places, position = FUNCTIONS[function]
    for place in places:
        owner, name = _owner(place)
        setattr(owner, name, _deadly(getattr(owner, name), when, position, re.compile(pattern)))


def _owner(place: str) -> tuple[Any, str]:
    """The module or class that a dotted name ends in, and the last name."""
    parts = place.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:-1]:
            owner = getattr(owner, part)
        return owner, parts[-1]
    raise ImportError(place)


def _deadly(original: Callable, when: str, position: int, pattern: re.Pattern) -> Callable:
    def deadly(*arguments, **named):
        path = Path(arguments[position]).absolute() if position < len(arguments) else Path()
        if not pattern.search(str(path)):
            return original(*arguments, **named)
        if when == "halfway":  # of a removal: the first file by name is still there, the others are gone
            for file in sorted(file for file in path.rglob("*") if file.is_file())[1:]:
                file.unlink()
        elif when != "before":
            original(*arguments, **named)
        if when == "torn":
            os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    return deadly


def serve() -> None:
    """Commands as JSON lines on stdin; their exit statuses, one a line, on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some libraries greet on stdout
    for name in HEAVY:
        with suppress(ImportError):  # then a child imports what it needs
            importlib.import_module(name)
    for line in sys.stdin:
        command = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_child(command))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def _child(command: dict) -> int:
    log = os.open(Path(command["cwd"]) / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(command["cwd"])
    sys.argv = ["upcycle", *command["arguments"]]
    try:
        if command["kill"]:
            plant(*command["kill"])
        importlib.import_module("launch.cli").main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


@contextmanager
def served() -> Iterator[Callable[..., int]]:
    """upcycle(*arguments, cwd=..., kill=...): exit status (-9 after a kill)."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    server = subprocess.Popen(
        [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run(*arguments: str, cwd: Path, kill: tuple[str, str, str] | None = None) -> int:
        assert server.stdin is not None and server.stdout is not None
        command = {"arguments": arguments, "cwd": str(cwd), "kill": kill}
        server.stdin.write(json.dumps(command) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    try:
        yield run
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def upcycle():
    with served() as run:
        yield run


# The tests ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(upcycle, tmp_path_factory) -> Path:
    """One run of the small walk that nothing disturbed."""
    where = tmp_path_factory.mktemp("reference")
    assert upcycle(*SMALL, cwd=where) == 0, (where / "log").read_text()
    return where


def contents(artifact: Path) -> dict[str, Any]:
    """Every file of an artifact, less what two runs can't share: times, and who made it."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in artifact.rglob("*") if path.is_file() and path.name != "timing.json"):
        name = str(path.relative_to(artifact))
        if path.name == "metrics.jsonl":
            rows = map(json.loads, path.read_text().splitlines())
            found[name] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
        elif path.name == "stage.json":
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if key != "made_by"}
        else:
            found[name] = path.read_bytes()
    return found


def times(directory: Path) -> dict[str, int]:
    """When each file was written."""
    return {
        str(path.relative_to(directory)): path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kill"),
    [(stage, kill) for stage, kills in CASES.items() for kill in kills],
    ids=lambda value: value if isinstance(value, str) else "-".join(value[:2]),
)
def test_killed_stage_ends_with_the_same_bytes(upcycle, reference, tmp_path, stage, kill):
    names = {path.name for path in (reference / "artifacts").iterdir()}
    final = tmp_path / "artifacts" / json.loads((reference / "runs" / "tiny" / "manifest.json").read_text())[stage]
    whole = reference / "artifacts" / final.name
    shutil.copytree(reference / "artifacts", tmp_path / "artifacts", ignore=shutil.ignore_patterns(final.name))
    killed = upcycle(*SMALL, f"stage={stage}", "launch.checkpoint_steps=1", cwd=tmp_path, kill=kill)
    assert killed == -signal.SIGKILL, f"the moment never came: {(tmp_path / 'log').read_text()}"

    partial = final.with_name(final.name + ".partial")
    assert {path.name for path in final.parent.iterdir()} <= names | {partial.name}, "litter in the store's root"
    if final.exists():  # killed after the rename: whole, apart from snapshots that nobody needs any more
        left = contents(final)
        assert {name: left[name] for name in left if not name.startswith("checkpoints/")} == contents(whole)
    else:
        assert partial.is_dir()
    written = times(partial)

    assert upcycle(*SMALL, f"stage={stage}", cwd=tmp_path) == 0, (tmp_path / "log").read_text()
    ours, theirs = contents(final), contents(whole)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    assert {path.name for path in final.parent.iterdir()} == names
    if kill == FINISH:  # nothing was left to compute
        kept = times(final)
        assert kept == {name: written[name] for name in kept}


if __name__ == "__main__":
    serve()

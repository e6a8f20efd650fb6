"""Runs through a real Slurm of two virtual nodes: the stage graph, two nodes, a time limit, a failure, cancelling."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from tests.slurm.cluster import Cluster, missing_programs
from tests.test_launch import ROOT, TINY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(
        bool(missing_programs()), reason=f"needs root and Slurm's programs (lacks {', '.join(missing_programs())})"
    ),
]
SMALL = [
    *TINY, "~domains.cpp", "~domains.programs", "~branches.math", "soup=false", "dense=null", "~mixtures.btx",
    "~mixtures.btx_top1", "~mixtures.btx_random", "~mixtures.bam_shared_kv", "launch.threads=1", "track.progress=false",
]  # fmt: skip
SLURM = ["launch=slurm", "launch.partition=main", "launch.time=20", "launch.stop_seconds=10", "launch.memory=3G"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


def upcycle(cluster, *arguments, cwd, check=True):
    environment = cluster.environment | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "launch.cli", *arguments]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def states(cluster, run, cwd):
    """What `upcycle status RUN` says of each stage, without its job."""
    lines = upcycle(cluster, "status", run, cwd=cwd).stdout.splitlines()[1:]
    return {line.split()[0]: line for line in lines}


def until_idle(cluster, run, cwd, seconds=600):
    """Wait until none of the run's jobs is in the queue."""
    limit = time.monotonic() + seconds
    while cluster.said("squeue", "-h", "-o", "%i").strip():
        logs = {path.name: path.read_text()[-1500:] for path in (cwd / "runs" / run / "slurm" / "logs").iterdir()}
        assert time.monotonic() < limit, f"{cluster.said('squeue')}\n{logs}"
        time.sleep(1)
    return states(cluster, run, cwd)


def weights(cwd, run, stage):
    manifest = json.loads((cwd / "runs" / run / "manifest.json").read_text())
    return {file.name: load_file(file) for file in sorted((cwd / "artifacts" / manifest[stage]).glob("*.safetensors"))}


def same(first, second):
    return first.keys() == second.keys() and all(
        (first[file][name] == second[file][name]).all() for file in first for name in first[file]
    )


def test_the_whole_run_goes_through_the_queue(cluster, here, tmp_path):
    done = upcycle(cluster, *SMALL, *SLURM, cwd=here)
    assert "10 jobs submitted" in done.stdout, done.stdout
    again = upcycle(cluster, *SMALL, *SLURM, cwd=here, check=False)
    assert again.returncode == 2 and "are in the queue" in again.stderr
    found = until_idle(cluster, "tiny", here)
    assert all(" done " in line for line in found.values()), found
    assert (here / "runs" / "tiny" / "report.html").is_file()
    upcycle(cluster, *SMALL, cwd=tmp_path)
    assert same(weights(here, "tiny", "mix/bam"), weights(tmp_path, "tiny", "mix/bam"))
    assert "0 jobs submitted" in upcycle(cluster, *SMALL, *SLURM, cwd=here).stdout

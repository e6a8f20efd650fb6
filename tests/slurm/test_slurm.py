"""Runs through a real Slurm of two virtual nodes: the stage graph, two nodes, a time limit, a failure, cancelling."""

from __future__ import annotations

import json
import re
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
    again = upcycle(cluster, *SMALL, *SLURM, cwd=here)
    assert "0 jobs submitted" in again.stdout and "were in the queue" in again.stdout, again.stdout
    found = until_idle(cluster, "tiny", here)
    assert all(" done " in line for line in found.values()), found
    assert (here / "runs" / "tiny" / "report.html").is_file()
    upcycle(cluster, *SMALL, cwd=tmp_path)
    assert same(weights(here, "tiny", "mix/bam"), weights(tmp_path, "tiny", "mix/bam"))
    assert "0 jobs submitted" in upcycle(cluster, *SMALL, *SLURM, cwd=here).stdout


def test_a_stage_on_two_nodes(cluster, here, tmp_path):
    """ZeRO-2 over two nodes: two processes took part, and trained what one process trains."""
    mixture = ["mix.rng_seed=7", "stage=mix/bam", "mix.precision=fp32", "launch.checkpoint_seconds=null"]
    done = upcycle(
        cluster,
        *SMALL,
        *SLURM,
        *mixture,
        "name=two",
        "launch.nodes=2",
        "launch.config=zero2",
        "launch.processes=2",
        cwd=here,
    )
    assert "1 jobs submitted" in done.stdout, done.stdout
    found = until_idle(cluster, "two", here)
    (log,) = (here / "runs" / "two" / "slurm" / "logs").glob("mix-bam-*.log")
    assert " done " in found["mix/bam"], log.read_text()
    assert "on n[1-2]" in log.read_text()
    metrics = (
        here
        / "artifacts"
        / json.loads((here / "runs" / "two" / "manifest.json").read_text())["mix/bam"]
        / "metrics.jsonl"
    )
    two = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    metrics.parent.rename(tmp_path / "two")
    upcycle(cluster, *SMALL, *mixture, cwd=here)
    one = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    assert len(two) == 4 and two == pytest.approx(one, abs=1e-4)


def test_a_job_at_its_time_limit_is_queued_again_and_ends_with_the_same_weights(cluster, here, tmp_path):
    """One minute is less than the stage takes. Slurm's signal comes up to a minute early, so the script gets it while training runs."""
    long = ["mix.rng_seed=8", "mix.tokens=350000", "stage=mix/bam", "launch.checkpoint_seconds=null"]
    upcycle(
        cluster,
        *SMALL,
        *SLURM,
        *long,
        "name=long",
        "launch.time=1",
        "launch.stop_seconds=15",
        "launch.restarts=40",
        cwd=here,
    )
    found = until_idle(cluster, "long", here, seconds=1500)
    (log,) = (here / "runs" / "long" / "slurm" / "logs").glob("mix-bam-*.log")
    said = log.read_text()
    assert " done " in found["mix/bam"], said
    assert "asked to stop: step" in said and "start 2" in said and "going on from step" in said, said
    interrupted = weights(here, "long", "mix/bam")
    artifact = json.loads((here / "runs" / "long" / "manifest.json").read_text())["mix/bam"]
    (here / "artifacts" / artifact).rename(tmp_path / "interrupted")
    upcycle(cluster, *SMALL, *long, cwd=here)
    assert same(interrupted, weights(here, "long", "mix/bam"))


def test_a_failing_stage_takes_its_dependants_with_it_and_no_other(cluster, here):
    bad = ["name=bad", "+mixtures.other={assemble: ${mixtures.bam.assemble}, train: {lr: 1e30}}", "mix.rng_seed=9"]
    upcycle(cluster, *SMALL, *SLURM, *bad, cwd=here)
    found = until_idle(cluster, "bad", here)
    logs = "\n".join(path.read_text()[-800:] for path in (here / "runs" / "bad" / "slurm" / "logs").iterdir())
    assert "FAILED" in found["mix/other"], logs
    assert "FloatingPointError" in found["mix/other"], found
    for stage in ("eval/other", "report"):
        assert "not started: mix/other did not finish" in found[stage], found
    assert " done " in found["eval/bam"]


def test_cancelling_takes_all_jobs_out_and_the_same_command_goes_on(cluster, here):
    long = [*SMALL, *SLURM, "name=gone", "mix.rng_seed=10", "mix.tokens=900000"]
    upcycle(cluster, *long, cwd=here)
    assert "jobs cancelled" in upcycle(cluster, "cancel", "gone", cwd=here).stdout
    until_idle(cluster, "gone", here)
    assert "no job of it is in the queue" in upcycle(cluster, "cancel", "gone", cwd=here).stdout
    assert "jobs submitted" in upcycle(cluster, *long, cwd=here).stdout
    upcycle(cluster, "cancel", "gone", cwd=here)


def test_a_sweep_shares_jobs_and_its_table_is_written_afterwards(cluster, here):
    """Two points need the same branches: the second waits for the first one's jobs."""
    words = [*SMALL, *SLURM, "name=sweep", "branch.rng_seed=11", "mix.lr=1e-3,2e-3"]
    done = upcycle(cluster, "-m", *words, cwd=here)
    first, second = map(int, re.findall(r"(\d+) jobs submitted", done.stdout))
    assert first > 3 and second == 3 and "were in the queue" in done.stdout, (
        done.stdout
    )  # mixture, its evaluation, report
    until_idle(cluster, "sweep/1", here)
    said = upcycle(cluster, "sweep", "sweep", cwd=here).stdout
    assert re.search(r"^0\.001 +1 ", said, re.M) and re.search(r"^0\.002 +1 ", said, re.M), said
    assert (here / "runs" / "sweep" / "sweep.csv").is_file()

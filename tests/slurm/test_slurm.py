"""Through a real Slurm of two virtual nodes: a sweep with all of its stage graph, two nodes, a time limit, preemption, cancelling."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from launch.jobs import TEMPLATE, Job, script
from launch.running import SlurmConfig
from tests.slurm.cluster import Cluster, missing_programs
from tests.test_launch import ROOT, TINY
from upcycle.store import Store, versioned

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
SLURM = ["launch=slurm", "launch.partition=main", "launch.time=20", "launch.stop_seconds=60", "launch.memory=3G"]
# A point that is as a run without Slurm, another one, one whose mixture fails, one that is refused.
SWEEP = ["-m", *SMALL, *SLURM, "name=sweep", "mix.lr=1e-3,2e-3,1e30,-1"]
MADE = "stage=[" + ",".join([
    *(f"{kind}/{domain}" for domain in ("code", "law", "math", "general") for kind in ("documents", "tokens")),
    "tokenizer", "seed", "branch/code", "branch/law", "assemble/bam", "mix/bam",
]) + "]"  # fmt: skip
SECONDS = 1500  # to wait for jobs, where other work takes the cores


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


def upcycle(cluster, *arguments, cwd, check=True):
    environment = cluster.environment | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "launch.cli", *arguments]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def states(cluster, run, cwd):
    """What `upcycle status RUN` says of each stage, or of each point of a sweep."""
    lines = upcycle(cluster, "status", run, cwd=cwd).stdout.splitlines()[1:]
    return {line.split()[0]: line for line in lines}


def until(condition, otherwise=lambda: "", seconds=SECONDS):
    limit = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < limit, otherwise()
        time.sleep(0.3)
    return found


def until_ended(cluster, job):
    """Wait until a job is no more in the queue."""
    until(lambda: not cluster.said("squeue", "-h", "-j", job), lambda: cluster.said("scontrol", "show", "job", job))


def weights(cwd, run, stage):
    manifest = json.loads((cwd / "runs" / run / "manifest.json").read_text())
    return {file.name: load_file(file) for file in sorted((cwd / "artifacts" / manifest[stage]).glob("*.safetensors"))}


def same(first, second):
    return first.keys() == second.keys() and all(
        (first[file][name] == second[file][name]).all() for file in first for name in first[file]
    )


@pytest.fixture(scope="session")
def limited(cluster, here):
    """A job of one minute that works until it is asked to stop, and has nothing left to do when it comes back. It goes on beside the tests."""
    template = here / "limited.sh"
    stand_in = """bash -c 'n=0
        until [ ${SLURM_RESTART_COUNT:-0} -gt 0 ] || [ $n -gt 900 ]; do [ -e "$UPCYCLE_STOP_FILE" ] && exit 75; sleep 0.2; n=$((n + 1)); done'"""
    template.write_text(TEMPLATE.read_text().replace("{{command}}", stand_in))
    stage = Store(here / "none").stage("mix/none", versioned(1)(lambda: None), None)
    settings = SlurmConfig(partition="main", time="1", stop_seconds=10, memory="100M", template=str(template))
    text = script(Job("mix", (stage,), ()), settings, [], here / "runs" / "limited", ROOT)
    (here / "runs" / "limited" / "slurm" / "logs").mkdir(parents=True)
    return subprocess.run(
        ["sbatch", "--parsable"], input=text, env=cluster.environment, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture(scope="session")
def submitted(cluster, here, limited):
    """The sweep's submission, and that of the same command at once again."""
    return [upcycle(cluster, *SWEEP, cwd=here, check=False) for _ in range(2)]


@pytest.fixture(scope="session")
def ended(cluster, here, submitted):
    """The jobs of the sweep have ended, the last of them its table's; what `upcycle status` then says of the points."""
    until_ended(cluster, json.loads((here / "runs/sweep/slurm/table.json").read_text())["job"])
    return states(cluster, "sweep", here)


def test_points_share_jobs_and_what_is_queued_is_not_submitted_again(submitted):
    first, again = submitted
    assert first.returncode == again.returncode == 2  # of the point that is refused
    assert re.findall(r"(\d+) jobs submitted", first.stdout) == ["10", "3", "3"], first.stdout + first.stderr
    assert re.findall(r"(\d+) jobs submitted", again.stdout) == ["0", "0", "0"], again.stdout + again.stderr
    assert "were in the queue" in first.stdout and "mix.lr" in first.stderr


def test_a_run_through_the_queue_makes_the_weights_of_one_without(cluster, here, ended, tmp_path):
    assert re.search(r" done +(\d+) of \1 stages", ended["0"]) and " done " in ended["1"], ended
    assert (here / "runs/sweep/0/report.html").is_file()
    upcycle(cluster, *SMALL, "mix.lr=1e-3", MADE, cwd=tmp_path)
    assert same(weights(here, "sweep/0", "mix/bam"), weights(tmp_path, "tiny", "mix/bam"))


def test_the_sweeps_table_is_there_when_its_jobs_have_ended(here, ended):
    with (here / "runs/sweep/sweep.csv").open() as stream:
        lines = [line for line in csv.DictReader(stream) if line["model"] in ("bam", "")]
    found = {line["point"]: (line["mix.lr"], line["state"]) for line in lines}
    assert found == {
        "0": ("0.001", "done"),
        "1": ("0.002", "done"),
        "2": ("1e+30", "failed"),
        "3": ("-1", "failed"),
    }, ended
    assert "FloatingPointError" in lines[2]["error"] and "mix.lr" in lines[3]["error"]
    assert (here / "runs/sweep/sweep.html").is_file() and "table: runs/sweep/sweep.csv" in ended["table:"]


def test_a_failing_stage_takes_its_dependants_with_it(cluster, here, ended):
    assert "failed" in ended["2"] and "mix/bam" in ended["2"] and "FloatingPointError" in ended["2"]
    found = states(cluster, "sweep/2", here)
    assert "FAILED" in found["mix/bam"], found
    for stage in ("eval/bam", "report"):
        assert "not started: mix/bam did not finish" in found[stage], found


def test_slurm_signals_a_script_before_its_time_limit_and_it_comes_back(cluster, here, limited):
    until_ended(cluster, limited)
    (log,) = (here / "runs/limited/slurm/logs").glob(f"*-{limited}.log")
    said = log.read_text()
    assert "start 1" in said and "the time limit is near; mix/none goes on" in said and "start 2" in said, said
    assert said.count("goes on when Slurm") == 1 and "JobState=COMPLETED" in cluster.said(
        "scontrol", "show", "job", limited
    ), said


def test_cancelling_a_sweep_leaves_the_jobs_that_another_run_needs(cluster, here, ended):
    """Submitted again, it is the failed point's jobs and the table's. They are held, so that none starts."""
    held = 'launch.options=["--hold"]'
    again = upcycle(cluster, *SWEEP, held, cwd=here, check=False)
    assert re.findall(r"(\d+) jobs submitted", again.stdout) == ["0", "0", "3"], again.stdout + again.stderr
    other = upcycle(cluster, *SMALL, *SLURM, "name=other", "mix.lr=1e30", held, cwd=here)
    assert "1 jobs submitted" in other.stdout and "2 were in the queue" in other.stdout, (
        other.stdout
    )  # a report has its run's name
    assert re.search(r"pending +\d+ of \d+ stages +mix/bam +JobHeldUser", states(cluster, "sweep", here)["2"])
    said = upcycle(cluster, "cancel", "sweep", cwd=here).stdout
    assert "2 jobs cancelled (2 that other runs need stay there)" in said, said  # its report and its table
    assert "3 jobs cancelled; the same command" in upcycle(cluster, "cancel", "other", cwd=here).stdout
    assert " cancelled" in states(cluster, "other", here)["mix/bam"]


def test_a_stage_on_two_nodes(cluster, here, ended, tmp_path):
    """ZeRO-2 over two nodes, from a launch file of the user's own that is gone by then: two processes took part, and trained what one process trains."""
    own = tmp_path / "own.yaml"
    own.write_text((ROOT / "launch" / "accelerate" / "zero2_multinode.yaml").read_text())
    mixture = ["mix.rng_seed=7", "stage=mix/bam", "mix.precision=fp32", "launch.checkpoint_seconds=null"]
    group = ["launch.nodes=2", f"launch.config={own}", "launch.processes=2"]
    done = upcycle(cluster, *SMALL, *SLURM, *mixture, "name=two", *group, cwd=here)
    assert "1 jobs submitted" in done.stdout, done.stdout
    own.unlink()
    run = here / "runs" / "two"
    until_ended(cluster, json.loads((run / "slurm/jobs.json").read_text())["mix/bam"]["job"])
    (log,) = (run / "slurm" / "logs").glob("mix-bam-*.log")
    metrics = here / "artifacts" / json.loads((run / "manifest.json").read_text())["mix/bam"] / "metrics.jsonl"
    assert metrics.is_file() and "on n[1-2]" in log.read_text(), log.read_text()
    two = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    metrics.parent.rename(tmp_path / "two")
    upcycle(cluster, *SMALL, *mixture, cwd=here)
    one = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    assert len(two) == 4 and two == pytest.approx(one, abs=1e-4)


def test_a_job_that_is_stopped_and_preempted_in_training_ends_with_the_same_weights(cluster, here, ended, tmp_path):
    """First Slurm's signal before the time limit, which here comes at once and not a minute early; then a requeue from outside, as PreemptMode=REQUEUE
    does it: SIGTERM, and SIGKILL after KillWait. Each time the job comes back and goes on from its checkpoint."""
    long = ["mix.rng_seed=8", "mix.tokens=102400", "stage=mix/bam", "launch.checkpoint_seconds=null"]
    upcycle(cluster, *SMALL, *SLURM, *long, "name=long", cwd=here)
    run = here / "runs" / "long"
    job = json.loads((run / "slurm/jobs.json").read_text())["mix/bam"]["job"]
    artifact = here / "artifacts" / json.loads((run / "manifest.json").read_text())["mix/bam"]
    log = run / "slurm" / "logs" / f"mix-bam-{job}.log"

    def steps():
        metrics = artifact.with_name(f"{artifact.name}.partial") / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.is_file() else 0

    def said():
        return log.read_text() if log.is_file() else cluster.said("scontrol", "show", "job", job)

    until(lambda: steps() > 3, said)
    assert cluster.ran("scancel", "--batch", "--signal=USR1", job)
    until(lambda: "asked to stop: step" in said() and "start 2" in said(), said)
    before = steps()
    until(lambda: steps() > before + 3, said)
    assert cluster.ran("scontrol", "requeue", job)
    until_ended(cluster, job)
    assert artifact.is_dir() and "start 3" in said(), said()
    asked = [int(step) for step in re.findall(r"asked to stop: step (\d+)", said())]
    went_on = [int(step) for step in re.findall(r"going on from step (\d+)", said())]
    assert 0 < asked[0] < asked[1] < 100 and went_on == asked, said()
    interrupted = weights(here, "long", "mix/bam")
    artifact.rename(tmp_path / "interrupted")
    upcycle(cluster, *SMALL, *long, cwd=here)
    assert same(interrupted, weights(here, "long", "mix/bam"))

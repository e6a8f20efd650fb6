"""A sweep as jobs: the job of its table, a line a point, cancelling; without Slurm. tests/slurm has the real one."""

from __future__ import annotations

import csv
import json
import re

import pytest
from omegaconf import OmegaConf

from launch import scheduler
from launch.status import print_cancelled, print_status
from launch.sweep import Table, note_point, points_of, read_points, write_tables
from launch.sweep_jobs import submit_table, table_job
from tests.test_jobs import Slurm

STAGES = ("seed", "mix/btx", "eval/btx", "report")
LAUNCH = {"scheduler": "slurm", "partition": "p", "kinds": {"report": {"time": "5"}}}


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Four points: one is done, one in training, one whose mixture failed, and one that was refused. They share the seed."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "runs" / "rates"
    for number, error in enumerate([None, None, None, "mix.lr: should be greater than 0"]):
        note_point(root / str(number), [f"mix.lr={number}", "name=rates"], error, ended=True)
    for number in range(3):
        manifest = {stage: f"{stage.replace('/', '-')}-{number if stage != 'seed' else 0}" for stage in STAGES}
        (root / f"{number}/manifest.json").write_text(json.dumps(manifest))
        OmegaConf.save({"artifacts": "artifacts", "launch": LAUNCH}, root / f"{number}/config.yaml")
        record = {
            stage: {"job": f"{number}{index}", "artifact": str(tmp_path / "artifacts" / name), "after": list(STAGES[index - 1 : index])}
            for index, (stage, name) in enumerate(manifest.items())
        }  # fmt: skip
        record["seed"]["job"] = "1"
        record["mix/btx"] |= {"steps": 20, "batch_tokens": 100}
        (root / f"{number}/slurm/logs").mkdir(parents=True)
        (root / f"{number}/slurm/jobs.json").write_text(json.dumps(record))
    for name in ("seed-0", *(f"{stage}-0" for stage in ("mix-btx", "eval-btx", "report"))):
        (tmp_path / "artifacts" / name).mkdir(parents=True)
        (tmp_path / "artifacts" / name / "stage.json").write_text("{}")
        (tmp_path / "artifacts" / name / "timing.json").write_text('{"seconds": 2.5}')
    report = {
        "models": {"btx": {"kind": "btx", "average": {"trained": {"nats_per_token": 3.0, "perplexity": 20.1}}, "perplexity": {"code": 20.1}}},
        "domain_groups": {"trained": ["code"]},
    }  # fmt: skip
    (tmp_path / "artifacts/report-0/report.json").write_text(json.dumps(report))
    row = {"step": 15, "loss": 3.25, "tokens_per_second": 100.0}
    for number in (1, 2):
        (tmp_path / f"artifacts/mix-btx-{number}.partial").mkdir()
    (tmp_path / "artifacts/mix-btx-1.partial/metrics.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "artifacts/mix-btx-2.partial/failed.json").write_text('{"error": "FloatingPointError: nan"}')
    return root


class Queue(Slurm):
    """Of the second point the mixture's job runs and the others wait; `held` wait too."""

    def __init__(self, *held):
        super().__init__(bad=-1)
        self.rows = {"11": "RUNNING", "12": "PENDING", "13": "PENDING"} | dict.fromkeys(held, "PENDING")

    def __call__(self, *words, stdin=None):
        said = super().__call__(*words, stdin=stdin)
        self.script = stdin if stdin is not None else getattr(self, "script", None)
        if words[0] == "scancel":
            self.rows = {job: state for job, state in self.rows.items() if job not in words}
        return (
            "".join(f"{job}|{state}|9:00|Dependency\n" for job, state in self.rows.items())
            if words[0] == "squeue"
            else said
        )


@pytest.fixture
def slurm(monkeypatch):
    from launch import sweep_jobs

    queue = Queue()
    for module in (scheduler, sweep_jobs):
        monkeypatch.setattr(module, "slurm", queue)
    return queue


def submitted_words(slurm):
    return [words for words in slurm.calls if words[0] == "sbatch"]


def test_the_table_waits_for_all_jobs_of_all_points_however_they_end(sweep, slurm):
    points = [point.where for point in points_of(sweep)]
    assert submit_table(sweep, points) == table_job(sweep) == "1"
    assert submitted_words(slurm) == [("sbatch", "--parsable", "--dependency=afterany:11:12:13")]
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", slurm.script, re.M))
    assert options["partition"] == "p" and options["time"] == "5" and options["job-name"] == "rates:table"
    assert f"-m launch.cli sweep {sweep}" in slurm.script and "{{" not in slurm.script


def test_a_table_job_that_still_waits_is_replaced(sweep, slurm):
    points = [point.where for point in points_of(sweep)]
    submit_table(sweep, points)
    slurm.rows["1"] = "PENDING"
    assert submit_table(sweep, points) == table_job(sweep) == "2"
    assert ("scancel", "--state=PENDING", "1") in slurm.calls


def test_without_jobs_in_the_queue_no_job_is_submitted_for_the_table(sweep, slurm):
    slurm.rows = {}
    assert submit_table(sweep, [point.where for point in points_of(sweep)]) is None
    assert not submitted_words(slurm) and table_job(sweep) is None


def test_points_that_failed_or_were_refused_are_in_the_table(sweep, slurm):
    assert [(point["state"], point["error"]) for point in read_points(sweep)] == [
        ("done", None),
        ("submitted", None),
        ("failed", "mix/btx: FAILED  FloatingPointError: nan"),
        ("failed", "mix.lr: should be greater than 0"),
    ]
    text, failed = write_tables(sweep)
    assert failed and "point 2 (mix.lr=2) failed: mix/btx: FAILED  FloatingPointError: nan" in text
    with (sweep / "sweep.csv").open() as stream:
        assert [line["state"] for line in csv.DictReader(stream)] == ["done", "submitted", "failed", "failed"]


def test_a_sweep_that_is_done_needs_no_slurm_for_its_table(sweep, monkeypatch):
    monkeypatch.setenv("PATH", str(sweep))
    for number in (1, 2):
        (sweep / f"{number}/point.json").unlink()
    assert [point["state"] for point in read_points(sweep)] == ["done", "failed"]


def test_status_of_a_sweep_is_a_line_a_point(sweep, slurm, capsys):
    submit_table(sweep, [point.where for point in points_of(sweep)])
    slurm.rows["1"] = "PENDING"
    for name in ("rates", "runs/rates"):
        assert print_status([name]) == 0
        head, *lines = [re.sub(r"\s+", " ", line).strip() for line in capsys.readouterr().out.splitlines()]
        assert head == "runs/rates 4 points: 1 done, 1 running, 2 failed"
        assert lines == [
            "0 mix.lr=0 done 4 of 4 stages",
            "1 mix.lr=1 running 1 of 4 stages mix/btx 15/20 loss 3.250 100 tok/s 5 s left time limit in 9:00",
            "2 mix.lr=2 failed 1 of 4 stages mix/btx FloatingPointError: nan",
            "3 mix.lr=3 failed mix.lr: should be greater than 0",
            "table: job 1, pending Dependency",
        ]


def test_cancelling_a_sweep_takes_its_table_and_what_no_other_run_counts_on(sweep, slurm, capsys):
    """Another run needs the mixture that trains."""
    submit_table(sweep, [point.where for point in points_of(sweep)])
    slurm.rows["1"] = "PENDING"
    notes = sweep.parent.parent / "artifacts" / ".jobs"
    notes.mkdir()
    other = sweep.parent / "other"
    (other / "slurm").mkdir(parents=True)
    (other / "slurm/jobs.json").write_text(json.dumps({"mix/btx": {"job": "11", "shared": str(sweep / "1")}}))
    (notes / "mix-btx-1.json").write_text(json.dumps({"job": "11", "runs": [str(sweep / "1"), str(other)]}))
    assert print_cancelled(["rates"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("runs/rates: 3 jobs cancelled (1 that other runs need stay there); the same command"), said
    assert set(slurm.rows) == {"11"}
    assert print_cancelled(["rates"]) == 0
    assert "0 jobs cancelled (1 that other runs need stay there)" in capsys.readouterr().out
    assert print_status(["rates"]) == 0
    assert re.search(r"1 +mix.lr=1 +cancelled", capsys.readouterr().out)


def test_a_refused_table_job_is_said_and_counts_as_a_failure(sweep, slurm, capsys, monkeypatch):
    slurm.bad = 1
    monkeypatch.setattr(Table, "failed", False)
    settings = {"plan": False, "dry_run": False, "hydra": {"sweep": {"dir": str(sweep)}}}
    Table().on_multirun_end(OmegaConf.create(settings))
    assert (
        "the sweep's table: sbatch: error: invalid partition; `upcycle sweep" in capsys.readouterr().err
        and Table.failed
    )

"""A run as jobs: which stages make one, what each waits for, its script, what Slurm is told; without Slurm. tests/slurm has the real one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from launch import follow, scheduler
from launch.copies import copies_of, keep_code, keep_files, keep_settings, new_copy, of_copies, own_files
from launch.groups import strategy_of
from launch.jobs import plan_jobs, script
from launch.overrides import CONF, rewritten
from launch.running import SlurmConfig
from launch.sharing import submitted_stages
from launch.submission import with_needed
from tests.test_launch import TINY, upcycle
from tests.test_merges import declared
from upcycle.store import Store, versioned


@pytest.fixture(scope="module")
def stages():
    return list(declared("experiment=tiny").store.stages.values())


def test_every_stage_is_in_one_job_and_comes_after_what_it_needs(stages):
    jobs = plan_jobs(stages)
    placed = {stage.name: number for number, job in enumerate(jobs) for stage in job.stages}
    assert (
        sorted(placed)
        == sorted(stage.name for stage in stages)
        == sorted({stage.name for job in jobs for stage in job.stages})
    )
    assert sum(len(job.stages) for job in jobs) == len(stages)
    for number, job in enumerate(jobs):
        waits = {placed[name] for name in job.after}
        assert all(before < number for before in waits)
        for stage in job.stages:
            needed = {placed[parent.name] for parent in stage.parents()} - {number}
            assert needed == waits, (job.name, stage.name)


def test_branches_are_an_array_and_data_is_one_job(stages):
    jobs = {job.name: job for job in plan_jobs(stages)}
    assert [stage.name for stage in jobs["branch"].stages] == ["branch/code", "branch/law", "branch/math"]
    assert jobs["branch"].array and not jobs["data"].array and jobs["data"].after == ()
    assert {stage.name.split("/")[0] for stage in jobs["data"].stages} == {"documents", "tokenizer", "tokens"}
    assert set(jobs["mix-btx"].after) == {"assemble/btx", "documents/code"}
    assert set(jobs["eval-btx"].after) == {"assemble/btx", "mix/btx", "documents/code"}


def test_what_is_queued_is_waited_for_and_not_made_again(stages):
    names = [stage.name for stage in stages if stage.name.split("/")[0] in ("documents", "tokenizer", "tokens")]
    queued = dict.fromkeys(names, "7") | {"seed": "8", "branch/law": "9_1"}
    jobs = {job.name: job for job in plan_jobs(stages, queued)}
    assert "data" not in jobs and "seed" not in jobs
    assert [stage.name for stage in jobs["branch"].stages] == ["branch/code", "branch/math"]
    assert set(jobs["branch"].after) == {"seed", names[0]} and {"branch/law", "branch/code", "branch/math"} <= set(
        jobs["soup"].after
    )


def test_a_run_counts_on_what_it_asks_for_and_on_what_that_needs(stages):
    """Another run's jobs for the rest of the recipe are none of its own."""
    asked = [stage for stage in stages if stage.name == "mix/btx"]
    found = {stage.name for stage in with_needed(asked)}
    assert {"mix/btx", "assemble/btx", "branch/law", "seed", "tokens/code", "documents/code"} <= found
    assert not {name for name in found if name.startswith(("eval/", "mix/bam", "assemble/bam", "report"))}


def options_of(text):
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.M))


def test_scripts_ask_for_what_the_settings_say(stages, tmp_path):
    launch = SlurmConfig(
        config="zero2", nodes=2, gpus=4, partition="gpu", time="1:00:00", memory="64G", parallel=2, setup=["module load x"],
        options=["--exclusive"], kinds={"data": {"partition": "cpu", "gpus": None, "config": None, "nodes": 1}, "eval": {"nodes": 1}},
    )  # fmt: skip
    jobs = {job.name: job for job in plan_jobs(stages)}
    texts = {
        name: script(job, launch, ["experiment=tiny", "a='b c'"], tmp_path / "runs/x", tmp_path)
        for name, job in jobs.items()
    }
    branch, data, assembly = (options_of(texts[name]) for name in ("branch", "data", "assemble"))
    assert (
        branch["array"] == "0-2%2"
        and branch["nodes"] == "2"
        and branch["gpus-per-node"] == "4"
        and branch["time"] == "1:00:00"
    )
    assert branch["signal"] == "B:USR1@120" and branch["output"].endswith('runs/x/slurm/logs/branch-%A_%a.log"')
    assert data["partition"] == "cpu" and "gpus-per-node" not in data
    assert assembly["nodes"] == assembly["gpus-per-node"] == "1"  # no group makes it
    assert options_of(texts["eval-btx"])["nodes"] == "1"
    assert (
        "stages=(branch/code branch/law branch/math)" in texts["branch"]
        and "stages=('[documents/code," in texts["data"]
    )
    assert "#SBATCH --exclusive" in texts["seed"] and "\nmodule load x\n" in texts["seed"]
    assert "experiment=tiny 'a='\"'\"'b c'\"'\"''" in texts["seed"]
    for text in texts.values():
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        assert "{{" not in text


def test_a_template_of_the_sites_own(stages, tmp_path):
    (job, *_) = plan_jobs(stages)
    mine = tmp_path / "mine.sh"
    mine.write_text("#!/bin/sh\n{{options}}\necho {{stages}}\n")
    text = script(job, SlurmConfig(template=str(mine)), [], tmp_path, tmp_path)
    assert text.splitlines()[-1].startswith("echo '[documents/code,")
    mine.write_text("{{wat}}")
    with pytest.raises(ValueError, match=r"mine.sh: \{\{wat\}\} is unknown, expected options, what"):
        script(job, SlurmConfig(template=str(mine)), [], tmp_path, tmp_path)
    with pytest.raises(ValueError, match="launch.template=.*none.sh: no such file"):
        script(job, SlurmConfig(template=str(tmp_path / "none.sh")), [], tmp_path, tmp_path)


REFUSED = {
    "machines, machine_rank and main_address are Slurm's to say": {"machine_rank": 0, "machines": 2, "main_address": "a:1", "processes": 2, "config": "ddp"},
    "under Slurm branches are an array": {"parallel_branches": 2},
    "nodes=2 has no effect without a group of processes": {"nodes": 2},
    "so say how many processes": {"config": "zero2"},
    "processes=3 is not a multiple of nodes=2": {"config": "zero2", "nodes": 2, "processes": 3},
    "kinds.branch.node: no setting of a job; expected one of": {"kinds": {"branch": {"node": 1}}},
    "kinds.branch.main_address: no setting of a job": {"kinds": {"branch": {"main_address": "a:1"}}},
    "nodes=3 has no effect": {"kinds": {"mix": {"nodes": 3}}},
    "should match pattern": {"time": "soon"},
    "YAML reads 8:00:00 as 28800": {"time": 28800},
    "greater than or equal to 10": {"stop_seconds": 1},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_no_job_can_have_are_refused(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SlurmConfig(**REFUSED[message])


def test_inside_a_job_a_node_knows_its_part():
    launch = SlurmConfig(
        config="zero3", nodes=2, gpus=4, kinds={"eval": {"nodes": 1}, "data": {"config": None, "nodes": 1}}
    )
    found = launch.within("mix", 1, "n1:29500")
    assert (found.processes, found.machines, found.machine_rank, found.main_address) == (8, 2, 1, "n1:29500")
    alone = launch.within("eval", 0, "n1:29500")
    assert (alone.processes, alone.machines, alone.main_address) == (4, 1, None)
    data = launch.within("data", 0, "n1:29500")
    assert (data.config, data.processes) == (None, None)


def test_code_and_the_users_settings_are_copied(tmp_path):
    own = tmp_path / "own"
    (own / "experiment").mkdir(parents=True)
    (own / "experiment" / "mine.yaml").write_text("name: mine\n")
    code = new_copy(tmp_path / "runs" / "x")
    keep_code(code)
    for words in (["--config-dir", str(own)], [f"--config-dir={own}"], ["-cd", str(own)]):
        kept = keep_settings([*words, "experiment=mine"], code)
        assert str(own) not in " ".join(kept) and kept[-1] == "experiment=mine"
        assert (code / "own_conf" / "experiment" / "mine.yaml").is_file()
    for part in (
        "upcycle/train.py",
        "launch/slurm/job.sh",
        "evals/report.py",
        "conf/config.yaml",
        "hydra_plugins",
        "COMMIT",
    ):
        assert (code / part).exists(), part


def test_launch_files_of_the_users_own_are_copied_and_jobs_read_the_copies(tmp_path):
    """The DeepSpeed settings that such a file names too. Names of launch/accelerate stay names."""
    deepspeed, mine, template = tmp_path / "ds.json", tmp_path / "mine.yaml", tmp_path / "job.sh"
    deepspeed.write_text('{"zero_optimization": {"stage": 2}}')
    mine.write_text(f"distributed_type: DEEPSPEED\ndeepspeed_config: {{deepspeed_config_file: {deepspeed}}}\n")
    template.write_text("{{options}}\n{{command}}\n")
    kinds = {"mix": {"config": str(mine)}, "eval": {"config": "ddp"}}
    launch = SlurmConfig(config="zero2", processes=2, template=str(template), kinds=kinds)
    files, code = own_files(launch), tmp_path / "code"
    assert files == {"launch.template": template, "launch.kinds.mix.config": mine}
    keep_files(files, code)
    copies = copies_of(files, code)
    for one in (deepspeed, mine, template):
        one.unlink()
    assert strategy_of(copies["launch.kinds.mix.config"]) == "zero2"
    assert copies["launch.template"].read_text() == "{{options}}\n{{command}}\n"
    found = compose_words(
        [*TINY, "launch=slurm", "launch.config=zero2", f"launch.kinds={{mix: {{config: {mine}}}}}", *of_copies(copies)]
    )
    assert found["launch"]["kinds"]["mix"]["config"] == str(copies["launch.kinds.mix.config"])
    assert found["launch"]["template"] == str(copies["launch.template"]) and found["launch"]["config"] == "zero2"
    with pytest.raises(ValueError, match="launch.config=zero9: neither a file nor one of"):
        own_files(SlurmConfig(config="zero9", processes=2))


def compose_words(words):
    """The settings that a command's words compose."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return OmegaConf.to_container(compose("config", overrides=rewritten(words)), resolve=False)


class Slurm:
    """Stands for Slurm's commands: numbers jobs from 1, refuses the `bad`th, and has in its queue what it was told."""

    def __init__(self, bad=0, queued=()):
        self.calls, self.bad, self.queued = [], bad, queued

    def __call__(self, *words, stdin=None):
        self.calls.append(words)
        if words[0] == "squeue":
            return "".join(f"{job}|PENDING|10:00|Dependency\n" for job in self.queued)
        if words[0] == "sbatch":
            number = sum(one[0] == "sbatch" for one in self.calls)
            if number == self.bad:
                raise RuntimeError("sbatch: error: invalid partition")
            return f"{number}\n"
        return ""


@pytest.fixture
def submitted(stages, tmp_path, monkeypatch):
    """The tiny run handed over to a stand-in, in a store of its own."""
    moved = [one.__class__(**{**vars(one), "path": tmp_path / "artifacts" / one.path.name}) for one in stages]
    monkeypatch.setattr(scheduler, "slurm", slurm := Slurm())
    jobs = plan_jobs(moved)
    found = scheduler.submit(jobs, ["text"] * len(jobs), tmp_path / "runs/x", {})
    return moved, jobs, found, slurm


def test_jobs_depend_on_just_what_they_need(submitted):
    _, jobs, found, slurm = submitted
    told = {job.name: words for job, words in zip(jobs, slurm.calls, strict=True)}
    assert told["data"] == ("sbatch", "--parsable")
    assert told["seed"][-1] == f"--dependency=afterok:{found['tokens/code']}"
    branch = found["branch/law"].split("_")[0]
    assert [found[f"branch/{name}"] for name in ("code", "law", "math")] == [f"{branch}_{n}" for n in range(3)]
    assert set(told["eval-law"][-1].split(":")[1:]) == {found["tokens/code"], f"{branch}_1"}


def test_another_run_waits_for_jobs_in_the_queue(submitted, tmp_path, monkeypatch):
    moved, _, found, _ = submitted
    monkeypatch.setattr(scheduler, "slurm", Slurm(queued=[found["seed"], found["branch/law"]]))
    assert scheduler.queued_stages(moved) == {"seed": found["seed"], "branch/law": found["branch/law"]}
    queued = dict.fromkeys(["seed", *(one.name for one in moved if "tokens" in one.name)], "3")
    jobs = plan_jobs([one for one in moved if one.name == "branch/code"], queued)
    assert [(job.name, len(job.after)) for job in jobs] == [("branch-code", 1)]


def test_a_refused_submission_takes_the_others_back(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler, "slurm", slurm := Slurm(bad=4))
    jobs = plan_jobs([one.__class__(**{**vars(one), "path": tmp_path / one.path.name}) for one in stages])
    with pytest.raises(RuntimeError, match="invalid partition"):
        scheduler.submit(jobs, ["text"] * len(jobs), tmp_path / "x", {})
    assert slurm.calls[-1] == ("scancel", "1", "2", "3")
    assert submitted_stages(tmp_path / "x") == {}


def test_a_seed_that_is_brought_along_comes_before_the_data():
    """Tokens are made with its tokenizer, so the one job of all data waits for it."""
    make, store = versioned(1)(lambda: None), Store("nowhere")
    documents = store.stage("documents/x", make, None)
    seed = store.stage("seed", make, None)
    tokens = store.stage("tokens/x", make, None, documents=documents, seed=seed)
    store.stage("branch/x", make, None, seed=seed, data={"x": tokens})
    seed_job, data, branch = plan_jobs(list(store.stages.values()))
    assert (seed_job.name, data.name, branch.name) == ("seed", "data", "branch-x")
    assert data.after == ("seed",) and set(branch.after) == {"seed", "documents/x"}


def test_stages_of_a_group_and_stages_of_one_process_are_no_array(stages):
    queued = {
        stage.name: "1" for stage in stages if stage.name.split("/")[0] in ("documents", "tokenizer", "tokens", "seed")
    }
    (one, *_) = [stage for stage in stages if stage.name == "branch/code"]
    alone = one.__class__(**{**vars(one), "function": lambda: None})
    jobs = plan_jobs([alone, *(stage for stage in stages if stage.name in ("branch/law", "branch/math"))], queued)
    assert [[stage.name for stage in job.stages] for job in jobs] == [["branch/code"], ["branch/law", "branch/math"]]


def test_a_job_that_ends_or_can_never_start_makes_nothing(submitted, monkeypatch):
    moved, _, found, _ = submitted
    for state, reason, counts in (
        ("RUNNING", "None", True),
        ("COMPLETING", "None", False),
        ("PENDING", "DependencyNeverSatisfied", False),
    ):
        said = f"{found['seed']}|{state}|1:00|{reason}\n"
        monkeypatch.setattr(scheduler, "slurm", lambda *words, said=said, **_: said)
        assert ("seed" in scheduler.queued_stages(moved)) is counts


def test_a_runs_own_job_stays_its_own_when_the_rest_is_submitted_again(submitted, tmp_path, monkeypatch):
    moved, jobs, found, _ = submitted
    monkeypatch.setattr(scheduler, "slurm", Slurm())
    rest, waited = [job for job in jobs if job.name == "report"], [stage for stage in moved if stage.name != "report"]
    scheduler.submit(rest, ["text"], tmp_path / "runs/x", found, waited)
    record = submitted_stages(tmp_path / "runs/x")
    assert record["branch/code"]["job"] == found["branch/code"] and "shared" not in record["branch/code"]
    scheduler.submit(rest, ["text"], tmp_path / "runs/y", found, waited)
    theirs = submitted_stages(tmp_path / "runs/y")
    assert theirs["branch/code"] == record["branch/code"] | {"shared": str(tmp_path / "runs/x")}
    assert theirs["branch/code"]["steps"] == 32  # `upcycle status` of this run tells progress too
    assert theirs["report"]["job"] == "2" and "shared" not in theirs["report"]


def shared_run(submitted, tmp_path, monkeypatch):
    """A second run, which needs the first one's seed and one of its branches."""
    moved, _, found, _ = submitted
    waited = [one for one in moved if one.name in ("documents/code", "seed", "branch/law")]
    monkeypatch.setattr(scheduler, "slurm", slurm := Slurm(queued=set(found.values())))
    scheduler.submit([], [], tmp_path / "runs/y", found, waited)
    return tmp_path / "runs/x", tmp_path / "runs/y", slurm


def test_cancelling_leaves_what_another_run_counts_on(submitted, tmp_path, monkeypatch):
    """And all that this waits for. When that run is cancelled too, it goes."""
    _, _, found, _ = submitted
    first, second, slurm = shared_run(submitted, tmp_path, monkeypatch)
    taken, left = scheduler.cancel([first])
    assert set(left) == {found["documents/code"], found["seed"], found["branch/law"]}
    assert set(taken) == set(found.values()) - set(left) and slurm.calls[-1] == ("scancel", *taken)
    assert submitted_stages(first)["seed"]["cancelled"] and "cancelled" not in submitted_stages(second)["seed"]
    slurm.queued = left
    taken, left = scheduler.cancel([second])
    assert set(taken) == {found["documents/code"], found["seed"], found["branch/law"]} and not left
    slurm.queued = []
    assert scheduler.cancel([second]) == ([], [])


def test_cancelling_both_runs_takes_all(submitted, tmp_path, monkeypatch):
    _, _, found, _ = submitted
    taken, left = scheduler.cancel(shared_run(submitted, tmp_path, monkeypatch)[:2])
    assert set(taken) == set(found.values()) and not left


def test_a_run_whose_directory_is_gone_counts_on_nothing(submitted, tmp_path, monkeypatch):
    _, _, found, _ = submitted
    first, second, _ = shared_run(submitted, tmp_path, monkeypatch)
    shutil.rmtree(second)
    taken, left = scheduler.cancel([first])
    assert set(taken) == set(found.values()) and not left


def test_a_cancelled_run_that_is_submitted_again_counts_on_what_was_left(submitted, tmp_path, monkeypatch):
    moved, _, found, _ = submitted
    first, second, _ = shared_run(submitted, tmp_path, monkeypatch)
    scheduler.cancel([first])
    left = [one for one in moved if one.name in ("documents/code", "seed", "branch/law")]
    scheduler.submit([], [], first, found, left)
    record = submitted_stages(first)
    assert "cancelled" not in record["seed"] and "shared" not in record["seed"] and record["mix/btx"]["cancelled"]
    assert set(scheduler.cancel([second])[1]) == {found["documents/code"], found["seed"], found["branch/law"]}


def test_states_are_told_from_the_queue_the_store_and_the_logs(submitted, tmp_path, monkeypatch):
    moved, _, found, _ = submitted
    run, places = tmp_path / "runs/x", {stage.name: stage.path for stage in moved}
    monkeypatch.setattr(scheduler, "slurm", Slurm(queued=[found["seed"]]))
    done, failed, silent = (places[name] for name in ("tokenizer", "branch/code", "branch/law"))
    done.mkdir(parents=True)
    (done / "stage.json").write_text("{}")
    (done / "timing.json").write_text('{"seconds": 2.5}')
    partial = Path(f"{failed}.partial")
    partial.mkdir()
    (partial / "failed.json").write_text('{"error": "ValueError: no"}')
    row = {"step": 16, "loss": 3.25, "tokens_per_second": 1024.0}
    (partial / "metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row)[:9])
    (run / "slurm" / "logs" / f"branch-{found['branch/law']}.log").write_text(
        "upcycle: it broke\nsrun: error: exit 2\n"
    )
    manifest = {stage.name: stage.path.name for stage in moved}
    said = {row.stage: row.said for row in follow.stage_states(run, manifest, tmp_path / "artifacts")}
    assert said["tokenizer"] == "done  2.5 s" and said["seed"] == "pending  Dependency"
    assert said["branch/code"] == "FAILED  16/32  loss 3.250  1,024 tok/s  16 s left  ValueError: no"
    assert said["branch/law"] == "ended without finishing it  it broke" and silent.name in manifest.values()
    assert said["mix/btx"].startswith("not started: ") and said["mix/btx"].endswith("did not finish")


def test_of_a_shared_job_the_other_runs_log_tells_how_it_ended(submitted, tmp_path, monkeypatch):
    moved, _, found, _ = submitted
    first, second, slurm = shared_run(submitted, tmp_path, monkeypatch)
    slurm.queued = []
    (first / "slurm" / "logs" / f"branch-{found['branch/law']}.log").write_text("slurmstepd: *** JOB 3 CANCELLED ***\n")
    manifest = {stage.name: stage.path.name for stage in moved if stage.name in ("seed", "branch/law")}
    seed, branch = follow.stage_states(second, manifest, tmp_path / "artifacts")
    assert branch.said == "ended without finishing it  slurmstepd: *** JOB 3 CANCELLED ***" and branch.state == "failed"
    assert seed.said == f"not started: cancelled  (a job of {first})"
    scheduler.cancel([second])
    slurm.queued = [found["seed"]]
    scheduler.cancel([second])
    slurm.queued = []
    assert follow.stage_states(second, manifest, tmp_path / "artifacts")[0].said == "cancelled"


@pytest.mark.slow
def test_a_dry_run_prints_scripts_and_needs_no_slurm(tmp_path):
    done = upcycle(*TINY, "launch=slurm", "launch.partition=p", "dry_run=true", cwd=tmp_path)
    assert done.stdout.count("#SBATCH --partition=p") == done.stdout.count("######## ") > 10
    assert "dry_run=" not in done.stdout and not list(tmp_path.iterdir())
    wrong = upcycle(*TINY, "launch=slurm", "launch.node=2", "dry_run=true", cwd=tmp_path, check=False)
    assert wrong.returncode == 2 and "nodes, partition" in wrong.stderr


def test_without_slurm_that_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="squeue: no such program, expected Slurm's on this machine"):
        scheduler.queue(["1"])
    assert scheduler.queue([]) == {}

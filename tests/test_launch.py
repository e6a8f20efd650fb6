"""The command as a user types it: plan, run, run again, one stage, mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from evals.provenance import WITHOUT_EFFECT
from launch.cli import USAGE, unknown_word
from launch.overrides import rewritten

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "experiment=tiny",
    "domains.code.max_bytes=150000",
    "domains.law.max_bytes=400000",
    "domains.math.max_bytes=100000",
    "domains.general.max_bytes=150000",
    "seed.tokenizer.vocab_size=400",
    "seed.train.tokens=8192",
    "branch.tokens=4096",
    "mix.tokens=4096",
    "eval.max_tokens=600",
]


def upcycle(*arguments, cwd, check=True, timeout=300):
    """Run the command in `cwd`; on an unexpected exit status show what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One small run of the whole walk, from an empty directory."""
    where = tmp_path_factory.mktemp("run")
    upcycle(*TINY, cwd=where)
    return where


def weights(where, stage):
    manifest = json.loads((where / "runs" / "tiny" / "manifest.json").read_text())
    return load_file(where / "artifacts" / manifest[stage] / "model.safetensors")


@pytest.mark.slow
def test_report_has_every_model_and_domain(finished):
    report = json.loads((finished / "runs" / "tiny" / "report.json").read_text())
    kinds = {name: model["kind"] for name, model in report["models"].items()}
    assert kinds == {
        "seed": "seed", "code": "branch", "law": "branch", "math": "branch", "soup": "soup", "dense": "dense",
        "btx": "btx", "btx_top1": "btx", "btx_random": "btx", "bam": "bam", "bam_shared_kv": "bam", "oracle": "oracle",
    }  # fmt: skip
    assert report["domains"] == ["code", "law", "math", "general", "cpp", "programs"]
    for name, model in report["models"].items():
        assert set(model["perplexity"]) == set(model["bits_per_byte"]) == set(report["domains"]), name
        assert all(1 < value < 1e4 for value in model["perplexity"].values()), name
    dense, btx = report["models"]["dense"], report["models"]["btx"]
    assert abs(dense["train_tokens"] - btx["train_tokens"]) <= 8 * 128  # the same up to one batch
    assert (finished / "runs" / "tiny" / "report.html").stat().st_size > 50_000


@pytest.mark.slow
def test_report_says_where_it_comes_from_and_how_training_went(finished):
    run = finished / "runs" / "tiny"
    report, manifest = json.loads((run / "report.json").read_text()), json.loads((run / "manifest.json").read_text())
    found, models = report["provenance"], report["models"]
    composed = yaml.safe_load((run / "config.yaml").read_text())
    assert found["config"] == {key: value for key, value in composed.items() if key not in WITHOUT_EFFECT}
    assert found["rng_seeds"]["rng_seed"] == found["config"]["rng_seed"] and len(found["rng_seeds"]) > 5
    keys = {
        stage: artifact.rsplit("-", 1)[1] for stage, artifact in manifest.items() if stage not in ("report", "budget")
    }
    assert found["artifacts"] == keys and {"commit", "python", "torch", "transformers"} <= set(found)
    assert sorted(stage for stages in found["made_by"].values() for stage in stages) == sorted(keys)
    assert {"processor", "cores", "memory_bytes", "system"} <= set(report["machine"])
    last = {name: json.loads(metrics(finished, f"mix/{name}")[-1]) for name in ("btx", "bam")}
    for name, row in last.items():
        tokens, model = row["tokens"], models[name]
        assert ("attention" in model["course"]) == (name == "bam") and model["course"]["tokens"][-1] == tokens
        parts = sum(models[branch]["train_flops"] - models["seed"]["train_flops"] for branch in ("code", "law", "math"))
        behind = models["seed"]["train_flops"] + parts
        assert model["train_flops"] == pytest.approx(behind + tokens * model["flops_per_token"])
        assert (
            len(metrics(finished, f"mix/{name}")) <= 50
            and model["course"]["ffn"]["dead_experts"][-1] == row["dead_experts"]
        )
    assert (
        set(report["pareto"]) == {"train_flops", "active_parameters"}
        and report["pareto"]["train_flops"]["unknown"] == []
    )
    for name in ("pareto", "curves-flops", "course-bam"):
        assert all((run / "figures" / f"{name}.{kind}").is_file() for kind in ("svg", "png"))


def metrics(where, stage):
    manifest = json.loads((where / "runs" / "tiny" / "manifest.json").read_text())
    return (where / "artifacts" / manifest[stage] / "metrics.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_second_run_computes_nothing_and_is_quick(finished):
    before = sorted((path, path.stat().st_mtime_ns) for path in (finished / "artifacts").rglob("*") if path.is_file())
    start = time.monotonic()
    done = upcycle(*TINY, cwd=finished)
    assert time.monotonic() - start < 15
    assert "made in" not in done.stdout and "report:" in done.stdout
    after = sorted((path, path.stat().st_mtime_ns) for path in (finished / "artifacts").rglob("*") if path.is_file())
    assert [item for item in before if ".lock" not in str(item[0])] == [
        item for item in after if ".lock" not in str(item[0])
    ]


@pytest.mark.slow
def test_frozen_random_router_stays_as_drawn(finished):
    before, after = weights(finished, "assemble/btx_random"), weights(finished, "mix/btx_random")
    learned = weights(finished, "mix/btx")
    routers = [name for name in before if "router" in name]
    assert routers and all((before[name] == after[name]).all() for name in routers)
    assert any((before[name] != learned[name]).any() for name in routers)
    assert any((before[name] != after[name]).any() for name in before if "experts" in name)


@pytest.mark.slow
def test_sweep_shares_every_artifact_it_can(finished):
    before = {path.name for path in (finished / "artifacts").iterdir() if path.is_dir()}
    sweep = "mixtures.btx.assemble.router.losses.z_coefficient=0.0,0.001"
    done = upcycle("-m", *TINY, "stage=assemble/btx", sweep, cwd=finished)
    (new,) = {path.name for path in (finished / "artifacts").iterdir() if path.is_dir()} - before
    runs = [finished / "runs" / "tiny" / number for number in ("0", "1")]
    for run, z_coefficient in zip(runs, (0.0, 0.001), strict=True):
        router = yaml.safe_load((run / "config.yaml").read_text())["mixtures"]["btx"]["assemble"]["router"]
        assert router["losses"]["z_coefficient"] == z_coefficient
    first, second = (json.loads((run / "manifest.json").read_text()) for run in runs)
    assert first == json.loads((finished / "runs" / "tiny" / "manifest.json").read_text())
    changed = {stage for stage in first if first[stage] != second[stage]}
    assert changed == {"assemble/btx", "mix/btx", "eval/btx", "report"} and second["assemble/btx"] == new
    assert (finished / "artifacts" / new / "model.safetensors").is_file()
    assert [line.split()[0] for line in done.stdout.splitlines() if "made in" in line] == ["assemble/btx"]


def test_a_sweep_with_many_overrides_finds_names_for_its_runs(tmp_path):
    many = [f"+branches.a_branch_of_domain_{n}.train.proportions.code=1.0" for n in range(10)]
    done = upcycle("plan=true", *TINY, "-m", *many, "rng_seed=1,2", cwd=tmp_path)
    assert done.stdout.count("stages done") == 2
    announced = [line for line in done.stdout.splitlines() if line.startswith("run ")]
    assert announced == ["run 0: rng_seed=1", "run 1: rng_seed=2"]


@pytest.mark.slow
def test_a_sequence_longer_than_a_domain_stops_before_the_seed_is_trained(finished):
    longer = [
        "mix.sequence_length=10000000",
        "++seed.sizes.max_position_embeddings=10000000",
        "mix.tokens=1000000000",
        "seed.train.rng_seed=2",
        "dense=null",
    ]
    done = upcycle(*TINY, *longer, "name=longer", cwd=finished, check=False)
    assert done.returncode == 2 and "fewer than one sequence of 10000000" in done.stderr
    assert "made in" not in done.stdout


@pytest.mark.slow
def test_status_and_report_words(finished, tmp_path):
    done = upcycle("status", cwd=finished)
    assert "runs/tiny  41 of 41 stages done, finished" in done.stdout
    shutil.copytree(finished / "runs" / "tiny", tmp_path / "runs" / "tiny")
    (tmp_path / "README.md").write_text("# X\n<!-- table: tiny -->\nold\n<!-- /table -->\nend\n")
    done = upcycle("report", "tiny", "--readme", cwd=tmp_path)
    assert "bam_shared_kv" in done.stdout
    text = (tmp_path / "README.md").read_text()
    assert "bam_shared_kv" in text and "\nold\n" not in text and text.endswith("end\n")
    wrong = upcycle("report", "tinny", cwd=tmp_path, check=False)
    assert wrong.returncode == 2 and "tinny: no run of that name here" in wrong.stderr and "tiny" in wrong.stderr


@pytest.mark.slow
def test_tasks_are_measured_and_reported(finished):
    """On top of a finished run: its stages are found, the models' tasks and the report are made."""
    wanted = ["tasks=continuations", "tasks.names=[continuations_law,continuations_general]", "tasks.limit=6"]
    small = ["tasks.continuations.context_characters=60", "tasks.continuations.continuation_characters=30"]
    done = upcycle(*TINY, *wanted, *small, "tasks.continuations.choices=2", "name=tasked", cwd=finished)
    made = [line.split()[0] for line in done.stdout.splitlines() if " made in " in line]
    report = json.loads((finished / "runs" / "tasked" / "report.json").read_text())
    models = [name for name in report["models"] if name != "oracle"]
    assert made == ["questions/law", "questions/general", *(f"tasks/{name}" for name in models), "report"]
    for name in models:
        for row in report["models"][name]["tasks"].values():
            assert 0 <= row["metrics"]["acc"]["value"] <= 1 and row["questions"] == 6
    assert report["tasks"]["chance"] == {"continuations_law": 0.5, "continuations_general": 0.5}
    assert "acc_mutual_info" in done.stdout
    assert '<h2 id="tasks-title">Tasks</h2>' in (finished / "runs" / "tasked" / "report.html").read_text()


@pytest.mark.slow
def test_offline_tracking_needs_no_account_and_changes_nothing(finished, tmp_path):
    manifest = json.loads((finished / "runs" / "tiny" / "manifest.json").read_text())
    shutil.copytree(finished / "artifacts", tmp_path / "artifacts")
    final = tmp_path / "artifacts" / manifest["mix/bam"]
    shutil.rmtree(final)
    upcycle(*TINY, "stage=mix/bam", "track=wandb", cwd=tmp_path)
    (record,) = (tmp_path / "runs" / "tiny" / "wandb").glob("offline-run-*/run-*.wandb")
    assert record.stat().st_size > 1000
    ours = load_file(final / "model.safetensors")
    assert all((ours[name] == value).all() for name, value in weights(finished, "mix/bam").items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["seed", "branch/code", "mix/bam"])
def test_killed_run_goes_on_and_ends_with_the_same_weights(finished, tmp_path, stage):
    """kill -9 in the middle of a stage's steps; every stage before it is reused from the finished run."""
    manifest = json.loads((finished / "runs" / "tiny" / "manifest.json").read_text())
    artifacts = tmp_path / "artifacts"
    shutil.copytree(finished / "artifacts", artifacts)
    final = artifacts / manifest[stage]
    shutil.rmtree(final)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.cli", *TINY, f"stage={stage}", "launch.checkpoint_steps=1"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    partial = final.with_name(final.name + ".partial")
    while process.poll() is None and not any(partial.glob("checkpoints/step-0000000[2-9]")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not final.exists() and partial.is_dir()
    done = upcycle(*TINY, f"stage={stage}", cwd=tmp_path)
    assert "going on from step" in done.stdout
    ours, theirs = load_file(final / "model.safetensors"), weights(finished, stage)
    assert set(ours) == set(theirs) and all((ours[name] == theirs[name]).all() for name in ours)


def test_plan_names_every_stage_and_computes_nothing(tmp_path):
    before = sum(os.times()[2:4])  # processor time of children: other tests may keep the machine busy
    done = upcycle("plan=true", cwd=tmp_path)
    assert sum(os.times()[2:4]) - before < 3
    for word in (
        "documents/code",
        "tokenizer",
        "tokens/cpp",
        "seed",
        "branch/math",
        "mix/bam_shared_kv",
        "dense",
        "report",
    ):
        assert word in done.stdout
    assert "0 of 41 stages done" in done.stdout and "missing" in done.stdout
    assert not (tmp_path / "artifacts").exists()


def test_a_mixture_is_matched_or_drawn_though_no_file_says_so(tmp_path):
    for argument in ("mixtures.btx_top1.match=compute", "mixtures.btx_top1.scratch=true"):
        upcycle("plan=true", "experiment=tiny", argument, cwd=tmp_path)
    assert rewritten(["mixtures.btx.match=data"]) == ["++mixtures.btx.match=data"]
    assert rewritten(["mixtures.none.match=data", "++mixtures.a.match=x"]) == [
        "mixtures.none.match=data",
        "++mixtures.a.match=x",
    ]


def test_plan_does_not_import_torch(tmp_path):
    code = (
        "import sys; sys.argv = ['upcycle', 'plan=true', 'experiment=tiny']; from launch.cli import main; main(); "
        "bad = [m for m in ('torch', 'transformers', 'datasets', 'wandb', 'matplotlib') if m in sys.modules]; assert not bad, bad"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_one_stage_names_its_missing_inputs(tmp_path):
    done = upcycle("stage=branch/code", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "stage 'branch/code' needs seed, tokens/code, tokens/general, which are not finished" in done.stderr
    done = upcycle("stage=branch/cod", cwd=tmp_path, check=False)
    assert "stage=branch/cod: no such stage; did you mean branch/code" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mix.lrr=1"], "mix.lrr: unknown key; did you mean lr?"),
        (["mixx.lr=1"], "mixx: unknown key; did you mean mix"),
        (["+mixtures.btx.train.lrr=1"], "mixtures.btx.train.lrr: unknown key; did you mean lr?"),
        (["mix.lr=fast"], "upcycle: mix.lr: Input should be a valid number (got 'fast')\n"),
        (["+mixtures.btx.train.tokens=1.5"], "upcycle: mixtures.btx.train.tokens: Input should be a valid integer (got 1.5)\n"),
        (["a=1", "-m", "mix.lr=fast"], "a: unknown key"),
        (["experiment=tin"], "upcycle: experiment=tin: no such file; did you mean tiny? Choices: baselines, bring_your_own, camex, demo, merge, merging, routers, tiny.\n"),
        (["mixtures.btx.assemble.router.kind=topk"], "mixtures.btx.assemble.router: kind=topk is not known, expected one of top_k, soft, switch, "
        "sample_top1, expert_choice, hash, uniform, oracle; did you mean top_k?"),
        (["mixtures.btx.assemble.router.top_k=6"], "mixtures.btx.assemble.router.top_k=6 exceeds the 4 experts (seed, code, law, math)"),
        (["mixtures.btx.assemble.router.top_k=1"], "mixtures.btx.assemble.router: top_k=1 with gate_order=topk_softmax"),
        (["+mix.proportions.cod=1.0"], "'cod', expected one of the trained domains (code, law, math, general); did you mean code?"),
        (["experiment=dmo"], "dmo"),
        (["rng_seed=-1"], "rng_seed: Input should be greater than or equal to 0"),
        (["launch.threads=0"], "launch.threads: Input should be greater than or equal to 1"),
        (["tasks=continuation"], "tasks=continuation: no such file; did you mean continuations? Choices: bam, btx, continuations."),
        (["tasks=continuations", "tasks.names=[continuations_lw]"], "tasks.names has 'continuations_lw', which needs a domain's documents"),
        (["tasks=continuations", "tasks.limits=1"], "tasks.limits: unknown key; did you mean limit?"),
        (["eval.max_tokens=0"], "eval.max_tokens: Input should be greater than 0"),
        (["dense=true"], "upcycle: dense: Input should be an object (got True)\n"),
        (["mix=true"], "upcycle: mix: Input should be an object (got True)\n"),
        (["branch=3"], "upcycle: branch: Input should be an object (got 3)\n"),
        (["++mixtures.btx.train=3"], "upcycle: mixtures.btx.train: Input should be an object (got 3)\n"),
        (["shares=foo"], "upcycle: shares=foo: expected two numbers above 0 that sum to 1, branches and mixture, "),
        (["shares={branch: 0.9, mixture: 0.1}"], "upcycle: shares.branch: unknown key; did you mean branches? Valid here: branches, mixture\n"),
        (["mixtures.btxx.match=compute"], "upcycle: mixtures.btxx: unknown key; did you mean btx"),
        (["eval.bootstrap_samples=1"], "eval.bootstrap_samples=1: expected at least 100"),
        (["seed.sizes.num_attention_heads=5"], "sizes.hidden_size=192 is not a multiple of num_attention_heads=5"),
        (["domains.law.test_fraction=0"], "domains.law.test_fraction is 0, but eval.split=test measures every domain"),
        (["seed.architecture=lama"], "seed: architecture='lama' is not supported, expected one of gpt_neox, llama; did you mean llama?"),
    ],
)  # fmt: skip
def test_mistakes_are_named_at_once(tmp_path, arguments, message):
    done = upcycle("plan=true", *arguments, cwd=tmp_path, check=False)
    assert done.returncode != 0 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "UPCYCLE_TRACEBACK" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["name=../xyz"], "name=../xyz: expected letters, digits, _, . and -, "),
        (["-m", "name=ok,a/b"], "name=a/b: expected letters"),
        (["name=zz", "stage=branch/cod"], "stage=branch/cod: no such stage; did you mean branch/code"),
        (["--config-dir=own", "experiment=deep"], "name: String should match pattern"),
    ],
)
def test_a_refused_run_leaves_no_directory(tmp_path, arguments, message):
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "deep.yaml").write_text("# @package _global_\ndefaults: [tiny, _self_]\nname: a/b\n")
    done = upcycle(*arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert sorted(tmp_path.iterdir()) == [tmp_path / "own"]


FILES = {
    "mine.yaml": "# @package _global_\ndefaults: [tiny, _self_]\nname: mine\nmix: {lr: 1.0e-2}\n",
    "wrong.yaml": "# @package _global_\ndefaults: [tiny, _self_]\nmix: {lrr: 1.0e-2}\n",
    "package.yaml": "defaults: [tiny, _self_]\nname: mine\n",
    "torn.yaml": "# @package _global_\nname: [mine\n",
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-dir", "own", "experiment=wrong"], "upcycle: mix.lrr: unknown key; did you mean lr? Valid here: tokens, "),
        (["experiment=mine", "--config-dir=own", "mix.lrr=1"], "upcycle: mix.lrr: unknown key; did you mean lr? Valid here: "),
        (
            ["experiment=min", "--config-dir", "own"],
            "upcycle: experiment=min: no such file; did you mean mine or merging or tiny? Choices: baselines, bring_your_own, camex, demo, merge, merging, mine, package, "
            f"routers, tiny, torn, wrong. Looked in {ROOT / 'conf' / 'experiment'} and own/experiment.\n",
        ),
        (
            ["experiment=package", "--config-dir", "own"],
            "upcycle: the experiment's settings came in below a key `experiment`, expected them at the top; make "
            "`# @package _global_` the first line of its file\n",
        ),
        (["experiment=torn", "--config-dir", "own"], 'own/experiment/torn.yaml", line 3, column 1 '),
        (["experiment=mine", "--config-dir", "owl"], "upcycle: Additional config directory '"),
    ],
)  # fmt: skip
def test_mistakes_in_ones_own_settings_are_named(tmp_path, arguments, message):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    for name, text in FILES.items():
        (tmp_path / "own" / "experiment" / name).write_text(text)
    done = upcycle("plan=true", *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_ones_own_experiment_runs(tmp_path):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(FILES["mine.yaml"])
    done = upcycle("plan=true", "experiment=mine", "--config-dir", "own", cwd=tmp_path)
    assert "0 of 41 stages done" in done.stdout and sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def test_a_word_is_looked_up_before_hydra_reads_it(tmp_path):
    done = upcycle("reprot", cwd=tmp_path, check=False)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr == (
        "upcycle: reprot: no such word; did you mean report or export or route? Words: help, explain, doctor, export, status, "
        "report, replicates, add, remove, dense, fold, route, prune, cancel, sweep; settings are key=value (upcycle --help shows them)\n"
    )
    assert unknown_word(["experiment=tiny", "stat"]) == "stat"
    for fine in ([], ["a=1", "+b=2", "~c"], ["-m", "a=1,2"], ["a=1", "--config-dir", "here"]):
        assert unknown_word(fine) is None


def test_an_error_of_a_library_says_how_to_see_where(tmp_path):
    done = upcycle("experiment=tiny", f"artifacts={'long' * 100}", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.endswith(" (UPCYCLE_TRACEBACK=1 shows where)\n") and "Error: " in done.stderr, done.stderr
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "runs").write_text("")  # where Hydra itself wants a directory
    done = upcycle("plan=true", cwd=blocked, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.endswith(" (UPCYCLE_TRACEBACK=1 shows where)\n"), done.stderr


@pytest.mark.parametrize(
    ("source", "content"),
    [("text", b""), ("text", b"\xff\xfe\x00bad"), ("json", b'{"text": "cut'), ("parquet", b"not parquet")],
)
def test_files_that_are_not_what_the_settings_say_are_named(tmp_path, source, content):
    (tmp_path / "mine").write_bytes(content)
    changes = [f"domains.code.source={source}", "domains.code.path=mine", "domains.code.max_bytes=null"]
    done = upcycle("experiment=tiny", "stage=documents/code", *changes, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"domain mine could not be read as source={source}" in done.stderr, done.stderr


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(finished, tmp_path):
    shutil.copytree(finished / "artifacts", tmp_path / "artifacts")
    changes = ["seed.train.tokens=4000000", "seed.train.max_epochs=1000", "stage=seed", "launch.checkpoint_steps=1"]
    command = [sys.executable, "-m", "launch.cli", *TINY, *changes]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits "ignore"
    )  # fmt: skip
    while process.poll() is None and not any((tmp_path / "artifacts").glob("seed-*.partial/checkpoints/step-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and "stopped; the same command goes on from there" in errors
    assert "Traceback" not in errors


def test_help_shows_words_and_settings(tmp_path):
    done = upcycle("--help", cwd=tmp_path)
    assert done.stdout.startswith(USAGE)
    assert "Settings, as composed by Hydra" in done.stdout and "\nmixtures:\n" in done.stdout


@pytest.mark.slow
def test_wheel_runs_elsewhere(tmp_path):
    """The `upcycle` command of an installed wheel finds its settings from any directory: conf/ is package data."""
    source = tmp_path / "source"
    kept = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in kept.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path / "dist"), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site), "COLUMNS": "200"}
    done = subprocess.run(
        [site / "bin" / "upcycle", "plan=true"], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "0 of 41 stages done" in done.stdout, done.stderr
    probe = "import launch.pipeline, upcycle.api; print(launch.pipeline.CONF, upcycle.api.preset('bam').attention)"
    where = subprocess.run(
        [sys.executable, "-c", probe], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    )
    assert where.stdout.split() == [str(site / "conf"), "mixture"]


def test_a_preset_that_no_mixture_reads_is_refused(tmp_path):
    """`+assemble=` reaches mixtures that have no preset of their own; here each has one."""
    for argument in ("+assemble=btx_segments", "assemble=btx_segments"):
        done = upcycle("plan=true", "experiment=tiny", argument, cwd=tmp_path, check=False)
        assert done.returncode == 2 and "assemble@mixtures.NAME.assemble=PRESET" in done.stderr, done.stderr


@pytest.mark.parametrize("preset", ["btx_hash", "btx_random"])
def test_phases_of_a_router_that_has_nothing_to_train_are_refused_in_the_plan(tmp_path, preset):
    phases = "mixtures.btx.train.phases=[{steps: 5, trainable: [router]},{}]"
    done = upcycle(
        "plan=true",
        "experiment=tiny",
        f"assemble@mixtures.btx.assemble={preset}",
        f"+{phases}",
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert (
        "mixtures.btx.train.phases[0].trainable names router, and the routers of this mixture have nothing"
        in done.stderr
    )


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    words = "import sys; from launch.cli import _spoken; sys.exit(_spoken(lambda _: print('x\\n' * 10**6) or 3, []))"
    command = f'{sys.executable} -c "{words}" | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "x\n", "")

"""Progress and tracking: what a person sees, what trackers get, and that a tracker's failure is not the run's."""

import base64
import hashlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console

from launch import display, track, trackers
from launch.config import LaunchConfig, TrackConfig
from launch.measured import measured
from launch.plan import human
from tests.wandb_file import read, table
from upcycle.store import Run, Store, versioned

ROOT = Path(__file__).resolve().parent.parent
ROW = {
    "step": 3, "loss": 2.5, "cross_entropy": 2.4, "balance": 1.2, "z": 0.3, "lr": 1e-3, "tokens_per_second": 12345.0,
    "peak_share": 0.5, "largest_load": 0.4, "dead_experts": 1, "ffn_entropy": 1.1, "router_gradient_norm": 0.01, "load": [[1.0]],
}  # fmt: skip
EVALUATION = {
    "domains": {"law": {"nats": 30.0, "tokens": 10, "bytes": 40}, "code": {"nats": 8.0, "tokens": 4, "bytes": 9}},
    "routing": {
        "attention": None,
        "ffn": {
            "experts": ["seed", "law"],
            "layers": [0, 2],
            "share": {"law": [[0.25, 0.75], [0.5, 0.5]], "code": [[1.0, 0.0], [0.4, 0.6]]},
            "entropy": {"law": [0.1, 0.2], "code": [0.3, 0.4]},
            "load": [[0.6, 0.4], [0.45, 0.55]],
            "mean_entropy": [0.2, 0.3],
            "mutual_information": [0.05, 0.01],
        },
    },
}


@versioned(1)
def train_model(config, *, out, run):
    """As the loop does: a row a step, in the file, to the trackers, and as progress."""
    with (out / "metrics.jsonl").open("w") as file:
        for step in range(1, config["steps"] + 1):
            if step == config.get("at"):
                TROUBLE[config["trouble"]]()
            row = ROW | {"step": step, "loss": 1 / step, "tokens": 64 * step, "train_flops": 64e6 * step}
            file.write(json.dumps(row) + "\n")
            run.record(row)
            run.advance(step, config["steps"], **row)
            time.sleep(config.get("seconds", 0.0))


@versioned(1)
def write_files(config, *, out, run):
    for name, content in config.items():
        (out / name).write_text(content if isinstance(content, str) else json.dumps(content))


def wandb_services() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "wandb-core" in child.name()]


def send(what: signal.Signals) -> None:
    until = time.monotonic() + 60
    while not wandb_services():
        assert time.monotonic() < until, "wandb has not started"
        time.sleep(0.1)
    time.sleep(1)  # rows are on their way
    for service in wandb_services():
        service.send_signal(what)


TROUBLE = {"killed": lambda: send(signal.SIGKILL), "stopped": lambda: send(signal.SIGSTOP)}


def tracker(where=Path(), wandb="off", tensorboard=False, **options):
    console = Console(file=io.StringIO(), width=250)
    cfg = SimpleNamespace(
        name="tiny", rng_seed=1, launch=LaunchConfig(**options), track=TrackConfig(wandb=wandb, tensorboard=tensorboard)
    )
    return track.Tracker(cfg, console, where), console.file


def stage(tmp_path, name, function=train_model, config=None):
    store = Store(tmp_path / "artifacts")
    return store, store.stage(name, function, config or {"steps": 5})


def make(tmp_path, name, function=train_model, config=None, **trackers_on):
    """One stage under trackers: its artifact, what was shown, and the wandb file if there is one."""
    store, made = stage(tmp_path, name, function, config)
    tracks, shown = tracker(tmp_path, **trackers_on)
    with tracks.stage(made) as run:
        store.make(made, run)
    assert made.finished
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{made.key[:16]}/*.wandb"))
    return made, shown.getvalue(), files[-1] if files else None


def test_a_line_shows_step_losses_speed_and_router_health(tmp_path, monkeypatch):
    monkeypatch.setattr(display, "PLAIN_SECONDS", 0.0)
    made, shown = tracker()
    with made.stage(stage(tmp_path, "mix/bam")[1]) as run:
        run.advance(2, 12, **ROW)
        run.advance(3, 12, **ROW)
    for part in (
        "mix/bam  3/12", "loss 2.500", "ce 2.400", "balance 1.200", "z 0.300", "lr 1.0e-03", "12.3k tok/s", "50% of peak",
        "largest load 40%", "dead 1", "entropy 1.10", "gradient 1.0e-02", "s left",
    ):  # fmt: skip
        assert part in shown.getvalue()


def test_time_left_is_that_of_the_part_at_hand(tmp_path, monkeypatch):
    """A stage reads, then compares: the seconds spent on reading say nothing about comparing."""
    clock = iter([0.0, 100.0, 110.0, 1000.0, 1001.0])
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(display, "PLAIN_SECONDS", 0.0)
    console = Console(file=io.StringIO(), width=250)
    shown = display.Display("documents/law", console, enabled=True)
    for done, total, doing in ((10, 30, "read"), (20, 30, "read"), (1, 5, "compared"), (2, 5, "compared")):
        shown.advance(done, total, doing=doing)
    assert console.file.getvalue().splitlines() == [
        "  documents/law  10/30  read",
        "  documents/law  20/30  read  10 s left",
        "  documents/law  1/5  compared",
        "  documents/law  2/5  compared  3 s left",
    ]


def test_a_terminal_has_one_live_line(tmp_path):
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with display.Display("soup", console, enabled=True) as shown:
        shown.advance(1, 2, doing="tensors")
        shown.live.refresh()
    text = console.file.getvalue()
    assert "soup  1/2  tensors" in text and "\x1b[2K" in text  # and it is taken away again


def test_lines_come_now_and_then_without_a_terminal(tmp_path):
    made, shown = tracker()
    with made.stage(stage(tmp_path, "seed")[1]) as run:
        for step in range(1000):
            run.advance(step + 1, 1000)
    assert shown.getvalue() == ""


def test_launch_options_reach_the_stage(tmp_path):
    made, _ = tracker(checkpoint_steps=7, checkpoint_seconds=None, keep_checkpoints=3)
    with made.stage(stage(tmp_path, "seed")[1]) as run:
        assert (run.checkpoint_steps, run.checkpoint_seconds, run.keep_checkpoints) == (7, None, 3)


class Broken:
    """A sink whose `log` fails or never returns."""

    def __init__(self, hangs: bool):
        self.hangs, self.calls, self.let_go = hangs, [], threading.Event()

    def start(self):
        self.calls.append("start")

    def log(self, row):
        self.calls.append(row["step"])
        if not self.hangs:
            raise ConnectionError("gone")
        self.let_go.wait()

    def finish(self, measured):
        self.calls.append("finish")

    def give_up(self):
        self.calls.append("give_up")
        self.let_go.set()


@pytest.mark.parametrize(
    ("hangs", "why"), [(False, "gone"), (True, "it has not answered for 0 s")], ids=["fails", "hangs"]
)
def test_a_tracker_that_fails_or_hangs_is_dropped_and_training_goes_on(tmp_path, monkeypatch, hangs, why):
    monkeypatch.setattr(trackers, "PATIENCE_SECONDS", 0.2)
    sink = Broken(hangs)
    monkeypatch.setattr(track, "Wandb", lambda *_: sink)
    start = time.monotonic()
    _, shown, _ = make(tmp_path, "seed", config={"steps": 50, "seconds": 0.01}, wandb="offline")
    assert time.monotonic() - start < 5
    assert sink.calls == ["start", 1, "give_up"]
    assert shown.splitlines() == [f"seed: wandb stopped ({why}); the run goes on without it"]


def test_a_tracker_that_is_not_installed_costs_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    _, shown, _ = make(tmp_path, "seed", wandb="offline")
    assert len(shown.splitlines()) == 1 and "seed: wandb could not start (import of wandb halted" in shown


def test_wandb_has_settings_and_metrics_over_tokens_and_flops(tmp_path):
    made, shown, file = make(tmp_path, "mix/btx", wandb="offline")
    found, record = read(file), json.loads((made.path / "stage.json").read_text())
    assert shown == ""
    run = found["run"]
    assert (run.run_group, run.job_type, run.display_name) == ("tiny", "mix", "mix/btx")
    assert (run.project, run.run_id) == ("upcycle", made.key[:16])
    wanted = record | {"experiment": "tiny", "rng_seed": 1}
    assert {name: found["config"][name] for name in wanted} == wanted  # config, versions, commit
    assert found["axes"]["*"] == "tokens" and found["axes"]["by_flops/*"] == "train_flops"
    rows = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    assert len(found["rows"]) == len(rows) == 5
    for logged, row in zip(found["rows"], rows, strict=True):
        scalars = {name: value for name, value in row.items() if not isinstance(value, list)}
        assert {name: logged[name] for name in scalars} == scalars
        assert logged["by_flops/loss"] == row["loss"] and logged["_step"] == row["step"]


def test_wandb_has_an_evaluations_tables(tmp_path):
    _, _, file = make(tmp_path, "eval/btx", write_files, {"evaluation.json": EVALUATION}, wandb="offline")
    found = table(file, "domains")
    assert found["columns"] == ["domain", "perplexity", "bits_per_byte", "tokens"]
    assert found["data"] == [
        ["law", pytest.approx(math.exp(3)), pytest.approx(0.75 / math.log(2)), 10],
        ["code", pytest.approx(math.exp(2)), pytest.approx(8 / 9 / math.log(2)), 4],
    ]
    found = table(file, "ffn_share")
    assert found["columns"] == ["layer", "domain", "entropy", "seed", "law"]
    assert found["data"][1] == [2, "law", 0.2, 0.5, 0.5] and found["data"][2] == [0, "code", 0.3, 1.0, 0.0]
    assert table(file, "ffn_load")["data"] == [[0, 0.2, 0.05, 0.6, 0.4], [2, 0.3, 0.01, 0.45, 0.55]]
    (row,) = read(file)["rows"]
    assert row["perplexity/law"] == pytest.approx(math.exp(3)) and "attention_share" not in row


def test_wandb_has_the_report_as_artifact_and_its_table(tmp_path):
    report = json.loads((ROOT / "docs" / "demo" / "report.json").read_text())
    files = {"report.json": report, "report.html": "<html></html>"}
    made, _, file = make(tmp_path, "report", write_files, files, wandb="offline")
    (artifact,) = [
        one for one in read(file)["artifacts"] if one.type == "report"
    ]  # tables are artifacts of wandb's own
    assert (artifact.name, artifact.type) == ("report-tiny", "report")
    digests = {one.path: one.digest for one in artifact.manifest.contents}
    for name in files:
        assert digests[name] == base64.b64encode(hashlib.md5((made.path / name).read_bytes()).digest()).decode()
    found = table(file, "summary")
    btx = dict(zip(found["columns"], next(row for row in found["data"] if row[0] == "btx"), strict=True))
    model = report["models"]["btx"]
    assert btx["law"] == model["perplexity"]["law"] and btx["train_flops"] == model["train_flops"]
    assert btx["trained average"] == model["average"]["trained"]["perplexity"]
    assert len(found["data"]) == len(report["models"])


def test_tables_of_tasks_and_ablations(tmp_path):
    metric = {"acc": {"value": 0.5, "stderr": 0.1, "interval": [0.3, 0.7]}}
    (tmp_path / "tasks.json").write_text(
        json.dumps({"tasks": {"piqa": {"metrics": metric, "chance": 0.25, "questions": 9}}})
    )
    assert measured(tmp_path).tables["tasks"][1] == [["piqa", "acc", 0.5, 0.1, 0.25, 9]]
    assert measured(tmp_path).figures == {"piqa/acc": 0.5}
    (tmp_path / "tasks.json").unlink()
    whole, forced = ({"law": {"nats": nats, "tokens": 10}} for nats in (20.0, 30.0))
    experts = {"seed": {"removed": None, "forced": forced}}
    (tmp_path / "ablation.json").write_text(json.dumps({"whole": whole, "experts": experts}))
    assert measured(tmp_path).tables["ablation"][1] == [["seed", "law", 2.0, None, 3.0]]


def test_an_attempt_after_a_crash_is_the_same_wandb_run(tmp_path):
    store, made = stage(tmp_path, "mix/btx", config={"steps": 3})
    tracks, _ = tracker(tmp_path, wandb="offline")
    with pytest.raises(KeyboardInterrupt), tracks.stage(made) as run:
        run.record(ROW | {"tokens": 192})
        raise KeyboardInterrupt
    with tracks.stage(made) as run:
        store.make(made, run)
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    found = [read(file) for file in files]
    assert [one["run"].run_id for one in found] == [made.key[:16]] * 2
    assert [len(one["rows"]) for one in found] == [1, 3]


# In a process of its own, for the interpreter must also come to its end: a stopped service holds up wandb's exit hooks.
CHILD = """
import sys
from pathlib import Path
from launch import trackers
from tests import test_track
trackers.PATIENCE_SECONDS = 8.0
where = Path(sys.argv[1])
steps = 30 if sys.argv[2] == "killed" else 2000
for name in ("seed", "mix/btx"):
    trouble = {"trouble": sys.argv[2], "at": 10} if name == "seed" else {}
    made, shown, file = test_track.make(where, name, config={"steps": steps, **trouble}, wandb="offline")
    rows = test_track.read(file)["rows"] if name == "mix/btx" else []
    print(name, len((made.path / "metrics.jsonl").read_text().splitlines()), len(rows), shown.splitlines())
"""


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["killed", "stopped"])
def test_training_outlives_wandbs_service(tmp_path, trouble):
    """Its process killed, or stopped, in the middle of a stage: every step is made, one line says so, the next stage is
    tracked again, and the process ends."""
    alone = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), trouble],
        cwd=ROOT,
        env=alone,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    why = r"Connection lost|\[Errno \d+\] .*" if trouble == "killed" else "it has not answered for 8 s"
    steps = 30 if trouble == "killed" else 2000
    first, second = done.stdout.splitlines()
    assert re.fullmatch(rf"seed {steps} 0 \['seed: wandb stopped \(({why})\); the run goes on without it'\]", first)
    assert second == f"mix/btx {steps} {steps} []"
    assert done.stderr == ""


def test_tensorboard_has_metrics_over_tokens(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made, shown, _ = make(tmp_path, "mix/btx", tensorboard=True)
    assert shown == ""
    found = EventAccumulator(str(tmp_path / "tensorboard" / made.path.name)).Reload()
    rows = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "tokens_per_second", "train_flops"):
        logged = [(event.step, event.value) for event in found.Scalars(name)]
        assert logged == [(row["tokens"], pytest.approx(row[name])) for row in rows]
    measured, _, _ = make(tmp_path, "eval/btx", write_files, {"evaluation.json": EVALUATION}, tensorboard=True)
    found = EventAccumulator(str(tmp_path / "tensorboard" / measured.path.name)).Reload()
    assert found.Scalars("perplexity/code")[0].value == pytest.approx(math.exp(2))


@pytest.mark.parametrize(
    ("number", "text"), [(1234567, "1.23M"), (0.5, "0.5"), (999, "999"), (2.4e13, "24T"), (None, "")]
)
def test_numbers_are_short(number, text):
    assert human(number) == text


def small_recipe(root):
    """Every kind of stage that a recipe has, on two domains."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from launch.config import build
    from launch.recipes import upcycle

    halves = "{code: 0.5, general: 0.5}"
    overrides = [
        "experiment=tiny", "tasks=continuations", "tasks.continuations.questions=4", "btm={top_k: null}", "greedy_soup=true",
        "ablation={}", "curvature.compare=true", "curvature.sequences=2", "+merges.camex={method: camex, options: {steps: 2}}", "seed.tokenizer.vocab_size=400", "seed.train.tokens=2048", "branch.tokens=1024",
        "mix.tokens=1024", "eval.max_tokens=300", "domains.code.max_bytes=150000", "domains.general.max_bytes=150000",
    ]  # fmt: skip
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        raw = OmegaConf.to_container(compose("config", overrides=overrides), resolve=True)
    for key, kept in (("domains", ("code", "general")), ("branches", ("code",)), ("mixtures", ("btx",))):
        raw[key] = {name: raw[key][name] for name in kept}
    raw["mixtures"]["scratch"] = raw["mixtures"]["btx"] | {"scratch": True}
    for where in (raw["mix"], raw["seed"]["train"], raw["seed"]["tokenizer"]):
        where["proportions"] = OmegaConf.to_container(OmegaConf.create(halves))
    return upcycle(build(raw), Store(root)).store


@pytest.mark.slow
def test_every_kind_of_stage_shows_its_progress_to_the_end(tmp_path):
    import evals.stages
    import upcycle.stages

    kinds = {
        one for module in (upcycle.stages, evals.stages) for one in vars(module).values() if hasattr(one, "version")
    }
    store = small_recipe(tmp_path)
    (tmp_path / "copy").mkdir()
    seen: dict[str, list[tuple[int, int]]] = {}
    for made in store.stages.values():
        steps = seen.setdefault(made.name, [])
        store.make(
            made, Run(say=lambda text: None, advance=lambda done, total, steps=steps, **_: steps.append((done, total)))
        )
    steps = seen["import"] = []
    upcycle.stages.import_model(
        None, out=tmp_path / "copy", path=str(store.stages["seed"].path),
        run=Run(advance=lambda done, total, **_: steps.append((done, total))),
    )  # fmt: skip
    assert {made.function for made in store.stages.values()} | {upcycle.stages.import_model} == kinds
    for name, steps in seen.items():
        assert steps and steps[-1][0] == steps[-1][1], name
        assert all(0 <= done <= total for done, total in steps), name

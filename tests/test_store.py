"""Artifacts: the key says what made them, the directory says whether they are whole."""

import json
import multiprocessing
import time
from dataclasses import dataclass

import pytest

from upcycle.store import Run, Store, versioned

QUIET = Run(say=lambda text: None)


@dataclass(frozen=True)
class Settings:
    value: int


@versioned(1)
def write_value(config, *, out, run, parent=None, extra=None):
    (out / "calls").write_text((out / "calls").read_text() + "x" if (out / "calls").is_file() else "x")
    below = (parent / "value").read_text() if parent else ""
    (out / "value").write_text(f"{below}{config.value}")


@versioned(1)
def crash(config, *, out, run):
    (out / "half").write_text("half")
    raise RuntimeError("killed")


@versioned(1)
def slow(config, *, out, run):
    with (out.parent / "calls").open("a") as calls:
        calls.write("x")
    time.sleep(1.5)


def test_same_key_is_computed_once(tmp_path):
    store = Store(tmp_path)
    stage = store.stage("a", write_value, Settings(1))
    assert store.make(stage, QUIET) is True
    assert store.make(Store(tmp_path).stage("a", write_value, Settings(1)), QUIET) is False
    assert (stage.path / "calls").read_text() == "x"
    assert stage.state == "done" and stage.seconds() >= 0


def test_key_follows_config_inputs_content_and_version_and_nothing_else(tmp_path):
    def key(value=1, content=None, outside=None, parent=None, version=1):
        store = Store(tmp_path)
        write_value.version = version
        inputs = {"parent": store.stage("p", write_value, Settings(parent))} if parent else {}
        return store.stage("a", write_value, Settings(value), content, outside, **inputs).key

    base = key()
    assert key(outside={"extra": "elsewhere"}) == base
    different = [key(value=2), key(content="x"), key(parent=1), key(parent=2), key(version=2)]
    write_value.version = 1
    assert len({base, *different}) == 6


def test_crash_leaves_nothing_that_looks_finished(tmp_path):
    store = Store(tmp_path)
    stage = store.stage("a", crash, Settings(1))
    with pytest.raises(RuntimeError, match="killed"):
        store.make(stage, QUIET)
    assert not stage.finished and not stage.path.exists() and stage.state == "partial"
    assert json.loads((stage.partial / "timing.json").read_text())["seconds"] >= 0
    assert json.loads((stage.partial / "failed.json").read_text()) == {"error": "RuntimeError: killed"}


def test_next_attempt_sees_only_what_it_can_resume_from(tmp_path):
    store = Store(tmp_path)
    stage = store.stage("a", write_value, Settings(1))
    (stage.partial / "checkpoints" / "step-00000001").mkdir(parents=True)  # dropped at the end, by the store
    (stage.partial / "model-00001-of-00002.safetensors").write_text("half")
    (stage.partial / "leftover").mkdir()
    store.make(stage, QUIET)
    assert sorted(path.name for path in stage.path.iterdir()) == [
        "calls",
        "stage.json",
        "timing.json",
        "value",
    ]


def test_partial_state_names_the_newest_step(tmp_path):
    stage = Store(tmp_path).stage("a", crash, Settings(1))
    assert stage.state == "missing"
    for step in ("step-00000020", "step-00000100", "step-00000200.partial"):
        (stage.partial / "checkpoints" / step).mkdir(parents=True)
    assert stage.state == "partial at step 100"


def test_missing_inputs_are_named(tmp_path):
    store = Store(tmp_path)
    parent = store.stage("seed", write_value, Settings(1))
    child = store.stage("branch/code", write_value, Settings(2), parent=parent)
    with pytest.raises(ValueError, match=r"stage 'branch/code' needs seed, which is not finished; .*stage=seed"):
        store.make(child, QUIET)
    store.make(parent, QUIET)
    store.make(child, QUIET)
    assert (child.path / "value").read_text() == "12"


def test_one_name_cannot_mean_two_things(tmp_path):
    store = Store(tmp_path)
    store.stage("a", write_value, Settings(1))
    with pytest.raises(ValueError, match="declared twice with different settings"):
        store.stage("a", write_value, Settings(2))


def test_a_crash_before_the_last_rename_costs_only_the_rename(tmp_path, monkeypatch):
    store = Store(tmp_path)
    stage = store.stage("a", write_value, Settings(1))
    with monkeypatch.context() as patch:
        patch.setattr(Store, "_finish", lambda self, artifact: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.make(stage, QUIET)
    assert not stage.finished
    store.make(stage, QUIET)
    assert stage.finished and (stage.path / "calls").read_text() == "x"


def test_time_of_killed_attempts_counts(tmp_path):
    store = Store(tmp_path)
    stage = store.stage("a", write_value, Settings(1))
    stage.partial.mkdir(parents=True)
    (stage.partial / "timing.json").write_text('{"seconds": 100.0}')
    store.make(stage, QUIET)
    assert 100 < stage.seconds() < 105


def test_lock_is_released_when_the_stage_is_made(tmp_path):
    from filelock import FileLock

    store = Store(tmp_path)
    stage = store.stage("a", write_value, Settings(1))
    store.make(stage, QUIET)
    FileLock(tmp_path / ".locks" / f"{stage.path.name}.lock").acquire(timeout=0)


def _make_slow(root):
    store = Store(root)
    store.make(store.stage("a", slow, Settings(1)), QUIET)


def test_two_processes_wait_for_one_another(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_make_slow, args=(tmp_path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / "calls").read_text() == "x"


def test_artifacts_of_other_versions_are_noted(tmp_path):
    store = Store(tmp_path)
    stage = store.stage("a", write_value, Settings(1))
    store.make(stage, QUIET)
    record = json.loads((stage.path / "stage.json").read_text())
    record["made_by"]["torch"] = "0.0"
    (stage.path / "stage.json").write_text(json.dumps(record))
    store.make(stage, QUIET)
    assert store.foreign["a"].startswith("torch 0.0 (now ")

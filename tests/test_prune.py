"""What no run refers to goes, what one refers to or a process makes stays."""

from __future__ import annotations

import json

import pytest
from filelock import FileLock

from launch.prune import prune


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Two runs of one store; `old` and its half-made sibling are nobody's."""
    monkeypatch.chdir(tmp_path)
    for run, artifacts in {"a": ["seed-00000001", "mix-00000001"], "b": ["seed-00000001", "mix-00000002"]}.items():
        (tmp_path / "runs" / run).mkdir(parents=True)
        stages = {name.split("-")[0]: name for name in artifacts}
        (tmp_path / "runs" / run / "manifest.json").write_text(json.dumps(stages))
        (tmp_path / "runs" / run / "config.yaml").write_text("artifacts: artifacts\n")
    for name in (
        "seed-00000001",
        "mix-00000001",
        "mix-00000002.partial",
        "mix-00000003",
        "mix-00000004.partial",
        ".locks",
    ):
        (tmp_path / "artifacts" / name).mkdir(parents=True)
        (tmp_path / "artifacts" / name / "stage.json").write_bytes(b"12345")
    for mine in ("my_models", "mix-0000000a.bak", "data-12345678"):  # nothing that the store has made
        (tmp_path / "artifacts" / mine).mkdir()
    return tmp_path / "artifacts"


NOT_OURS = [".locks", "data-12345678", "mix-0000000a.bak", "my_models"]


def names(store):
    return sorted(path.name for path in store.iterdir())


def test_only_what_no_run_refers_to_is_shown_and_removed_when_asked(here, capsys):
    before = names(here)
    assert prune([]) == 0 and names(here) == before
    said = capsys.readouterr().out
    assert (
        "mix-00000003" in said
        and "mix-00000004.partial" in said
        and "2 artifacts, 10B, that no run refers to; --yes removes them" in said
    )
    assert "seed-00000001" not in said and "mix-00000002" not in said
    assert prune(["--yes"]) == 0 and set(names(here)) == {
        *NOT_OURS,
        "mix-00000001",
        "mix-00000002.partial",
        "seed-00000001",
    }
    assert "2 of 2 artifacts removed, 10B in all" in capsys.readouterr().out
    assert prune([]) == 0 and "0 artifacts, 0B, that no run refers to\n" in capsys.readouterr().out


def test_what_is_being_made_stays(here, capsys):
    with FileLock(here / ".locks" / "mix-00000004.lock"):
        assert prune(["--yes"]) == 0
    assert "mix-00000004.partial" in names(here) and "mix-00000003" not in names(here)


def test_what_a_crash_left_of_a_removal_goes_too(here):
    (here / "mix-00000003.removed").mkdir()
    assert prune(["--yes"]) == 0 and set(names(here)) == {
        *NOT_OURS,
        "mix-00000001",
        "mix-00000002.partial",
        "seed-00000001",
    }


def test_a_damaged_run_and_no_run_remove_nothing(here, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "b" / "manifest.json").write_text('{"seed"')
    assert prune(["--yes"]) == 2 and "mix-00000003" in names(here)
    assert "manifest.json" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert prune([]) == 2 and "no run here" in capsys.readouterr().err
    assert prune(["--all"]) == 2 and "expected nothing, or --yes" in capsys.readouterr().err

"""docs/performance.md: what it says of a run, and that a run that fails or breaks off loses nothing."""

import json
from pathlib import Path

import pytest

import evals.speed
from evals.benchmarks import assembly, scaling, training
from evals.benchmarks.rows import compared, lines, unscored
from evals.benchmarks.sides import Bench, SideFailed
from evals.performance_page import PAGE, begun, markdown, record, write_page

TRIED = {"what": "Flex attention", "found": "0 of 3 shapes have a backward", "command": "python try.py"}


@pytest.fixture
def page(tmp_path):
    """A page's path, with what was tried beside it."""
    (tmp_path / "performance_tried.json").write_text(json.dumps([TRIED]))
    return tmp_path / "performance.md"


ROWS_OF_A_PAGE = [
    compared("tokenize", "text", [9.0], [10.0], "bytes/s", checked="same tokens", limit="the tokenizer"),
    compared("start_plan", "demo", [4.0], [3.0], "s", less_is_better=True),
    compared("memory_logits", "tiny", [9.0], [10.0], "bytes", less_is_better=True),
    unscored("ties_mergekit", "tiny", "s", "exit status 1:\n  File <string>, a | b"),
    compared("train_btx_compiled", "small", [95.0], [100.0], "tokens/s"),
    compared("train_btx_compile_gain", "small", [105.0], [100.0], "tokens/s"),
    scaling.Curve("scaling_step", "layers", "s", (1.0, 2.0), (1.0, 4.0), (5.0, 10.0)).row(),
]
PROFILES = {"BTX": {"seconds": 1.5, "operators": [["aten::mm", 0.5, 12]]}}


def constructed(page, rows=ROWS_OF_A_PAGE, **more):
    bench = Bench(page.parent, rounds=1, known={"limits": {"matmul": 7e11, "memory": 2e10}})
    return record(begun(["--page"], None, page), rows, bench, PROFILES, page=page, **more)


def test_the_page_is_what_its_json_gives(page):
    write_page(constructed(page, figures=[page.parent / "performance" / "scaling_step_layers.svg"]), page)
    found = json.loads(page.with_suffix(".json").read_text())
    text = page.read_text()
    assert text == markdown(found)
    for part in (
        "2 of 6 ratios with a target are reached", "| tokenize | text | 9 | 10 | bytes/s | 0.90 | 0.90 to 0.90 | ≥ 0.8 | yes | 1 | same tokens | the tokenizer |",
        "matrix products in bf16 700.0 GFLOP/s", "| `aten::mm` | 50.0% | 12 |", "## Scaling", "`python -m evals.speed --page`", "Load over 1, 5 and 15 minutes",
        "![scaling step layers](performance/scaling_step_layers.svg)", "- **Flex attention**: 0 of 3 shapes have a backward (`python try.py`)",
    ):  # fmt: skip
        assert part in text
    for other in PAGE.parent.glob("performance.json"):  # there is one once a whole run has been published
        assert PAGE.read_text() == markdown(json.loads(other.read_text()))


def test_a_problem_stays_in_its_cell(page):
    (line,) = [line for line in markdown(constructed(page)).splitlines() if line.startswith("| ties_mergekit")]
    assert line.endswith("| NOT COMPARED: exit status 1: File &lt;string>, a \\| b |")
    assert line.replace("\\|", "").count("|") == len(next(lines([]))) + 1


def test_the_page_says_what_is_furthest_from_its_target_and_what_is_missing(page):
    text = markdown(constructed(page))
    assert (
        "The largest gap that remains: memory_logits (tiny), a ratio of 0.90 where at most 0.6 is to be reached."
        in text
    )
    assert "Not compared: ties_mergekit (tiny)." in text
    assert "Not measured: train_btx_default, train_btx_tuned, train_btx_dense, train_bam_dense, " in text
    reached = [compared("tokenize", "text", [9.0], [10.0], "bytes/s")]
    assert "Nearest to missing its target: tokenize (text), a ratio of 0.90" in markdown(constructed(page, reached))


def test_compiled_steps_reach_their_targets_together(page):
    text = markdown(constructed(page))
    assert "| small | 0.95, to be at least 0.9 | 1.05, to be at least 1.15 | no |" in text


def test_a_page_needs_what_was_tried_before_anything_is_measured(page, monkeypatch, capsys):
    monkeypatch.setattr(evals.speed, "PAGE", page)
    monkeypatch.setattr(evals.speed, "run", lambda *given: pytest.fail("measured"))
    for entries in (None, [], [{"what": "Flex attention", "found": "slower", "command": "python try.py"}], [{}]):
        file = page.with_name("performance_tried.json")
        file.unlink(missing_ok=True) if entries is None else file.write_text(json.dumps(entries))
        assert evals.speed.main(["--page"]) == 2
        error = capsys.readouterr().err
        assert "performance_tried.json" in error and "what, found, command" in error


def test_a_run_that_breaks_off_leaves_what_it_measured(page, monkeypatch, capsys):
    def broken(bench):
        yield compared("start_plan", "demo", [4.0], [3.0], "s", less_is_better=True)
        raise KeyboardInterrupt

    first = ROWS_OF_A_PAGE[:1]
    monkeypatch.setattr(evals.speed, "PAGE", page)
    monkeypatch.setattr(evals.speed, "GROUPS", {"data": {"tokenize": lambda bench: iter(first), "plan": broken}})
    assert evals.speed.main(["--page"]) == 130
    assert "performance.json.partial" in capsys.readouterr().err
    left = json.loads(page.with_suffix(".json.partial").read_text())
    assert [row["name"] for row in left["rows"]] == ["tokenize", "start_plan"] and "tokenize" in markdown(left)
    assert not page.exists()


def test_what_fails_as_a_whole_is_a_row_and_the_page_is_written(page, monkeypatch, capsys):
    def failing(bench):
        raise SideFailed("checkpoints:write_models ended with exit status 1: [/no/style] is full")

    monkeypatch.setattr(evals.speed, "PAGE", page)
    monkeypatch.setattr(
        evals.speed, "GROUPS", {"assembly": {"against_cp": failing, "tokenize": lambda bench: iter(ROWS_OF_A_PAGE[:1])}}
    )
    monkeypatch.setattr(training, "profiles", failing)
    assert evals.speed.main(["--page"]) == 1
    assert "[/no/style] is full" in capsys.readouterr().out.replace("\n", " ")
    text = page.read_text()
    assert "| against_cp |" in text and "| tokenize |" in text and "Not measured: checkpoints:write_models" in text
    assert not page.with_suffix(".json.partial").exists()


def test_models_that_could_not_be_written_are_not_taken_for_made(tmp_path, monkeypatch):
    def once(self, function, config):
        if not tries:
            tries.append(1)
            raise SideFailed("no space left")
        (Path(config["folder"]) / "seed").mkdir(exist_ok=True)
        return {"bytes": 1}

    tries = []
    monkeypatch.setattr(Bench, "once", once)
    bench = Bench(tmp_path, quick=True)
    with pytest.raises(SideFailed, match="no space left"):
        assembly.models_of(bench)
    made = assembly.models_of(bench)
    assert (made / "seed").exists() and bench.known[f"bytes of {made}"] == 1 and len(tries) == 1

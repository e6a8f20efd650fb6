"""Several runs side by side: known differences, what is refused, and the page against what it embeds."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path

import pytest

from evals.page_runs import render_runs
from evals.provenance import flattened, made_by, origins
from evals.report import build_report
from evals.runs import compare_runs, format_runs
from evals.tables import write_perplexity, write_signed
from launch.cli import WORDS
from launch.status import print_replicates, print_reports, print_status
from tests.reports import Page, make_inputs


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> dict:
    return build_report(**make_inputs(tmp_path_factory.mktemp("inputs")) | {"samples": 50})


@pytest.fixture(scope="module")
def second(first) -> dict:
    """The same run with every perplexity 2 % higher, without the soup, at another learning rate."""
    report = copy.deepcopy(first)
    del report["models"]["soup"]
    for model in report["models"].values():
        for average in model["average"].values():
            average["nats_per_token"] += math.log(1.02)
            average["perplexity"] *= 1.02
            average["interval"] = [1.02 * end for end in average["interval"]]
    report["provenance"]["config"] = {"name": "other", "mix": {"rng_seed": 7, "lr": 2e-3}, "soup": False}
    return report


def test_differences_of_runs_are_known(first, second):
    found = compare_runs({"a": first, "b": second})
    assert set(found["models"]) == set(first["models"]) - {"soup"} and found["only_in"] == {"a": ["soup"], "b": []}
    assert list(found["domain_groups"]) == ["trained", "in_domain", "out_of_domain"]
    for name, groups in found["models"].items():
        for group, runs in groups.items():
            assert runs["a"] == first["models"][name]["average"][group] | {"difference": 0.0}
            assert runs["b"]["difference"] == pytest.approx(math.log(1.02), rel=1e-9)
    assert found["settings"] == {"mix.lr": {"a": 1e-3, "b": 2e-3}, "soup": {"a": None, "b": False}}
    text = format_runs(found)
    assert "b − a" in text and text.count("+0.0198") == 3 * len(found["models"])
    assert "mix.lr: 0.001 | 0.002" in text and "Not in all runs: a: soup." in text


def test_what_only_one_run_has_is_one_row_and_long_values_wrap(first, second):
    def configured(report, **config):
        return _other(report, lambda found: found["provenance"].update(config=config))

    mixture, long = {"train": {"lr": 1.0, "phases": [{}]}, "assemble": {"tie": "none"}}, list(range(60))
    a = configured(first, mixtures={"btx": mixture, "old": mixture}, dense=None, order=long)
    b = configured(
        second,
        mixtures={"btx": mixture | {"train": {"lr": 2.0, "phases": [{}]}}, "new": mixture},
        dense={"lr": 1.0},
        order=[],
    )
    found = compare_runs({"a": a, "b": b})
    assert found["settings"] == {
        "mixtures.btx.train.lr": {"a": 1.0, "b": 2.0},
        "mixtures.old": {"a": "only in a", "b": None},
        "mixtures.new": {"a": None, "b": "only in b"},
        "dense": {"a": None, "b": "only in b"},
        "order": {"a": long, "b": []},
    }
    assert (
        f"mixtures.old: only in a | –\nmixtures.new: – | only in b\ndense: – | only in b\norder:\n    a: {long}\n    b: []"
        in format_runs(found)
    )
    html = render_runs(found)
    assert (
        '<table class="plain"><thead>' in html and ".plain td { white-space: normal; overflow-wrap: anywhere;" in html
    )


def test_an_average_over_other_domains_is_left_out(first):
    old = copy.deepcopy(first)
    old["domain_groups"] = {name: first["domain_groups"][name] for name in ("trained", "out_of_domain")}
    for reports in ({"old": old, "new": first}, {"new": first, "old": old}):
        assert list(compare_runs(reports)["domain_groups"]) == ["trained", "out_of_domain"]


def _other(report: dict, change) -> dict:
    report = copy.deepcopy(report)
    change(report)
    return report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(split="valid"), "b has split valid, expected test as a has"),
        (lambda r: r.update(sequence_length=256), "b has sequence_length 256, expected 512 as a has"),
        (lambda r: r["domains"].pop(), "b has domains code law math general cpp, expected code law math general cpp programs"),
        (lambda r: r["documents"].update(law=119), "b has test documents of law 119, expected 120 as a has"),
        (lambda r: r["models"]["seed"]["tokens"].update(math=5), "b has test tokens of math 5, expected "),
        (lambda r: r["domain_groups"]["trained"].pop(), "b has domains trained on code law math, expected code law math general"),
        (lambda r: r.update(models={"x": r["models"]["seed"]}), r"no model is in all of a, b \(a has seed, code, law, math, soup and 7 more"),
    ],
)  # fmt: skip
def test_runs_on_other_test_sets_are_refused(first, change, message):
    with pytest.raises(ValueError, match=message):
        compare_runs({"a": first, "b": _other(first, change)})


def test_page_of_runs_shows_what_it_embeds(first, second):
    found = compare_runs({"runs/<a>": first, "runs/b": second})
    page = Page(render_runs(found))
    assert json.loads(page.embedded) == json.loads(json.dumps(found))
    header, *rows = page.tables["runs-table"]
    assert ["".join(cell["text"]) for cell in header] == ["model", "average", "runs/<a>", "runs/b", "runs/b − runs/<a>"]
    assert len(rows) == 3 * len(found["models"])
    for row in rows:
        runs = found["models"][row[0]["value"]][row[1]["value"]]
        for cell, average in zip(row[2:4], runs.values(), strict=True):
            low, high = average["interval"]
            assert float(cell["value"]) == average["perplexity"]
            assert cell["text"] == [
                write_perplexity(average["perplexity"]),
                f"{write_perplexity(low)} to {write_perplexity(high)}",
            ]
        assert float(row[4]["value"]) == runs["runs/b"]["difference"]
        assert row[4]["text"] == [write_signed(runs["runs/b"]["difference"])]
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img") and "src" not in attributes and "href" not in attributes


def _keep(report: dict, run: Path) -> None:
    run.mkdir(parents=True)
    (run / "manifest.json").write_text("{}")
    (run / "report.json").write_text(json.dumps(report))


def test_report_word_compares_runs_and_keeps_its_ways(first, second, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, report in (("a", first), ("b", second), ("short", first | {"sequence_length": 256})):
        _keep(report, Path("runs") / name)
    assert print_reports(["a"]) == 0 and "runs/b" not in capsys.readouterr().out
    os.utime("runs/b/report.json", (2e9, 2e9))
    assert print_reports([]) == 0  # the newest that has one
    printed = capsys.readouterr().out
    assert "Settings that differ" not in printed and printed.count("tokens scored: code") == 1
    assert print_reports(["runs/a", "b", "--html=both.html"]) == 0
    printed = capsys.readouterr().out
    compared = compare_runs({"runs/a": first, "runs/b": second})
    assert printed.count("tokens scored: code") == 2 and format_runs(compared) in printed
    assert Path("both.html").read_text() == render_runs(json.loads(json.dumps(compared)))
    assert print_reports(["a", "short", "--html=no.html"]) == 2 and not Path("no.html").exists()
    assert "runs/short has sequence_length 256, expected 512 as runs/a has" in capsys.readouterr().err
    assert print_reports(["a", "--htm=x"]) == 2
    assert "got a --htm=x, expected [RUN ...] [--readme] [--html=OUT.html]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["a", "--html=x.html"],
            "--html=x.html: got 1 runs, expected two at least; a run's own page is its report.html",
        ),
        (["a", "b", "--html=x.htm"], "--html=x.htm: expected a name that ends in .html"),
        (["a", "b", "--html=/nodir/x.html"], "--html=/nodir/x.html: there is no directory /nodir; make it"),
        (["a", "runs/a"], "a: named twice, expected different runs"),
        (["a", "short"], "runs/short has sequence_length 256"),
        (["runs/nosuch"], "runs/nosuch: no run of that name here (no manifest.json in runs/nosuch); runs here: a, b"),
        (["a", "--readme"], "--readme: there is no "),
        (["list"], "runs/list/report.json: damaged (got list, expected an object); start that run again"),
        (["empty"], "runs/empty/report.json: lacks 'experiment'; start that run again"),
        (["cut"], "runs/cut/report.json: not whole JSON ("),
        (["bare"], "runs/bare/report.json: damaged (seed lacks perplexity); start that run again"),
        (["holed"], "runs/holed/report.json: lacks 'perplexity'; start that run again"),
    ],
)
def test_what_report_refuses_prints_and_writes_nothing(
    first, second, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    for name, report in (("a", first), ("b", second), ("short", first | {"sequence_length": 256})):
        _keep(report, Path("runs") / name)
    bare = _other(first, lambda report: report["models"]["seed"].pop("perplexity"))
    holed = _other(first, lambda report: report["models"]["btx"]["average"]["trained"].pop("perplexity"))
    for name, text in {
        "list": "[]", "empty": "{}", "cut": json.dumps(first)[:99], "bare": json.dumps(bare), "holed": json.dumps(holed),
    }.items():  # fmt: skip
        _keep({}, Path("runs") / name)
        (Path("runs") / name / "report.json").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    assert print_reports(arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.startswith("upcycle: ") and message in printed.err, printed.err
    assert printed.err.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before


def test_a_damaged_manifest_hides_no_other_run(first, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c", "d"):
        _keep(first, Path("runs") / name)
        (Path("runs") / name / "config.yaml").write_text("artifacts: artifacts\n")
    Path("runs/a/manifest.json").write_text('{"seed": "se')
    Path("runs/b/manifest.json").write_text('{"seed": 3}')
    Path("runs/c/config.yaml").write_text("artifacts: [cut")
    assert print_status([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "runs/d  0 of 0 stages done, finished\n"
    said = printed.err.splitlines()
    assert said[0].startswith("upcycle: runs/a/manifest.json: not whole JSON (") and said[0].endswith("the file anew")
    assert said[1].startswith("upcycle: runs/b/manifest.json: damaged (seed=3, expected the name of an artifact)")
    assert said[2].startswith("upcycle: runs/c/config.yaml: not whole YAML (") and len(said) == 3
    assert WORDS["doctor"](["a"]) == 2 and "runs/a/manifest.json: not whole JSON (" in capsys.readouterr().err


def test_replicates_says_what_is_missing(first, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _keep(first, Path("runs/a"))
    for arguments, message in (
        ([], "replicates: got no run, expected at least two runs that differ in rng_seed"),
        (["a"], "replicates: got a alone, expected at least two runs that differ in rng_seed"),
        (["nosuch"], "nosuch: no run of that name here (no manifest.json in nosuch or runs/nosuch); runs here: a"),
        (["a", "nosuch"], "nosuch: no run of that name here"),
    ):
        assert print_replicates(arguments) == 2 and message in capsys.readouterr().err


def test_origins_hold_versions_commits_seeds_and_settings(tmp_path):
    for name, record in (
        ("seed", {"made_by": {"commit": "abc"}}),
        ("mix", {"made_by": {"commit": "abd+"}}),
        ("old", None),
    ):
        (tmp_path / name).mkdir()
        if record is not None:
            (tmp_path / name / "stage.json").write_text(json.dumps(record))
    stages = {name: tmp_path / name for name in ("seed", "mix", "old")}
    assert made_by(stages) == {"abc": ["seed"], "abd+": ["mix"], "unknown": ["old"]}
    config = {
        "rng_seed": 3,
        "mix": {"rng_seed": 4, "router": {}, "lr": 0.1},
        "domains": {"code": {"proportions": [1, 2]}},
    }
    assert dict(flattened(config)) == {
        "rng_seed": 3, "mix.rng_seed": 4, "mix.router": {}, "mix.lr": 0.1, "domains.code.proportions": [1, 2],
    }  # fmt: skip
    found = origins(stages, config)
    assert found["rng_seeds"] == {"rng_seed": 3, "mix.rng_seed": 4} and found["config"] == config
    import torch

    assert found["torch"] == torch.__version__ and {"commit", "python", "tokenizers", "matplotlib"} <= set(found)

"""Routers over training and curves against FLOPs: against loops over the logged steps, and the page against the report."""

from __future__ import annotations

import json
import math

import pytest
from matplotlib import rc_context

from evals.course import POINTS, course_of
from evals.drawing import STYLE
from evals.evidence import read_rows
from evals.figures_training import curve_families, draw_course, draw_curves
from evals.page import render_page
from evals.report import build_report
from tests.reports import EXPERTS, LAYERS, Page, make_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    return make_inputs(tmp_path_factory.mktemp("inputs")) | {"samples": 20}


@pytest.fixture(scope="module")
def report(inputs) -> dict:
    return build_report(**inputs)


@pytest.fixture(scope="module")
def html(report) -> str:
    return render_page(report)


def test_course_equals_a_loop_over_the_log(report, inputs):
    """Stretch by stretch, step by step, expert by expert, from the file itself."""
    lines = (inputs["training"]["mix/bam"] / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    course, each = report["models"]["bam"]["course"], len(steps) // POINTS
    assert len(steps) == each * POINTS and len(course["tokens"]) == POINTS
    names = {"ffn": ("load", "ffn_entropy"), "attention": ("attention_load", "attention_entropy")}
    for part, (load, entropy) in names.items():
        assert (course[part]["layers"], course[part]["experts"]) == (LAYERS, len(EXPERTS))
        for point in range(POINTS):
            inside = steps[point * each : (point + 1) * each]
            assert course["tokens"][point] == inside[-1]["tokens"]
            sums = dict.fromkeys(
                ("entropy", "largest_load", "dead_experts", "information", "information_shuffled"), 0.0
            )
            for step in inside:
                sums["entropy"] += step[entropy]
                for measure in ("information", "information_shuffled"):
                    sums[measure] += sum(step[f"{part}_{measure}"]) / LAYERS
                sums["largest_load"] += max(share for layer in step[load] for share in layer)
                for layer in step[load]:
                    for share in layer:
                        sums["dead_experts"] += share < 0.1 / len(EXPERTS)
            for measure, total in sums.items():
                assert course[part][measure][point] == pytest.approx(total / each, rel=1e-5, abs=1e-9), measure
    assert course["ffn"]["gate_sum"] == [1.0] * POINTS and "gate_sum" not in course["attention"]
    assert course["ffn"]["dead_experts"][0] == 0 and course["ffn"]["dead_experts"][-1] == 3


def test_what_is_no_mixtures_training_has_no_course(report):
    assert {name for name, model in report["models"].items() if model["course"]} == {
        "btx", "btx_top1", "btx_random", "bam", "bam_shared_kv",
    }  # fmt: skip
    assert "attention" not in report["models"]["btx"]["course"]
    assert course_of([]) is None and course_of([{"step": 1, "tokens": 8, "loss": 2.0}]) is None


def test_what_training_logged_goes_before_rounded_loads(tmp_path):
    """A resumed step counts as last logged; the log's own largest load and dead experts are exact, its loads rounded."""
    row = {"step": 1, "tokens": 8, "load": [[0.9, 0.1]], "ffn_entropy": 0.3, "largest_load": 0.90004, "dead_experts": 1}
    again = row | {"ffn_entropy": 0.2}
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, (row, again))))
    assert course_of(read_rows(tmp_path)) == {
        "tokens": [8],
        "ffn": {"layers": 1, "experts": 2, "entropy": [0.2], "largest_load": [0.90004], "dead_experts": [1.0]},
    }


def test_page_shows_the_course_of_the_report(report, html):
    header, *rows = Page(html).tables["course-table"]
    assert len(header) == 9 and len(rows) == 3 + 2 * 2
    parts = {"feed-forward": "ffn", "attention": "attention"}
    for row in rows:
        found = report["models"][row[0]["value"]]["course"][parts[row[1]["value"]]]
        assert row[2]["text"] == [str(found["experts"]), f"{found['layers']} layers"]
        for cell, measure, digits in zip(
            row[3:],
            ("information", "information_shuffled", "entropy", "largest_load", "dead_experts", "gate_sum"),
            (4, 4, 3, 3, 1, 3),
            strict=True,
        ):
            if measure not in found:
                assert cell == {"value": "", "text": ["–"]}
                continue
            first, last = found[measure][0], found[measure][-1]
            assert float(cell["value"]) == last and cell["text"] == [f"{last:.{digits}f}", f"from {first:.{digits}f}"]


def test_drawn_course_is_that_of_the_report(report):
    course = report["models"]["bam"]["course"]
    with rc_context(STYLE):
        figure = draw_course("bam", course)
    for axis, measure in zip(figure.axes, ("information", "entropy", "largest_load", "dead_experts"), strict=True):
        for part, label in (("ffn", "feed-forward"), ("attention", "attention")):
            line = next(line for line in axis.lines if line.get_label() == label)
            assert list(line.get_xdata()) == course["tokens"] and list(line.get_ydata()) == course[part][measure]
        equal = {"entropy": math.log(4), "largest_load": 0.25}.get(measure)
        dotted = [list(line.get_ydata()) for line in axis.lines if line.get_linestyle() == ":"]
        if measure == "information":
            assert dotted == [course[part]["information_shuffled"] for part in ("ffn", "attention")]
        else:
            assert dotted == ([[equal, equal]] * 2 if equal else [])


def test_flops_of_a_curve_are_its_tokens_times_a_tokens(report, html):
    """The drawn end of a curve is the stage's FLOPs: here 6 per active parameter and token."""
    families = curve_families(report, "flops")
    assert families == curve_families(report, "tokens")
    with rc_context(STYLE):
        figure = draw_curves(report, "flops")
    drawn = {line.get_label(): line for axis in figure.axes for line in axis.lines}
    assert set(drawn) == {name for names in families.values() for name in names}
    for name, line in drawn.items():
        model = report["models"][name]
        for flops, loss, (tokens, nats) in zip(line.get_xdata(), line.get_ydata(), model["curve"], strict=True):
            assert flops == pytest.approx(tokens * 6 * model["active_parameters"]) and loss == nats
    for word in ("tokens", "FLOPs"):
        assert html.count(f'aria-label="Training loss against {word}: ') == 3


def test_models_of_unknown_cost_have_no_curve_against_flops(report):
    models = {name: model | {"flops_per_token": None} for name, model in report["models"].items()}
    assert curve_families(report | {"models": models}, "flops") == {}
    html = render_page(report | {"models": models})
    assert "Training loss against tokens" in html and "Training loss against FLOPs" not in html

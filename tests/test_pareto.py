"""Quality against compute: the front against a loop over pairs, its drawing and its table against the report."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from evals.drawing import STYLE
from evals.figures import draw_figures
from evals.figures_pareto import PANELS, draw_pareto, spread
from evals.page import render_page
from evals.page_training import front_sentence
from evals.pareto import front, pareto
from evals.report import build_report
from evals.tables import write_perplexity
from tests.reports import Page, make_inputs


@pytest.fixture(scope="module")
def html(report) -> str:
    return render_page(report)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    return build_report(**make_inputs(tmp_path_factory.mktemp("inputs")) | {"samples": 50})


def undominated(points: dict[str, tuple[float, float]]) -> set[str]:
    """Those that no other is as good as in both and better in one: a loop over pairs."""
    found = set()
    for name, (cost, loss) in points.items():
        beaten = False
        for other_cost, other_loss in points.values():
            beaten |= other_cost <= cost and other_loss <= loss and (other_cost < cost or other_loss < loss)
        if not beaten:
            found.add(name)
    return found


def test_front_equals_a_loop_over_pairs():
    rng = np.random.default_rng(0)
    for count in (0, 1, 2, 7, 30):
        for _ in range(50):
            values = rng.integers(0, 6, (count, 2))  # few values, so that costs and losses tie
            points = {f"m{index}": (int(cost), int(loss)) for index, (cost, loss) in enumerate(values)}
            found = front(points)
            assert set(found) == undominated(points) and len(found) == len(set(found))
            assert [points[name][0] for name in found] == sorted(points[name][0] for name in found)


def test_front_of_a_run_is_known(report):
    """The made-up run by hand: every mixture but BTX top-1 (worse than dense at its cost) and the random router is on it."""
    assert report["pareto"]["train_flops"]["front"] == ["seed", "soup", "dense", "btx", "bam_shared_kv", "bam"]
    assert report["pareto"]["active_parameters"]["front"] == ["dense", "btx", "bam_shared_kv", "bam"]
    models = copy.deepcopy(report["models"])
    models["dense"]["train_flops"] = None
    found = pareto(models)
    assert found["train_flops"] == {
        "front": ["seed", "soup", "btx_top1", "btx", "bam_shared_kv", "bam"],
        "unknown": ["dense"],
    }
    assert found["active_parameters"] == report["pareto"]["active_parameters"]


def test_page_names_the_front_of_the_report(report, html):
    page = Page(html)
    header, *rows = page.tables["pareto-table"]
    assert len(header) == 4 and [row[0]["value"] for row in rows] == [
        name for name in report["models"] if name != "oracle"
    ]
    for row in rows:
        model, name = report["models"][row[0]["value"]], row[0]["value"]
        low, high = model["average"]["trained"]["interval"]
        assert float(row[1]["value"]) == model["average"]["trained"]["perplexity"]
        assert row[1]["text"] == [
            write_perplexity(float(row[1]["value"])),
            f"{write_perplexity(low)} to {write_perplexity(high)}",
        ]
        for cell, cost in zip(row[2:], PANELS, strict=True):
            assert float(cell["value"]) == model[cost]
            assert ("on the front" in cell["text"]) == (name in report["pareto"][cost]["front"])
    for cost in PANELS:
        sentence = front_sentence(report, cost)
        assert sentence in html
        for name in report["models"]:
            assert (f"{name} (" in sentence) == (name in report["pareto"][cost]["front"])


def test_drawn_points_are_those_of_the_report(report):
    """Every model but the oracle as a mark at its cost and perplexity, filled if on the front; who is beyond the scale at its edge."""
    far = copy.deepcopy(report)
    far["models"]["law"]["average"]["trained"] |= {"perplexity": 400.0, "interval": [390.0, 410.0]}
    limit = 1.5 * far["models"]["seed"]["average"]["trained"]["perplexity"]
    with rc_context(STYLE):
        figure = draw_pareto(far)
    for axis, cost in zip(figure.axes, PANELS, strict=True):
        marks = {}
        for line in axis.lines:
            if line.get_marker() not in ("None", None, ""):
                marks[(float(line.get_xdata()[0]), float(line.get_ydata()[0]))] = line.get_markerfacecolor() != "none"
        expected = {
            (model[cost], min(model["average"]["trained"]["perplexity"], limit)): name in far["pareto"][cost]["front"]
            for name, model in far["models"].items()
            if name != "oracle"
        }
        assert marks == expected
        texts = [text.get_text() for text in axis.texts]
        assert "law 400.0 ↑" in texts and sum("↑" in text for text in texts) == 1 and len(texts) == 11


def test_labels_of_many_models_do_not_overlap(report):
    many = copy.deepcopy(report)
    for index in range(30):
        model = copy.deepcopy(many["models"]["btx"])
        model["average"]["trained"]["perplexity"] += 0.01 * index
        many["models"][f"btx_{index}"] = model
    many["pareto"] = pareto(many["models"])
    with rc_context(STYLE):
        figure = draw_pareto(many)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        for axis in figure.axes:
            boxes = sorted((Text.get_window_extent(text) for text in axis.texts), key=lambda box: box.y0)  # no lines
            assert len(boxes) == 41
            for below, above in pairwise(boxes):
                assert below.y1 <= above.y0 + 1.5  # pixels of the box's own margin, at 100 dots an inch
            assert boxes[0].y0 >= 0 and boxes[-1].y1 <= figure.bbox.y1


def test_labels_keep_their_order_and_move_only_where_they_must():
    assert spread([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert spread([0.0, 0.0, 0.9], 0.2) == pytest.approx([0.0, 0.2, 0.9])
    assert spread([1.0, 1.0], 0.25) == pytest.approx([0.75, 1.0])


def test_a_cost_that_nobody_knows_has_no_panel(report, html):
    """Models that were all brought along: the page says so, and draws what is known."""
    brought = copy.deepcopy(report)
    for model in brought["models"].values():
        model["train_flops"] = 0.0 if model["kind"] == "seed" else None
    brought["pareto"] = pareto(brought["models"])
    shown = render_page(brought)
    assert html.count('aria-label="Perplexity: Against') == 2 and shown.count('aria-label="Perplexity: Against') == 1
    assert "Unknown, so left out: code, law, math, soup" in shown


def test_reports_of_before_still_make_a_page(report):
    """From before there was a front, a course or FLOPs of curves, and routing was shares, entropy and information alone."""
    old = json.loads(json.dumps(report))
    del old["pareto"]
    for model in old["models"].values():
        for key in ("course", "flops_per_token"):
            model.pop(key, None)
    page = Page(render_page(old))
    assert json.loads(page.embedded) == old and set(page.tables) == {"summary-table", "cost-table"}
    names = {name for name, _ in draw_figures(old)}
    assert "curves" in names and not {"pareto", "curves-flops", "course-bam"} & names

"""The pages in a real browser: nothing goes wrong, nothing sticks out, tables sort, it prints; and each check notices a fault."""

from __future__ import annotations

import copy
import re

import pytest

from evals.page import render_page
from evals.page_runs import render_runs
from evals.report import build_report
from evals.runs import compare_runs
from tests.browser import Browser, needs_chromium
from tests.reports import make_inputs

WIDTHS = (400, 1400)
A4_INSIDE = 718  # pixels of 1/96 inch between Chromium's own margins of 1 cm


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    return build_report(**make_inputs(tmp_path_factory.mktemp("inputs")) | {"samples": 50})


@pytest.fixture(scope="module")
def pages(report, tmp_path_factory):
    """{"report": the page of a run, "runs": of two}, as files."""
    out = tmp_path_factory.mktemp("run")
    (out / "report.html").write_text(render_page(report))
    other = copy.deepcopy(report)
    other["provenance"]["config"]["mix"]["lr"] = 2e-3
    (out / "runs.html").write_text(render_runs(compare_runs({"runs/a": report, "runs/b": other})))
    return {"report": out / "report.html", "runs": out / "runs.html"}


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@needs_chromium
@pytest.mark.parametrize("which", ["report", "runs"])
def test_nothing_goes_wrong_and_nothing_sticks_out(browser, pages, which):
    """At both widths, in both themes, with every fold open as when it is printed."""
    for width in WIDTHS:
        for dark in (False, True):
            browser.open(pages[which], width, dark=dark)
            assert browser.evaluate("innerWidth") == width
            assert browser.complaints == [] and browser.overflow() == []
            browser.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
            assert browser.complaints == [] and browser.overflow() == []
            color = browser.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", color))) < 3 * 128) == dark


@needs_chromium
def test_the_checks_notice_faults(browser, pages, tmp_path):
    html = pages["report"].read_text()
    faults = {
        '<script>console.error("planted")</script>': "planted",
        "<script>nowhere.at.all()</script>": "nowhere is not defined",
        '<img src="nowhere.png" alt="">': "ERR_FILE_NOT_FOUND",
    }
    for number, (fault, message) in enumerate(faults.items()):
        page = tmp_path / f"{number}.html"
        page.write_text(html.replace("</main>", f"{fault}</main>"))
        browser.open(page, 400)
        assert any(message in complaint for complaint in browser.complaints), fault
    for number, width in enumerate(WIDTHS):
        page = tmp_path / f"wide{number}.html"
        page.write_text(html.replace("</main>", f'<div class="planted" style="width:{width + 1}px">.</div></main>'))
        browser.open(page, width)
        assert browser.overflow() == ["DIV.planted"]


@needs_chromium
def test_tables_sort_when_a_header_is_clicked(browser, pages, report):
    """Ascending, then descending, by the report's numbers; by name in the first column."""
    browser.open(pages["report"], 1400)

    def clicked(table: str, column: int) -> list[str]:
        browser.evaluate(f"document.querySelectorAll('#{table} thead button')[{column}].click()")
        return browser.evaluate(
            f"[...document.querySelectorAll('#{table} tbody tr')].map((row) => row.cells[0].dataset.value)"
        )

    models = report["models"]
    rising = sorted(models, key=lambda name: models[name]["average"]["trained"]["perplexity"])
    assert clicked("summary-table", 1) == rising and clicked("summary-table", 1) == rising[::-1]
    assert clicked("summary-table", 0) == sorted(models)
    costs = {name: model["train_flops"] for name, model in models.items() if name != "oracle"}
    assert [costs[name] for name in clicked("pareto-table", 2)] == sorted(costs.values())
    arrows = browser.evaluate(
        "[...document.querySelectorAll('#summary-table th[aria-sort]')].map((one) => one.ariaSort)"
    )
    assert arrows[0] == "ascending" and set(arrows[1:]) == {"none"}
    assert browser.complaints == []


@needs_chromium
def test_the_page_prints(browser, pages):
    """Tables fit between the margins of A4; folds open, so that paper has what the screen has."""
    for page in pages.values():
        browser.open(page, A4_INSIDE, media="print")
        assert browser.overflow() == []
    browser.open(pages["report"], 1400)
    printed = browser.pdf()
    assert printed.startswith(b"%PDF-")
    assert browser.evaluate("[...document.querySelectorAll('details')].every((one) => one.open)")
    assert browser.complaints == [] and len(re.findall(rb"/Type\s*/Page\b", printed)) > 5

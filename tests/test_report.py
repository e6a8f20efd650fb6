"""The report: its numbers against slow loops and known answers, its table and page against its numbers."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rc_context

from evals.figures import STYLE, draw_comparisons
from evals.findings import headline
from evals.page import render_page
from evals.report import build_report, format_table, markdown_table, update_readme, write_report
from evals.statistics import bootstrap_domains, bootstrap_nats_per_token, generator, percentile_interval
from evals.tables import average_title, quality_columns, write_count, write_perplexity
from tests.reports import DOMAINS, Page, make_inputs, write_evaluation


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def report(inputs) -> dict:
    return build_report(**inputs)


# ------------------------------------------------------------------------------------------------------- statistics


def test_bootstrap_equals_loop():
    rng = np.random.default_rng(3)
    nats, tokens = rng.uniform(1, 90, (3, 11)), rng.integers(1, 40, 11).astype(float)
    fast = bootstrap_nats_per_token(nats, tokens, 25, generator(5, "code"))
    stream = generator(5, "code")
    for resample in range(25):
        drawn = stream.integers(0, 11, size=11)
        for model in range(3):
            expected = sum(nats[model][n] for n in drawn) / sum(tokens[n] for n in drawn)
            assert fast[resample, model] == pytest.approx(expected, rel=1e-12)


def test_bootstrap_does_not_depend_on_chunks(monkeypatch):
    nats, tokens = np.arange(14.0).reshape(2, 7) + 1, np.arange(7.0) + 1
    whole = bootstrap_nats_per_token(nats, tokens, 40, generator(0, "law"))
    monkeypatch.setattr("evals.statistics.CHUNK_DRAWS", 21)
    np.testing.assert_array_equal(whole, bootstrap_nats_per_token(nats, tokens, 40, generator(0, "law")))


def test_bootstrap_spread_is_the_standard_error():
    values = np.random.default_rng(0).normal(3, 0.5, 400)
    draws = bootstrap_nats_per_token(values[None], np.ones(400), 4000, generator(1, "x"))[:, 0]
    error = values.std() / math.sqrt(400)
    assert draws.std() == pytest.approx(error, rel=0.05)
    low, high = percentile_interval(draws)
    assert (high - low) == pytest.approx(2 * 1.96 * error, rel=0.06)


def test_paired_difference_of_a_constant_shift_has_no_spread():
    tokens = np.arange(1.0, 51.0)
    nats = np.random.default_rng(2).uniform(1, 5, 50) * tokens
    draws = bootstrap_nats_per_token(np.stack([nats - 0.1 * tokens, nats]), tokens, 200, generator(0, "x"))
    np.testing.assert_allclose(draws[:, 0] - draws[:, 1], -0.1, rtol=1e-9)
    assert draws[:, 0].std() > 0.01


def test_domains_draw_independently_of_their_company():
    nats, tokens = np.ones((1, 9)) * np.arange(1, 10), np.ones(9)
    alone = bootstrap_domains({"law": nats}, {"law": tokens}, 50, 3)
    both = bootstrap_domains({"code": nats, "law": nats}, {"code": tokens, "law": tokens}, 50, 3)
    np.testing.assert_array_equal(alone["law"], both["law"])
    assert not np.array_equal(both["code"], both["law"])


# ------------------------------------------------------------------------------------------------------------ report


def test_perplexity_and_bits_per_byte_are_those_of_the_evaluation(report, inputs):
    for name, directory in inputs["evaluations"].items():
        for domain, total in json.loads((directory / "evaluation.json").read_text())["domains"].items():
            model = report["models"][name]
            assert model["perplexity"][domain] == pytest.approx(math.exp(total["nats"] / total["tokens"]))
            assert model["bits_per_byte"][domain] == pytest.approx(total["nats"] / math.log(2) / total["bytes"])
            assert model["interval"][domain][0] < model["perplexity"][domain] < model["interval"][domain][1]


def test_average_is_the_mean_of_nats_per_token_over_its_group(report):
    btx = report["models"]["btx"]
    mean = sum(btx["nats_per_token"][domain] for domain in ("code", "law", "math", "general")) / 4
    assert btx["average"]["trained"]["nats_per_token"] == pytest.approx(mean)
    assert btx["average"]["trained"]["perplexity"] == pytest.approx(math.exp(mean))
    assert average_title(report, "trained") == "trained avg (code law math general)"


def test_averages_of_domains_with_and_without_a_branch(report):
    """In-domain is what has a branch of its name, general what was trained on without one; against sums by hand."""
    groups = {"in_domain": ["code", "law", "math"], "general": ["general"], "out_of_domain": ["cpp", "programs"]}
    assert report["domain_groups"] == {"trained": ["code", "law", "math", "general"], **groups}
    for model in report["models"].values():
        for group, members in groups.items():
            product = math.prod(model["perplexity"][domain] for domain in members)
            assert model["average"][group]["perplexity"] == pytest.approx(product ** (1 / len(members)))
        assert model["average"]["general"]["interval"] == model["interval"]["general"]
    titles = ["trained avg (code law math general)", "in-domain avg (code law math)", "code", "law", "math", "general"]
    assert [*quality_columns(report)] == [*titles, "out of domain avg (cpp programs)", "cpp", "programs"]


def test_an_average_that_another_column_shows_has_none(inputs):
    """Two general domains have an average of their own; without branches, general is all that was trained on."""
    two = build_report(**inputs | {"domains": DOMAINS | {"cpp": True}, "samples": 10})
    titles = ["trained avg (code law math general cpp)", "in-domain avg (code law math)", "code", "law", "math"]
    expected = [*titles, "general avg (general cpp)", "general", "cpp", "out of domain avg (programs)", "programs"]
    assert [*quality_columns(two)] == expected
    assert two["models"]["btx"]["average"]["general"]["nats_per_token"] == pytest.approx(
        (two["models"]["btx"]["nats_per_token"]["general"] + two["models"]["btx"]["nats_per_token"]["cpp"]) / 2
    )
    rows = [row for row in inputs["rows"] if row.kind in ("seed", "btx")]
    few = build_report(
        **inputs | {"rows": rows, "domains": {"code": True, "law": True}, "baseline": None, "samples": 10}
    )
    assert few["domain_groups"] == {
        "trained": ["code", "law"],
        "in_domain": [],
        "general": ["code", "law"],
        "out_of_domain": [],
    }
    assert [*quality_columns(few)] == ["trained avg (code law)", "code", "law"]
    assert "avg" in format_table(few) and "in-domain" not in format_table(few)


def test_oracle_takes_branches_on_their_domains_and_the_seed_elsewhere(report):
    models = report["models"]
    assert models["oracle"]["sources"] == {
        "code": "code", "law": "law", "math": "math", "general": "seed", "cpp": "seed", "programs": "seed",
    }  # fmt: skip
    for domain, source in models["oracle"]["sources"].items():
        assert models["oracle"]["perplexity"][domain] == models[source]["perplexity"][domain]
    assert models["oracle"]["parameters"] is None


def test_seconds_add_up_and_parallel_stages_overlap(report):
    assert report["models"]["btx"]["seconds"] == 900 + 301 + 310 + 298 + 380 + 380
    assert report["models"]["btx"]["parallel_seconds"] == 900 + 310 + 380 + 380
    assert report["seconds"] == 900 + 1210.5 + 301 + 310 + 298 + 380 * 7  # every stage once


def test_comparisons_hold_every_mixture_against_every_reference(report):
    pairs = {(item["model"], item["against"]) for item in report["comparisons"]}
    tried = {"soup", "btx", "btx_top1", "btx_random", "bam", "bam_shared_kv"}
    assert pairs == {(m, a) for m in tried for a in ("dense", "seed", "oracle", "btx_random") if m != a}
    for item in report["comparisons"]:
        ours, theirs = (report["models"][item[side]]["average"]["trained"] for side in ("model", "against"))
        assert item["nats_difference"] == pytest.approx(ours["nats_per_token"] - theirs["nats_per_token"])
        assert item["interval"][0] < item["nats_difference"] < item["interval"][1]


def test_intervals_of_comparisons_are_of_differences_on_the_same_resampled_documents(report, inputs):
    """Resample by resample, domain by domain, from the evaluations' own documents."""
    names = ["bam", "dense"]
    documents = {name: np.load(inputs["evaluations"][name] / "documents.npz") for name in names}
    trained = report["domain_groups"]["trained"]
    nats = {domain: np.stack([documents[name][f"{domain}.nats"] for name in names]) for domain in DOMAINS}
    tokens = {domain: documents["bam"][f"{domain}.tokens"] for domain in DOMAINS}
    samples, seed = (report["bootstrap"][key] for key in ("samples", "rng_seed"))
    draws = bootstrap_domains(nats, tokens, samples, seed)
    differences = [
        sum(draws[domain][sample][0] - draws[domain][sample][1] for domain in trained) / len(trained)
        for sample in range(samples)
    ]
    item = next(one for one in report["comparisons"] if (one["model"], one["against"]) == ("bam", "dense"))
    assert item["interval"] == pytest.approx(np.percentile(differences, [2.5, 97.5]), rel=1e-9)


def test_mixtures_are_held_against_every_dense_run_and_the_reference(inputs):
    rows = [replace(row, kind="dense") if row.name == "btx_top1" else row for row in inputs["rows"]]
    report = build_report(**inputs | {"rows": rows, "samples": 10, "reference": "btx"})
    against = {item["against"] for item in report["comparisons"] if item["model"] == "bam"}
    assert against == {"dense", "btx_top1", "btx", "seed", "oracle", "btx_random"}


def test_curve_is_thinned_and_a_resumed_step_counts_once(report, tmp_path, inputs):
    assert len(report["models"]["btx"]["curve"]) == 200
    assert report["models"]["soup"]["curve"] == []
    lines = [{"step": s, "tokens": 10 * s, "loss": 9.0} for s in (1, 2)] + [{"step": 2, "tokens": 20, "loss": 4.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "timing.json").write_text('{"seconds": 1}')
    changed = build_report(**inputs | {"training": inputs["training"] | {"dense": tmp_path}, "samples": 10})
    assert changed["models"]["dense"]["curve"] == [[10.0, 9.0], [20.0, 4.0]]


def test_report_is_json_and_repeats_exactly(report, inputs):
    again = build_report(**inputs)
    assert json.dumps(again, allow_nan=False) == json.dumps(report, allow_nan=False)


def test_runs_without_baseline_branches_or_foreign_domains(inputs, tmp_path):
    rows = [asdict(row) for row in inputs["rows"] if row.name in ("seed", "btx")]
    small = build_report(**inputs | {"rows": rows, "domains": {"code": True}, "baseline": None, "samples": 20})
    assert "oracle" not in small["models"]
    assert [(item["model"], item["against"]) for item in small["comparisons"]] == [("btx", "seed")]
    write_report(small, tmp_path)
    assert "dense" not in headline(small)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "dnse"}, "baseline='dnse' is not among the models seed, code, law, math, soup and 6 more"),
        ({"domains": {"code": False}}, "none of code is trained"),
        ({"evaluations": {}}, "evaluations lack the models seed"),
        ({"training": {}}, "training lacks the stages seed"),
        ({"domains": {"poetry": True}}, "lacks the domains poetry"),
    ],
)
def test_missing_inputs_are_named(inputs, change, message):
    with pytest.raises(ValueError, match=message):
        build_report(**inputs | change)


def test_models_scored_on_other_documents_are_refused(inputs, tmp_path):
    other = write_evaluation(tmp_path, "btx", documents=119)
    with pytest.raises(ValueError, match="btx was evaluated on 119 documents"):
        build_report(**inputs | {"evaluations": inputs["evaluations"] | {"btx": other}})


def test_diverged_and_inconsistent_evaluations_are_refused(inputs, tmp_path):
    directory = write_evaluation(tmp_path, "btx")
    arrays = dict(np.load(directory / "documents.npz"))
    for value, message in ((math.nan, "diverged"), (1e6, "different runs")):
        arrays["code.nats"][0] = value
        np.savez(directory / "documents.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            build_report(**inputs | {"evaluations": inputs["evaluations"] | {"btx": directory}})


REMAKE = "; remove that artifact's directory; the next run makes it again"
DAMAGED = {
    "evaluation.json": {
        "{": "not whole JSON (Expecting property name",
        "{}": "lacks 'domains'",
        "[]": "damaged (got list, expected an object)",
        '{"domains": {"code": {}}, "split": "test", "sequence_length": 8}': "lacks 'nats'",
    },
    "documents.npz": {"junk": "damaged (not a whole .npz)", None: "there is no such file"},
    "metrics.jsonl": {
        '{"step": 1, "tok': "not whole JSON (",
        '{"step": 1, "tokens": "x", "loss": 2.0}': "damaged (tokens='x' is no number)",
        '{"tokens": 8, "loss": 2.0}': "damaged (no figures of a step)",
        '{"step": 1, "tokens": 8, "loss": null}': "damaged (loss=None is no number)",
        '{"step": 1, "tokens": 8, "load": [[1], [0, 1]], "ffn_entropy": 1}': "damaged (",
        "": "damaged (no rows, expected one for each step of the training)",
        None: "there is no such file",
    },
    "ablation.json": {"{": "not whole JSON", '{"max_tokens": 1, "whole": {"a": 1}, "experts": {}}': "lacks 'code'"},
    "timing.json": {"{}": "lacks 'seconds'"},
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGED.items() for text in texts])
def test_a_damaged_file_of_an_artifact_is_named_with_what_mends_it(inputs, tmp_path, name, text):
    kind = {"evaluation.json": "evaluations", "documents.npz": "evaluations", "ablation.json": "ablations"}
    which = kind.get(name, "training")
    directory, key = tmp_path / "damaged", "mix/btx" if which == "training" else "btx"
    given = inputs.get(which, {})
    shutil.copytree(given[key], directory) if given else directory.mkdir()
    (directory / name).unlink(missing_ok=True)
    if text is not None:
        (directory / name).write_text(text)
    with pytest.raises(ValueError) as refused:
        build_report(**inputs | {which: given | {key: directory}, "samples": 5})
    said = str(refused.value)
    assert said.startswith(str(directory / name)) and DAMAGED[name][text] in said and said.endswith(REMAKE), said


# -------------------------------------------------------------------------------------------------------------- text


def test_numbers_are_written_to_three_or_four_digits():
    assert [write_perplexity(x) for x in (3.14159, 31.4159, 314.159, 31415.9)] == ["3.142", "31.42", "314.2", "31,416"]
    assert [write_count(x) for x in (950, 12345, 999_900, 118e6, None)] == ["950", "12.3k", "1.00M", "118M", "–"]


def test_tables_hold_every_model_and_mark_the_lowest(report):
    plain, markdown = format_table(report), markdown_table(report)
    best = write_perplexity(report["models"]["code"]["perplexity"]["code"])
    assert f"{best}*" in plain and f"**{best}**" in markdown
    assert "trained avg (code law math general)" in markdown
    for name in report["models"]:
        assert any(line.startswith(name + " ") for line in plain.splitlines())
    for table in (plain, markdown):
        assert "rng_seed 17" in table and "cores 4, memory 16.0 GiB" in table and "tokens scored: code" in table
    assert "*" not in next(line for line in plain.splitlines() if line.startswith("oracle"))


def test_readme_table_is_replaced_between_its_markers_only(report, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- table: demo -->\nold\n<!-- /table -->\nb\n<!-- table: x -->kept<!-- /table -->\n")
    for _ in range(2):
        update_readme(report, readme)
        text = readme.read_text()
        assert "\nold\n" not in text and "kept" in text and markdown_table(report) in text
        assert text.startswith("a\n<!-- table: demo -->\n| model") and "<!-- /table -->\nb\n" in text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="0 tables marked"):
        update_readme(report, readme)


def test_headline_says_who_won_even_when_dense_does(report):
    assert headline(report).startswith("bam beats dense: ")
    for interval, start in (
        ([0.01, 0.03], "No mixture or merge beats dense: the best, bam"),
        ([-0.01, 0.01], "No clear winner"),
    ):
        changed = copy.deepcopy(report)
        for item in changed["comparisons"]:
            item["interval"] = interval
        assert headline(changed).startswith(start)


# -------------------------------------------------------------------------------------------------------------- page


@pytest.fixture(scope="module")
def written(report, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    write_report(report, out)
    return out


def test_page_embeds_the_report_it_shows(report, written):
    page = Page((written / "report.html").read_text())
    stored = json.loads((written / "report.json").read_text())
    assert json.loads(page.embedded) == stored == json.loads(json.dumps(report))


def test_summary_numbers_equal_the_report(report, written):
    header, *rows = Page((written / "report.html").read_text()).tables["summary-table"]
    columns = quality_columns(report)
    assert ["".join(cell["text"]) for cell in header] == ["model", *columns]
    assert [row[0]["value"] for row in rows] == list(report["models"])
    for row in rows:
        name = row[0]["value"]
        for cell, (title, column) in zip(row[1:], columns.items(), strict=True):
            assert float(cell["value"]) == column[name]
            assert cell["text"][0] == write_perplexity(column[name])
            low, high = report["models"][name]["interval"].get(title) or _average_interval(report, name, title)
            assert cell["text"][1] == f"{write_perplexity(low)} to {write_perplexity(high)}"


def _average_interval(report: dict, name: str, title: str) -> list[float]:
    """The interval of the average with that title."""
    group = next(group for group in report["domain_groups"] if average_title(report, group) == title)
    return report["models"][name]["average"][group]["interval"]


def test_page_is_self_contained_and_accessible(written):
    html = (written / "report.html").read_text()
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img") and "src" not in attributes, tag
        assert not attributes.get("href", "#").startswith("http")
    assert "@import" not in html and "url(http" not in html
    identities = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(identities) == len(set(identities))
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert "<b>&</b>" not in html  # what a user's configuration holds is escaped


def test_what_routers_go_by_is_shown_where_it_was_measured(report, written):
    html = (written / "report.html").read_text()
    section = re.search(r'id="microscope">.*?</section>', html, re.S)
    assert section is not None
    assert re.findall("<summary>(.*?)</summary>", section.group()) == ["bam", "bam_shared_kv"]
    fold = section.group().split("</details>")[0]
    gates = re.findall(
        r'<th scope="row">layer (\d)</th>(?:<td style="--v:[\d.]+">(\d+)</td>)(?:<td style="[^"]*">(\d+)</td>)', fold
    )
    assert gates == [("0", "25", "75"), ("1", "75", "25")] * 2  # feed-forward and attention; empty bins left out
    assert '<th scope="col">0.25</th><th scope="col">0.30</th><th scope="col">mean</th>' in fold
    measured = report["models"]["bam"]["routing"]["ffn"]["information"]["token"]["measured"]
    assert f"<strong>{measured[1]:.4f}</strong><small>{measured[1] / 4:.4f} to {measured[1] / 4:.4f}</small>" in fold
    assert "token id" in fold and "part of word" not in fold
    assert "<td>62&nbsp;%<small>38&nbsp;%</small></td>" in fold
    assert fold.count('<table class="drift">') == 2 and fold.count("moved by 37.5&nbsp;%") == 2
    assert fold.count("<td>12.5&nbsp;%<small>–</small></td>") == 4
    assert (
        fold.count("<td>·the<small>31 %, × 1.2</small></td>") == 4
        and fold.count("<td>id 9<small>50 %, × 2.0</small></td>") == 4
    )
    assert "same expert" in fold and "72 % (28 % by chance); 51 % (25 % by chance)" in fold


def test_what_experts_are_worth_is_shown_in_nats(inputs, tmp_path):
    def domains(rate: float) -> dict:
        return {domain: {"nats": rate * 50 * place, "tokens": 50 * place} for place, domain in enumerate(DOMAINS, 1)}

    experts = {
        "seed": {"removed": None, "reason": "it is needed", "forced": domains(4.25)},
        "code": {"removed": domains(2.75), "reason": "", "forced": domains(1.5)},
    }
    found = {"max_tokens": None, "whole": domains(2.5), "experts": experts}
    (tmp_path / "ablation.json").write_text(json.dumps(found, sort_keys=True))  # as stages write it
    report = build_report(**inputs | {"samples": 10, "ablations": {"bam": tmp_path}})
    ablation = report["models"]["bam"]["ablation"]
    assert ablation["whole"] == dict.fromkeys(DOMAINS, 2.5) and ablation["experts"]["seed"]["removed"] is None
    table = re.search(r'<table class="ablation">.*?</table>', render_page(report), re.S)
    assert table is not None
    assert list(ablation["whole"]) == list(ablation["experts"]["code"]["removed"]) == list(DOMAINS) == report["domains"]
    assert table.group().count("<td>–<small>+1.7500</small></td>") == 6
    assert table.group().count("<td>+0.2500<small>−1.0000</small></td>") == 6


def test_page_leaves_out_what_was_not_measured(report):
    bare = copy.deepcopy(report)
    bare["comparisons"] = []
    for model in bare["models"].values():
        model["routing"], model["curve"], model["course"] = None, [], None
    html = render_page(bare)
    assert 'id="summary"' in html
    assert not any(
        f'id="{part}"' in html
        for part in ("comparisons", "curves", "routing", "information", "microscope", "specialisation")
    )


def test_a_bar_far_beyond_the_seeds_is_cut_and_keeps_its_figure(report):
    plain = render_page(report)
    far = copy.deepcopy(report)
    far["models"]["soup"]["perplexity"]["law"] = 54_321.0
    html = render_page(far)
    assert html.count('soup cut"') == plain.count('soup cut"') + 1 and "54,321" in html
    widths = [float(width) for width in re.findall(r'class="bar[^"]*" style="--v:([\d.]+)"', html)]
    assert widths and max(widths) <= 1


def test_a_merge_is_drawn_as_no_mixture(report):
    other = copy.deepcopy(report)
    other["models"]["soup"]["kind"] = "merge"
    plain, html = render_page(report), render_page(other)
    drawn = plain.count('class="bar soup"')
    assert drawn > 1 and html.count('class="bar merge"') == drawn and "bar soup" not in html
    assert ">merge</li>" in html and ">mixture</li>" in html and "hexagon merge" in html


def test_figures_are_written_as_svg_and_png_and_repeat(report, written, tmp_path):
    names = {path.name for path in (written / "figures").iterdir()}
    for name in (
        "perplexity",
        "comparisons",
        "curves",
        "curves-flops",
        "pareto",
        "course-bam",
        "routing-bam-attention",
        "information-btx-ffn",
        "gates-bam-attention",
    ):
        assert {f"{name}.svg", f"{name}.png"} <= names
    assert render_page(report) == (written / "report.html").read_text(encoding="utf-8")
    with rc_context(STYLE):
        draw_comparisons(report).savefig(tmp_path / "again.svg", metadata={"Date": None}, facecolor="white")
    assert (tmp_path / "again.svg").read_bytes() == (written / "figures/comparisons.svg").read_bytes()


def test_building_a_report_loads_neither_torch_nor_matplotlib():
    code = "import sys, evals.report; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

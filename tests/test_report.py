"""The report: its numbers against slow loops and known answers, its table and page against its numbers."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rc_context

from evals.figures import STYLE, draw_comparisons
from evals.findings import headline
from evals.page import render_page
from evals.report import ModelRow, build_report, format_table, markdown_table, update_readme, write_report
from evals.statistics import bootstrap_domains, bootstrap_nats_per_token, generator, percentile_interval
from evals.tables import average_title, quality_columns, write_count, write_perplexity

DOMAINS = {"code": True, "law": True, "math": True, "general": True, "cpp": False, "programs": False}
EXPERTS = ["seed", "code", "law", "math"]
LAYERS = 2
BRANCHES = [["seed"], ["branch/code", "branch/law", "branch/math"]]
# fmt: off
# name: (kind, parameters, active parameters, train tokens, stages, mean nats per token by domain)
MODELS = {
    "seed": ("seed", 21e6, 21e6, 30e6, [["seed"]], (3.05, 3.10, 2.95, 3.30, 3.25, 3.02)),
    "code": ("branch", 21e6, 21e6, 40e6, [["seed"], ["branch/code"]], (2.42, 3.62, 3.31, 3.66, 2.71, 2.55)),
    "law": ("branch", 21e6, 21e6, 40e6, [["seed"], ["branch/law"]], (3.71, 2.50, 3.52, 3.58, 3.90, 3.68)),
    "math": ("branch", 21e6, 21e6, 40e6, [["seed"], ["branch/math"]], (3.33, 3.55, 2.21, 3.61, 3.52, 3.24)),
    "soup": ("soup", 21e6, 21e6, 60e6, [*BRANCHES, ["merge/soup"]],
        (2.85, 2.93, 2.70, 3.31, 3.04, 2.87)),
    "dense": ("dense", 21e6, 21e6, 70e6, [["seed"], ["dense"]], (2.521, 2.610, 2.331, 3.262, 2.842, 2.672)),
    "btx": ("btx", 58e6, 34e6, 70e6, [*BRANCHES, ["assemble/btx"], ["mix/btx"]],
        (2.472, 2.561, 2.272, 3.241, 2.801, 2.623)),
    "btx_top1": ("btx", 58e6, 21e6, 70e6, [*BRANCHES, ["mix/btx_top1"]],
        (2.519, 2.612, 2.330, 3.268, 2.860, 2.681)),
    "btx_random": ("btx", 58e6, 34e6, 70e6, [*BRANCHES, ["mix/btx_random"]],
        (2.561, 2.650, 2.381, 3.270, 2.901, 2.722)),
    "bam": ("bam", 74e6, 50e6, 70e6, [*BRANCHES, ["mix/bam"]],
        (2.461, 2.552, 2.258, 3.239, 2.790, 2.611)),
    "bam_shared_kv": ("bam", 71e6, 47e6, 70e6, [*BRANCHES, ["mix/bam_shared_kv"]],
        (2.465, 2.557, 2.265, 3.238, 2.793, 2.618)),
}
# fmt: on


def fake_routing(rng: np.random.Generator, learned: bool, attention: bool) -> dict:
    """Routing as an evaluation records it: sharper in later layers when learned, even when random."""

    def part() -> dict:
        share = {}
        for domain in DOMAINS:
            own = {"general": 0, "cpp": 1, "programs": 1}.get(domain, EXPERTS.index(domain) if domain in EXPERTS else 0)
            layers = []
            for layer in range(LAYERS):
                logits = rng.normal(0, 0.2, len(EXPERTS))
                logits[own] += (0.5 + 0.7 * layer) if learned else 0
                layers.append((np.exp(logits) / np.exp(logits).sum()).tolist())
            share[domain] = layers
        entropy = {domain: [-sum(p * math.log(p) for p in layer) for layer in share[domain]] for domain in DOMAINS}
        information = [0.02 + 0.12 * layer if learned else 0.004 for layer in range(LAYERS)]
        shuffled = [sorted(abs(rng.normal(0.004, 0.002, 20)).tolist()) for _ in range(LAYERS)]
        return {"share": share, "entropy": entropy, "mutual_information": information, "shuffled": shuffled}

    return {"experts": EXPERTS, "ffn": part(), "attention": part() if attention else None}


def write_training(root: Path, stage: str, rng: np.random.Generator, points: int = 900) -> Path:
    """A training artifact: timing, and metrics for the stages that train."""
    directory = root / stage.replace("/", "-")
    directory.mkdir(parents=True)
    seconds = {"seed": 900.0, "dense": 1210.5, "branch/code": 301.0, "branch/law": 310.0, "branch/math": 298.0}
    (directory / "timing.json").write_text(json.dumps({"seconds": seconds.get(stage, 380.0)}))
    if not stage.startswith(("merge", "assemble")):
        decay = 2.3 + rng.uniform(0, 0.3) + 1.6 * np.exp(-np.arange(points) / 120) + rng.normal(0, 0.05, points)
        lines = [
            json.dumps({"step": step, "tokens": (step + 1) * 16384, "loss": loss + 0.01, "cross_entropy": loss})
            for step, loss in enumerate(decay.tolist())
        ]
        (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def write_evaluation(root: Path, name: str, documents: int = 120) -> Path:
    """An evaluation directory; documents share their difficulty across models, as real ones do."""
    kind, *_, rates = MODELS[name]
    directory = root / f"evaluation-{name}"
    directory.mkdir(parents=True)
    rng = np.random.default_rng(list(MODELS).index(name) + 100)
    arrays, summary = {}, {}
    for index, (domain, rate) in enumerate(zip(DOMAINS, rates, strict=True)):
        shared = np.random.default_rng(index)
        tokens = shared.integers(60, 900, documents)
        difficulty = shared.normal(0, 0.25, documents)
        nats = tokens * np.maximum(rate + difficulty - difficulty.mean() + rng.normal(0, 0.04, documents), 0.2)
        arrays |= {f"{domain}.nats": nats, f"{domain}.tokens": tokens, f"{domain}.bytes": tokens * 4}
        counts = {"tokens": int(tokens.sum()), "bytes": int(tokens.sum() * 4), "documents": documents}
        summary[domain] = {"nats": float(nats.sum()), **counts, "overlap": 0.012 if index < 3 else None}
    routed = kind in ("btx", "bam")
    routing = fake_routing(rng, learned=name != "btx_random", attention=kind == "bam") if routed else None
    document = {"split": "test", "sequence_length": 512, "domains": summary, "routing": routing}
    (directory / "evaluation.json").write_text(json.dumps(document))
    np.savez(directory / "documents.npz", **arrays)
    return directory


def make_inputs(root: Path) -> dict:
    """The arguments of `build_report` for eleven models on six domains."""
    rows = [
        ModelRow(
            name=name, kind=kind, parameters=int(size), active_parameters=int(active), train_tokens=int(tokens),
            train_flops=6 * active * tokens, stages=stages, learning_rate=3e-4,
        )
        for name, (kind, size, active, tokens, stages, _) in MODELS.items()
    ]  # fmt: skip
    stages = dict.fromkeys(stage for row in rows for group in row.stages for stage in group)
    rng = np.random.default_rng(0)
    return {
        "experiment": "demo",
        "rows": rows,
        "domains": DOMAINS,
        "evaluations": {name: write_evaluation(root, name) for name in MODELS},
        "training": {stage: write_training(root, stage, rng) for stage in stages},
        "machine": {"device": "CPU", "cores": 4, "memory_bytes": 16 * 2**30},
        "provenance": {"commit": "0123abc", "versions": {"torch": "2.9.0", "note": "<b>&</b></script>"}},
        "samples": 500,
        "rng_seed": 17,
    }


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


class Page(HTMLParser):
    """Collects a page's tags, the JSON it embeds, and the rows of the table `summary-table`."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.rows, self.embedded = [], [], ""
        self.inside, self.in_json = False, False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.in_json = tag == "script" and attributes.get("id") == "report"
        self.inside = attributes.get("id") == "summary-table" if tag == "table" else self.inside
        if self.inside and tag == "tr":
            self.rows.append([])
        if self.inside and tag in ("th", "td"):
            self.rows[-1].append({"value": attributes.get("data-value"), "text": []})

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "table"
        self.in_json = self.in_json and tag != "script"

    def handle_data(self, data):
        if self.in_json:
            self.embedded += data
        elif self.inside and self.rows and self.rows[-1]:
            self.rows[-1][-1]["text"].append(data)


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
    header, *rows = Page((written / "report.html").read_text()).rows
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


def test_page_leaves_out_what_was_not_measured(report):
    bare = copy.deepcopy(report)
    bare["comparisons"] = []
    for model in bare["models"].values():
        model["routing"], model["curve"] = None, []
    html = render_page(bare)
    assert 'id="summary"' in html
    assert not any(f'id="{part}"' in html for part in ("comparisons", "curves", "routing", "information"))


def test_a_bar_far_beyond_the_seeds_is_cut_and_keeps_its_figure(report):
    plain = render_page(report)
    far = copy.deepcopy(report)
    far["models"]["soup"]["perplexity"]["law"] = 54_321.0
    html = render_page(far)
    assert html.count('soup cut"') == plain.count('soup cut"') + 1 and "54,321" in html
    widths = [float(width) for width in re.findall(r'class="bar[^"]*" style="--v:([\d.]+)"', html)]
    assert widths and max(widths) <= 1


def test_figures_are_written_as_svg_and_png_and_repeat(report, written, tmp_path):
    names = {path.name for path in (written / "figures").iterdir()}
    for name in ("perplexity", "comparisons", "curves", "routing-bam-attention", "information-btx-ffn"):
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

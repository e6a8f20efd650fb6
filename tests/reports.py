"""A made-up run: evaluations and trainings of eleven models on six domains, and the reading of a report's page."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from evals.report import ModelRow

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
        told = {"measured": information, "control": [[0.25 * value] * 19 for value in information]}
        bins = [[0.0] * 5 + [0.25 + 0.5 * layer, 0.75 - 0.5 * layer] + [0.0] * 13 for layer in range(LAYERS)]
        closer = {
            "load": [np.mean([share[domain][layer] for domain in DOMAINS], axis=0).tolist() for layer in range(LAYERS)],
            "largest_gate": [0.31, 0.29],
            "histograms": {"edges": [edge / 20 for edge in range(21)], "largest_gate": bins, "entropy": bins},
            "information": {"token": told, "position": told, "word": None},
            "agreement": {"share": [0.62], "independent": [0.38]},
            "examples": [
                {
                    "seed": [{"id": 7, "text": " the", "count": 90, "share": 0.31, "lift": 1.2}],
                    "code": [],
                    "law": [],
                    "math": [{"id": 9, "text": None, "count": 30, "share": 0.5, "lift": 2.0}],
                }
            ]
            * LAYERS,
        }
        shares = {"share": share, "entropy": entropy, "mutual_information": information, "shuffled": shuffled}
        return shares | (closer if attention else {})  # evaluations of older versions lack them

    sides = {"by": "expert", "share": [0.72, 0.51], "independent": [0.28, 0.25]}
    moved = {
        "experts": EXPERTS,
        "layers": [0, 1],
        "distance": [[0.5, 0.25, 0.125, 1.0]] * 2,
        "router": [[None] * 4] * 2,
    }
    more = {"agreement": sides, "drift": {"rest": 0.375, "ffn": moved, "attention": moved}} if attention else {}
    return {"experts": EXPERTS, "ffn": part(), "attention": part() if attention else None} | more


def write_training(root: Path, stage: str, rng: np.random.Generator, points: int = 900) -> Path:
    """A training artifact: timing, and metrics for the stages that train."""
    directory = root / stage.replace("/", "-")
    directory.mkdir(parents=True)
    seconds = {"seed": 900.0, "dense": 1210.5, "branch/code": 301.0, "branch/law": 310.0, "branch/math": 298.0}
    (directory / "timing.json").write_text(json.dumps({"seconds": seconds.get(stage, 380.0)}))
    if not stage.startswith(("merge", "assemble")):
        decay = 2.3 + rng.uniform(0, 0.3) + 1.6 * np.exp(-np.arange(points) / 120) + rng.normal(0, 0.05, points)
        rows = [
            {"step": step, "tokens": (step + 1) * 16384, "loss": loss + 0.01, "cross_entropy": loss}
            | (fake_router(step / points, "bam" in stage) if stage.startswith("mix") else {})
            for step, loss in enumerate(decay.tolist())
        ]
        (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return directory


def fake_router(done: float, attention: bool) -> dict:
    """What training records of two layers of four experts, after this share of it: one expert of a layer takes over."""
    load = [[0.25 + 0.75 * done, *[0.25 - 0.25 * done] * 3], [0.25, 0.25, 0.25, 0.25]]
    entropy = sum(-p * math.log(p) for layer in load for p in layer if p) / 2
    row = {"load": load, "ffn_entropy": entropy, "gate_sum": 1.0}
    row |= {"ffn_information": [0.3 * done, 0.01], "ffn_information_shuffled": [0.02, 0.01]}
    row |= {"largest_load": load[0][0], "dead_experts": sum(p < 0.025 for layer in load for p in layer)}
    more = {"attention_load": load[::-1], "attention_entropy": 0.75 * entropy}
    more |= {"attention_information": [0.0, 0.1 * done], "attention_information_shuffled": [0.0, 0.03]}
    return row | (more if attention else {})


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
            flops_per_token=None if kind == "soup" else 6 * active,
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
        "provenance": {
            "commit": "0123abc",
            "torch": "2.9.0",
            "note": "<b>&</b></script>",
            "made_by": {"0123abc": list(stages)},
            "rng_seeds": {"rng_seed": 1, "mix.rng_seed": 7},
            "artifacts": dict.fromkeys(stages, "89abcdef"),
            "config": {"name": "demo", "mix": {"rng_seed": 7, "lr": 1e-3}},
        },
        "samples": 500,
        "rng_seed": 17,
    }


class Page(HTMLParser):
    """Collects a page's tags, the JSON it embeds, and the rows of every table that has an id."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.tables, self.embedded = [], {}, ""
        self.rows, self.in_json = None, False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.in_json = tag == "script" and attributes.get("id") == "report"
        if tag == "table" and "id" in attributes:
            self.rows = self.tables[attributes["id"]] = []
        elif self.rows is not None and tag == "tr":
            self.rows.append([])
        elif self.rows is not None and tag in ("th", "td"):
            self.rows[-1].append({"value": attributes.get("data-value"), "text": []})

    def handle_endtag(self, tag):
        self.rows = None if tag == "table" else self.rows
        self.in_json = self.in_json and tag != "script"

    def handle_data(self, data):
        if self.in_json:
            self.embedded += data
        elif self.rows and self.rows[-1]:
            self.rows[-1][-1]["text"].append(data)

"""The model card of an exported mixture: what is recorded about it, and fields for what only its owner knows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upcycle.explanation import combined_in_words, routing_in_words
from upcycle.merge_config import from_record

METHOD = {
    "merged": ("Branch-Train-MiX", "arXiv:2403.07816", "branch-train-mix"),
    "mixture": ("Branch-Attend-Mix", "arXiv:2408.08274", "branch-attend-mix"),
}
COPIES = ("Sparse upcycling", "arXiv:2212.05055", "sparse-upcycling")  # where all experts come from the seed
FRONT = """\
---
license: other  # fill in: the terms of the seed, of every branch and of their data apply
license_name:  # fill in
license_link:  # fill in
base_model:  # fill in
library_name: transformers
pipeline_tag: text-generation
tags:
- mixture-of-experts
- {tag}
---
"""


@dataclass(frozen=True)
class Facts:
    """What is recorded about a mixture beside its config; each may be missing.

    merge: how the tensors outside the experts were made. fingerprints: a hash of each expert's tensors. stage, tokens:
    of the run that made it, and how many tokens that stage trained on. figures: the model's row of a report.
    sequence_length: of the windows in which the report measured.
    """

    merge: str | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)
    stage: str | None = None
    tokens: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    sequence_length: int | None = None


def read_facts(directory: Path, report: Path | None = None) -> Facts:
    """What assembly.json, stage.json and a run's report.json say about the mixture in `directory`.

    Raises ValueError: the report measured another model.
    """
    stage = _read(directory / "stage.json")
    assembly = _assembly(directory, stage)
    found: dict[str, Any] = {"fingerprints": _fingerprints(assembly)}
    if "merge" in assembly:
        found["merge"] = from_record(assembly["merge"]).words
    if stage:
        found["stage"] = f"{stage['stage']}-{stage['key'][:8]}"
        found["tokens"] = (stage["config"].get("train") or {}).get("tokens")
    if report is not None:
        found["figures"], found["sequence_length"] = _figures(directory, stage, report)
    return Facts(**found)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _assembly(directory: Path, stage: dict[str, Any]) -> dict[str, Any]:
    """assembly.json, from beside the weights or from the artifact that they were trained from."""
    sources = [f"{name.replace('/', '-')}-{key[:8]}" for name, key in stage.get("inputs", {}).items()]
    found = [_read(path / "assembly.json") for path in (directory, *(directory.parent / name for name in sources))]
    return next((assembly for assembly in found if assembly), {})


def _fingerprints(assembly: dict[str, Any]) -> dict[str, str]:
    """SHA-256 over the hashes of each expert's own tensors, in the order in which they were assembled."""
    digests: dict[str, Any] = {name: hashlib.sha256() for name in assembly.get("experts", ())}
    for row in assembly.get("tensors", ()):
        for name, hashes in row.get("sha256", {}).items():
            digests.setdefault(name, hashlib.sha256()).update("".join(hashes).encode())  # or an attention expert's own
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _figures(directory: Path, stage: dict[str, Any], report: Path) -> tuple[dict[str, Any], int]:
    """The row of `report` about the artifact in `directory`, found by its key, and the report's window."""
    measured = _read(report)
    if not {"models", "provenance"} <= measured.keys():
        found = "no report of a run" if measured else "no such file"
        raise ValueError(f"report={report}: {found}; name the report.json of the run that made {directory}")
    artifacts = measured["provenance"]["artifacts"]
    key = stage.get("key", "")[:8]
    name = next((name for name, found in artifacts.items() if found == key), None)
    model = name.partition("/")[2] if name else ""
    trained_on = name == f"assemble/{model}" and f"mix/{model}" in artifacts  # it measured what training made of it
    if model not in measured["models"] or trained_on:
        what = f"{name} ({key})" if name else (key or "without a stage.json")
        ours = ", ".join(f"{found}-{artifacts[found]}" for found in artifacts if found.startswith("mix/")) or "none"
        raise ValueError(
            f"report={report}: {directory} is {what}, which that run did not measure; its mixtures: {ours}"
        )
    return measured["models"][model], measured["sequence_length"]


def model_card(config: Any, facts: Facts, format: str, remarks: Sequence[str], title: str) -> str:
    """README.md of a directory that holds the mixture of `config` as `format`; `remarks` go under its limits."""
    copies = set(config.expert_sources) == {"seed"}
    name, paper, tag = COPIES if copies else METHOD[config.attention]
    made = "copies of" if copies else "copies that were trained apart of"
    return "\n".join(
        [
            FRONT.format(tag=tag),
            f"# {title}",
            "",
            f"A mixture of {config.num_experts} experts, assembled from {made} one {config.seed.model_type} model "
            f"({name}, {paper}).",
            "",
            *_recipe(config, facts, name),
            *_branches(config, facts),
            *_results(facts),
            *_use(format),
            *_limits(remarks),
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(cells) + " |" for cells in lines), ""]


def _recipe(config: Any, facts: Facts, method: str) -> list[str]:
    seed, merge = config.seed, facts.merge or "not recorded"
    routing = routing_in_words(config.to_dict(), config.num_experts, config.num_attention_experts)
    rows = [
        ["method", method],
        ["seed", f"{seed.model_type}: {seed.num_hidden_layers} layers, hidden size {config.hidden_size}, vocabulary {config.vocab_size}"],
        ["experts, in order", ", ".join(config.experts)],
        *_placement(config),
        *([f"attention {name.strip()}" if name.startswith(" ") else name, words] for name, words in routing),
        ["all other weights", merge],
    ]  # fmt: skip
    return ["## Recipe", "", *_table(["", ""], rows)]


def _placement(config: Any) -> list[list[str]]:
    """Rows of what is not one expert of each model in every layer."""
    rows = []
    if config.split > 1:
        rows.append(["split", f"each expert has 1/{config.split} of a feed-forward's hidden units"])
    if config.shared_expert != "none":
        rows.append(["shared expert", f"{config.shared_expert}, shared_gate={config.shared_gate}"])
    if words := combined_in_words(config.combine):
        rows.append(["combined", words])
    if config.routed_layers is not None:
        rows.append(["layers that are mixtures", ", ".join(map(str, config.routed))])
    return rows


def _branches(config: Any, facts: Facts) -> list[str]:
    rows = [[name, facts.fingerprints.get(name, "not recorded")] for name in config.experts]
    said = "The fingerprint is a SHA-256 over the hashes of an expert's own tensors at assembly."
    return ["## Branches", "", said, "", *_table(["expert", "fingerprint"], rows)]


def _results(facts: Facts) -> list[str]:
    lines = ["## Training and results", ""]
    if facts.stage:
        trained = f", trained on {facts.tokens:,} tokens there" if facts.tokens else ""
        lines.append(f"- Made by stage `{facts.stage}`{trained}.")
    if facts.figures.get("train_tokens"):
        lines.append(
            f"- Tokens of all stages behind it (of a seed that was brought along, only what came after): {facts.figures['train_tokens']:,}."
        )
    if not facts.figures:
        return [*lines, "- No measurement is recorded here.", ""]
    rows = [[domain, f"{value:.4g}"] for domain, value in facts.figures["perplexity"].items()]
    said = f"Test perplexity, in windows of {facts.sequence_length} tokens, measured on the mixture before this export:"
    return [*lines, "", said, "", *_table(["domain", "perplexity"], rows)]


def _use(format: str) -> list[str]:
    flag = ", trust_remote_code=True" if format == "remote_code" else ""
    said = (
        "The code is in this directory: read it before you trust it. After `import upcycle.modeling` no flag is needed."
        if format == "remote_code"
        else f"The class is transformers' own (`{format}`); its logits equal the mixture's in fp32."
    )
    return [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'path = "."  # this directory, or its name on the Hub',
        f"model = AutoModelForCausalLM.from_pretrained(path{flag})",
        f"tokenizer = AutoTokenizer.from_pretrained(path{flag})",
        "```",
        "",
        said,
        "",
    ]


def _limits(remarks: Sequence[str]) -> list[str]:
    return [
        "## Limits",
        "",
        "- It knows and repeats what its seed's and its branches' data held; nothing here measured bias, safety or truth.",
        "- Perplexities above, where there are any, are of those test sets and that window only.",
        *(f"- {remark}." for remark in remarks),
        "",
    ]

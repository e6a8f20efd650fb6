"""What routers go by, as tables of the page: the histogram of the largest gate, information beside controls, agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from evals.figures import layer_numbers, routed_parts
from evals.page_charts import PARTS
from evals.tables import write_signed

TRAITS = {"domain": "domain", "token": "token id", "position": "position", "word": "part of word"}


def microscope(report: Mapping[str, Any], opened: str | None) -> str:
    """Of every routed model that was looked at so closely, a fold with the tables of its sublayers; `opened` is open."""
    folds = []
    for name, model in report["models"].items():
        routing = model["routing"]
        tables = [part_tables(part, routing[part]) for part in routed_parts(model) if "histograms" in routing[part]]
        if tables:
            sides = agreement_of_sides(routing.get("agreement"))
            folds.append(
                f"<details{' open' if name == opened else ''}><summary>{escape(name)}</summary>"
                f"{''.join(tables)}{sides}{drift_tables(routing.get('drift'))}"
                f"{ablation_table(model.get('ablation'))}</details>"
            )
    return "".join(folds)


def part_tables(part: str, measured: Mapping[str, Any]) -> str:
    """The tables of one sublayer."""
    return f"<h3>{PARTS[part].capitalize()}</h3>{gate_table(measured)}{information_table(measured)}{examples_table(measured)}"


def gate_table(measured: Mapping[str, Any]) -> str:
    """Layers × bins of the largest gate: percent of tokens, shaded; bins that no layer has anything in are left out."""
    edges, shares = measured["histograms"]["edges"], measured["histograms"]["largest_gate"]
    used = [place for place in range(len(edges) - 1) if any(layer[place] for layer in shares)] or [0]
    shown = range(used[0], used[-1] + 1)
    head = "".join(f'<th scope="col">{edges[place]:.2f}</th>' for place in shown)
    rows = []
    for layer, share, mean in zip(layer_numbers(measured), shares, measured["largest_gate"], strict=True):
        cells = "".join(f'<td style="--v:{share[place]:.3f}">{100 * share[place]:.0f}</td>' for place in shown)
        rows.append(f'<tr><th scope="row">layer {layer}</th>{cells}<td class="entropy">{mean:.2f}</td></tr>')
    return (
        '<div class="scroll"><table class="heat" style="width:auto"><caption>Largest gate, from … on: percent of tokens</caption>'
        f'<thead><tr><td></td>{head}<th scope="col">mean</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def examples_table(measured: Mapping[str, Any]) -> str:
    """Experts × layers: the tokens that an expert has the most beyond its share of all, with p(expert | token) and by how much
    that is more than p(expert)."""
    if not measured.get("examples"):
        return ""
    head = "".join(f'<th scope="col">layer {layer}</th>' for layer in layer_numbers(measured))
    rows = []
    for expert in measured["examples"][0]:
        cells = "".join(
            f"<td>{'<br>'.join(map(_example, layer[expert])) or '–'}</td>" for layer in measured["examples"]
        )
        rows.append(f'<tr><th scope="row">{escape(expert)}</th>{cells}</tr>')
    return (
        '<div class="scroll"><table class="examples"><caption>Tokens by expert: the share of a token that the expert has, and how many '
        "times its share of all that is</caption>"
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _example(one: Mapping[str, Any]) -> str:
    text = (
        f"id {one['id']}"
        if one["text"] is None
        else "".join("·" if c == " " else c if c.isprintable() else "␣" for c in one["text"])
    )
    return f"{escape(text)}<small>{100 * one['share']:.0f} %, × {one['lift']:.1f}</small>"


def information_table(measured: Mapping[str, Any]) -> str:
    """Layers × traits: nats, and below them the range of the controls; bold above all of them. Agreement with the next layer."""
    found = {"domain": {"measured": measured["mutual_information"], "control": measured["shuffled"]}}
    found |= {trait: one for trait, one in measured["information"].items() if one}
    traits = [trait for trait in TRAITS if trait in found]
    head = "".join(f'<th scope="col">{TRAITS[trait]}</th>' for trait in traits)
    agreement = measured["agreement"]
    rows = []
    for place, layer in enumerate(layer_numbers(measured)):
        cells = "".join(
            _information_cell(found[trait]["measured"][place], found[trait]["control"][place]) for trait in traits
        )
        alike = ""
        if place < len(agreement["share"]):
            alike = _agreement_cell(agreement["share"][place], agreement["independent"][place])
        rows.append(f'<tr><th scope="row">layer {layer}</th>{cells}{alike or "<td></td>"}</tr>')
    return (
        "<div class='scroll'><table><caption><span>Information about the expert, nats; below, the range of its controls. Last: "
        "tokens whose first expert is that of the next layer; below, by chance</span></caption>"
        f'<thead><tr><td></td>{head}<th scope="col">next layer</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _information_cell(value: float, control: Sequence[float]) -> str:
    shown = f"{value:.4f}"
    above = f"<strong>{shown}</strong>" if value > max(control) else shown
    return f"<td>{above}<small>{min(control):.4f} to {max(control):.4f}</small></td>"


def _agreement_cell(share: float, independent: float) -> str:
    return f"<td>{100 * share:.0f}&nbsp;%<small>{100 * independent:.0f}&nbsp;%</small></td>"


def agreement_of_sides(agreement: Mapping[str, Any] | None) -> str:
    """A sentence on whether attention and feed-forward go to the same expert."""
    if not agreement:
        return ""
    pairs = zip(agreement["share"], agreement["independent"], strict=True)
    shown = "; ".join(f"{100 * share:.0f} % ({100 * chance:.0f} % by chance)" for share, chance in pairs)
    return (
        f"<p>Attention and feed-forward first go to the same {agreement['by']} for this share of the tokens, layer by "
        f"layer: {shown}.</p>"
    )


def ablation_table(ablation: Mapping[str, Any] | None) -> str:
    """Experts × domains: what removing an expert adds to the nats per token, and below, what forcing it adds."""
    if not ablation:
        return ""
    whole = ablation["whole"]
    head = "".join(f'<th scope="col">{escape(domain)}</th>' for domain in whole)
    rows = []
    for name, expert in ablation["experts"].items():
        cells = ""
        for domain, rate in whole.items():
            removed = "–" if expert["removed"] is None else write_signed(expert["removed"][domain] - rate)
            cells += f"<td>{removed}<small>{write_signed(expert['forced'][domain] - rate)}</small></td>"
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        '<div class="scroll"><table class="ablation"><caption><span>Nats per token that removing an expert adds (above), '
        "and sending all tokens to it (below)</span></caption>"
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def drift_tables(drift: Mapping[str, Any] | None) -> str:
    """Layers × experts: how far training moved each, in percent of what was assembled, and below, its router's row."""
    tables = []
    for part in (part for part in PARTS if drift and part in drift):
        moved, rows = drift[part], []
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in moved["experts"])
        for layer, own, router in zip(moved["layers"], moved["distance"], moved["router"], strict=True):
            cells = "".join(
                f"<td>{_percent(one)}<small>{_percent(row)}</small></td>" for one, row in zip(own, router, strict=True)
            )
            rows.append(f'<tr><th scope="row">layer {layer}</th>{cells}</tr>')
        tables.append(
            f'<div class="scroll"><table class="drift"><caption><span>How far training moved {PARTS[part]} from their '
            f"branches, and (below) their rows of the router; what experts share moved by {_percent(drift['rest'])}"
            f"</span></caption><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        )
    return "".join(tables)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}&nbsp;%"

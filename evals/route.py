"""Which expert each token of a text goes to, and of what the mixture goes on to say: read from one forward, as one page.

The text is continued greedily; then one forward over all of it records what every router decided. Routers look at no later
token, so these are the decisions of the generation too.
Shapes: T tokens, L layers, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import upcycle.modeling  # noqa: F401  (registers the mixture's classes)
from evals.page_charts import PARTS
from evals.page_parts import HERE
from evals.words import token_texts
from upcycle.checkpoint import Checkpoint
from upcycle.configuration import UpcycledConfig
from upcycle.directories import resolve
from upcycle.health import gates_of
from upcycle.router import RoutingTrace

UNIT = 1000  # gates are kept in thousandths
COLOURS = 8  # of page.css; experts beyond them share one, and have their own numbers


@torch.no_grad()
def read_routes(directory: str | Path, text: str, new_tokens: int) -> dict[str, Any]:
    """`tokens` (id and text), how many are of the `prompt`, and of each routed sublayer `experts`, `layers`, `gates`.

    gates: [layer][token][expert] as applied, in thousandths.
    Raises ValueError: no mixture there, no tokens in `text`, or more than the model's positions; logits that are no numbers.
    """
    directory = resolve(directory)
    found = Checkpoint(directory).config
    if found.get("model_type") != UpcycledConfig.model_type:
        raise ValueError(
            f"{directory}: model_type is {found.get('model_type')!r}, expected {UpcycledConfig.model_type!r}: only a mixture "
            "has routers; give the directory of one"
        )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer(text, return_tensors="pt").input_ids
    positions = found["seed"].get("max_position_embeddings") or found["seed"].get("n_positions")
    if not 1 <= prompt.shape[1] <= (positions or prompt.shape[1]) - new_tokens:
        raise ValueError(
            f"the text has {prompt.shape[1]} tokens and {new_tokens} are to follow, expected at least 1 and at most the "
            f"model's {positions} positions together; give another text, or --new-tokens=0"
        )
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = prompt
    if new_tokens:
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    trace = RoutingTrace()
    logits = model(ids, trace=trace, use_cache=False).logits
    if not logits.isfinite().all():
        raise ValueError(
            f"{directory}: its logits of this text are not all finite, so what it chooses means nothing; `upcycle doctor "
            f"{directory}` says which weights are at fault"
        )
    texts = token_texts(tokenizer, ids[0].tolist())
    return {
        "tokens": [{"id": int(one), "text": shown} for one, shown in zip(ids[0], texts, strict=True)],
        "prompt": prompt.shape[1],
        "parts": {
            part: {
                "experts": list(model.config.names_of(part)),
                "layers": model.config.routed,
                "gates": [(gates_of(one) * UNIT).round().int().tolist() for one in trace.of(part)],
            }
            for part in model.config.parts
        },
    }


def render_routes(routes: Mapping[str, Any], title: str) -> str:
    """The whole page: tokens over the number of their expert; which sublayer and layer is chosen on it. No network."""
    parts = routes["parts"]
    choices = "".join(
        f'<label><input type="radio" name="part" value="{part}"{" checked" * (part == next(iter(parts)))}> '
        f"{PARTS[part]}</label>"
        for part in parts
    )
    embedded = json.dumps(routes, ensure_ascii=False).replace("<", "\\u003c")
    css = "".join((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "route.css"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)} · routes</title>
<style>
{css}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">upcycle route</p>
<h1>{escape(title)}</h1>
<p class="lead">Under each token the number of its expert, the one with the largest gate first; with more than two experts
a token, the first alone. Underlined: what the mixture said. Point at a token, or move among them with the arrow keys, to
read its gates in every layer.</p>
</header>
<form id="choice" aria-label="Which routers to show">
<fieldset><legend>Experts</legend>{choices}</fieldset>
<label>Layer <select id="layer">{layer_options(next(iter(parts.values())))}</select></label>
</form>
<ol class="experts" id="experts" aria-label="Experts, and their share of the tokens shown">{expert_key(routes)}</ol>
<div class="tokens" id="tokens" role="group" aria-label="Tokens">{token_marks(routes)}</div>
<section class="gates" aria-label="Gates of one token in every layer"><div id="detail" aria-live="polite"></div></section>
</main>
<script type="application/json" id="routes">{embedded}</script>
<script>
{(HERE / "route.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def layer_options(part: Mapping[str, Any]) -> str:
    return "".join(f'<option value="{place}">{layer}</option>' for place, layer in enumerate(part["layers"]))


def experts_of(gates_E: list[int]) -> list[int]:
    """The experts that a token has, the largest gate first; of more than two the first alone."""
    order = sorted((e for e, gate in enumerate(gates_E) if gate), key=lambda e: (-gates_E[e], e))
    return order if len(order) <= 2 else order[:1]


def expert_key(routes: Mapping[str, Any]) -> str:
    """Number, name and share of the tokens of every expert, in the first sublayer and layer."""
    part = next(iter(routes["parts"].values()))
    firsts = [(experts_of(gates) or [None])[0] for gates in part["gates"][0]]
    return "".join(
        f'<li class="e{expert % COLOURS}"><b>{expert + 1}</b> {escape(name)} '
        f"<small>{100 * firsts.count(expert) / len(firsts):.0f}&nbsp;%</small></li>"
        for expert, name in enumerate(part["experts"])
    )


def token_marks(routes: Mapping[str, Any]) -> str:
    """Every token with its experts, as the page is before anything is chosen."""
    part, marks = next(iter(routes["parts"].values())), []
    for place, (token, gates) in enumerate(zip(routes["tokens"], part["gates"][0], strict=True)):
        chosen = experts_of(gates)
        css = ["t", *([f"e{chosen[0] % COLOURS}"] if chosen else []), *(["said"] if place >= routes["prompt"] else [])]
        said = "·".join(str(expert + 1) for expert in chosen) or "–"
        hint = ", ".join(f"{name} {gate / UNIT:.3f}" for name, gate in zip(part["experts"], gates, strict=True) if gate)
        marks.append(
            f'<span class="{" ".join(css)}" title="{escape(hint)}" tabindex="{0 if place == 0 else -1}">'
            f"<span>{visible(token['text'])}</span><small>{said}</small></span>{'<br>' * token['text'].count(chr(10))}"
        )
    return "".join(marks)


def visible(text: str) -> str:
    """A token's text as HTML in which a line's end can be seen."""
    return escape(text).replace("\r", "").replace("\n", "⏎").replace("\t", "⇥")

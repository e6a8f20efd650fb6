"""What is true of each kind of router, and what combining experts may be, as data: settings, costs and models read it here. No torch.

The functions themselves are routing.ROUTERS. This file travels inside checkpoints as remote code: it imports nothing else of
ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Facts(NamedTuple):
    """every: a token has all experts. one: it has one; where neither is so, top_k says how many.

    weightless: why the router has no weights; "" if it has. selects: by `routing.select`, so biases and groups mean something.
    scaled: gates are what `gate_scale` makes of them; else they sum to 1. sparse: in training most of its places hold nothing,
    so that experts are given the others only.
    """

    every: bool = False
    one: bool = False
    weightless: str = ""
    selects: bool = False
    scaled: bool = False
    sparse: bool = False


FACTS = {
    "topk_softmax": Facts(selects=True),
    "softmax_topk": Facts(selects=True, scaled=True),
    "soft": Facts(every=True),
    "switch": Facts(one=True, scaled=True),
    "sample_top1": Facts(one=True, scaled=True),
    "expert_choice": Facts(scaled=True, sparse=True),
    "hash": Facts(one=True, weightless="the token's id picks the expert"),
    "uniform": Facts(every=True, weightless="every expert has the same gate"),
    "oracle": Facts(one=True, weightless="the domain's label picks the expert"),
}

# How feed-forward experts are combined: what a config's `combine` may hold, beside what it is without it (CombineConfig says what each
# means), what of it makes soft merging CAMEx, and whose a layer's base is.
COMBINE: dict[str, Any] = {
    "of": "outputs",
    "base": "none",
    "train_base": True,
    "alpha": 1.0,
    "curvature": "none",
    "rank": 1,
    "share": "layer",
    "election": "none",
    "drop": 0.0,
    "update": "none",
}
BENDING = ("alpha", "curvature", "election", "drop", "update")
UPDATES = ("none", "travel", "previous_merged", "per_layer")

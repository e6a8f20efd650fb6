"""Branch-Train-Merge's ensemble (arXiv:2208.03306): domain models side by side, each weighed by how well it has predicted so far.

Shapes: N models, B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evals.perplexity import FREE, Scorer, Steering


def ensemble_nats(nats_NBS: Tensor, top_k: int | None = None) -> Tensor:
    """(B, S) nats of each label under the ensemble, from those under each of its models, in float64.

        p(x_t | x_<t) = Σ_e w_e(t) p_e(x_t | x_<t),   w_e(t) ∝ (1/N) Π_{s<t} p_e(x_s | x_<s)     (arXiv:2208.03306)

    The posterior w is that of the window alone: it starts uniform at each window's first label. top_k: only so many models
    of the largest posterior count, their weights scaled to sum to 1; equal ones in the models' order. A label of 0 nats
    under every model (padding) has 0 nats and moves no weight.
    Differs: the prior is uniform, where the paper also averages posteriors over development text (its cached prior); nothing
    but the window is known here, as for every other model.
    """
    nats_NBS = nats_NBS.double()
    before_NBS = torch.cat([torch.zeros_like(nats_NBS[..., :1]), nats_NBS[..., :-1].cumsum(-1)], -1)
    weights_NBS = (-before_NBS).log_softmax(0)
    if top_k is not None and top_k < len(nats_NBS):
        order_NBS = weights_NBS.argsort(dim=0, descending=True, stable=True)
        left_out = torch.zeros_like(weights_NBS, dtype=torch.bool).scatter_(0, order_NBS[top_k:], True)
        weights_NBS = weights_NBS.masked_fill(left_out, -torch.inf).log_softmax(0)
    return -(weights_NBS - nats_NBS).logsumexp(0)


class Ensemble(nn.Module):
    """Called as a Scorer is; every model sees every batch, so all parameters are active whatever top_k says."""

    def __init__(self, scorers: Sequence[Scorer], top_k: int | None = None):
        super().__init__()
        self.scorers, self.top_k = nn.ModuleList(scorers), top_k

    def forward(self, inputs_BS: Tensor, labels_BS: Tensor, steering: Steering = FREE) -> tuple[Tensor, None]:
        """(B, S) nats of every label, 0 where IGNORED; an ensemble has no routers."""
        nats_NBS = torch.stack([scorer(inputs_BS, labels_BS)[0].double() for scorer in self.scorers])
        return ensemble_nats(nats_NBS, self.top_k), None

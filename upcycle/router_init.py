"""The first weights of routers: drawn, or pointing towards the texts of their experts.

Shapes: D hidden, E experts, N sources of experts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from upcycle.router_config import InitConfig

ROUNDING = 1e-5  # of the means' size: a difference below it is fp32's


def drawn_rows(shape: Sequence[int], target: str, init: InitConfig, rng_seed: int) -> Tensor:
    """(E, D) rows that no text was needed for; draws depend on (rng_seed, target, a tensor's name) only, not on order.

    normal      N(0, std²) entries; a row's norm is about std · √D
    zeros       every expert alike: gates are equal, and of a top-k router's ties the kernel decides
    orthogonal  rows at right angles, each of norm std · √D, the frame uniform among all (Q of a normal draw's QR)

    Raises ValueError: more orthogonal rows than dimensions.
    """
    experts, hidden = shape
    if init.kind == "zeros":
        return torch.zeros(experts, hidden)
    key = hashlib.sha256(f"{rng_seed}/{target}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
    if init.kind == "orthogonal":
        if experts > hidden:
            raise ValueError(
                f"init.kind=orthogonal: {experts} experts cannot have rows at right angles in a hidden size of {hidden}; write "
                "init.kind=normal"
            )
        rows = torch.empty(experts, hidden)
        return torch.nn.init.orthogonal_(rows, gain=init.std * math.sqrt(hidden), generator=generator)
    assert init.kind == "normal", init.kind
    return torch.randn(experts, hidden, generator=generator) * init.std


def rows_towards(means_ND: Tensor, std: float) -> Tensor:
    """(N, D) fp32: row n points from the mean of all texts to the mean of source n's, μ_n, and has norm std · √D.

        w_n = std · √D · c_n / ‖c_n‖,    c_n = (I − m mᵀ) (μ_n − μ),    μ = mean_n μ_n,    m = μ / ‖μ‖

    Why not W = (μ_1 … μ_N) itself:
    - Hidden states share a large part, and differ in size from layer to layer: raw rows give gates of 0 and 1. What the
      rows share does nothing, softmax((W − 1 vᵀ) x) = softmax(W x − (vᵀx) 1) = softmax(W x), and neither does it change
      the order of logits; so μ goes.
    - A router has no bias. A token x = μ + … would give every row the constant c_n · μ, and one expert would take
      (almost) everything; rows at right angles to μ give the mean token N equal logits, all 0.
    - With rows of one length each source's own mean has its largest logit at its own row, whatever the geometry:
      w_k · μ_n = std √D ‖c_n‖ cos(c_k, c_n), largest at k = n. Without, a long row can beat a short one at home.
    A row's norm is that of a normal draw, so `std` means the same for every kind; a token's logit is std · √D times its
    extent along the row. Logits are larger than drawn rows give, since text lies along these rows.
    Differs: mergekit takes μ_n / ‖μ_n‖, averages over padding, and leaves the shared part in.
    A source whose mean differs from that of all by no more than rounding has no direction: its row is zeros.
    """
    means_ND = means_ND.double()
    mean_D = means_ND.mean(0)
    size = means_ND.norm(dim=1).mean()
    centred_ND = means_ND - mean_D
    direction_D = mean_D / mean_D.norm().clamp_min(torch.finfo(torch.float64).tiny)
    centred_ND -= (centred_ND @ direction_D)[:, None] * direction_D
    norms_N = centred_ND.norm(dim=1)
    lengths_N = torch.where(norms_N > ROUNDING * size, std * math.sqrt(means_ND.shape[1]) / norms_N, 0.0)
    return (lengths_N[:, None] * centred_ND).float()

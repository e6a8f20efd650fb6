"""What the expert kernels of transformers get to see of the experts' weights.

This file travels inside checkpoints as remote code: it imports nothing else of ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _SeenExperts:
    """Stands in for an experts module: its parameters cast to `dtype`, the last bias as `share` of it.

    Under tensor parallelism every rank adds the bias that follows its part of down_proj. The share changes the value
    alone: the bias is whole on each rank, so its gradient has to be whole as well.
    """

    def __init__(self, experts: nn.Module, dtype: torch.dtype, share: float):
        self._experts, self._dtype, self._share = experts, dtype, share

    def __getattr__(self, name: str):
        value = getattr(self._experts, name)
        if name == "down_proj_bias" and self._share < 1:
            value = self._share * value.detach() + (value - value.detach())
        return value.to(self._dtype) if isinstance(value, Tensor) else value


GROUPED_BYTES = 16  # torch's grouped_mm wants rows of a multiple of these


def shown_to_kernels(experts_class: Any) -> Any:
    """Give the expert kernels weights of autocast's dtype: grouped_mm is not on autocast's list and would run in fp32.

    Experts of a width that grouped_mm refuses (small shards) run one after the other, as with "eager".
    """
    chosen = experts_class.forward
    plain = chosen.__wrapped__  # what transformers' decorator takes for "eager"

    def forward(self, hidden_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        device, dtype = hidden_TD.device.type, hidden_TD.dtype
        share = self.down_proj.shape[-1] / self.intermediate_dim if self.has_bias else 1.0
        autocast = torch.is_autocast_enabled(device)
        if autocast:
            dtype = torch.get_autocast_dtype(device)
        odd = self.down_proj.shape[-1] * dtype.itemsize % GROUPED_BYTES
        inner = plain if odd and self.config._experts_implementation == "grouped_mm" else chosen
        if share == 1 and not autocast:
            return inner(self, hidden_TD, experts_TK, gates_TK.to(dtype))
        return inner(_SeenExperts(self, dtype, share), hidden_TD.to(dtype), experts_TK, gates_TK.to(dtype))

    experts_class.forward = forward
    return experts_class

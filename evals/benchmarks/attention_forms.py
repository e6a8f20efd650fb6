"""Exact forms of causal attention, forward and backward, beside SDPA's kernel. Runs in a side.

Shapes: B batch, H heads, S sequence, d head size.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from upcycle.cpu_kernels import causal_blocks_forward

BLOCK = 128  # queries
OFF = 0.02  # of output and gradients in norm, from the same in fp32: several roundings to bf16


class AttentionForms:
    """Exact causal attention forward and backward in several forms, in bf16. config: `shape` (B, H, S, d)."""

    def __init__(self, config: Mapping[str, Any]):
        torch.manual_seed(0)
        B, H, S, d = config["shape"]
        drawn = [torch.randn(B, S, H, d).bfloat16().transpose(1, 2) for _ in range(4)]  # as projections lie
        self.gradient, self.inputs = drawn[0], [one.requires_grad_() for one in drawn[1:]]
        self.repeats = config["steps"]
        exact = self._computed(FORMS["matmul"], [tensor.detach().float().requires_grad_() for tensor in self.inputs])
        for name, form in FORMS.items():
            for found, wanted in zip(self._computed(form, self.inputs), exact, strict=True):
                if not (found.float() - wanted).norm() <= OFF * wanted.norm():
                    raise ValueError(
                        f"{name} is not exact attention: off by more than {OFF:.0%} in output or gradients"
                    )
        self.about: dict[str, Any] = {"forms": list(FORMS)}

    def _computed(self, form: Any, inputs: list[Tensor]) -> list[Tensor]:
        """Output, and the gradients of the sum of its squares."""
        out = form(*inputs)
        return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    def measure(self) -> dict[str, float]:
        """Seconds of each form."""
        found = {}
        for name, form in FORMS.items():
            seconds = []
            for _ in range(self.repeats + 1):
                start = time.perf_counter()
                form(*self.inputs).backward(self.gradient)
                seconds.append(time.perf_counter() - start)
                for tensor in self.inputs:
                    tensor.grad = None
            found[name] = median(seconds[1:])
        return found


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def _matmul(query: Tensor, key: Tensor, value: Tensor) -> Any:
    """All scores at once."""
    length = query.shape[-2]
    above = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    return scores.masked_fill(above, float("-inf")).softmax(-1) @ value


def _blocks(query: Tensor, key: Tensor, value: Tensor, size: int = BLOCK) -> Any:
    """Blocks of queries, each against the keys up to its end: half of the scores."""
    out = []
    for start in range(0, query.shape[-2], size):
        part = query[..., start : start + size, :]
        stop = start + part.shape[-2]
        scores = (part @ key[..., :stop, :].transpose(-1, -2)) * query.shape[-1] ** -0.5
        above = torch.ones(part.shape[-2], stop, dtype=torch.bool).triu(start + 1)
        out.append(scores.masked_fill(above, float("-inf")).softmax(-1) @ value[..., :stop, :])
    return torch.cat(out, -2)


def _ours(query: Tensor, key: Tensor, value: Tensor) -> Any:
    """The kernel that training on CPUs uses."""
    return causal_blocks_forward(torch.nn.Module(), query, key, value, None)[0].transpose(1, 2)


FORMS = {"sdpa": _sdpa, "matmul": _matmul, "blocks": _blocks, "causal_blocks": _ours}

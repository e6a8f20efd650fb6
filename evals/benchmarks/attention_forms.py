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

BLOCK = 128  # queries
OFF = 0.02  # of output and gradients in norm, from the same in fp32: several roundings to bf16


class AttentionForms:
    """Exact causal attention forward and backward in several forms, in bf16. config: `shape` (B, H, S, d)."""

    def __init__(self, config: Mapping[str, Any]):
        torch.manual_seed(0)
        self.inputs = [torch.randn(config["shape"]).bfloat16().requires_grad_() for _ in range(3)]
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
                form(*self.inputs).sum().backward()
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


class _OwnBackward(torch.autograd.Function):
    """`_blocks` with the backward written out: probabilities are kept in the inputs' dtype, half of S² a head.

    dV = Pᵀ dO,  dP = dO Vᵀ,  dS = P ⊙ (dP − rowsum(P ⊙ dP)),  dQ = dS K / √d,  dK = dSᵀ Q / √d
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shape = query.shape
        queries, keys, values = (one.reshape(-1, *shape[-2:]) for one in (query, key, value))
        queries = queries * shape[-1] ** -0.5
        out, kept = torch.empty_like(queries), []
        above = torch.full((BLOCK, BLOCK), float("-inf"), dtype=query.dtype).triu_(1)
        for start in range(0, shape[-2], BLOCK):
            stop = min(start + BLOCK, shape[-2])
            scores = torch.bmm(queries[:, start:stop], keys[:, :stop].transpose(1, 2))
            scores[:, :, start:stop] += above[: stop - start, : stop - start]
            kept.append(scores.softmax(-1))
            out[:, start:stop] = torch.bmm(kept[-1], values[:, :stop])
        ctx.save_for_backward(queries, keys, values, *kept)
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        queries, keys, values, *kept = ctx.saved_tensors
        shape = gradients[0].shape
        given = gradients[0].reshape(queries.shape)
        to_queries, to_keys, to_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for number, chances in enumerate(kept):
            start, stop = number * BLOCK, chances.shape[-1]
            own = given[:, start:stop]
            to_values[:, :stop].baddbmm_(chances.transpose(1, 2), own)
            to_chances = torch.bmm(own, values[:, :stop].transpose(1, 2))
            to_scores = torch.ops.aten._softmax_backward_data(to_chances, chances, -1, chances.dtype)
            to_queries[:, start:stop] = torch.bmm(to_scores, keys[:, :stop])
            to_keys[:, :stop].baddbmm_(to_scores.transpose(1, 2), queries[:, start:stop])
        to_queries *= shape[-1] ** -0.5
        return tuple(one.view(shape) for one in (to_queries, to_keys, to_values))


FORMS = {"sdpa": _sdpa, "matmul": _matmul, "blocks": _blocks, "blocks_own_backward": _OwnBackward.apply}

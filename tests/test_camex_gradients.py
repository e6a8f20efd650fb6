"""The gradients that docs/camex.md derives, against autograd through the layers."""

from __future__ import annotations

import pytest
import reference
import torch
from torch import Tensor

from tests.test_camex import EXPERTS, FORMS, layers_of, maps_of, mixture_of
from upcycle.kronecker import FACTORS
from upcycle.router import RoutingTrace

NAME, ALPHA = "down_proj", 0.9
SCORES = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], dtype=torch.float64)  # two decisions


def upstream(merged: list[Tensor]) -> tuple[Tensor, list[list[Tensor]]]:
    """A loss of every layer's merged experts (N, O, I), and G_n = ∂L/∂Ê_n of each."""
    generator = torch.Generator().manual_seed(4)
    targets = [torch.randn(one.shape, generator=generator, dtype=torch.float64) for one in merged]
    loss = sum(0.5 * (one - target).square().sum() for one, target in zip(merged, targets, strict=True))
    return loss, [list((one - target).detach()) for one, target in zip(merged, targets, strict=True)]


def contracted(gradient: Tensor, factors: dict[str, Tensor], which: str) -> Tensor:
    """∂L/∂factor from ∂L/∂M as a full matrix (O·I, O·I): one index pair kept, the others summed with the other factors."""
    sizes = [factors[name].shape[0] for name in FACTORS]
    view, letters, given = gradient.view(*sizes, *sizes), "abcd", []
    for name, letter in zip(FACTORS, letters, strict=True):
        if name != which:
            given.append((f"{letter}{letter.upper()}", factors[name]))
    kept = letters[FACTORS.index(which)]
    pattern = ",".join(["abcdABCD", *[pair for pair, _ in given]]) + f"->{kept}{kept.upper()}"
    return torch.einsum(pattern, view, *[one for _, one in given])


@pytest.mark.parametrize("update", ["none", "travel"])
def test_the_derived_gradients_are_autograds(update):
    form = FORMS["ca"] | {"alpha": ALPHA, "update": update}
    model = mixture_of(form, "gpt_neox")
    layers, trace = layers_of(model), RoutingTrace()
    merged, bases, taus = [], [], []
    for layer in layers:
        base, delta = layer.experts.weights(trace)
        merged.append(base[NAME] + torch.einsum("ne,eoi->noi", SCORES, delta[NAME]))
        bases.append(base[NAME].detach())
        taus.append(getattr(layer.experts, NAME).detach() - base[NAME].detach())
    loss, G = upstream(merged)
    loss.backward()
    maps = [maps_of(model, layer, "down", 0) for layer in layers]
    maps = [[one.detach() for one in of_layer] for of_layer in maps]

    def back(place: int, gradient: Tensor, expert: int) -> Tensor:
        return (maps[place][expert].T @ gradient.flatten()).view_as(gradient)

    H = torch.zeros_like(bases[0])  # ∂L/∂B of the layer after
    count = len(EXPERTS)
    for place in reversed(range(len(layers))):
        own = dict(layers[place].experts.named_parameters(recurse=False))
        for expert in range(count):
            of_merged = ALPHA * sum(s[expert] * one for s, one in zip(SCORES, G[place], strict=True))
            reaching = of_merged + ALPHA / count * H if update == "travel" else of_merged
            whole = torch.outer(reaching.flatten(), taus[place][expert].flatten())
            factors = {name: own[f"curvature_down_{name}"].detach()[expert, 0, 0] for name in FACTORS}
            torch.testing.assert_close(maps[place][expert], reference.kronecker_map([list(factors.values())]))
            for name in FACTORS:
                found = own[f"curvature_down_{name}"].grad[expert, 0, 0]
                torch.testing.assert_close(found, contracted(whole, factors, name), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(own[NAME].grad[expert], back(place, reaching, expert), rtol=1e-9, atol=1e-9)
        direct = sum(
            one - ALPHA * sum(s[e] * back(place, one, e) for e in range(count))
            for s, one in zip(SCORES, G[place], strict=True)
        )
        through = H - ALPHA / count * sum(back(place, H, e) for e in range(count)) if update == "travel" else 0
        H = direct + through
        if f"base_{NAME}" in own:
            torch.testing.assert_close(own[f"base_{NAME}"].grad, H, rtol=1e-9, atol=1e-9)
    assert ("base_down_proj" in dict(layers[1].experts.named_parameters())) == (update == "none")

"""Models of random weights to measure, in the process that measures them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from evals.benchmarks.shapes import EXPERTS
from upcycle.api import preset
from upcycle.assembly import placed_experts, upcycled_config
from upcycle.cost import Shape
from upcycle.families import family_of
from upcycle.modeling import UpcycledForCausalLM

logging.set_verbosity_error()
logging.disable_progress_bar()
BRANCHES = ("code", "law", "math")
PROBE_TOKENS = 64  # on which two sides show that they compute the same


def built(config: Mapping[str, Any]) -> Any:
    """The model that a side's config names, in fp32.

    `directory`: read from there. `sizes`: drawn, a dense one, or the mixture that the preset `method` makes of it and three
    branches, with as many `experts` and `top_k` as those say.
    """
    if "directory" in config:
        return AutoModelForCausalLM.from_pretrained(config["directory"], dtype=torch.float32)
    torch.manual_seed(0)
    sizes = dict(config["sizes"])
    seed = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    if "method" not in config:
        return AutoModelForCausalLM.from_config(seed, dtype=torch.float32)
    mixture = mixture_config(seed, config["method"], config.get("experts", EXPERTS), config.get("top_k"))
    return UpcycledForCausalLM._from_config(mixture, dtype=torch.float32)


def mixture_config(seed: Any, method: str, experts: int, top_k: int | None) -> Any:
    choice = preset(method)
    if top_k is not None:
        choice = replace(choice, router=replace(choice.router, top_k=top_k))
    branches = [*BRANCHES, *[f"domain{number}" for number in range(len(BRANCHES), experts)]][: experts - 1]
    return upcycled_config(seed, placed_experts(seed, branches, choice), choice)


def about(model: Any, length: int) -> dict[str, Any]:
    """What a side says of its model. routers: parameters of all routers. flops: of training, a token, by cost.py."""
    shape = Shape.of_config(model.config.to_dict())
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "planned_parameters": shape.parameters,
        "active_parameters": shape.active_parameters,
        "routers": shape.router_rows * shape.hidden,
        "flops_per_token": shape.train_flops_per_token(length),
    }


@torch.no_grad()
def probe(model: Any) -> list[float]:
    """Logits of the last tokens of a fixed text, in fp32 and evaluation mode."""
    was_training = model.training
    model.eval()
    ids = torch.arange(3, 3 + PROBE_TOKENS).mul(37).remainder(model.config.vocab_size).unsqueeze(0)
    logits = model(ids).logits[0, -2:].float().flatten()
    model.train(was_training)
    return logits.tolist()


def write_btx(config: Mapping[str, Any]) -> dict[str, Any]:
    """A BTX mixture and the same as transformers' Mixtral, below `folder`. config: as in `built`."""
    from upcycle.exporting import export

    folder = Path(config["folder"])
    mixture = built(config | {"method": "btx"})
    mixture.save_pretrained(folder / "mixture")
    written = export(folder / "mixture", folder / "native")
    return {"format": written.format, "difference": written.difference}


def decoder_layers(model: Any) -> Any:
    """The layers of a mixture's decoder, or of a dense model."""
    if isinstance(model, UpcycledForCausalLM):
        return getattr(model.model.decoder, family_of(model.config.seed).layers)
    return getattr(model.base_model, family_of(model.config).layers)


def cache_tensors(cache: Any) -> list[Tensor]:
    """The keys and values of a transformers cache."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]

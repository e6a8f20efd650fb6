"""What the tensors of a dense model are: which role each has, in which layer, and along which axis a linear's inputs lie."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from upcycle.merge_config import Role

# By a word in the name of the class of the module that holds the tensor, or of one around it; the innermost counts.
HOLDERS: tuple[tuple[str, Role], ...] = (("Attention", "attention"), ("MLP", "mlp"))


@dataclass(frozen=True)
class TensorFacts:
    """layer: None outside of the layers. in_axis: as in `merging.Merging`."""

    role: Role
    layer: int | None = None
    in_axis: int | None = None


UNKNOWN = TensorFacts("other")  # of a tensor that the class does not have as a parameter


def tensor_facts(config: Any) -> dict[str, TensorFacts]:
    """Of every parameter of the class that the config belongs to, by the name that a checkpoint has it under. Memory: none."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head, found = model.get_output_embeddings(), {}
    roles: dict[str, Role] = {}
    for name, module in model.named_modules():
        around = roles.get(name.rpartition(".")[0], "other")
        roles[name] = _role(module, module is head, around)
        for parameter, tensor in module.named_parameters(recurse=False):
            full = f"{name}.{parameter}"
            inside = re.search(r"\.(\d+)\.", full)
            linear = parameter == "weight" and isinstance(module, (nn.Linear, Conv1D)) and id(tensor) not in embedded
            in_axis = int(isinstance(module, nn.Linear)) if linear else None
            found[full] = TensorFacts(roles[name], int(inside[1]) if inside else None, in_axis)
    return found


def _role(module: nn.Module, is_head: bool, around: Role) -> Role:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if is_head:
        return "head"
    kind = type(module).__name__
    if "Norm" in kind:
        return "norm"
    for word, role in HOLDERS:
        if word in kind:
            return role
    return around

"""What a Hugging Face decoder calls its parts. Supporting a family is one entry in FAMILIES.

This file travels inside checkpoints as remote code: it imports nothing else of ours.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

Role = Literal["query", "key", "value", "fused", "output"]


@dataclass(frozen=True)
class Family:
    """Names inside one family's classes.

    decoder: attribute of the causal LM that holds the decoder (also the prefix of its tensors in a checkpoint).
    attention, mlp: attributes of a decoder layer. projections: attribute of the attention -> its role; `fused` is one
    projection whose rows are ordered (head, [query, key, value], head_dim).
    gate, up, down: attributes of the MLP; `gate` is None for a plain MLP.
    """

    decoder: str
    attention: str
    projections: dict[str, Role]
    up: str
    down: str
    gate: str | None = None
    mlp: str = "mlp"

    @property
    def output(self) -> str:
        return next(name for name, role in self.projections.items() if role == "output")

    @property
    def fused(self) -> str | None:
        return next((name for name, role in self.projections.items() if role == "fused"), None)


LLAMA = Family(
    decoder="model",
    attention="self_attn",
    projections={"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"},
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
)
GPT_NEOX = Family(
    decoder="gpt_neox",
    attention="attention",
    projections={"query_key_value": "fused", "dense": "output"},
    up="dense_h_to_4h",
    down="dense_4h_to_h",
)

FAMILIES: dict[str, Family] = {"llama": LLAMA, "gpt_neox": GPT_NEOX}


def family_of(config) -> Family:
    """The family of a Hugging Face config.

    Raises ValueError: the model type has no entry.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type={config.model_type!r} is not supported; expected one of {', '.join(sorted(FAMILIES))}. "
            "To add it, describe its parts in upcycle/families.py"
        )
    return FAMILIES[config.model_type]


def key_value_heads(config) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def widened(config, queries: int, keys: int):
    """A copy of `config` for an attention with `queries` times the query heads and `keys` times the key/value heads.

    The head dimension stays; families that derive it from `hidden_size` get a hidden size to match.
    """
    wide = copy.deepcopy(config)
    size = head_dim(config)
    if hasattr(config, "num_key_value_heads"):
        wide.head_dim = size
        wide.num_key_value_heads = key_value_heads(config) * keys
    else:
        wide.hidden_size = size * config.num_attention_heads * queries
    wide.num_attention_heads = config.num_attention_heads * queries
    return wide

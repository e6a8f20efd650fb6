"""What a Hugging Face decoder calls its parts. Supporting a family is one entry in FAMILIES.

This file travels inside checkpoints as remote code: it imports nothing else of ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

Role = Literal["query", "key", "value", "fused", "output"]
ACTIVATIONS = ("act_fn", "activation_fn", "act")  # attributes of an MLP that hold its activation


@dataclass(frozen=True)
class Family:
    """Names inside one family's classes, and the few things in which families differ.

    decoder: attribute of the causal LM that holds the decoder (also the prefix of its tensors in a checkpoint).
    layers: attribute of the decoder. attention, mlp: attributes of a decoder layer.
    projections: attribute of the attention -> its role. fused_rows: how the rows of a fused projection are ordered,
    "heads" (head, [query, key, value], head_dim) or "blocks" (all queries, all keys, all values).
    norms: attribute of the attention -> "query" or "key". Absent ones (optional in some families) are fine.
    heads_first: its per-head norms see (B, heads, S, d) and not (B, S, heads, d).
    up: the projections into the MLP's hidden units, stacked in this order; gated: they are a gate and an up.
    grouped: the attention can have fewer key/value heads than query heads.
    conv1d: its linear layers store (in, out). mlp_dropout: config attribute of the dropout at the MLP's end.
    head_bias: the language-model head has one.
    """

    decoder: str = "model"
    layers: str = "layers"
    attention: str = "self_attn"
    projections: dict[str, Role] = field(
        default_factory=lambda: {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
    )
    fused_rows: Literal["heads", "blocks"] = "blocks"
    norms: dict[str, Role] = field(default_factory=lambda: {"q_norm": "query", "k_norm": "key"})
    heads_first: bool = False
    mlp: str = "mlp"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    gated: bool = True
    grouped: bool = True
    conv1d: bool = False
    mlp_dropout: str | None = None
    head_bias: bool = False

    @property
    def output(self) -> str:
        return next(name for name, role in self.projections.items() if role == "output")

    @property
    def fused(self) -> str | None:
        return next((name for name, role in self.projections.items() if role == "fused"), None)


LLAMA = Family()
GEMMA3 = replace(LLAMA, heads_first=True)
STABLELM = replace(LLAMA, heads_first=True, norms={"q_layernorm": "query", "k_layernorm": "key"})
GLM4 = replace(LLAMA, up=("gate_up_proj",))
PHI3 = replace(GLM4, projections={"qkv_proj": "fused", "o_proj": "output"})
NEMOTRON = replace(LLAMA, up=("up_proj",), gated=False)
STARCODER2 = replace(LLAMA, up=("c_fc",), down="c_proj", gated=False, mlp_dropout="residual_dropout")
PHI = replace(
    STABLELM,
    projections={"q_proj": "query", "k_proj": "key", "v_proj": "value", "dense": "output"},
    up=("fc1",),
    down="fc2",
    gated=False,
    head_bias=True,
)
GPT_NEOX = Family(
    decoder="gpt_neox",
    attention="attention",
    projections={"query_key_value": "fused", "dense": "output"},
    fused_rows="heads",
    up=("dense_h_to_4h",),
    down="dense_4h_to_h",
    gated=False,
    grouped=False,
)
GPT2 = Family(
    decoder="transformer",
    layers="h",
    attention="attn",
    projections={"c_attn": "fused", "c_proj": "output"},
    up=("c_fc",),
    down="c_proj",
    gated=False,
    grouped=False,
    conv1d=True,
    mlp_dropout="resid_pdrop",
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "olmo2": LLAMA,
    "olmo3": LLAMA,
    "cohere": LLAMA,
    "cohere2": LLAMA,
    "granite": LLAMA,
    "smollm3": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": GEMMA3,
    "stablelm": STABLELM,
    "glm4": GLM4,
    "phi": PHI,
    "phi3": PHI3,
    "seed_oss": replace(LLAMA, mlp_dropout="residual_dropout"),
    "nemotron": NEMOTRON,
    "starcoder2": STARCODER2,
    "gpt_neox": GPT_NEOX,
    "gpt2": GPT2,
}

_NO_KEYWORDS = "its decoder does not hand keyword arguments on to its layers, so the routers' trace cannot reach them"
REFUSED: dict[str, str] = {
    "opt": "its decoder layer holds the feed-forward projections itself; there is no MLP module to replace",
    "gptj": _NO_KEYWORDS,
    "falcon": _NO_KEYWORDS,
    "bloom": _NO_KEYWORDS,
    "mpt": _NO_KEYWORDS,
}


def family_of(config) -> Family:
    """The family of a Hugging Face config: its entry, or that of the listed family whose parts it has (`parts_of`).

    Raises ValueError: transformers' code of this model type stands in the way (it says how), or it is not known.
    """
    kind = config.model_type
    if kind in FAMILIES:
        return FAMILIES[kind]
    if kind in REFUSED:
        raise ValueError(f"model_type={kind!r} is not supported: {REFUSED[kind]}; expected one of {_known()}")
    if (like := getattr(config, "parts_of", None)) in FAMILIES:
        return FAMILIES[like]
    raise ValueError(
        f"model_type={kind!r} is not in the table of families, expected one of {_known()}, or a config whose parts_of "
        "names one (assembling a mixture looks for it)"
    )


def is_listed(config) -> bool:
    """False for a family that was only found to have known parts: its mixtures are always proved."""
    return config.model_type in FAMILIES


def _known() -> str:
    return ", ".join(sorted(FAMILIES))


def candidates(config) -> list[str]:
    """Listed families, one name for each entry, that name every part of this config's classes, no more and no less.

    Raises ValueError: there are none, or the model type is refused.
    """
    if config.model_type in REFUSED:
        family_of(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError:
        raise ValueError(f"model_type={config.model_type!r} is no causal language model of transformers") from None
    entries: list[Family] = []
    names = []
    for name, family in FAMILIES.items():
        if family not in entries and _has_parts(model, family):
            entries.append(family)
            names.append(name)
    if not names:
        raise ValueError(
            f"model_type={config.model_type!r} is not supported: its layers have other parts than the families known here "
            f"({_known()}). To add it, describe its parts in upcycle/families.py"
        )
    return names


def _has_parts(model: Any, family: Family) -> bool:
    layers = getattr(getattr(model, family.decoder, None), family.layers, None)
    head = getattr(model, "lm_head", None)
    if not isinstance(layers, nn.ModuleList) or head is None or (head.bias is not None) != family.head_bias:
        return False
    for layer in layers:
        attention, mlp = getattr(layer, family.attention, None), getattr(layer, family.mlp, None)
        if attention is None or mlp is None:
            return False
        parts = {name.split(".")[0] for name, _ in attention.named_parameters()}
        if not set(family.projections) <= parts <= {*family.projections, *family.norms}:
            return False
        if {name.split(".")[0] for name, _ in mlp.named_parameters()} != {*family.up, family.down}:
            return False
        if isinstance(getattr(mlp, family.down), Conv1D) != family.conv1d:
            return False
        dropout = any("dropout" in name for name in (*vars(mlp), *dict(mlp.named_children())))
        if dropout != (family.mlp_dropout is not None):
            return False
    return True


def stacked_shapes(mlp: nn.Module, family: Family, experts: int, split: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the feed-forwards of all experts, each 1/split of `mlp`, side by side: gate_up_proj (E, 2F, D) with the gate rows
    first, or up_proj (E, F, D), and down_proj (E, D, F); gate_up_proj_bias (E, 2F), down_proj_bias (E, D) where there are biases.
    """
    ups, down = [getattr(mlp, name) for name in family.up], getattr(mlp, family.down)
    # A module that is built for ZeRO-3 has its weights partitioned already, and says what they were.
    sizes = [tuple(getattr(one.weight, "ds_shape", one.weight.shape))[:: -1 if family.conv1d else 1] for one in ups]
    rows, hidden = sum(size[0] for size in sizes), sizes[0][1]
    assert rows % split == 0, (rows, split)  # experts.place refuses such a split
    rows //= split
    first, inner = ("gate_up_proj", rows // 2) if family.gated else ("up_proj", rows)
    shapes: dict[str, tuple[int, ...]] = {first: (experts, rows, hidden), "down_proj": (experts, hidden, inner)}
    if down.bias is not None:
        shapes |= {f"{first}_bias": (experts, rows), "down_proj_bias": (experts, hidden)}
    return shapes


def key_value_heads(config) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def widened(config, queries: int, keys: int):
    """A copy of `config` for an attention with `queries` times the query heads and `keys` times the key/value heads.

    The head dimension stays, for classes that read it and for those that derive it from `hidden_size`.
    """
    wide, size = copy.deepcopy(config), head_dim(config)
    if config.hidden_size == size * config.num_attention_heads:
        wide.hidden_size = config.hidden_size * queries
    wide.num_attention_heads = config.num_attention_heads * queries
    if getattr(config, "num_key_value_heads", None):
        wide.num_key_value_heads = config.num_key_value_heads * keys
    wide.head_dim = size
    return wide


def split_fused(fused: Tensor, family: Family, config) -> dict[str, Tensor]:
    """The rows of a fused projection as those of its query, key and value."""
    if family.fused_rows == "heads":
        parts = fused.unflatten(0, (config.num_attention_heads, 3, -1))
        return {role: parts[:, place].flatten(0, 1) for place, role in enumerate(("query", "key", "value"))}
    rows = head_dim(config) * config.num_attention_heads, *[head_dim(config) * key_value_heads(config)] * 2
    return dict(zip(("query", "key", "value"), fused.split(rows), strict=True))


def join_fused(parts: dict[str, Tensor], family: Family, config) -> Tensor:
    """The inverse of `split_fused`."""
    if family.fused_rows == "heads":
        heads = [parts[role].unflatten(0, (config.num_attention_heads, -1)) for role in ("query", "key", "value")]
        return torch.stack(heads, dim=1).flatten(0, 2)
    return torch.cat([parts[role] for role in ("query", "key", "value")])


def final_logits(config, logits: Tensor) -> Tensor:
    """What a family does to its logits after the head: Cohere and Granite scale them, Gemma caps them softly."""
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = (logits / cap).tanh() * cap
    return logits


def language_model_head(model: Any) -> Callable[[Tensor], Tensor]:
    """Hidden states -> logits of a dense model or a mixture."""
    head, config = model.get_output_embeddings(), getattr(model.config, "seed", model.config)
    return lambda hidden: final_logits(config, head(hidden))

"""Turn dense language models into mixtures of experts.

    import upcycle
    upcycle.assemble(seed="A", branches={"code": "B", "math": "C"}, out="moe", method="bam")
    model = transformers.AutoModelForCausalLM.from_pretrained("moe")

Shapes, everywhere: B batch, S sequence, T tokens (B·S), D hidden, F feed-forward, E experts, K experts per token,
H heads, L layers, V vocabulary, N models being merged.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Looked up on first use: `import upcycle` must not wait for torch.
_HOMES = {
    "add_expert": "upcycle.editing",
    "assemble": "upcycle.api",
    "export": "upcycle.exporting",
    "fold": "upcycle.folding",
    "merge_models": "upcycle.merge_api",
    "preset": "upcycle.api",
    "remove_expert": "upcycle.editing",
    "to_dense": "upcycle.dense",
    "AssembleConfig": "upcycle.mixture_config",
    "RouterConfig": "upcycle.router_config",
    "TrainConfig": "upcycle.config",
    "RoutingTrace": "upcycle.router",
    "UpcycledConfig": "upcycle.configuration",
    "UpcycledForCausalLM": "upcycle.modeling",
    "UpcycledModel": "upcycle.modeling",
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "merge":  # upcycle.merge.METHODS
        return import_module("upcycle.merge")
    if name not in _HOMES:
        raise AttributeError(f"module 'upcycle' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)

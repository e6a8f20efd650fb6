"""A family that is not in the table, taken for one that is: when its parts have that one's names, and a small random
mixture of it computes what its dense model computes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from upcycle.configuration import UpcycledConfig
from upcycle.families import candidates, is_listed
from upcycle.modeling import UpcycledForCausalLM
from upcycle.pieces import plan_pieces

TOLERANCE = 1e-4  # of the largest logit, in fp32
VOCABULARY = 64
FORMS = ({"attention": "merged"}, {"attention": "mixture"}, {"attention": "mixture", "kv": "shared"})


def with_family(seed: Any) -> Any:
    """`seed`, whose family is known: listed, or written down in its `parts_of` after the checks.

    Raises ValueError: no listed family has its parts, or none of those that do passes the check.
    """
    if is_listed(seed) or getattr(seed, "parts_of", None):
        return seed
    names, problems = candidates(seed), []
    for name in names:
        problem = _problem(seed, name)
        if problem is None:
            seed.parts_of = name
            return seed
        problems.append(f"as {name}: {problem}")
    raise ValueError(
        f"model_type={seed.model_type!r} is not in the table of families (docs/families.md). Its parts have known names, but "
        f"a small mixture of it does not compute what its dense model does ({'; '.join(problems)}). To add it, describe its "
        "parts in upcycle/families.py"
    )


def _problem(seed: Any, name: str) -> str | None:
    """Why a mixture of two copies of a small random model is not that model; None if it is, in all three forms."""
    small = _small(seed, name)
    tokens = torch.arange(2, 12).view(2, 5)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        dense = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
        for parameter in dense.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # biases and norms too
        expected = dense(tokens).logits
        for choice in FORMS:
            try:
                logits = _of_copies(dense, small, choice)(tokens).logits
            except Exception as error:  # what another family's code makes of it may be anything
                return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            off = ((logits - expected).abs().max() / expected.abs().max()).item()
            if not off <= TOLERANCE:
                return f"with {choice} logits differ by {off:.1e} of the largest"
    return None


def _small(seed: Any, name: str) -> Any:
    """Two layers and few tokens; the sizes of a layer are the seed's."""
    small, layers = copy.deepcopy(seed), seed.num_hidden_layers
    for field, value in seed.to_dict().items():
        if isinstance(value, list) and len(value) == layers:  # a value a layer
            setattr(small, field, value[:2])
    small.num_hidden_layers, small.vocab_size, small.pad_token_id = min(2, layers), VOCABULARY, None
    small.parts_of = name
    return small


def _of_copies(dense: Any, seed: Any, choice: dict) -> UpcycledForCausalLM:
    config = UpcycledConfig(seed=seed.to_dict(), experts=["a", "b"], **choice)
    mixture: Any = UpcycledForCausalLM._from_config(config, dtype=torch.float32).eval()
    state, packed = dense.state_dict(), {}
    names = [name for name in state if not (name == "lm_head.weight" and config.tie_word_embeddings)]
    for piece in plan_pieces(config, names):
        if piece.origin == "fresh":
            packed[piece.target] = torch.randn(2, config.hidden_size)
            continue
        cuts: list[Tensor] = [piece.cut(state[source]) for source in piece.sources]
        packed[piece.target] = piece.stack([cuts, cuts]) if piece.stack else cuts[0]
    mixture.load_state_dict(packed, strict=False)
    mixture.tie_weights()
    routed = mixture(torch.ones(1, 2, dtype=torch.long), output_router_logits=True).router_logits
    if len(routed) != seed.num_hidden_layers:
        raise ValueError(f"the routers' trace reached {len(routed)} of {seed.num_hidden_layers} layers")
    return mixture

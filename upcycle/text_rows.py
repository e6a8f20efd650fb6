"""Rows of routers from texts: the hidden states that each router of an assembled mixture sees, expert by expert.

While the texts of a source are read, all routers are forced to its expert: no router is needed to initialise a router, and
the states are those of a dense model of the seed's class with that expert inside the merged rest.
Shapes: B batch, S sequence, D hidden, E experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from upcycle.batches import TokenArray
from upcycle.checkpoint import overwrite_tensors
from upcycle.configuration import UpcycledConfig
from upcycle.directories import TOKENIZER_FILES
from upcycle.init_texts import check_texts, domain_of
from upcycle.mixture_config import AssembleConfig
from upcycle.modeling import UpcycledForCausalLM
from upcycle.router import Router, RoutingTrace
from upcycle.router_config import InitConfig
from upcycle.router_init import rows_towards

WINDOW_TOKENS = 512
BATCH_TEXTS = 8
SPLIT = "train"  # what is measured on valid and test must not have shaped a weight
PARTS = {"router": "ffn", "attention_router": "attention"}


@dataclass(frozen=True)
class Texts:
    """The texts of one source: token ids, and what each token counts; all weights together sum to 1. said: for the record."""

    ids: list[np.ndarray]
    weights: list[np.ndarray]
    said: dict[str, Any]


def prompt_texts(prompts: Sequence[str], kind: str, tokenizer: Any) -> Texts:
    """Each prompt counts the same: by the mean over its tokens, or (hidden_last) by its last token.

    Encoded as training text is (data.encode): no special tokens, and one that is written out is ordinary text.
    """
    encoded = tokenizer(list(prompts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids, weights = [np.asarray(one, dtype=np.int64) for one in encoded], []
    for one in ids:
        places = np.arange(len(one)) == len(one) - 1 if kind == "hidden_last" else np.ones(len(one))
        weights.append(places / (max(places.sum(), 1) * len(ids)))
    return Texts(ids, weights, {"prompts": list(prompts), "tokens": sum(map(len, ids))})


def domain_texts(directory: Path, tokens: int, window_tokens: int = WINDOW_TOKENS) -> Texts:
    """`tokens` tokens of a domain's training split (all, if it has fewer), in windows spread evenly over it.

    Every token counts the same. Raises ValueError: there are no token arrays.
    """
    array = TokenArray(directory, SPLIT)
    count = min(tokens, len(array))
    size = min(window_tokens, count)
    starts = np.arange(0, count, size)
    spread = (len(array) - count) * np.arange(len(starts)) // max(len(starts) - 1, 1)
    ids = [
        np.asarray(array.tokens[start + extra : min(start + size, count) + extra], dtype=np.int64)
        for start, extra in zip(starts.tolist(), spread.tolist(), strict=True)
    ]
    digest = hashlib.sha256(np.concatenate(ids).tobytes()).hexdigest()
    said = {"split": SPLIT, "tokens": count, "windows": len(ids), "sha256": digest}
    return Texts(ids, [np.full(len(one), 1 / count) for one in ids], said)


def texts_of_routers(
    config: UpcycledConfig, choice: AssembleConfig, seed_dir: Path, data: Mapping[str, Path]
) -> dict[str, dict[str, Texts]]:
    """Of each setting of routers that start from texts, the texts of each source; a seed without any is left out.

    Raises ValueError: a source without texts (`check_texts`); texts that the model cannot read.
    """
    sources = list(dict.fromkeys(config.expert_sources))
    check_texts(choice, sources, data)
    longest = getattr(config.seed, "max_position_embeddings", None) or WINDOW_TOKENS
    found: dict[str, dict[str, Texts]] = {}
    for setting, init in choice.inits.items():
        if init.needs_prompts:
            tokenizer = _tokenizer(seed_dir, setting, init)
            found[setting] = {s: prompt_texts(init.prompts[s], init.kind, tokenizer) for s in sources}
        elif init.needs_text:
            domains = {source: domain for source in sources if (domain := domain_of(source, data))}
            window_tokens = min(WINDOW_TOKENS, longest)
            for source, domain in domains.items():
                texts = domain_texts(data[domain], init.tokens, window_tokens)
                texts.said["domain"] = domain
                found.setdefault(setting, {})[source] = texts
    for setting, by_source in found.items():
        for source, texts in by_source.items():
            _check_readable(f"{setting}.init: text {{}} of {source}", texts, longest, config.vocab_size)
    return found


def _tokenizer(seed_dir: Path, setting: str, init: InitConfig) -> Any:
    reason = f"none of {', '.join(TOKENIZER_FILES[:3])}, ... is there"
    if any((seed_dir / name).is_file() for name in TOKENIZER_FILES):  # without any, some classes make an empty one
        try:
            return AutoTokenizer.from_pretrained(seed_dir)
        except Exception as error:  # many kinds, of several libraries
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(
        f"{setting}.init.kind={init.kind} reads prompts, and the seed's tokenizer could not be loaded from {seed_dir} "
        f"({reason}); copy the tokenizer there, or write {setting}.init.kind=normal"
    ) from None


def _check_readable(which: str, texts: Texts, longest: int, vocab_size: int) -> None:
    for number, ids in enumerate(texts.ids, 1):
        if not 1 <= len(ids) <= longest:
            raise ValueError(
                f"{which.format(number)} has {len(ids)} tokens, expected 1 to {longest} (the model's "
                "max_position_embeddings); change it, or give it in pieces, each a text of its own"
            )
        if ids.max() >= vocab_size:
            raise ValueError(
                f"{which.format(number)} has the token {ids.max()}, but the model's vocabulary ends at {vocab_size - 1}; "
                "tokenise with the seed's tokenizer"
            )


def write_text_rows(directory: Path, choice: AssembleConfig, texts: dict[str, dict[str, Texts]]) -> None:
    """Overwrite the rows of routers that start from texts in an assembled mixture. Memory: the whole mixture in fp32.

    A source's row is the same for all its experts; for a seed without texts it is zeros, the logit of the mean token.
    Raises ValueError: texts that give some router no direction.
    """
    model: Any = UpcycledForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows: dict[str, Tensor] = {}
    while texts:
        setting, by_source = next(iter(texts.items()))
        init = choice.inits[setting]
        alike = [other for other in texts if choice.inits[other] == init]  # one pass for both kinds of routers
        texts = {other: found for other, found in texts.items() if other not in alike}
        routers = routers_of(model, [PARTS[other] for other in alike])
        means = {s: means_of(model, init.kind, routers, found, s) for s, found in by_source.items()}
        for name, router in routers.items():
            rows_ND = rows_towards(torch.stack([mean[name] for mean in means.values()]), init.std)
            for source, row_D in zip(means, rows_ND, strict=True):
                if not row_D.any():
                    raise ValueError(
                        f"{setting}.init.kind={init.kind}: to router {router.name} the texts of {source} look like those of all "
                        "sources together, so they give its row no direction; give other texts"
                    )
            of_source = dict(zip(means, rows_ND, strict=True))
            nothing_D = torch.zeros(model.config.hidden_size)
            sources = model.config.sources_of(router.name.split(".")[0])
            rows[f"{name}.weight"] = torch.stack([of_source.get(source, nothing_D) for source in sources])
    del model
    overwrite_tensors(directory, rows)


def routers_of(model: nn.Module, parts: Sequence[str]) -> dict[str, Router]:
    """The routers of some parts ("ffn", "attention") that have weights of their own, by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Router) and module.weight is not None and module.name.split(".")[0] in parts
    }


def means_of(model: Any, kind: str, routers: dict[str, Router], texts: Texts, source: str) -> dict[str, Tensor]:
    """(D,) float64, of each router, the weighted mean of what it sees of a source's texts, forced to its (first) expert.

    prompt_embedding: of the tokens' input embeddings, for all routers the same. What some families multiply embeddings
    with drops out when the rows get their length; position embeddings (GPT-2) tell nothing about a text.
    """
    if kind == "prompt_embedding":
        vectors_VD = model.model.get_input_embeddings().weight.detach()
        mean_D = torch.zeros(vectors_VD.shape[1], dtype=torch.float64)
        for ids_S, weights_S in zip(texts.ids, texts.weights, strict=True):
            mean_D += torch.from_numpy(weights_S) @ vectors_VD[torch.from_numpy(ids_S)].double()
        return dict.fromkeys(routers, mean_D)
    expert = {part: model.config.sources_of(part).index(source) for part in model.config.parts}
    return mean_hidden(model, routers, texts, expert)


@torch.no_grad()
def mean_hidden(model: Any, routers: dict[str, Router], texts: Texts, expert: dict[str, int]) -> dict[str, Tensor]:
    """(D,) float64 Σ weight · x over all tokens, x the input of each router with all tokens forced to `expert`, by part."""
    sums = {name: torch.zeros(model.config.hidden_size, dtype=torch.float64) for name in routers}
    for start in range(0, len(texts.ids), BATCH_TEXTS):
        batch = range(start, min(start + BATCH_TEXTS, len(texts.ids)))
        shape = (len(batch), max(len(texts.ids[n]) for n in batch))
        ids_BS, mask_BS = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        weights_BS = torch.zeros(shape, dtype=torch.float64)
        for row, n in enumerate(batch):
            length = len(texts.ids[n])
            ids_BS[row, :length] = torch.from_numpy(texts.ids[n])
            mask_BS[row, :length] = 1
            weights_BS[row, :length] = torch.from_numpy(texts.weights[n])

        def watch(name: str, weights_BS: Tensor):
            def add(module: nn.Module, args: tuple) -> None:
                counted_BS = weights_BS != 0  # padding may hold anything
                sums[name] += weights_BS[counted_BS] @ args[0].view(*weights_BS.shape, -1)[counted_BS].double()

            return add

        handles = [router.register_forward_pre_hook(watch(name, weights_BS)) for name, router in routers.items()]
        trace = RoutingTrace(forced=expert)
        model.model(input_ids=ids_BS, attention_mask=mask_BS, trace=trace, use_cache=False)
        for handle in handles:
            handle.remove()
    return sums


def said(choice: AssembleConfig, texts: dict[str, dict[str, Texts]]) -> dict[str, Any]:
    """How the routers started, for assembly.json."""
    return {
        setting: {"kind": init.kind, "std": init.std}
        | ({"texts": {s: found.said for s, found in texts[setting].items()}} if setting in texts else {})
        for setting, init in choice.inits.items()
    }

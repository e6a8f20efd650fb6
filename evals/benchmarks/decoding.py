"""Decoding: a BAM mixture with shared keys and values against its seed, by the weights that a token reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from evals.benchmarks import checks, limits
from evals.benchmarks.rows import Row, compared, unscored
from evals.benchmarks.shapes import largest
from evals.benchmarks.sides import Bench, SideFailed, alternate

BATCHES = (1, 16)
PROMPT, TOKENS = 64, 32  # of each sequence: given, and decoded in a round
METHOD = "bam_shared_kv"


def write_copies(config: Mapping[str, Any]) -> dict[str, Any]:
    """A seed, and the mixture of copies of it, below `folder`: the mixture's logits are the seed's."""
    import torch

    from evals.benchmarks.models import BRANCHES, built
    from upcycle.api import preset
    from upcycle.assembly import write_mixture

    folder = Path(config["folder"])
    seed = built(config).to(torch.bfloat16)
    seed.save_pretrained(folder / "seed")
    (folder / "mixture").mkdir()
    write_mixture(folder / "seed", dict.fromkeys(BRANCHES, folder / "seed"), folder / "mixture", preset(METHOD))
    return {}


class DecodeSide:
    """Greedy decoding in bf16, a token at a time. config: `directory`, `batch`, `prompt`, `tokens`."""

    def __init__(self, config: Mapping[str, Any]):
        import torch

        from evals.benchmarks.models import built, probe

        self.config, self.torch = config, torch
        model = built(config)
        self.about: dict[str, Any] = {"probe": probe(model)}
        self.model = model.to(torch.bfloat16).eval()
        generator = torch.Generator().manual_seed(0)
        shape = (config["batch"], config["prompt"])
        self.prompt = torch.randint(3, model.config.vocab_size, shape, generator=generator)
        whole = {parameter.data_ptr(): parameter for parameter in model.parameters()}  # a tied one is read once
        self.read = sum(map(_bytes, whole.values())) - self._left()

    def _decode(self) -> tuple[list[float], Any]:
        """Seconds of each token; the cache."""
        seconds = []
        with self.torch.no_grad():
            out = self.model(self.prompt, use_cache=True)
            for _ in range(self.config["tokens"]):
                ids = out.logits[:, -1:].argmax(-1)
                start = time.perf_counter()
                out = self.model(ids, past_key_values=out.past_key_values, use_cache=True)
                seconds.append(time.perf_counter() - start)
        return seconds, out.past_key_values

    def _left(self) -> int:
        """Bytes of experts that no sequence of the batch takes, on average over the tokens: what their routers really choose."""
        from upcycle.modeling import StackedExperts

        experts = [module for module in self.model.modules() if isinstance(module, StackedExperts)]
        if not experts:
            return 0
        counts: list[int] = []

        def count(_module: Any, inputs: tuple) -> None:
            counts.append(len(self.torch.unique(inputs[1])))

        hooks: list[Any] = [module.register_forward_pre_hook(count) for module in experts]
        self._decode()
        for hook in hooks:
            hook.remove()
        del counts[: len(experts)]  # those of the prompt
        stacked = sum(_bytes(parameter) for module in experts for parameter in module.parameters())
        share = sum(counts) / len(counts) / experts[0].num_experts
        return round(stacked * (1 - share))

    def measure(self) -> dict[str, Any]:
        from evals.benchmarks.models import cache_tensors

        seconds, cache = self._decode()
        return {
            "seconds": median(seconds[2:]),
            "cache_bytes": sum(map(_bytes, cache_tensors(cache))),
            "weight_bytes": self.read,
        }


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()


def shared_kv(bench: Bench) -> Iterator[Row]:
    """Seconds a token, against the seed's times the bytes of weights that the mixture reads for each of the seed's."""
    size, name, unit = largest(bench.quick), "decode_bam_shared_kv", "s a token"
    folder = bench.folder / "decoding"
    folder.mkdir()
    try:
        bench.once("decoding:write_copies", {"folder": str(folder), "sizes": size.seed})
    except SideFailed as error:
        yield unscored(name, size.name, unit, str(error))
        return
    for batch in BATCHES:
        config = {"batch": batch, "prompt": 8 if bench.quick else PROMPT, "tokens": 4 if bench.quick else TOKENS}
        sides = {
            who: bench.side("decoding:DecodeSide", config | {"directory": str(folder / who)}, keeps_freed_memory=True)
            for who in ("mixture", "seed")
        }
        found, case = alternate(sides, bench.rounds), f"{size.name}, batch {batch}"
        try:
            ours, seed = found.pair("mixture", "seed", "seconds")
            checks.same_logits(found.ready["mixture"], found.ready["seed"], "the seed")
            caches, weights = (
                found.pair("mixture", "seed", "cache_bytes"),
                found.pair("mixture", "seed", "weight_bytes"),
            )
            if caches[0] != caches[1]:
                raise SideFailed(f"the mixture's cache has {caches[0][0]:,.0f} bytes, the seed's {caches[1][0]:,.0f}")
            more = weights[0][0] / weights[1][0]
            limit = limits.of_memory(bench, weights[0][-1] / ours[-1])
            note = f"{more:.2f} times the seed's weights a token, {median(ours) / median(seed):.2f} times its seconds; cache {caches[0][0]:,.0f} bytes, the seed's"
            yield compared(
                name, case, ours, [more * one for one in seed], unit, less_is_better=True,
                checked="same logits and bytes of cache", limit=limit, note=note,
            )  # fmt: skip
        except SideFailed as error:
            yield unscored(name, case, unit, str(error))


BENCHMARKS: dict[str, Callable[[Bench], Iterator[Row]]] = {"shared_kv": shared_kv}

"""Training steps: BTX against Mixtral and dense models, BAM against a dense model, dense against the matmul peak."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from evals.benchmarks import checks, limits
from evals.benchmarks.rows import Row, compared, unscored
from evals.benchmarks.shapes import EXPERTS, TOP_K, Size, largest, neox, sizes
from evals.benchmarks.sides import Bench, Rounds, Side, SideFailed, alternate

UNIT = "tokens/s"
IMPLEMENTATIONS = ("grouped_mm", "eager")  # batched_mm copies every token's expert: 11 GB for the small model's batch
STEPS = {True: 5, False: 2}  # timed in a round, of a model that stays in memory, or not
# Moments appear at the end of the first step; kernels are compiled and memory is taken in the first few.
WARM_UP = {True: 8, False: 2}
COMPILING = {"compile": True, "warm_up": 3}  # steps in which torch compiles, and finds what it has to compile again


def tokens_of(bench: Bench, size: Size) -> Path:
    """Random tokens as prepare_data leaves them, more than a benchmark trains on."""
    import numpy as np

    folder = bench.folder / f"tokens-{size.seed['vocab_size']}"
    if not folder.exists():
        folder.mkdir()
        count = 64 * size.tokens
        tokens = np.random.default_rng(0).integers(0, size.seed["vocab_size"], count).astype(np.uint32)
        for part, array in (("tokens", tokens), ("offsets", np.array([0, count])), ("bytes", np.array([count]))):
            np.save(folder / f"train.{part}.npy", array)
    return folder


def config_of(bench: Bench, size: Size, **more: Any) -> dict[str, Any]:
    """Of a side of training_sides."""
    data = {"data": str(tokens_of(bench, size)), "sequences": size.sequences, "length": size.length}
    return (
        data
        | {"sizes": size.seed, "steps": 1 if bench.quick else STEPS[size.held], "warm_up": WARM_UP[size.held]}
        | more
    )


def in_our_loop(bench: Bench, size: Size, **more: Any) -> Side:
    return bench.side("training_sides:LoopSide", config_of(bench, size, **more), keeps_freed_memory=True)


def row_of(
    bench: Bench, name: str, case: str, found: Rounds, ours: str, peer: str, check: Callable[[], None], note: str = "",
    checked: str = "parameters in number, as cost.py plans them",
) -> Row:  # fmt: skip
    """tokens/s of two sides; a side that failed, or fails the check, is not scored."""
    try:
        pair = found.pair(ours, peer, "tokens_per_second")
        check()
        limit = limits.of_training(bench, found.ready[ours], *found.answers[ours])
        return compared(name, case, *pair, UNIT, checked=checked, limit=limit, note=note)
    except SideFailed as error:
        return unscored(name, case, UNIT, str(error))


def btx(bench: Bench) -> Iterator[Row]:
    """Against transformers' Mixtral of the same weights as a user gets it, and tuned; against dense of equal active parameters."""
    for size in sizes(bench.quick):
        folder = bench.folder / f"btx-{size.name.replace(' ', '')}"
        folder.mkdir()
        try:
            made = bench.once("models:write_btx", {"folder": str(folder), "sizes": size.seed, "top_k": TOP_K})
            if made["format"] != "mixtral":
                raise SideFailed(f"the mixture was exported as {made['format']}, not as Mixtral")
        except SideFailed as error:
            yield unscored("train_btx_default", size.name, UNIT, str(error))
            continue
        native = config_of(bench, size, directory=str(folder / "native"))
        sides = {
            "ours": in_our_loop(bench, size, directory=str(folder / "mixture")),
            "default": bench.side("training_sides:PlainSide", native),
            **{
                one: bench.side("training_sides:PlainSide", native | {"implementation": one}, keeps_freed_memory=True)
                for one in IMPLEMENTATIONS
            },
            "dense": in_our_loop(bench, size, sizes=size.wider(feed_forward=TOP_K)),
        }
        found = alternate(sides, bench.rounds_of(size.held), size.held)
        yield from _btx_rows(bench, size, found)


def _btx_rows(bench: Bench, size: Size, found: Rounds) -> Iterator[Row]:
    def is_mixtral(peer: str) -> Callable[[], None]:
        def check() -> None:
            checks.as_planned(found.ready["ours"])
            checks.same_logits(found.ready["ours"], found.ready[peer], peer)
            checks.same_first_step(found.answers["ours"], found.answers[peer], peer)

        return check

    def rate(side: str) -> float:
        return median(answer["tokens_per_second"] for answer in found.answers[side])

    chosen = found.ready.get("default", {}).get("implementation")
    note = f"experts {chosen}, as transformers takes them"
    same = "same logits; loss and gradients of the first step"
    yield row_of(bench, "train_btx_default", size.name, found, "ours", "default", is_mixtral("default"), note, same)
    working = [one for one in IMPLEMENTATIONS if one not in found.failed] or list(IMPLEMENTATIONS)
    best = max(working, key=lambda one: rate(one) if found.answers[one] else 0.0)
    failed = "".join(f"; {one} FAILED: {found.failed[one]}" for one in IMPLEMENTATIONS if one in found.failed)
    note = f"experts {best}, the faster of {' and '.join(working)}; our allocator setting{failed}"
    yield row_of(bench, "train_btx_tuned", size.name, found, "ours", best, is_mixtral(best), note, same)
    equal = _equal_active(found, "ours", "dense")
    yield row_of(bench, "train_btx_dense", size.name, found, "ours", "dense", equal)


def _equal_active(found: Rounds, mixture: str, dense: str) -> Callable[[], None]:
    def check() -> None:
        checks.as_planned(found.ready[mixture])
        checks.same_size(found.ready[mixture], found.ready[dense])

    return check


def btx_compiled(bench: Bench) -> Iterator[Row]:
    """Every decoder layer through torch.compile, ours and the dense model's; and against ours without."""
    size = sizes(bench.quick)[0]
    mixture: dict[str, Any] = {"method": "btx", "top_k": TOP_K}
    sides = {
        "ours": in_our_loop(bench, size, **mixture, **COMPILING),
        "plain": in_our_loop(bench, size, **mixture),
        "dense": in_our_loop(bench, size, sizes=size.wider(feed_forward=TOP_K), **COMPILING),
    }
    found = alternate(sides, bench.rounds)
    equal = _equal_active(found, "ours", "dense")
    yield row_of(bench, "train_btx_compiled", size.name, found, "ours", "dense", equal)

    def same() -> None:
        checks.same_first_step(found.answers["ours"], found.answers["plain"], "uncompiled")

    note, checked = "compiled against uncompiled", "loss and gradients of the first step"
    yield row_of(bench, "train_btx_compile_gain", size.name, found, "ours", "plain", same, note, checked)


def bam(bench: Bench) -> Iterator[Row]:
    """Against a dense model with the heads of all experts, and the feed-forward of one."""
    for size in sizes(bench.quick):
        sides = {
            "ours": in_our_loop(bench, size, method="bam"),
            "dense": in_our_loop(bench, size, sizes=size.wider(heads=EXPERTS)),
        }
        found = alternate(sides, bench.rounds_of(size.held), size.held)
        yield row_of(bench, "train_bam_dense", size.name, found, "ours", "dense", _equal_active(found, "ours", "dense"))


def attention_forms(bench: Bench) -> Iterator[Row]:
    """Other exact forms of BAM's attention against SDPA, forward and backward."""
    for size in sizes(bench.quick):
        heads = EXPERTS * size.seed["num_attention_heads"]
        head_size = size.seed["hidden_size"] // size.seed["num_attention_heads"]
        config = {"shape": [size.sequences, heads, size.length, head_size], "steps": 1 if bench.quick else 5}
        side = bench.side("attention_forms:AttentionForms", config, keeps_freed_memory=True)
        found = alternate({"all": side}, bench.rounds)
        for form in found.ready.get("all", {"forms": ["other forms"]})["forms"]:
            if form == "sdpa":
                continue
            name = f"bam_attention_{form}"
            try:
                pair = found.of("all", form), found.of("all", "sdpa")
                checked = "output and gradients against fp32"
                yield compared(name, size.name, *pair, "s", less_is_better=True, checked=checked, note="against SDPA")
            except SideFailed as error:
                yield unscored(name, size.name, "s", str(error))


def bam_parallel(bench: Bench) -> Iterator[Row]:
    """BAM on a seed whose attention and feed-forward run side by side, and on one where they follow each other."""
    size = sizes(bench.quick)[0]
    sides = {
        name: in_our_loop(bench, neox(size, name == "parallel"), method="bam") for name in ("parallel", "sequential")
    }
    found = alternate(sides, bench.rounds_of(size.held), size.held)

    def equal() -> None:
        one, other = (found.ready[name]["parameters"] for name in sides)
        if one != other:
            raise SideFailed(f"the parallel seed's mixture has {one:,} parameters, the sequential one's {other:,}")

    yield row_of(bench, "train_bam_parallel", f"{size.name}, GPT-NeoX", found, "parallel", "sequential", equal)


def dense_peak(bench: Bench) -> Iterator[Row]:
    """A dense branch's training against matrix products alone."""
    size, name, unit = largest(bench.quick), "train_dense_peak", "FLOP/s"
    found = alternate({"dense": in_our_loop(bench, size)}, bench.rounds_of(size.held), size.held)
    try:
        rates, peaks = found.pair("dense", "dense", "tokens_per_second")[0], found.of("dense", "peak")
        checks.as_planned(found.ready["dense"])
        flops = [found.ready["dense"]["flops_per_token"] * rate for rate in rates]
        limit = limits.of_training(bench, found.ready["dense"], *found.answers["dense"])
        checked = "parameters as cost.py plans them"
        yield compared(name, size.name, flops, peaks, unit, checked=checked, limit=limit)
    except SideFailed as error:
        yield unscored(name, size.name, unit, str(error))


def profiles(bench: Bench) -> dict[str, Mapping[str, Any]]:
    """Where the time of a step goes: shares of operators."""
    small, found = sizes(bench.quick)[0], {}
    for name, size, more in (
        ("BTX", small, {"method": "btx", "top_k": TOP_K}),
        ("dense, equal active parameters", small, {"sizes": small.wider(feed_forward=TOP_K)}),
        ("BAM", small, {"method": "bam"}),
        ("dense", largest(bench.quick), {}),
    ):
        with in_our_loop(bench, size, **more) as side, suppress(SideFailed):
            found[f"{name}, {size.name}"] = side.ask("profile")
    return found


BENCHMARKS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "btx": btx,
    "btx_compiled": btx_compiled,
    "bam": bam,
    "attention_forms": attention_forms,
    "bam_parallel": bam_parallel,
    "dense_peak": dense_peak,
}

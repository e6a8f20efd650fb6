"""Two ranks of one core each against one rank of one core, the same tokens a rank, started as `upcycle` starts groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from evals.benchmarks.rows import Row, compared, unscored
from evals.benchmarks.shapes import QUICK, SMALL, TOP_K
from evals.benchmarks.sides import LAST_WORDS, ROOT, Bench, SideFailed, environment
from evals.benchmarks.training import UNIT, config_of

RANKS, SECONDS = 2, 900
LOSS, NORM = (
    1e-5,
    0.01,
)  # shares of the first step's cross-entropy, and of its gradient's norm, by which ranks may differ from one process over the same batch


def run_ranks(bench: Bench, strategy: str, ranks: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the first of so many ranks says; alone, without a launcher. Raises SideFailed."""
    answer = bench.folder / "ranks.json"
    answer.unlink(missing_ok=True)
    child = ["-m", "evals.benchmarks.ranks", json.dumps(dict(config) | {"answer": str(answer)})]
    command = [sys.executable, *child]
    if ranks > 1:
        file = ROOT / "launch" / "accelerate" / f"{strategy}.yaml"
        options = ["--config_file", str(file), "--num_processes", str(ranks), "--num_cpu_threads_per_process", "1"]
        command = [sys.executable, "-m", "launch.groups", *options, *child]
    env = environment(1, DS_ACCELERATOR="cpu")
    try:
        ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise SideFailed(f"{ranks} ranks of {strategy} were not done after {SECONDS} s") from None
    if ended.returncode or not answer.exists():
        raise SideFailed(
            f"{ranks} ranks of {strategy} ended with exit status {ended.returncode}: {ended.stderr.strip()[-LAST_WORDS:]}"
        )
    return json.loads(answer.read_text())


def compare(bench: Bench, strategy: str) -> Iterator[Row]:
    """tokens/s of all ranks. Also that the ranks train what one process trains on the batch of all of them."""
    size, name = QUICK if bench.quick else SMALL, f"ranks_{strategy}"
    own = config_of(bench, size, method="btx", top_k=TOP_K)
    together = own | {"sequences": RANKS * size.sequences, "micro": size.sequences}
    ours, alone = [], []
    try:
        whole = run_ranks(bench, strategy, 1, together | {"steps": 1})
        for _ in range(min(bench.rounds, 3)):
            alone.append(run_ranks(bench, strategy, 1, own))
            ours.append(run_ranks(bench, strategy, RANKS, together))
        first = [(answer["first_loss"][0], answer["first_norm"]) for answer in (ours[0], whole)]
        for one, other, share in zip(*first, (LOSS, NORM), strict=True):
            if not abs(one - other) <= share * other:
                raise SideFailed(
                    f"the ranks' first step has (loss, gradient norm) {first[0]}, one process over all of it {first[1]}"
                )
        rates = [[answer["tokens_per_second"] for answer in answers] for answers in (ours, alone)]
        cores = f"cores {ours[0]['cores']}, of one rank {alone[0]['cores']}"
        checked = "loss and norm of the gradients of the first step, against one process over the whole batch"
        yield compared(
            name, size.name, *rates, UNIT, checked=checked, limit=cores, note=f"{size.tokens:,} tokens a rank"
        )
    except SideFailed as error:
        yield unscored(name, size.name, UNIT, str(error))


def ddp(bench: Bench) -> Iterator[Row]:
    yield from compare(bench, "ddp")


def zero2(bench: Bench) -> Iterator[Row]:
    yield from compare(bench, "zero2")


def main() -> None:
    """One rank: trains on one core, as training_sides.LoopSide does; the first one writes what it measured."""
    from upcycle.machine import keep_freed_memory

    config = json.loads(sys.argv[1])
    keep_freed_memory()
    cores = sorted(os.sched_getaffinity(0))
    core = cores[int(os.environ.get("LOCAL_RANK", "0")) % len(cores)]
    os.sched_setaffinity(0, {core})
    import torch

    torch.set_num_threads(1)
    from evals.benchmarks.training_sides import LoopSide
    from upcycle.team import join, leave

    team = join()
    side = LoopSide(config, team)
    loss = side.step()
    first = {"first_loss": [loss], "first_norm": side.gradient_norm}
    answer = side.measure() | first | {"cores": team.gather(core)}
    side.loop.engine.close()
    if team.leads:
        Path(config["answer"]).write_text(json.dumps(answer))
    leave()


BENCHMARKS: dict[str, Callable[[Bench], Iterator[Row]]] = {"ddp": ddp, "zero2": zero2}

if __name__ == "__main__":
    main()

"""Dense models of one seed -> one dense model, tensor by tensor, and merge.json: how, of what, and how alike they were."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from upcycle.ahead import in_order, threads_for
from upcycle.checkpoint import DTYPES, Checkpoint, CheckpointWriter, Stored, finite
from upcycle.directories import copy_companions
from upcycle.durable import write_json
from upcycle.merge import statistics_of
from upcycle.merge_config import MergeConfig
from upcycle.merge_report import Figures, MergeReport
from upcycle.merger import Merger, Statistics
from upcycle.merging import SEED, Member
from upcycle.preflight import check_alike
from upcycle.roles import UNKNOWN
from upcycle.store import ignore

AVERAGE = MergeConfig()


def write_merged(
    seed_dir: Path,
    branch_dirs: Mapping[str, Path],
    out: Path,
    config: MergeConfig = AVERAGE,
    include_seed: bool = True,
    statistics: Mapping[str, Sequence[Path]] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 4_000_000_000,
    report: bool = True,
    advance: Callable[..., None] = ignore,
) -> dict:
    """Merge into `out` (an existing directory) and return what merge.json says. Memory: a few tensors of every model, however many
    layers.

    include_seed: the seed has a share too. statistics: as in `assembly.write_mixture`. dtype: of the result (None: the
    seed's, tensor by tensor). report: also how large and how alike the branches' τ are, and where TIES sees conflict.
    Raises ValueError: checkpoints that do not fit together (`check_alike`); see `Merger`.
    """
    seed, branches = Checkpoint(seed_dir), {name: Checkpoint(path) for name, path in branch_dirs.items()}
    check_alike(seed, dict(branches))
    models = ({SEED: seed} if include_seed else {}) | branches
    curvature = {name: Statistics(*paths) for name, paths in (statistics or {}).items()}
    dense = AutoConfig.from_pretrained(seed_dir)
    merger = Merger(config, seed, dense, list(models), curvature)
    merger.check_statistics()
    merger.check_roles(seed.names)
    figures = MergeReport() if report and branches else None
    kinds = {name: getattr(torch, dtype or DTYPES[seed.stored_dtype(name)]) for name in seed.names}
    total_bytes = sum(kinds[name].itemsize * math.prod(seed.shape(name)) for name in seed.names)
    writer = CheckpointWriter(out, max_shard_bytes, total_bytes)

    def make(name: str) -> tuple[Tensor, Figures | None]:
        stored = {who: Stored(model, name) for who, model in ({SEED: seed} | models).items()}
        if merger.keeps_seed(name):
            tensor = finite(seed, name, kinds[name]).to(kinds[name])
        else:
            tensor = merger.merged(name, {who: stored[who] for who in models}, kinds[name])
        own = {who: Member(stored[who], config.weights.get(who, 1.0)) for who in branches}
        return tensor, figures.measured(own, Member(stored[SEED])) if figures else None

    # Methods that read curvature solve systems, at which torch's own threads are better.
    made = in_order(make, seed.names, most=1 if statistics_of(config) else threads_for(len(models)))
    for number, (name, (tensor, found)) in enumerate(zip(seed.names, made, strict=True)):
        writer.add(name, tensor)
        if figures is not None:
            figures.add(merger.facts.get(name, UNKNOWN), found)
        advance(number + 1, len(seed.names))
    writer.close()
    dense.name_or_path = ""  # where the seed lay is no part of the result
    if dtype:
        dense.dtype = getattr(torch, dtype)
    dense.save_pretrained(out)
    copy_companions(seed_dir, out)
    record: dict = {"merge": config.record, "models": list(models), "averaged": dict(merger.averaged)}
    record |= {"unconverged": merger.unconverged} if merger.unconverged else {}
    record |= {"curvature": {name: one.about for name, one in curvature.items()}} if curvature else {}
    record |= {"roles": figures.of_roles(), "layers": figures.rows()} if figures else {}
    write_json(out / "merge.json", record)
    return record

"""Dense models of one seed merged into one, in one call, without a config file or an artifact store."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress, TaskID

from upcycle.api import validated
from upcycle.checkpoint import Checkpoint
from upcycle.config import CurvatureConfig, SamplesConfig
from upcycle.dense_merge import write_merged
from upcycle.directories import check_new, resolve
from upcycle.durable import atomic_directory
from upcycle.merge import check_merge, learning, readers
from upcycle.merge_config import MergeConfig
from upcycle.merging import SEED
from upcycle.preflight import check_alike
from upcycle.relatedness import check_related
from upcycle.stages import learn_camex, measure_curvature
from upcycle.store import Run, ignore

RESULT_DTYPES = (None, "float32", "bfloat16", "float16")


def merge_models(
    *,
    seed: str | Path,
    branches: Mapping[str, str | Path],
    out: str | Path,
    method: str = "average",
    weights: Mapping[str, float] | None = None,
    roles: Mapping[str, Any] | None = None,
    data: Mapping[str, str | Path] | None = None,
    samples: Mapping[str, Any] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_bytes: int = 4_000_000_000,
    **options: Any,
) -> Path:
    """Merge dense models of one seed into one, in `out`, tensor by tensor, and return its path.

        upcycle.merge_models(seed="A", branches={"code": "B", "math": "C"}, out="merged", method="ties", density=0.3)

    seed, branches: Hugging Face directories with safetensors, or names on the Hub; the seed has a share too, unless `weights`
    gives it 0. method, options: one of merge.METHODS and what it takes. weights: of models by name, 1 where none is given.
    roles: another method (a name, or {"method": ..., "options": ...}) for "attention", "mlp", "norm", "embedding", "head".
    data: a folder of token arrays (`data.tokenize_domain`) for each model by name, on whose training split a method that
    reads curvature measures it; `samples`: fields of SamplesConfig, how. dtype: of the result; None is the seed's.
    The directory appears only when everything in it is written; merge.json says how it was made, and how alike the branches are.
    Warns as `assemble` does. Raises ValueError: checkpoints that do not fit together, options that are not the method's,
    curvature that cannot be measured, data that nothing reads; `out` is not new or empty.
    """
    settings = {"method": method, "options": options, "weights": dict(weights or {}), "roles": dict(roles or {})}
    config, measured = validated(MergeConfig, settings), validated(SamplesConfig, dict(samples or {}))
    start, paths = resolve(seed), {name: resolve(path) for name, path in branches.items()}
    check_merge(config, [SEED, *paths])
    read, texts = readers(config, [SEED, *paths]), {name: Path(folder) for name, folder in (data or {}).items()}
    _check_texts(config, read, texts, samples is not None)
    check_new(Path(out))
    if not paths:
        raise ValueError("branches is empty, expected at least one; give it as branches={NAME: DIR}")
    if dtype not in RESULT_DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; expected float32, bfloat16, float16, or None for the seed's")
    first, others = Checkpoint(start), {name: Checkpoint(path) for name, path in paths.items()}
    positions = first.config.get("max_position_embeddings") or first.config.get("n_positions")
    if read and isinstance(positions, int) and measured.sequence_length > positions:
        raise ValueError(
            f"samples.sequence_length={measured.sequence_length} exceeds the seed's {positions} positions; expected at most as many"
        )
    for note in [*check_alike(first, others), *check_related(first, others).warnings]:
        warnings.warn(note, stacklevel=2)
    with atomic_directory(Path(out)) as new, _progress() as advance, TemporaryDirectory(dir=new.parent) as folder:
        statistics = _measured(config, read, {SEED: start} | paths, texts, measured, Path(folder), advance)
        told = partial(advance, doing="tensors merged")
        write_merged(start, paths, new, config, True, statistics, dtype, max_shard_bytes, advance=told)
    return Path(out)


def _check_texts(
    config: MergeConfig, read: Mapping[str, Sequence[str]], texts: Mapping[str, Path], samples: bool
) -> None:
    """Raises ValueError: a model whose curvature is read has no text; text, or settings of a measurement, that nothing reads."""
    wanted = list(dict.fromkeys(name for names in read.values() for name in names))
    if absent := [name for name in wanted if name not in texts]:
        raise ValueError(
            f"merge={config.words} reads the curvature of {', '.join(wanted)}, and data has no text of {absent[0]}; give a folder of token "
            f'arrays for each, data={{"{absent[0]}": FOLDER, ...}}'
        )
    if idle := [name for name in texts if name not in wanted]:
        raise ValueError(
            f"data={{{', '.join(idle)}}} has no effect: merge={config.words} reads no curvature of it; leave it out"
        )
    if samples and not wanted:
        raise ValueError(f"samples has no effect: merge={config.words} reads no curvature; leave it out")


def _measured(
    config: MergeConfig,
    read: Mapping[str, Sequence[str]],
    models: Mapping[str, Path],
    texts: Mapping[str, Path],
    samples: SamplesConfig,
    folder: Path,
    advance: Callable[..., None],
) -> dict[str, list[Path]]:
    """The curvature of every model that the merge reads, below `folder`."""
    found: dict[str, list[Path]] = {}
    for kind, names in read.items():
        if kind == "camex":
            out = folder / kind
            out.mkdir()
            told = Run(say=ignore, advance=lambda done, total, **_: advance(done, total, doing="curvature learned"))
            own = {name: {name: 1.0} for name in names}
            learned = learning(config, names, own, samples.sequence_length, samples.rng_seed)
            branches = {name: path for name, path in models.items() if name != SEED}
            learn_camex(learned, out=out, run=told, seed=models[SEED], branches=branches, data=dict(texts))
            found |= {name: [*found.get(name, []), out / name] for name in names}
            continue
        for name in names:
            out = folder / f"{kind}-{name}"
            out.mkdir()
            settings: dict[str, Any] = {"kinds": (kind,), **asdict(samples)}
            one: dict[str, Any] = {"curvature": CurvatureConfig(**settings), "proportions": {name: 1.0}}
            run = Run(say=ignore, advance=partial(advance, doing=f"{kind} of {name}"))
            measure_curvature(one, out=out, run=run, model=models[name], data={name: texts[name]})
            found.setdefault(name, []).append(out)
    return found


@contextmanager
def _progress() -> Iterator[Callable[..., None]]:
    """A bar on a terminal: `advance(done, total, doing=...)`."""
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(done: int, total: int, doing: str = "", **_figures: Any) -> None:
            if doing not in tasks:
                tasks[doing] = bar.add_task(doing, total=total)
            bar.update(tasks[doing], completed=done)

        yield advance

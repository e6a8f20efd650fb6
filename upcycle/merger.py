"""Tensors of several checkpoints merged one at a time, by the settings of a merge; and what a model's curvature lies in.

Memory: a few copies of one tensor; what the method says of the curvature that it reads for it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from upcycle.camex_merging import camex_solved
from upcycle.checkpoint import Checkpoint, Stored, is_finite
from upcycle.curvature_merging import mats_solved
from upcycle.merge import KEPT, METHODS, OF_LINEARS, by_linears_only, check_merge, needed_statistics, readers
from upcycle.merge_config import MergeConfig, RoleConfig
from upcycle.merging import OF_MODELS, SEED, Member, Merging, Readable
from upcycle.roles import UNKNOWN, tensor_facts

SOLVERS = {"mats": mats_solved, "camex": camex_solved}  # methods that may stop before they are done
STEM = "curvature"  # of the files that `stages.measure_curvature` writes


class Statistics:
    """A model's curvature: the directory that `stages.measure_curvature` has written, or several.

    Raises ValueError: none there, or damaged.
    """

    def __init__(self, *directories: Path):
        self.directories, self._held = directories, {}
        for directory in directories:
            files = sorted(Path(directory).glob(f"{STEM}*.safetensors"))
            if not files or not (Path(directory) / f"{STEM}.json").is_file():
                raise ValueError(
                    f"{directory}: no curvature there; expected {STEM}.json and {STEM}.safetensors of a curvature stage"
                )
            for file in files:
                try:
                    with safe_open(file, framework="pt") as opened:
                        self._held |= dict.fromkeys(opened.keys(), file)
                except (SafetensorError, OSError) as error:
                    raise ValueError(f"{file}: not a whole safetensors file ({error}); measure it again") from None

    @cached_property
    def about(self) -> list[dict[str, Any]]:
        """What was measured, on what."""
        return [json.loads((Path(one) / f"{STEM}.json").read_text()) for one in self.directories]

    def tensors(self, key: str) -> list[str]:
        """The names of the tensors that it has this of."""
        return [name.removeprefix(f"{key}/") for name in self._held if name.startswith(f"{key}/")]

    def has(self, key: str, tensor: str) -> bool:
        return f"{key}/{tensor}" in self._held

    def of(self, keys: tuple[str, ...], tensor: str) -> Mapping[str, Tensor]:
        """Those of these statistics that there are, of one tensor, read where they are asked for. A norm or a score is of all tensors."""
        names = {key: key if key in OF_MODELS else f"{key}/{tensor}" for key in keys}
        return _Read({key: (self._held[name], name) for key, name in names.items() if name in self._held})


class _Read(Mapping[str, Tensor]):
    """Tensors by name that nobody keeps."""

    def __init__(self, places: Mapping[str, tuple[Path, str]]):
        self._places = places

    def __getitem__(self, key: str) -> Tensor:
        file, name = self._places[key]
        with safe_open(file, framework="pt") as opened:  # pages that were read count as this process's while it is open
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Merger:
    """Merges tensors of the seed and its branches as `config` says.

    models: names of those that have a share, "seed" among them if it is one. statistics: curvature of each that a method
    reads, by name. Raises ValueError: see `merge.check_merge`.
    """

    def __init__(
        self,
        config: MergeConfig,
        seed: Checkpoint,
        dense: Any,
        models: list[str],
        statistics: Mapping[str, Statistics] | None = None,
    ):
        check_merge(config, models)
        self.config, self.seed, self.models, self.statistics = config, seed, models, dict(statistics or {})
        self.facts = tensor_facts(dense)
        self.averaged: Counter[str] = Counter()  # by method: tensors that it has no curvature of, and so averages
        self.unconverged = 0  # tensors at which `mats` stopped by its number of iterations

    def check_statistics(self) -> None:
        """Raises ValueError: a method reads curvature of a model, and it is not there."""
        for kind, names in readers(self.config, self.models).items():
            if absent := [name for name in names if name not in self.statistics]:
                raise ValueError(
                    f"merge={self.config.words} reads the curvature ({kind}) of {', '.join(names)}, and that of {absent[0]} is not given; "
                    "measure it on the text that the model was trained on"
                )

    def check_roles(self, names: Iterable[str]) -> None:
        """Raises ValueError: a role that none of the tensors has that are to be merged."""
        there = {self.facts.get(name, UNKNOWN).role for name in names}
        for role in self.config.roles:
            if role not in there:
                raise ValueError(
                    f"merge.roles.{role} has no effect: no tensor that is merged has that role (there: {', '.join(sorted(there))}); "
                    "leave it out"
                )

    def way(self, name: str) -> RoleConfig:
        """How tensors of this name are merged."""
        return self.config.of(self.facts.get(name, UNKNOWN).role)

    def method(self, name: str) -> str:
        """By what it is merged: "average" where the method reads what only linears' weights have and this is none, or a linear too
        large to be measured."""
        way, keys = self.way(name), ()
        if by_linears_only(way, self.facts.get(name, UNKNOWN).in_axis):
            return "average"
        if way.method != KEPT:
            keys = OF_LINEARS & set(needed_statistics(way.method, way.options))
        return "average" if keys and not self._measured(tuple(keys), name) else way.method

    def keeps_seed(self, name: str) -> bool:
        """Whether the result is the seed's own tensor."""
        return self.way(name).method == KEPT

    def merging(self, name: str, tensors: Mapping[str, Readable]) -> Merging:
        """All models' tensors of one name, with the weights and the statistics that its method reads."""
        way, in_axis = self.way(name), self.facts.get(name, UNKNOWN).in_axis
        keys = needed_statistics(way.method, way.options)
        if self.method(name) != way.method:
            self.averaged[way.method] += 1
            keys, in_axis = (), None
        members = {who: self._member(who, name, tensor, keys) for who, tensor in tensors.items()}
        base = None
        if METHODS[way.method].needs_seed:
            stored = Stored(self.seed, name)
            base = members.get(SEED) or self._member(SEED, name, stored, keys)
        return Merging(name, members, base, in_axis)

    def _member(self, who: str, name: str, tensor: Readable, keys: tuple[str, ...]) -> Member:
        own = self.statistics.get(who)
        return Member(tensor, self.config.weights.get(who, 1.0), own.of(keys, name) if own else {})

    def _measured(self, keys: tuple[str, ...], name: str) -> bool:
        """Whether any model has any of these."""
        return any(one.has(key, name) for one in self.statistics.values() for key in keys)

    def merged(self, name: str, tensors: Mapping[str, Readable], dtype: torch.dtype) -> Tensor:
        """The merged tensor in `dtype`. tensors: of the models that have a share. Raises ValueError: see the method; values that
        are not finite, or that `dtype` cannot hold."""
        way = self.way(name)
        found = self._made(way, self.merging(name, tensors))
        if not is_finite(cast := found.to(dtype)):
            largest, kind = found.abs().max().item(), str(dtype).removeprefix("torch.")
            raise ValueError(
                f"merge={way.method} of {name} makes {largest:.4g}, expected finite values that {kind} can hold; choose another "
                "dtype or milder options"
            )
        return cast

    def _made(self, way: RoleConfig, merging: Merging) -> Tensor:
        if way.method not in SOLVERS:
            return METHODS[way.method](merging, **way.options)
        solved = SOLVERS[way.method](merging, **METHODS[way.method].checked(way.options))
        self.unconverged += not solved.converged
        return solved.tensor

"""What the doctor looks at: the files of one mixture, read once; and what it says about them, one `Finding` a check."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from evals.evidence import METRICS, row_of
from upcycle.checkpoint import Checkpoint
from upcycle.config import TrainConfig
from upcycle.configuration import UpcycledConfig
from upcycle.directories import weight_files
from upcycle.durable import reading
from upcycle.explain import assembled_of, read_json
from upcycle.phases import Phase, plan_phases
from upcycle.store import FAILED, RECORD

RESTORE = "restore the file, or take the line out"
LAST = 10  # steps that "now" is the mean of: a batch alone is noise, a hundred would hide what has just begun
Verdict = Literal["ok", "look", "bad"]


@dataclass(frozen=True)
class Finding:
    """One check's verdict. figure: what was measured; threshold: what it was compared with; do: what to change."""

    check: str
    verdict: Verdict
    said: str
    figure: float | None = None
    threshold: str = ""
    do: str = ""


@dataclass(frozen=True)
class Case:
    """One mixture. state: never trained; training or stopped in it; trained.

    config: None where the mixture that a training began from is not at hand. assembled: where it was assembled, if that is
    known. train: its training's settings, if they are known. rows: of metrics.jsonl. idle_seconds: since its last row. failed: the
    error that ended it.
    """

    directory: Path
    state: Literal["assembled", "training", "trained"]
    config: UpcycledConfig | None = None
    assembled: Path | None = None
    stage: str = ""
    train: TrainConfig | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    idle_seconds: float = 0.0
    failed: str = ""

    @property
    def step(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    def phases(self) -> list[Phase]:
        return plan_phases(self.train) if self.train else []

    def warm(self) -> list[dict[str, Any]]:
        """The rows after the first warm-up, in which losses and gradients have nothing to be compared with yet."""
        return [row for row in self.rows if row["step"] > (self.train.schedule.warmup_steps if self.train else LAST)]

    def setting(self, name: str) -> str:
        """A setting's whole name on the command line, of this mixture alone where its name is known: `train.lr` becomes
        `++mixtures.btx.train.lr`, with Hydra's ++ since a mixture writes down only what differs from `mix`."""
        mixture = self.stage.partition("/")[2]
        return f"{'++' if name.startswith('train.') else ''}mixtures.{mixture}.{name}" if mixture else name

    def scaled(self, name: str, factor: float) -> str:
        """A setting of the training, `factor` times what it is: `++mixtures.btx.train.lr=0.002 (is 0.004)`."""
        if self.train is None:
            return f"a {'larger' if factor > 1 else 'smaller'} train.{name}"
        value: Any = self.train
        for key in name.split("."):
            value = getattr(value, key)
        return f"{self.setting(f'train.{name}')}={factor * value:g} (is {value:g})"

    def faster(self, group: str) -> str:
        """The rate of a group of parameters, three times what it is."""
        groups: dict[str, Any] = {**self.train.optimizer.groups} if self.train else {}
        own = groups.get(group)
        rate = own.lr_multiplier if own else 1.0
        return f"{self.setting(f'train.optimizer.groups.{group}.lr_multiplier')}={3 * rate:g} (is {rate:g})"

    def router_setting(self, part: str, name: str) -> str:
        return self.setting(f"assemble.{'router' if part == 'ffn' else 'attention_router'}.{name}")

    def series(self, name: str) -> np.ndarray:
        """(N, ...) a figure of metrics.jsonl, row by row; of no rows where a row lacks it."""
        found = [row[name] for row in self.rows if name in row]
        if len(found) < len(self.rows):
            return np.empty(0)
        with reading(self.directory / METRICS, RESTORE):
            return np.array(found, dtype=np.float64)

    def parameter_names(self) -> list[str]:
        """The names of the mixture's tensors, from its own files or those of its assembly; [] if neither is at hand."""
        where = self.assembled if self.state == "training" else self.directory
        return Checkpoint(where).names if where else []


def now(series: np.ndarray) -> np.ndarray:
    """Mean of the last LAST rows."""
    return series[-LAST:].mean(0)


def is_mixture(directory: Path) -> bool:
    config = read_json(directory / "config.json")
    return isinstance(config, dict) and config.get("model_type") == "upcycled"


def read_case(directory: Path, stage: str = "", train: Mapping | None = None, assembled: Path | None = None) -> Case:
    """The case in `directory`: a mixture, or a training of one that is not finished (<stage>-<key>.partial).

    stage, train, assembled: what a run's files say of an unfinished training, which has no record of its own yet.
    Raises ValueError: neither; files that cannot be read; weights that are not whole.
    """
    if not directory.is_dir():
        raise ValueError(
            f"{directory}: no such directory; expected a mixture, a training that is not finished, or a run"
        )
    record = read_json(directory / RECORD) or {}
    rows, idle = read_rows(directory / METRICS)
    if is_mixture(directory):
        trained = record.get("function") == "train_model" or (directory / METRICS).is_file()
        weight_files(directory)
        assembled, source = assembled_of(directory, record), directory
        assembled = None if trained and assembled == directory else assembled
        with reading(directory / RECORD, "copy it again"):
            train = record["config"]["train"] if record.get("function") == "train_model" else train
        state, stage = "trained" if trained else "assembled", record.get("stage", stage)
    elif (directory / METRICS).is_file() and not (directory / "config.json").exists():
        if rows and "load" not in rows[-1]:
            raise ValueError(f"{directory}: its {METRICS} tells of no experts; expected the training of a mixture")
        state, stage = "training", stage or _stage_of(directory)
        assembled = source = assembled or _only_assembly(directory, stage)
    else:
        raise ValueError(
            f"{directory}: no mixture; expected config.json with model_type 'upcycled', or {METRICS} of a training that is not "
            "finished; give a mixture's directory, or a run (`upcycle status` lists them)"
        )
    config = UpcycledConfig.from_pretrained(source) if source else None
    failed = (read_json(directory / FAILED) or {}).get("error", "")
    return Case(directory, state, config, assembled, stage, _train_config(train, directory), rows, idle, failed)


def read_rows(path: Path) -> tuple[list[dict[str, Any]], float]:
    """Rows of metrics.jsonl, and seconds since it was last written; a last line that is being written is left out.

    Raises ValueError: another line that is no row.
    """
    if not path.is_file():
        return [], 0.0
    with reading(path, RESTORE):
        text = path.read_text(encoding="utf-8")
    lines, rows = text.splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(row_of(line))
        except ValueError as error:
            if number == len(lines) and isinstance(error, json.JSONDecodeError):
                break
            raise ValueError(f"{path}: line {number} is no row of metrics ({error}); {RESTORE}") from None
    return rows, time.time() - path.stat().st_mtime


def _train_config(train: Mapping | None, directory: Path) -> TrainConfig | None:
    if train is None:
        return None
    try:
        return TypeAdapter(TrainConfig).validate_json(json.dumps(train), strict=True)
    except ValidationError as error:
        raise ValueError(
            f"{directory}: the settings of its training are not those of this version ({error.errors()[0]['msg']}); use the "
            "version that trained it"
        ) from None


def _stage_of(directory: Path) -> str:
    """ "mix/btx" for mix-btx-8a83d033.partial."""
    name = directory.name.removesuffix(".partial").rpartition("-")[0]
    return name.replace("-", "/", 1) if name.startswith("mix-") else ""


def _only_assembly(directory: Path, stage: str) -> Path | None:
    """The finished assembly of that name beside an unfinished training, if there is exactly one."""
    name = stage.removeprefix("mix/")
    found = [
        path
        for path in directory.parent.glob(f"assemble-{name}-*")
        if path.name.rpartition("-")[0] == f"assemble-{name}"
    ]
    found = [path for path in found if is_mixture(path)]
    return found[0] if len(found) == 1 else None


def to_json(case: Case, findings: Sequence[Finding]) -> dict[str, Any]:
    bad = any(finding.verdict == "bad" for finding in findings)
    look = any(finding.verdict == "look" for finding in findings)
    return {
        "directory": str(case.directory),
        "state": case.state,
        "step": case.step,
        "steps": case.train.steps if case.train else None,
        "verdict": "bad" if bad else "look" if look else "ok",
        "checks": [asdict(finding) for finding in findings],
    }

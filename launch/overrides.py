"""What a user types: rewritten where Hydra's grammar is in the way, and explained where Hydra refuses it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from launch.config import RUN_NAME
from upcycle.config import nearest

CONF = Path(__file__).resolve().parent.parent / "conf"
TAKES_A_VALUE = {"--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p"}
SWEEPS = {"-m", "--multirun"}
DIRECTORY = re.compile(r"(?P<key>\+{0,2}(?:seed\.path|branches\.[^.=]+\.path|out|artifacts))=(?P<value>.*)", re.S)
BRANCH = re.compile(r"\+{0,2}branches\.(?P<name>[^.=]+)(?P<path>\.path)?=(?P<value>.*)", re.S)
NAME = re.compile(r"\+{0,2}name=(?P<value>.*)", re.S)
MIXTURE = re.compile(r"mixtures\.(?P<name>[^.=]+)\.(?:match|scratch)=.*", re.S)
FREE_KEYS = re.compile(
    r"(?:merges|curvature\.texts|launch\.kinds)(?:\.[^=]+)?=.*", re.S
)  # settings by names of the user's: no file has them
# A directory that Hydra takes without quotes, and as text.
PLAIN = re.compile(r"[A-Za-z_./][\w/\-.+%@:]*", re.ASCII)


def rewritten(arguments: list[str]) -> list[str]:
    """The arguments as Hydra wants them: options first, directories quoted, branches that no file names.

    Raises ValueError: a branch is given twice, without `.path`, or by a name that Hydra cannot read; a run's name that is none.
    """
    sweep = bool(SWEEPS & set(arguments))
    _check_name(arguments, sweep)
    arguments = [_quoted(argument, sweep) for argument in _options_first(arguments)]
    arguments = [f"++{argument}" if FREE_KEYS.fullmatch(argument) else argument for argument in arguments]
    return _free_mixtures(_free_branches(arguments))


def _check_name(arguments: list[str], sweep: bool) -> None:
    """The run's name, before Hydra makes its directory. Raises ValueError: it is none."""
    for found in filter(None, map(NAME.fullmatch, arguments)):
        given = found["value"].strip("'\"")
        for name in given.split(",") if sweep else [given]:
            if "$" not in name and not re.fullmatch(RUN_NAME, name):  # what Hydra fills in is checked with the settings
                raise ValueError(
                    f"name={name}: expected letters, digits, _, . and -, the last one no . or -, since runs/NAME becomes a directory; "
                    "give the run such a name"
                )


def _options_first(arguments: list[str]) -> list[str]:
    """Hydra's parser takes no override between two options: all overrides to the end."""
    overrides, others = [], []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        override = ("=" in argument and not argument.startswith("-")) or argument.startswith(("+", "~"))
        (overrides if override and before not in TAKES_A_VALUE else others).append(argument)
    return others + overrides


def _quoted(argument: str, sweep: bool) -> str:
    """A directory's name as text: Hydra reads `=`, `~`, brackets, accents and leading digits in its own way."""
    found = DIRECTORY.fullmatch(argument)
    if found is None or found["value"] in ("", "null") or found["value"].startswith(("'", '"', "$")):
        return argument
    if PLAIN.fullmatch(found["value"]) or (sweep and "," in found["value"]):
        return argument
    escaped = found["value"].replace("'", "\\'")
    return f"{found['key']}='{escaped}'"


def _free_branches(arguments: list[str]) -> list[str]:
    """`branches.NAME.path=DIR` for any NAME, in place of a training that the experiment has planned for that branch.

    Hydra adds a key that no file has only with `++`, and the file's `train` would be a second origin of the branch.
    """
    seen: dict[str, str] = {}
    result = []
    for argument in arguments:
        found = BRANCH.fullmatch(argument)
        if found is None or found["value"].startswith("{") or found["value"] == "null":
            result.append(argument)
            continue
        name, value = found["name"], found["value"]
        if not found["path"]:
            raise ValueError(f"{argument}: expected settings of the branch; write branches.{name}.path={value}")
        if name in seen:
            raise ValueError(
                f"branches.{name}.path is given twice ({seen[name]}, {value}), expected one checkpoint for each branch; "
                "give the other branch a name of its own"
            )
        if not re.fullmatch(r"[A-Za-z_][\w-]*", name, re.ASCII):
            raise ValueError(
                f"branches.{name}: expected a name of letters, digits, - and _ that starts with a letter; rename the branch"
            )
        seen[name] = value
        result.append(f"++branches.{name}.path={value}")
        if not any(re.match(rf"\+{{0,2}}branches\.{re.escape(name)}\.train\b", other) for other in arguments):
            result.append(f"++branches.{name}.train=null")
    return result


def _free_mixtures(arguments: list[str]) -> list[str]:
    """`mixtures.NAME.match=` and `.scratch=` of a mixture that there is, whether or not a file writes them: with `++`."""
    if not any(map(MIXTURE.fullmatch, arguments)):
        return arguments
    names = set((_composed(arguments) or {}).get("mixtures") or {})
    names |= set(re.findall(r"\+mixtures\.([^.=]+)", " ".join(arguments)))
    found = [MIXTURE.fullmatch(argument) for argument in arguments]
    return [
        f"++{one}" if match and match["name"] in names else one for one, match in zip(arguments, found, strict=True)
    ]


def own_arguments(tokens: int | None = None) -> list[str]:
    """What starts this very run again, one run of a sweep too: the command's options and the settings, less `stage`.

    tokens: of the run, if it has some; they stand in place of a budget, which must not be measured again.
    """
    left_out = ("stage=",) if tokens is None else ("stage=", "budget=", "tokens=")
    settings = [one for one in task_overrides() if not one.startswith(left_out)]
    return [*options_of(sys.argv[1:]), *settings, *([] if tokens is None else ["budget=null", f"tokens={tokens}"])]


def task_overrides() -> list[str]:
    """This run's settings as typed, with `${...}` as it stands there."""
    from hydra.core.hydra_config import HydraConfig

    found: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return found


def quoted(path: Path) -> str:
    """A path as a value that Hydra takes for text."""
    escaped = str(path.absolute()).replace("'", "\\'")
    return f"'{escaped}'"


def options_of(typed: list[str]) -> list[str]:
    """The command's options, such as `--config-dir DIR`, less those that make it a sweep."""
    options = []
    for before, argument in zip(["", *typed], typed, strict=False):
        if before in TAKES_A_VALUE or (argument.startswith("-") and argument not in SWEEPS):
            options.append(argument)
    return options


def swept_keys(arguments: list[str]) -> set[str]:
    """The keys that the runs of a sweep differ in, as typed."""
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(overrides)
    return {str(one.input_line).split("=")[0] for one in parsed if one.is_sweep_override()}


def check_package(raw: DictConfig) -> None:
    """Raises ValueError: the experiment's file lacks the line that puts its settings at the top."""
    if isinstance(raw.get("experiment"), DictConfig):
        raise ValueError(
            "the experiment's settings came in below a key `experiment`, expected them at the top; make "
            "`# @package _global_` the first line of its file"
        )


def explained(error: Exception) -> str:
    """Hydra's or OmegaConf's complaint, with the names that would have been valid there."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        return _no_such_choice(error.missing_cfg_file, sorted(set(error.options)))
    if "Could not override 'assemble'" in str(error):
        return (
            "assemble=PRESET is for experiments with one mixture; here each has a preset of its own: write "
            "assemble@mixtures.NAME.assemble=PRESET, with the name of one of them"
        )
    if isinstance(error, MissingMandatoryValue) and error.full_key:
        return f"{error.full_key}: missing; give it a value ({error.full_key}=...)"
    return _unknown_key(str(error))


def _no_such_choice(file: str, choices: list[str]) -> str:
    group, _, choice = file.rpartition("/")
    own = _option(sys.argv[1:], "--config-dir", "-cd")
    where = f" Looked in {CONF / group} and {Path(own) / group}." if own else ""
    return f"{group}={choice}: no such file{nearest(choice, choices)} Choices: {', '.join(choices)}.{where}"


def _option(arguments: list[str], *names: str) -> str | None:
    for argument, after in zip(arguments, [*arguments[1:], None], strict=True):
        for name in names:
            if argument == name:
                return after
            if argument.startswith(f"{name}="):
                return argument.removeprefix(f"{name}=")
    return None


def _unknown_key(message: str) -> str:
    found = re.search(r"full_key: (\S+)", message) or re.search(r"override '([^']+)'", message)
    if found is None or "Did you mean" in message:  # Hydra's own guess, at a group's place
        return message
    path = found.group(1).split(".")
    node: Any = _composed(sys.argv[1:])
    if node is None:
        return message
    for depth, part in enumerate(path):
        names = [str(key) for key in node] if isinstance(node, DictConfig) else []
        if part not in names:
            where = ".".join(path[: depth + 1])
            return f"{where}: unknown key{nearest(part, names)} Valid here: {', '.join(names)}" if names else message
        node = node[part]
    return _unknown_within(found.group(1), node) or message


def _unknown_within(where: str, node: Any) -> str | None:
    """The key that `where={KEY: ...}` names on the command line and the settings there lack."""
    names = [str(key) for key in node] if isinstance(node, DictConfig) else []
    for argument in sys.argv[1:]:
        if names and argument.startswith(f"{where}={{"):
            given: Any = OverridesParser.create().parse_override(argument).value()
            if unknown := [str(key) for key in given if str(key) not in names]:
                return f"{where}.{unknown[0]}: unknown key{nearest(unknown[0], names)} Valid here: {', '.join(names)}"
    return None


def _composed(arguments: list[str]) -> Any:
    """The settings of the experiment and tasks that are named, before all others; None where they cannot be composed."""
    overrides = [
        argument for argument in arguments if argument.startswith(("experiment=", "tasks=", "launch=", "track="))
    ]
    if own := _option(arguments, "--config-dir", "-cd"):
        overrides.append(f"hydra.searchpath=[file://{Path(own).absolute()}]")
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        try:
            return hydra.compose("config", overrides=overrides)
        except (HydraException, OmegaConfBaseException):
            return None

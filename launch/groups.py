"""Stages made by a group of processes: the driver starts `accelerate launch` for each, and every process runs

    python -m launch.pipeline <the same settings> stage=mix/bam

which is also what one types by hand. `python -m launch.groups ...` is `accelerate launch ...` that says in one line which
process ended the group.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from launch.config import LaunchConfig
from upcycle import stopping
from upcycle.config import nearest
from upcycle.stopping import AGAIN, TERMINATED, Stopped
from upcycle.store import Artifact
from upcycle.team import ALONE, Team, asked_strategy, in_group, join

FILES = Path(__file__).resolve().parent / "accelerate"
STARTED = "UPCYCLE_STARTED_BY_DRIVER"


def launch_file(launch: LaunchConfig) -> Path:
    """The file that launch.config means.

    Raises ValueError: there is none.
    """
    assert launch.config is not None
    name = launch.config + ("_multinode" if launch.machines > 1 else "")
    if (FILES / f"{name}.yaml").is_file():
        return FILES / f"{name}.yaml"
    path = Path(launch.config).expanduser().absolute()
    if not path.is_file():
        names = sorted(path.stem for path in FILES.glob("*.yaml") if not path.stem.endswith("_multinode"))
        raise ValueError(
            f"launch.config={launch.config}: neither a file nor one of {', '.join(names)}{nearest(launch.config, names)}"
        )
    return path


def strategy_of(file: Path) -> str:
    """The strategy that a launch file asks for, from the keys that become a process's environment.

    Raises ValueError: see `team.asked_strategy`; not a launch file.
    """
    from omegaconf import OmegaConf

    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(file))
        found = dict(found)
    except Exception as error:  # of three libraries
        raise ValueError(f"{file}: not a launch file of Accelerate ({error}); `accelerate config` writes one") from None
    kind = str(found.get("distributed_type", "NO"))
    deepspeed, fsdp = found.get("deepspeed_config") or {}, found.get("fsdp_config") or {}
    environment = {
        "ACCELERATE_USE_DEEPSPEED": str(kind == "DEEPSPEED"),
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(deepspeed.get("deepspeed_config_file", "none")),
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(deepspeed.get("zero_stage", 2)),
        "ACCELERATE_USE_FSDP": str(kind == "FSDP"),
        "FSDP_VERSION": str(fsdp.get("fsdp_version", 1)),
        "ACCELERATE_USE_MEGATRON_LM": str(kind == "MEGATRON_LM"),
    }
    return asked_strategy(environment | ({} if kind == "NO" else {"LOCAL_RANK": "0"}))


def processes_of(launch: LaunchConfig) -> int:
    """How many processes the group of a stage has.

    Raises ValueError: nobody says so.
    """
    if launch.processes is not None:
        return launch.processes
    if strategy_of(launch_file(launch)) == "single":
        return 1
    if gpus := len(visible_gpus()):
        return gpus
    raise ValueError(
        f"launch.config={launch.config} without a GPU: say how many processes, launch.processes=2 for example"
    )


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; no torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip() and not gpu.strip().startswith("-")]
    # Devices' names are no indices: a container may have nvidia3 alone, which is its GPU 0.
    return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def member(launch: LaunchConfig) -> Team:
    """This process in its group; ALONE where no launcher started it.

    Raises ValueError: the group is not what launch.config asks for.
    """
    started = os.environ.get(STARTED) == "1"
    if not (started or in_group()):
        return ALONE
    if launch.config is None:
        return _joined(None, None)
    team = _joined(strategy_of(launch_file(launch)), launch.processes)
    if launch.offload != "none":
        zero = team.accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
        given = zero.get("offload_optimizer", {}).get("device", "none")
        if given != launch.offload:
            raise ValueError(
                f"launch.offload={launch.offload}, but the launcher gave DeepSpeed {given}; add --offload_optimizer_device "
                f"{launch.offload} to accelerate launch"
            )
    return team


@cache
def _joined(strategy: str | None, processes: int | None) -> Team:
    """Once a process: the runs of a sweep share the group."""
    return join(strategy, processes)


def drives(launch: LaunchConfig) -> bool:
    """Whether this process starts others, groups or branches side by side, rather than being one of them."""
    starts = launch.config is not None or launch.parallel_branches > 1
    return starts and os.environ.get(STARTED) != "1" and not in_group()


def command(launch: LaunchConfig, arguments: list[str], stage: str) -> list[str]:
    """The command that makes `stage` in a group. arguments: this run's settings, as typed."""
    per_process = launch.threads or max(1, len(os.sched_getaffinity(0)) * launch.machines // processes_of(launch))
    options = [
        "--config_file", str(launch_file(launch)), "--num_processes", str(processes_of(launch)),
        "--num_machines", str(launch.machines), "--machine_rank", str(launch.machine_rank),
        "--num_cpu_threads_per_process", str(per_process),
    ]  # fmt: skip
    if launch.main_address is not None:
        host, port = launch.main_address.rsplit(":", 1)
        options += ["--main_process_ip", host, "--main_process_port", port]
    if launch.offload != "none":
        options += _offload(launch)
    return [sys.executable, "-m", "launch.groups", *options, "-m", "launch.pipeline", *arguments, f"stage={stage}"]


def _offload(launch: LaunchConfig) -> list[str]:
    """Raises ValueError: not a strategy that can."""
    strategy = strategy_of(launch_file(launch))
    if not strategy.startswith("zero") or (launch.offload == "nvme" and strategy != "zero3"):
        can = "zero3" if launch.offload == "nvme" else "zero1, zero2 and zero3"
        raise ValueError(f"launch.offload={launch.offload} works with {can}, not with {strategy}; choose another")
    options = ["--offload_optimizer_device", launch.offload]
    if strategy == "zero3":
        options += ["--offload_param_device", launch.offload]
    if launch.nvme_path is not None:
        options += ["--offload_optimizer_nvme_path", launch.nvme_path, "--offload_param_nvme_path", launch.nvme_path]
    return options


def child_environment(member: bool = True, stop: Path | None = None) -> Mapping[str, str]:
    """Of processes that this one starts; a `member` makes one stage and drives no others. They bring their own wandb service, for none may end another's (trackers.py).

    stop: the file by which they will be asked to stop, if they will.
    """
    root = str(Path(__file__).resolve().parent.parent)  # found from any directory, installed or not
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    own = {stopping.PARENT: str(os.getpid())} | ({STARTED: "1"} if member else {})
    return {**inherited, "PYTHONPATH": path} | own | ({stopping.PASSED_ON: str(stop)} if stop else {})


def end(processes: Sequence[subprocess.Popen], patience: float = 10.0) -> None:
    """Launchers, or processes that make a stage, at once and with all that they started. SIGTERM would ask them to save first. patience: seconds."""
    for process in processes:
        process.send_signal(signal.SIGHUP)
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience)
        process.kill()
        process.wait()


def make_in_group(launch: LaunchConfig, arguments: list[str], stage: Artifact, saves: bool) -> None:
    """Make one stage with a group of processes, which print their progress here. saves: it stops at a checkpoint when SIGTERM asks this process to.

    Raises RuntimeError: the group ended without it. Stopped: it was asked to. SystemExit: likewise, and nothing was saved.
    """
    with stopping.passing_on() as stop:
        process = subprocess.Popen(command(launch, arguments, stage.name), env=child_environment(stop=stop))
        try:
            status = _awaited(process, stop if saves else None)
        except BaseException:  # the group must not outlive us
            end([process])
            raise
    if status == AGAIN:
        raise Stopped
    if stopping.signalled() and not stage.finished:  # and so was the group, before it could look
        sys.exit(TERMINATED)
    patience = 10 if status == 0 else 0  # seconds in which another machine's renaming must show here
    while patience and not stage.finished:
        time.sleep(1)
        patience -= 1
    if not stage.finished:
        raise RuntimeError(
            f"stage {stage.name}: its {processes_of(launch)} processes ended without finishing it (above is why); it is "
            f"{stage.state}, and the same command goes on from there"
        )


def _awaited(process: subprocess.Popen, stop: Path | None) -> int:
    """The exit status of a launcher. SIGTERM to this process makes the file `stop`; without one it raises SystemExit."""
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=0.2)
        if stopping.signalled():
            if stop is None:
                sys.exit(TERMINATED)
            stop.touch()


def _pass_on(*_: Any) -> None:
    """SIGTERM to a launcher. A batch system signals all processes of a job, and torchrun would kill those that need more than 30 seconds to save."""
    stopping.on_sigterm()
    Path(os.environ[stopping.PASSED_ON]).touch()


def _first_failure(failures: Mapping[int, Any]) -> tuple[int, int]:
    """Rank and exit status of the process that ended a group: others lose their connection to it and fail in the same moment."""
    codes = {rank: failures[rank].exitcode for rank in sorted(failures, key=lambda rank: failures[rank].timestamp)}
    stopped = [rank for rank, code in codes.items() if code == AGAIN]  # on all of them, or none
    killed = [rank for rank, code in codes.items() if code < 0]
    rank = [*stopped, *killed, *codes][0]
    return rank, codes[rank]


def main() -> None:
    """`accelerate launch`, with one line in place of two tracebacks when a process of the group fails."""
    stopping.end_with_parent()
    os.environ[stopping.PARENT] = str(os.getpid())
    if stopping.PASSED_ON in os.environ:
        os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"  # torchrun's --signals-to-handle
        signal.signal(signal.SIGTERM, _pass_on)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        with stopping.looking():
            launch_command(launch_command_parser().parse_args())
    except SignalException as stop:  # whoever sent it to us knows; the processes are stopped by now
        sys.exit(128 + int(stop.sigval))
    except ChildFailedError as error:
        rank, code = _first_failure(error.failures)
        if code == AGAIN:  # the first rank has said why
            sys.exit(AGAIN)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        print(f"upcycle: rank {rank} was {how}; the other processes of its group were stopped", file=sys.stderr)
        sys.exit(1)
    except subprocess.CalledProcessError as error:  # of a launch file for one process, which has said why
        sys.exit(AGAIN if error.returncode == AGAIN else 1)


if __name__ == "__main__":
    main()

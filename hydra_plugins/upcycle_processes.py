"""`upcycle -m hydra/launcher=processes hydra.launcher.at_once=4 ...`: points of a sweep side by side. Hydra looks for launchers in packages of this name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

LOG, POLL_SECONDS = "log.txt", 0.2


class Processes(Launcher):
    """Points of a sweep in processes of their own, `at_once` at a time, each with its share of the cores; what one prints is in its log.txt."""

    def __init__(self, at_once: int):
        self.at_once = at_once

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        if self.at_once < 1:
            raise ValueError(f"hydra.launcher.at_once={self.at_once}, expected 1 or more")
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from launch.sweep import only_shows

        if only_shows(self.config):
            raise ValueError(
                "hydra/launcher=processes writes what a point prints to its log; leave it out where plan=true or dry_run=true is to show something"
            )
        if len({name for one in job_overrides for name in one if name.startswith("name=")}) > 1:
            raise ValueError(
                "hydra/launcher=processes: points are runs/NAME/0, 1, ..., and name is swept; leave name out of the sweep"
            )
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # to take the points along
        self.points = {initial_job_idx + index: list(overrides) for index, overrides in enumerate(job_overrides)}
        waiting, running = list(self.points), dict[subprocess.Popen, int]()
        try:
            while waiting or running:
                while waiting and len(running) < self.at_once:
                    number = waiting.pop(0)
                    print(f"point {number}: {' '.join(self.points[number])}", flush=True)
                    running[self._start(number)] = number
                time.sleep(POLL_SECONDS)
                for process in [one for one in running if one.poll() is not None]:
                    self._ended(running.pop(process), process.returncode)
        except BaseException:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
            raise
        return [JobReturn(status=JobStatus.COMPLETED) for _ in self.points]

    def _start(self, number: int) -> subprocess.Popen:
        from launch.groups import child_environment
        from launch.overrides import options_of, quoted
        from launch.sweep import note_point

        where, overrides = self._where(number), self.points[number]
        note_point(where, overrides, None, ended=False)
        threads = str(max(1, len(os.sched_getaffinity(0)) // self.at_once))
        environment = {"OMP_NUM_THREADS": threads, **child_environment(member=False)}
        settings = [*options_of(sys.argv[1:]), *overrides, f"hydra.run.dir={quoted(where)}"]
        words = [sys.executable, "-m", "launch.pipeline", *settings]
        with (where / LOG).open("w") as log:
            return subprocess.Popen(
                words, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )

    def _ended(self, number: int, code: int) -> None:
        from launch.follow import last_line
        from launch.sweep import note_point
        from upcycle.stopping import AGAIN

        where = self._where(number)
        error = None if code == 0 else last_line(where / LOG) if code > 0 else f"killed by signal {-code}"
        note_point(where, self.points[number], error, ended=True)
        said = "done" if error is None else f"stopped: {error}" if code == AGAIN else f"FAILED: {error}"
        print(f"point {number} {said} (log: {where / LOG})", flush=True)

    def _where(self, number: int) -> Path:
        return Path(self.config.hydra.sweep.dir) / str(number)


SETTINGS = {"_target_": "hydra_plugins.upcycle_processes.Processes", "at_once": 2}
ConfigStore.instance().store(group="hydra/launcher", name="processes", node=SETTINGS, provider="upcycle")

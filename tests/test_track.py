"""Progress and tracking: what a person sees, and that a tracker's failure is not the run's."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from launch import track
from launch.config import LaunchConfig, TrackConfig
from launch.plan import human

ROW = {
    "step": 3, "loss": 2.5, "cross_entropy": 2.4, "balance": 1.2, "z": 0.3, "lr": 1e-3, "tokens_per_second": 12345.0,
    "peak_share": 0.5, "largest_load": 0.4, "dead_experts": 1, "ffn_entropy": 1.1, "router_gradient_norm": 0.01, "load": [[1.0]],
}  # fmt: skip


def tracker(**options):
    console = Console(file=io.StringIO(), width=250)
    cfg = SimpleNamespace(name="x", rng_seed=1, launch=LaunchConfig(**options), track=TrackConfig())
    return track.Tracker(cfg, console), console.file


def test_a_line_shows_step_losses_speed_and_router_health(monkeypatch):
    monkeypatch.setattr(track, "PLAIN_SECONDS", 0.0)
    made, shown = tracker()
    with made.stage("mix/bam") as run:
        run.advance(3, 12, **ROW)
    for part in (
        "mix/bam  3/12", "loss 2.500", "ce 2.400", "balance 1.200", "z 0.300", "lr 1.0e-03", "12.3k tok/s", "50% of peak",
        "largest load 40%", "dead 1", "entropy 1.10", "gradient 1.0e-02", "s left",
    ):  # fmt: skip
        assert part in shown.getvalue()


def test_lines_come_now_and_then_without_a_terminal():
    made, shown = tracker()
    with made.stage("seed") as run:
        for step in range(1000):
            run.advance(step + 1, 1000)
    assert shown.getvalue() == ""


def test_launch_options_reach_the_stage():
    made, _ = tracker(checkpoint_steps=7, checkpoint_seconds=None, keep_checkpoints=3)
    with made.stage("seed") as run:
        assert (run.checkpoint_steps, run.checkpoint_seconds, run.keep_checkpoints) == (7, None, 3)


def test_a_tracker_that_fails_is_dropped_and_training_goes_on(monkeypatch):
    calls = []

    def log(figures, step):
        calls.append(step)
        raise ConnectionError("gone")

    monkeypatch.setattr(
        track, "_start_wandb", lambda *args: SimpleNamespace(log=log, finish=lambda: calls.append("finish"))
    )
    made, shown = tracker()
    with made.stage("seed") as run:
        run.record(ROW)
        run.record(ROW)
    assert calls == [3] and "seed: tracking stopped (gone); training goes on" in shown.getvalue()


@pytest.mark.parametrize(
    ("number", "text"), [(1234567, "1.23M"), (0.5, "0.5"), (999, "999"), (2.4e13, "24T"), (None, "")]
)
def test_numbers_are_short(number, text):
    assert human(number) == text

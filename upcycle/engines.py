"""Which engine trains by which strategy (team.STRATEGIES)."""

from __future__ import annotations

from upcycle.engine import PlainEngine
from upcycle.sharded import ShardedEngine
from upcycle.zero import ZeroEngine

ENGINES = {
    "single": PlainEngine, "ddp": PlainEngine, "fsdp2": ShardedEngine,
    "zero1": ZeroEngine, "zero2": ZeroEngine, "zero3": ZeroEngine,
}  # fmt: skip

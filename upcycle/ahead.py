"""Tensors side by side: a thread each, in order. torch's own threads meet after every operation, which costs more than they
save where operations take microseconds, and a hundred times as much where another process wants the core."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

TENSORS = 8  # as many lie in memory at a time where it is not one of each model that takes more
Item = TypeVar("Item")
Made = TypeVar("Made")


def threads_for(models: int) -> int:
    """How many items are in the making, each of which has a tensor of every model in memory."""
    return max(1, TENSORS // models)


def in_order(function: Callable[[Item], Made], items: Iterable[Item], most: int) -> Iterator[Made]:
    """function(item) of every item, in order, made by as many threads as torch would use for one item, at most `most`.

    With one thread it is map(function, items). What a function raises is raised in its turn, and no further items are begun.
    """
    own = torch.get_num_threads()
    threads = min(most, own)
    if threads == 1:
        yield from map(function, items)
        return
    left, begun = iter(items), deque[Future[Made]]()
    torch.set_num_threads(1)  # of threads that begin from here on, too
    pool = ThreadPoolExecutor(threads)
    try:
        begun.extend(pool.submit(function, item) for item in islice(left, threads))
        while begun:
            made = begun.popleft().result()
            begun.extend(pool.submit(function, item) for item in islice(left, 1))
            yield made
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(own)

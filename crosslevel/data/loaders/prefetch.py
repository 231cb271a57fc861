"""Prefetching by threads; results come in order.

This is our own code, since `ThreadPoolExecutor.map` takes all keys at once; here at most ``depth`` results are computed
ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Key = TypeVar("Key")
Result = TypeVar("Result")


def ahead(
    job: Callable[[Key], Result],
    keys: Iterable[Key],
    depth: int = 2,
    threads: int = 1,
    name: str = "crosslevel-decode",
    begin: Callable[[], object] = lambda: None,
) -> Generator[Result, None, None]:
    """Results of ``job`` in the order of ``keys``, computed by threads while the caller works on earlier ones.

    Args:
        job: the function to call with each key.
        keys: one for each result; they are iterated in the caller's own thread.
        depth: the number of results computed or waiting beyond the one that the caller has.
        threads: the number of threads.
        name: of the threads.
        begin: called once in each of them.

    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, name, initializer=begin) as pool:
        try:
            for key in keys:
                waiting.append(pool.submit(job, key))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

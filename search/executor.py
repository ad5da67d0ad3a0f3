"""The one seam between the runner and what does the work: a `concurrent.futures.Executor`.

Locally, every worker is a process pool of one: a killed worker loses its own slice and nobody else's.
"""

import os
import queue
import signal
import threading
from collections.abc import Callable, MutableMapping
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor
from multiprocessing import active_children, connection, get_context, parent_process
from typing import Any

# What an executor raises when it lost the work: not the trial's fault, so the slice is sent again.
LOST = (BrokenExecutor, CancelledError)

Task = tuple[Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def set_worker_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """What workers inherit: one BLAS thread each, for one worker runs per core, and OpenBLAS's own choice of kernel.

    A kernel forced from outside may be one that rounds differently in company (see core.network.blas_is_exact), or
    half as fast; SIEVE_BLAS_KERNEL is the way to force one here.
    """
    environment.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    environment.pop("OPENBLAS_CORETYPE", None)
    if kernel := environment.get("SIEVE_BLAS_KERNEL"):
        environment["OPENBLAS_CORETYPE"] = kernel


def _begin_worker() -> None:
    """Leave Ctrl-C to the runner, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


class LocalExecutor(Executor):
    """`workers` processes, each replaced when it dies; the future of its slice then raises BrokenExecutor."""

    def __init__(self, workers: int) -> None:
        set_worker_environment()  # the workers import NumPy anew
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._tasks.put((future, fn, args, kwargs))
        return future

    def _serve(self) -> None:
        pool = _new_pool()
        while (task := self._tasks.get()) is not None:
            future, fn, args, kwargs = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(pool.submit(fn, *args, **kwargs).result())
            except BaseException as error:
                if isinstance(error, BrokenExecutor):
                    pool.shutdown(wait=False)
                    pool = _new_pool()
                future.set_exception(error)
        pool.shutdown()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the workers; with `cancel_futures`, at once and in the middle of their slices."""
        for _ in self._threads:
            self._tasks.put(None)
        if cancel_futures:
            for worker in active_children():
                worker.kill()
        if wait:
            for thread in self._threads:
                thread.join()


def _new_pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin_worker)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_executor(address: str, workers: int | None) -> tuple[Executor, Callable[[], int]]:
    """The executor for `address` ("local"), and a function that says how many workers it has now."""
    count = workers or cores()
    return LocalExecutor(count), lambda: count

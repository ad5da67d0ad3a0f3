"""Workers of this machine: what they give back, what they raise, and how they die."""

import os
import random
import resource
import threading
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from multiprocessing import active_children, get_context

import numpy as np
import pytest

from search.errors import WorkersLost, brief, details, in_one_line
from search.executor import LocalExecutor
from tests.failing import ERRORS, fail


@pytest.fixture
def executor() -> Iterator[LocalExecutor]:
    executor = LocalExecutor(1)
    yield executor
    executor.shutdown(cancel_futures=True)


def test_a_worker_may_be_killed_at_any_moment_of_a_large_result(executor: LocalExecutor) -> None:
    """Also while its 8 MB are on their way: the future says so at once, and the next task gets a new worker."""
    chance, broken = random.Random(1), 0
    for _ in range(25):
        future = executor.submit(np.ones, 1_000_000)
        time.sleep(chance.uniform(0, 0.02))
        for worker in active_children():
            worker.kill()
        try:
            assert future.result(timeout=20).sum() == 1_000_000
        except BrokenExecutor:
            broken += 1
    assert broken >= 1
    assert executor.submit(sum, (1, 2)).result(timeout=20) == 3


def test_a_worker_that_ends_is_heard_of(executor: LocalExecutor) -> None:
    """Its exit code is in what is raised; who waits idly and dies costs the next task, and no more."""
    with pytest.raises(BrokenExecutor, match="exit code 7"):
        executor.submit(os._exit, 7).result(timeout=20)
    process = executor.submit(os.getpid).result(timeout=20)
    os.kill(process, 9)
    with pytest.raises(BrokenExecutor, match="exit code -9"):
        executor.submit(os.getpid).result(timeout=20)
    assert executor.submit(os.getpid).result(timeout=20) != process


def test_what_work_raises_comes_back_with_its_place(executor: LocalExecutor) -> None:
    """The exception is of its own type and names the line in the worker; the worker goes on."""
    process = executor.submit(os.getpid).result(timeout=20)
    with pytest.raises(ZeroDivisionError) as raised:
        executor.submit(divmod, 1, 0).result(timeout=20)
    assert "executor.py" in raised.value.__notes__[0]
    with pytest.raises(TypeError, match="cannot pickle"):
        executor.submit(threading.Lock).result(timeout=20)
    assert executor.submit(os.getpid).result(timeout=20) == process


def test_where_no_process_can_begin_nobody_is_to_blame(executor: LocalExecutor) -> None:
    """Without file descriptors for a worker the task says so, and the next one gets through once there are some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert executor.submit(sum, (1, 2)).result(timeout=20) == 3
    with pytest.raises(BrokenExecutor):
        executor.submit(os._exit, 7).result(timeout=20)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(WorkersLost, match="Too many open files"):
            executor.submit(sum, (1, 2)).result(timeout=20)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert executor.submit(sum, (1, 2)).result(timeout=20) == 3


def test_an_end_at_once_waits_for_nobody() -> None:
    """A worker in the midst of a minute is killed, as is one that is only beginning."""
    for seconds in (0.0, 1.5):
        executor = LocalExecutor(1)
        future, since = executor.submit(time.sleep, 60), time.monotonic()
        time.sleep(seconds)
        executor.shutdown(cancel_futures=True)
        assert time.monotonic() - since < 20
        assert isinstance(future.exception(timeout=20), BrokenExecutor)
        assert not active_children()


@pytest.mark.parametrize("eta", ERRORS)
def test_what_work_raises_is_one_line_for_everybody(executor: LocalExecutor, eta: float) -> None:
    """Type and message of whatever was raised, picklable or not; the worker's whole traceback is beside it."""
    error = executor.submit(fail, eta).exception(timeout=20)
    assert error is not None
    assert in_one_line(error) == ERRORS[eta][1]
    assert "Traceback (most recent call last)" in details(error)
    assert "in fail" in details(error)


@pytest.mark.parametrize(
    ("stored", "line"),
    [
        (None, ""),
        ("pruned by median", "pruned by median"),
        (
            "Traceback (most recent call last):\n  File \"x.py\", line 3, in f\nValueError: it is wrong\n"
            "In the worker:\n  File \"y.py\", line 4, in g\n    raise ValueError(x)\n    ^^^^^^^^^^^^^^^^^^^\n",
            "ValueError: it is wrong",
        ),
        ("a\x1b[31mb\0c", "a [31mb c"),
    ],
)  # fmt: skip
def test_reasons_of_older_versions_are_read(stored: str | None, line: str) -> None:
    """A traceback that was stored in place of a reason is shown by the line that tells what was raised."""
    assert brief(stored) == line


def test_only_its_own_workers_end_with_an_executor() -> None:
    """Another process that the program has begun lives on, however the executor ends."""
    other = get_context("spawn").Process(target=time.sleep, args=(60,))
    other.start()
    try:
        for cancel in (False, True):
            executor = LocalExecutor(1)
            own = executor.submit(os.getpid).result(timeout=20)
            executor.shutdown(cancel_futures=cancel)
            assert own not in {child.pid for child in active_children()}
            assert other.is_alive()
    finally:
        other.kill()
        other.join()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking beside threads, from Python 3.12 on
def test_a_process_that_was_forked_meanwhile_keeps_no_worker_alive() -> None:
    """A fork of the program holds a copy of every pipe; an executor ends all the same."""
    executor = LocalExecutor(1)
    executor.submit(os.getpid).result(timeout=20)
    fork = os.fork()
    if not fork:
        time.sleep(60)
        os._exit(0)
    ending = threading.Thread(target=executor.shutdown, daemon=True)
    ending.start()
    ending.join(10)
    ended = not ending.is_alive()
    os.kill(fork, 9)
    os.waitpid(fork, 0)
    assert ended

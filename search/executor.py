"""The one seam between the runner and what does the work: a `concurrent.futures.Executor`.

Locally, every worker is a process with a pipe of its own: a killed worker loses its own slice and nobody else's. On
a Dask cluster, workers come, go and die as they like; each host has its own copy of the data and no credentials.
"""

import os
import pickle
import queue
import signal
import socket
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from contextlib import contextmanager, suppress
from functools import lru_cache
from multiprocessing import Pipe, connection, get_context, parent_process, resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.data import Dataset
from core.train import Progress, State, advance
from search.errors import IN_WORKER, DataError, InWords, SettingsError, WorkersLost, in_one_line
from search.failpoint import failpoint
from search.process import ENDING

if TYPE_CHECKING:
    import distributed

# What an executor raises when it lost the work, so that it is sent again: BrokenExecutor if the worker died of it
# (three times are too often), CancelledError if it was lost with everything else.
LOST = (BrokenExecutor, CancelledError)

RECOUNT_SECONDS = 1.0  # between questions how many workers there are
CONNECT_SECONDS = 5.0
MOST_STARTS = 20  # of one worker, in a row
START_SECONDS = 0.2  # between them

Slice = tuple[list[State], list[Progress], float]  # what a worker gives back, and the seconds that it took
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


def _serve_slices(pipe: connection.Connection) -> None:
    """A worker's whole life: do what comes through the pipe and hand back what it gives, or raises."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    pipe.send(None)  # it has imported what it needs
    with suppress(EOFError, OSError):  # the runner is gone
        while (task := pipe.recv()) is not None:
            fn, args, kwargs = task
            answer = attempt(fn, *args, **kwargs)
            try:
                pipe.send(answer)
            except Exception as error:  # a result that cannot be pickled
                pipe.send((None, _portable(error)))


def attempt(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> tuple[Any, Exception | None]:
    """In a worker: what `fn` gives, or what it raised, in a form that survives the way back."""
    try:
        return fn(*args, **kwargs), None
    except Exception as error:
        return None, _portable(error)


def _portable(error: Exception) -> Exception:
    """The error with its traceback in a note, as itself if it survives the way and in words if not."""
    place = f"{IN_WORKER}\n{''.join(traceback.format_exception(error))}"
    try:
        error.add_note(place)
        same = pickle.loads(pickle.dumps(error))
        if (type(same), in_one_line(same)) == (type(error), in_one_line(error)):
            return error
    except Exception:
        pass
    words = InWords(in_one_line(error))
    words.add_note(place)
    return words


def _follow_parent() -> None:
    """Do not outlive the runner."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


@contextmanager
def _safe_path() -> Iterator[None]:
    """Meanwhile, interpreters begin without the current folder on their path: its files are nobody's modules.

    multiprocessing begins them with `-c`, which alone would import what it needs from there.
    """
    with _SAFE_PATH:
        before = os.environ.get("PYTHONSAFEPATH")
        os.environ["PYTHONSAFEPATH"] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ["PYTHONSAFEPATH"]
            else:
                os.environ["PYTHONSAFEPATH"] = before


_SAFE_PATH = threading.Lock()


class Worker:
    """A process and this end of its pipe. Nobody else here holds the other end, so its death is heard at once.

    (ProcessPoolExecutor keeps it open, and waits for ever for the rest of a result whose worker was killed in it.)
    """

    def __init__(self) -> None:
        """Raises OSError if there can be none."""
        self._pipe, theirs = Pipe()
        self._process = get_context("spawn").Process(target=_serve_slices, args=(theirs,))
        with _safe_path():
            self._process.start()
        theirs.close()

    def await_beginning(self) -> None:
        """Raises BrokenExecutor if it dies before it has begun."""
        self._answer()

    def do(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `fn` gives, or raises; BrokenExecutor if the process died."""
        try:
            self._pipe.send((fn, args, kwargs))
        except OSError:
            raise BrokenExecutor(self._fate()) from None
        result, error = self._answer()
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        """Once it has done what it was given."""
        with suppress(OSError):
            self._pipe.send(None)  # a process that somebody forked here may hold this end of the pipe open
        self._pipe.close()
        self._process.join()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            raise BrokenExecutor(self._fate()) from None

    def kill(self) -> None:
        self._process.kill()

    def _fate(self) -> str:
        self._process.join(1)  # its own exit code, if it is on its way out
        self.kill()
        self.end()
        return f"worker {self._process.pid} ended with exit code {self._process.exitcode}"


class LocalExecutor(Executor):
    """`workers` processes, each replaced when it dies; the future of its slice then raises BrokenExecutor."""

    def __init__(self, workers: int) -> None:
        set_worker_environment()  # the workers import NumPy anew
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._ending = False
        self._alive: set[Worker] = set()  # our own, among whatever else this process has begun
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._tasks.put((future, fn, args, kwargs))
        return future

    def _serve(self) -> None:
        # Inherited by the workers from their first moment on: the runner alone decides what Ctrl-C and its like mean.
        with _safe_path():
            resource_tracker.ensure_running()  # which would let them through again
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        worker: Worker | None = None
        while (task := self._tasks.get()) is not None:
            future, fn, args, kwargs = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                worker = worker or self._new_worker()
                future.set_result(worker.do(fn, *args, **kwargs))
            except BaseException as error:
                if worker and isinstance(error, BrokenExecutor):
                    self._alive.discard(worker)
                    worker = None
                future.set_exception(error)
        if worker:
            worker.end()
            self._alive.discard(worker)

    def _new_worker(self) -> Worker:
        """A worker that has begun: what keeps it from that is not its work's fault. Raises WorkersLost."""
        problem: Exception | None = None
        for _ in range(MOST_STARTS):
            if self._ending:
                raise BrokenExecutor("the workers were ended")
            worker: Worker | None = None
            try:
                worker = Worker()
                self._alive.add(worker)
                if self._ending:
                    worker.kill()  # it began when the others had been killed
                worker.await_beginning()
                return worker
            except (BrokenExecutor, OSError) as error:
                if worker:
                    self._alive.discard(worker)
                problem = error
                time.sleep(START_SECONDS)
        raise WorkersLost(f"no worker process begins: {problem}; nothing is lost: mend that and launch the study again")

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the workers; with `cancel_futures`, at once and in the middle of their slices."""
        self._ending = cancel_futures
        for _ in self._threads:
            self._tasks.put(None)
        if cancel_futures:
            for worker in list(self._alive):
                worker.kill()
        if wait:
            for thread in self._threads:
                thread.join()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_executor(address: str, workers: int | None) -> tuple[Executor, Callable[[], int]]:
    """The executor for `address` ("local" or dask://host:port), and a function that says how many workers it has now.

    `workers` is how many processes to start here, or how many of the cluster's to use at most.
    """
    if address != "local":
        cluster = DaskExecutor(address.replace("dask://", "tcp://"))
        return cluster, lambda: min(cluster.workers(), workers or cluster.workers())
    count = workers or cores()
    return LocalExecutor(count), lambda: count


def advance_here(states: Sequence[State], data: Dataset, epochs: float) -> Slice:
    """`advance` in a worker."""
    for state in states:
        failpoint(f"eta={state.config.eta:g}")
    began = time.monotonic()
    return *advance(states, data, epochs), time.monotonic() - began


# ---- elsewhere


class DaskExecutor(Executor):
    """The workers of a Dask scheduler. While it is away there are no workers, and what it did is cancelled."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._client: distributed.Client | None = None
        self._flying: set[Future[Any]] = set()
        self._count, self._counted = 0, -RECOUNT_SECONDS
        if self._connected() is None:
            raise SettingsError(
                f"SIEVE_EXECUTOR: no Dask scheduler answers at {address}; start one with `dask scheduler`"
            )

    def _connected(self) -> "distributed.Client | None":
        """The client, made anew if it gave its scheduler up; None while there is no connection."""
        try:
            import distributed
        except ImportError:
            raise SettingsError("SIEVE_EXECUTOR: a Dask cluster needs: pip install 'sieve[dask]'") from None
        if self._client is None or self._client.status not in ("running", "connecting"):
            try:
                self._client = distributed.Client(
                    self.address, timeout=CONNECT_SECONDS, set_as_default=False, name="sieve"
                )
            except OSError:
                return None
        return self._client if self._client.status == "running" else None

    def workers(self) -> int:
        """Threads of all workers now; each trains one slice at a time."""
        if time.monotonic() - self._counted > RECOUNT_SECONDS:
            try:
                client = self._connected()
                self._count = sum(client.nthreads().values()) if client else 0
            except (OSError, AttributeError):  # the connection broke under the question
                self._count = 0
            self._counted = time.monotonic()
        return self._count

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        try:
            client = self._connected()
            if client is None:
                raise OSError(f"no connection to {self.address}")
            with warnings.catch_warnings():  # weights are what travels: 40 MB and back take 0.15 s of a slice of 5 s
                warnings.filterwarnings("ignore", "Sending large graph")
                key = f"{getattr(fn, '__name__', 'work')}-{uuid.uuid4().hex}"  # what the scheduler's pages show
                sent = client.submit(attempt, fn, *args, **kwargs, key=key, pure=False, retries=0)
        except OSError as error:
            future.set_exception(CancelledError(str(error)))
            return future
        self._flying.add(future)
        client.loop.add_callback(self._pass_on, sent, future)
        return future

    async def _pass_on(self, sent: "distributed.Future", future: Future[Any]) -> None:
        """Hand a result over; what Dask says of lost work becomes one of LOST."""
        try:
            result, error = await sent
            future.set_result(result) if error is None else future.set_exception(error)
        except BaseException as error:
            if type(error).__name__ == "KilledWorker":
                future.set_exception(BrokenExecutor(str(error)))
            elif sent.status == "error":  # the work's own
                future.set_exception(error)
            else:
                future.set_exception(CancelledError(str(error)))
        finally:
            self._flying.discard(future)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster, which drops what it still had to do for us."""
        if wait and not cancel_futures:
            for future in list(self._flying):
                future.exception()
        if self._client is not None:
            self._client.close(timeout=CONNECT_SECONDS)


def advance_elsewhere(states: Sequence[State], dataset: str, digest: str, epochs: float) -> Slice:
    """The same on a host of its own: `dataset` is the JSON of a DatasetSpec, `digest` that of its content."""
    return advance_here(states, own_copy(dataset, digest), epochs)


@lru_cache(maxsize=8)
def own_copy(dataset: str, digest: str) -> Dataset:
    """This host's copy of a dataset, from its own SIEVE_DATA_DIR or SIEVE_HOME. Raises DataError, naming the host."""
    from search.datasets import open_dataset
    from search.settings import Settings
    from search.study import DatasetSpec

    settings, spec = Settings.from_environment(), DatasetSpec.model_validate_json(dataset)
    with suppress(OSError):  # it may do without
        settings.make_home()
    places = [spec]
    if spec.path and settings.data_dir:  # the file lies elsewhere here, or another one has its place
        places.append(spec.model_copy(update={"path": str(settings.data_dir / Path(spec.path).name)}))
    problem = ""
    for place in places:
        try:
            data, _ = open_dataset(place, settings)
        except DataError as error:
            problem = problem or str(error)
            continue
        if data.digest == digest:
            return data
        problem = (
            f"its copy of {spec.name} is another one: expected digest {digest}, got {data.digest}; "
            "bring the same files there"
        )
    raise DataError(f"worker {socket.gethostname()}: {problem}")

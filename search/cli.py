"""The command line: a thin shell that parses, calls one function, shows what came back, and sets the exit code.

Exit codes: 0 done, 1 the study failed or the disk is full, 2 wrong input, 130 interrupted.

With --json, stdout holds one JSON value and nothing else: an object where a command tells of one thing, a list of
objects where it tells of several. What is wrong stands on stderr, as text, with or without it.
"""

import errno
import json
import logging
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search import process
from search.errors import FULL, DiskError, SieveError, StudyFileError
from search.settings import Settings, redact

if TYPE_CHECKING:
    from search.datasets import Row
    from search.outcome import Outcome
    from search.runner import Runner

app = typer.Typer(
    name="sieve",
    help="Coarse-to-fine hyper-parameter search for NumPy multi-layer perceptrons, every trial tracked in MLflow.",
    epilog="Exit codes: 0 done, 1 the study failed or the disk is full, 2 wrong input, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="The datasets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@app.callback()
def _begin() -> None:
    process.forgive_streams()
    process.spare_loopback()
    process.keep_private()


NO_ROOM = (*FULL, errno.EFBIG)

File = Annotated[Path, typer.Argument(help="A study file (YAML).", show_default=False)]
Study = Annotated[str, typer.Argument(help="A study's name.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Set = Annotated[list[str], typer.Option("--set", help="Override the file: search.trials=8. May be repeated.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Worker processes.  [default: one per core]")]


@contextmanager
def _errors() -> Iterator[None]:
    """Our errors and those of files as text on stderr and an exit code; any other is a bug, and keeps its traceback."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here, where it is known what to do if nobody reads it
    except SieveError as error:
        _say(str(error))
        raise typer.Exit(error.exit_code) from None
    except sqlite3.Error as error:
        _say(str(DiskError(str(Settings.from_environment().outbox), str(error))))
        raise typer.Exit(1) from None
    except OSError as error:
        if error.filename is None and error.errno in process.GONE:  # of our output
            process.leave_streams()
            raise typer.Exit(1) from None
        if error.filename is None and error.errno not in NO_ROOM:
            raise
        where = error.filename if isinstance(error.filename, str) else str(Settings.from_environment().home)
        _say(str(DiskError(where, error.strerror or str(error))))
        raise typer.Exit(1 if error.errno in NO_ROOM else 2) from None
    except KeyboardInterrupt:
        _say("interrupted")
        raise typer.Exit(130) from None


def _say(text: str) -> None:
    typer.echo(process.printable(text), err=True)


def _tell(text: str) -> None:
    typer.echo(process.printable(text))


def _tell_if_possible(text: str) -> None:
    """For what goes on whether it is heard or not: a log on a full disk ends no service."""
    with suppress(OSError):
        _tell(text)


def _show_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


# ---- study files and studies


@app.command()
def validate(
    files: Annotated[list[Path], typer.Argument(help="Study files.", show_default=False)], as_json: Json = False
) -> None:
    """Check study files; one line for each mistake, and exit code 2."""
    from search import samplers, study

    rows: list[dict[str, Any]] = []
    for file in files:
        rows.append({"file": str(file), "study": None, "mistakes": []})
        try:
            spec = study.load(file)
            samplers.check_packages(spec.search.method, str(file))
            rows[-1]["study"] = spec.name
            if not as_json:
                _tell(f"{file}: study '{spec.name}' is fine")
        except StudyFileError as error:
            rows[-1]["mistakes"] = error.mistakes
            for mistake in error.mistakes:
                _say(mistake)
    if as_json:
        _show_json(rows)
    if any(row["mistakes"] for row in rows):
        raise typer.Exit(2)


@app.command()
def launch(
    file: File,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and how long; write nothing.")] = False,
    set_: Set = [],  # noqa: B006
    workers: Workers = None,
    detach: Annotated[bool, typer.Option("--detach", help="Leave it to `sieve serve`, and return.")] = False,
    publish: Annotated[bool, typer.Option(help="Publish to MLflow meanwhile; else `sieve sync` does later.")] = True,
    as_json: Json = False,
) -> None:
    """Run a study to its end, or take it up where it was left."""
    with _errors():
        from search import run, study

        spec, settings = study.load(file, set_), Settings.from_environment()
        if dry_run:
            _show_plan(run.dry_run(spec, settings, workers=workers, say=_say), as_json)
            return
        if detach:
            from search import serve

            said = serve.enqueue(spec, settings, _say)
            _show_json({"study": spec.name, "state": "queued"}) if as_json else _tell(said)
            return
        _run(
            as_json,
            lambda **shown: run.launch(spec, settings, workers=workers, publish=publish, **shown),
        )


@app.command()
def retry(study: Study, workers: Workers = None, as_json: Json = False) -> None:
    """Run the failed slots of a study again, then go on with the study."""
    with _errors():
        from search import run
        from search.outcome import open_study

        settings = Settings.from_environment()
        spec = open_study(study, settings).spec
        _run(
            as_json,
            lambda **shown: run.launch(spec, settings, workers=workers, retry_failed=True, **shown),
        )


def _run(as_json: bool, start: Callable[..., "Outcome"]) -> None:
    """Show a running study; the first Ctrl-C, SIGTERM or SIGHUP ends its slices, the second ends it at once."""
    from search import report
    from search.outcome import summary
    from search.show import Display

    runners: list[Runner] = []  # none until it has begun

    def on_signal(_: int, __: Any) -> None:
        if not runners:
            raise KeyboardInterrupt
        if runners[0].stopping:
            try:
                display.console.show_cursor()
            finally:
                os._exit(130)
        runners[0].stop()
        # In a thread: this one may be printing just now, or importing what prints.
        text = "stopping: the running slices are saved first; once more to leave at once"
        threading.Thread(target=display.note, args=(text,)).start()

    process.outlast_readers()
    with Display(quiet=as_json) as display:
        process.on_end(on_signal)
        outcome = start(
            show=display.update,
            started=runners.append,
            warn=display.note,
            report=report.html,
            concluded=lambda outcome: None if as_json else display.conclude(outcome),
        )
    if as_json:
        _show_json(summary(outcome))
    else:
        display.part(outcome)


def _show_plan(plan: dict[str, Any], as_json: bool) -> None:
    from search.show import show_plan

    _show_json(plan) if as_json else show_plan(plan)


@app.command()
def status(
    study: Annotated[
        str | None, typer.Argument(help="A study's name; all of them without.", show_default=False)
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Until none of them waits or runs.")] = False,
    as_json: Json = False,
) -> None:
    """How studies stand: counts, stage, best, and tracking records not sent yet."""
    with _errors():
        from search import serve, show
        from search.outcome import standing

        settings = Settings.from_environment()
        rows = serve.follow(settings, study, _say) if follow else standing(settings, study)
        _show_json(rows) if as_json else show.show_standing(rows)


@app.command()
def stop(study: Study) -> None:
    """Let a running study end its running slices and save them; `sieve launch` goes on from there."""
    _request(study, "stop")


@app.command()
def cancel(study: Study) -> None:
    """Stop a running study and give up its running trials; `sieve retry` runs them again."""
    _request(study, "cancel")


def _request(study: str, what: str) -> None:
    with _errors():
        from search import run

        _tell(run.request(study, what, Settings.from_environment()))


@app.command()
def best(study: Study, as_json: Json = False) -> None:
    """The chosen configuration, with mean and deviation, and the best trials."""
    with _errors():
        from search import show
        from search.outcome import conclude, open_study, summary

        settings = Settings.from_environment()
        outcome = conclude(open_study(study, settings))
        _show_json(summary(outcome)) if as_json else show.show_outcome(outcome)


@app.command()
def export(
    study: Study,
    weights: Annotated[Path, typer.Option(help="Where to write the .npz.", show_default=False)],
) -> None:
    """The chosen configuration's weights, with everything needed to predict, as a plain .npz."""
    with _errors():
        from search.outcome import export

        with process.for_the_user():
            said = export(study, weights, Settings.from_environment())
        _tell(said)


@app.command("report")
def report_(
    study: Study,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write into.  [default: reports/STUDY at home]", show_default=False),
    ] = None,
) -> None:
    """The study as one HTML page that opens from disk, and its trials as CSV."""
    with _errors():
        from search import report
        from search.outcome import open_study

        settings = Settings.from_environment()
        folder = out or settings.home / "reports" / study
        with process.for_the_user() if out else nullcontext():
            written = report.write(open_study(study, settings), settings, folder)
        for path in written:
            _tell(f"wrote {path}")


@app.command()
def reproduce(
    names: Annotated[list[str] | None, typer.Argument(help="Studies; all of them without.", show_default=False)] = None,
    write_only: Annotated[bool, typer.Option("--write-only", help="Run nothing; write what is stored.")] = False,
    folder: Annotated[Path, typer.Option("--studies", help="The folder of the study files.")] = Path("studies"),
    out: Annotated[Path, typer.Option(help="Where reproduction.md goes.")] = Path("docs"),
    workers: Workers = None,
    publish: Annotated[bool, typer.Option(help="Publish to MLflow meanwhile; else `sieve sync` does later.")] = True,
) -> None:
    """Run the reports' experiments, each if it is not done yet, and write published figures beside ours."""
    with _errors():
        from search import reproduce as reports
        from search import run

        settings = Settings.from_environment()
        for spec in [] if write_only else reports.studies(folder, names or []):
            if reports.is_done(spec, settings):
                _say(f"study '{spec.name}' is done")
            else:
                _run(False, partial(run.launch, spec, settings, workers=workers, publish=publish))
        with process.for_the_user():
            page, *pictures = reports.write(reports.studies(folder), settings, out)
        _tell(f"wrote {page} and {len(pictures)} pictures")


# ---- watching


@app.command()
def ui(
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's server.")] = 5000,
    dashboard_port: Annotated[int, typer.Option(help="Port of the Optuna dashboard.")] = 8080,
) -> None:
    """MLflow's web UI and the Optuna dashboard on the embedded stores, on loopback, until Ctrl-C."""
    with _errors():
        from search import ui as pages

        process.outlast_readers()
        pages.serve(Settings.from_environment(), mlflow_port, dashboard_port, _tell_if_possible)


@app.command()
def dashboard(
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8080,
    writable: Annotated[bool, typer.Option("--writable", help="Let viewers delete and rename studies.")] = False,
    open_: Annotated[bool, typer.Option("--open", help="No password: only this machine can reach it.")] = False,
) -> None:
    """The Optuna dashboard, guarded: known hosts only, read-only, a password when not on loopback."""
    with _errors():
        from search import ui as pages

        pages.dashboard(Settings.from_environment(), host, port, writable=writable, open_=open_)


# ---- a service


@app.command()
def serve(workers: Workers = None) -> None:
    """Run studies that were launched with --detach, oldest first, until SIGTERM."""
    with _errors():
        from search import serve as service

        process.outlast_readers()
        service.serve(Settings.from_environment(), _tell_if_possible, workers)


@app.command()
def migrate() -> None:
    """Make the storage's tables, or bring those of an older version up to date; nothing may run meanwhile."""
    with _errors():
        from search import storage

        settings = Settings.from_environment()
        logging.disable(logging.INFO)  # Alembic's own reports
        storage.migrate(settings.storage)
        _tell(f"the tables of {redact(settings.storage)} are up to date")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check storage, MLflow, data, outbox, BLAS, executor and versions; what to do about each finding."""
    with _errors():
        from search import doctor as checks

        findings = checks.examine(Settings.from_environment())
        if as_json:
            _show_json([asdict(finding) for finding in findings])
        else:
            _tell("\n".join(map(str, findings)))
        raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


@app.command()
def sync(
    study: Annotated[str | None, typer.Argument(help="Only this study.", show_default=False)] = None,
    redo: Annotated[bool, typer.Option("--redo", help="Send again what was sent, even into an empty MLflow.")] = False,
    as_json: Json = False,
    follow: Annotated[int | None, typer.Option(hidden=True, help="Go on while this process lives.")] = None,
) -> None:
    """Send to MLflow what has not reached it yet."""
    with _errors():
        from search import run, tracking

        settings = Settings.from_environment()
        process.outlast_readers()
        if follow is None:
            process.on_end(signal.default_int_handler)
            run.recover_all(settings, _say)
        # Every study that has, or had, that name: one that was deleted may have something unsent too.
        studies = [None] if study is None else tracking.ids(settings, study)
        for known in studies if redo else []:
            tracking.redo(settings, known)
        if follow is not None:
            tracking.publish(settings, follow=True, parent=follow, study=studies[-1], warn=_say)
        else:
            from search.show import countdown

            left = sum(tracking.publish(settings, study=s, warn=_say, show=countdown(_say)) for s in studies)
            said = tracking.conclusion(settings, left, [s for s in studies if s])
            _show_json({"unsent": left}) if as_json else _tell(said)
            raise typer.Exit(1 if left else 0)


# ---- checks


@app.command()
def gradcheck(as_json: Json = False) -> None:
    """Analytic gradients against numeric ones, and against PyTorch's where it is installed."""
    with _errors():
        from core.gradcheck import check
        from search.show import show_gradients

        rows = check()
        _show_json([row._asdict() for row in rows]) if as_json else show_gradients(rows)
        if any(row.numeric >= 1e-7 or (row.torch or 0.0) >= 1e-10 for row in rows):
            raise typer.Exit(1)


@data_app.command("list")
def data_list(as_json: Json = False) -> None:
    """Which datasets are here."""
    with _errors():
        from search import datasets

        _show_data(datasets.listing(Settings.from_environment()), as_json)


def _show_data(rows: "list[Row]", as_json: bool) -> None:
    from search.show import show_data

    _show_json([asdict(row) for row in rows]) if as_json else show_data(rows)


@data_app.command("fetch")
def data_fetch(name: Annotated[str, typer.Argument(help="cifar10")]) -> None:
    """Download a dataset from its official address and verify it."""
    with _errors():
        from search import datasets

        settings = Settings.from_environment()
        with process.for_the_user() if settings.data_dir else nullcontext():
            _tell(f"{name} is in {datasets.fetch(name, settings)}")


@data_app.command("check")
def data_check(
    name: Annotated[str, typer.Argument(help="digits, cifar10 or npz")],
    path: Annotated[str | None, typer.Argument(help="npz: the file; cifar10: another folder")] = None,
    as_json: Json = False,
) -> None:
    """Read every file of a dataset again, compare its checksum, and count each class in each part."""
    with _errors():
        from search import datasets

        rows = datasets.check(name, Settings.from_environment(), path)
        _show_data(rows, as_json)
        if not all(row.ok for row in rows):
            raise typer.Exit(2)


if __name__ == "__main__":
    sys.exit(app())

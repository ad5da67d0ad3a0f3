"""What the command line shows: a live line while a study runs, tables at the end; plain lines when not a terminal."""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from search.outbox import run_name, spread
from search.process import printable

if TYPE_CHECKING:
    from search.datasets import Row
    from search.outcome import Outcome
    from search.runner import Status

PLAIN_SECONDS = 5.0  # between lines when nobody watches a terminal
PLAIN_WIDTH = 200  # of tables then, so that no word is broken
SHOWN = 8  # rows of a table
COUNTS = ("running", "pruned", "diverged", "failed", "waiting", "unsent", "refused")  # as far as there are any


class Display:
    """Progress of one running study. Use as a context manager."""

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=quiet, soft_wrap=True)
        self.live = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        self.last_line, self.last_stage = 0.0, ""

    def __enter__(self) -> "Display":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def update(self, status: "Status") -> None:
        text = progress_line(status)
        if self.live:
            self.live.update(Text(printable(text)))
        elif status.stage != self.last_stage or time.monotonic() - self.last_line > PLAIN_SECONDS:
            self.last_line, self.last_stage = time.monotonic(), status.stage
            self.note(text)

    def note(self, text: str) -> None:
        self.console.print(printable(text), highlight=False, markup=False)

    def conclude(self, outcome: "Outcome") -> None:
        """The result, as soon as it is there."""
        if self.live:
            self.live.stop()
        show_outcome(outcome)
        if outcome.unsent:
            self.note(f"sending the last {outcome.unsent} records to MLflow ...")

    def part(self, outcome: "Outcome") -> None:
        """What is left to say once the publisher has ended."""
        if outcome.unsent:
            self.note(f"warning: {outcome.unsent} tracking records are not sent yet; `sieve sync` sends them")
        if outcome.refused:
            self.note(
                f"warning: MLflow refused {outcome.refused} tracking records; `sieve sync` says why, and tries again"
            )
        self.note("`sieve ui` opens MLflow and the Optuna dashboard on all of it")


def countdown(say: Callable[[str], None]) -> Callable[[int], None]:
    """Says how many records are left to send, every few seconds."""
    said = time.monotonic()

    def show(left: int) -> None:
        nonlocal said
        if time.monotonic() - said > PLAIN_SECONDS:
            said = time.monotonic()
            say(f"{left:,} records left to send")

    return show


def progress_line(status: "Status") -> str:
    done = status.complete + status.pruned + status.diverged
    early = {"pruned": status.pruned, "diverged": status.diverged}
    parts = [
        f"{status.study}: {status.stage}",
        ", ".join(
            [f"{done}/{status.planned} done", f"{status.running} running"]
            + [f"{n} {word}" for word, n in early.items() if n]
            + [f"{status.failed} failed"]
        ),
        f"{status.trained:.0%} trained",
    ]
    if status.best is not None:
        parts.append(f"best {status.best:.4g} ({run_name(status.best_params)})")
    if status.epochs_per_second:
        parts.append(f"{status.epochs_per_second:.1f} epochs/s")
    if status.seconds_left is not None:
        parts.append(f"{duration(status.seconds_left)} left")
    return " | ".join(parts)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def show_outcome(outcome: "Outcome") -> None:
    if outcome.repeated:
        title = f"configurations of {outcome.study} with several runs, best mean first"
        means = [[run_name(r.params), str(r.n), spread(r.mean, r.deviation)] for r in outcome.repeated[:SHOWN]]
        show_table(title, ["parameters", "runs", outcome.metric], means)
        print()
    rows = [
        [
            attempt.attrs["stage"],
            str(attempt.slot),
            run_name(attempt.params),
            f"{attempt.value:.4f}",
            f"{attempt.attrs['test_accuracy']:.4f}" if "test_accuracy" in attempt.attrs else "-",
        ]
        for attempt in outcome.table[:SHOWN]
    ]
    columns = ["stage", "slot", "parameters", outcome.metric, "test_accuracy"]
    show_table(f"best single trials of {outcome.study}", columns, rows)
    console, chosen = Console(soft_wrap=True, highlight=False, markup=False), outcome.chosen
    console.print(f"chosen: {printable(run_name(chosen.params))}")
    runs = "1 run" if chosen.n == 1 else f"mean and deviation of {chosen.n} runs"
    console.print(f"  {outcome.metric}: {spread(chosen.mean, chosen.deviation)} ({runs})")
    if outcome.test_accuracy:
        console.print(f"  test_accuracy: {spread(*outcome.test_accuracy)}")
    for words in outcome.border:
        console.print(f"note: {printable(words)}")
    if outcome.failed:
        console.print(f"note: {outcome.failed} slots failed; `sieve retry {outcome.study}` runs them again")
        for reason in outcome.reasons:
            console.print(f"  {printable(reason)}")
    early = {"diverged": outcome.diverged, "pruned": outcome.pruned}
    if any(early.values()):
        console.print(f"note: without a result: {', '.join(f'{n} {word}' for word, n in early.items() if n)}")


def show_plan(plan: dict[str, Any]) -> None:
    rows = [[stage["name"], str(stage["trials"]), duration(stage["seconds"])] for stage in plan["stages"]]
    show_table(f"plan of {plan['study']}", ["stage", "trials", "about"], rows)
    for point in plan["first"]:
        print(printable(f"  {run_name(point)}"))
    print(f"about {duration(plan['seconds'])} of training on {plan['workers']} workers")


def show_standing(rows: Sequence[dict[str, Any]]) -> None:
    counts = [name for name in COUNTS if any(row[name] for row in rows)]
    columns = ["study", "state", "stage", "complete", *counts, "best"]
    show_table("studies", columns, [[_cell(row[c], ".4g") for c in columns] for row in rows])
    for row in rows:
        if row["problem"]:
            print(printable(f"{row['study']}: {row['state']}; {row['problem'].splitlines()[-1]}"))


def show_gradients(rows: Iterable[Any]) -> None:
    rows = list(rows)
    show_table(
        "relative errors of the gradients", list(rows[0]._fields), [[_cell(v, ".1e") for v in row] for row in rows]
    )


def show_data(rows: Iterable["Row"]) -> None:
    show_table("datasets", ["name", "state", "detail"], [[row.name, row.state, row.detail] for row in rows])


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(
        title=Text(printable(title), style="table.title"),
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
        show_edge=False,
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(table)


def _cell(value: Any, kind: str) -> str:
    return "-" if value is None else format(value, kind) if isinstance(value, float) else str(value)

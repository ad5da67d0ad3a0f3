"""Writes study-file.md from the models of study files and commands.md from the command line: `make docs`."""

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.main import get_command

from core import train
from core.train import TrainConfig
from search import cli, study

HERE = Path(__file__).parent
AUTHOR = "<!-- Written by generate.py; change the source instead and run `make docs`. -->\n"

MODELS: dict[str, type[BaseModel]] = {
    "The file": study.StudySpec,
    "dataset": study.DatasetSpec,
    "space: a range": study.Range,
    "space: a list": study.Choice,
    "space: hidden layers of any number and width": study.Layers,
    "space_from": study.SpaceFrom,
    "search: coarse-to-fine": study.CoarseToFine,
    "search: coarse-to-fine, each of stages": study.Stage,
    "search: coarse-to-fine, each of a stage's box": study.Box,
    "search: random": study.Random,
    "search: grid": study.Grid,
    "search: list": study.Listed,
    f"search: {', '.join(study.SAMPLERS)}": study.Sampler,
    "confirm": study.Confirm,
    "limits": study.Limits,
    "pruner: median": study.Median,
    "pruner: successive-halving, hyperband": study.Halving,
    "published": study.Published,
}
WORDS = {str: "text", bool: "true or false", int: "whole number", float: "number", NoneType: "none", Any: "value"}
BOUNDS = {"ge": "{} or more", "gt": "above {}", "le": "{} at most", "lt": "below {}"}
BOUNDS |= {"min_length": "{} or more long", "max_length": "{} long at most"}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), ["---"] * len(list(head)), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def words(kind: Any) -> str:
    """A type as a person says it."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return ", ".join([words(inside[0]), *(bound for part in inside[1:] for bound in bounds(part))])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(words, inside)))
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in inside)
    if origin in (list, tuple):
        return f"list of {words(inside[0])}" if inside else "list"
    if origin is dict or kind is dict:
        return "mapping"
    if inspect.isclass(kind) and issubclass(kind, BaseModel):
        return "mapping"
    return WORDS[kind]


def bounds(part: Any) -> list[str]:
    """What a constraint, or the constraints within a Field, say."""
    if isinstance(part, FieldInfo):
        return [bound for own in part.metadata for bound in bounds(own)]
    return [text.format(f"{getattr(part, name):,}") for name, text in BOUNDS.items() if hasattr(part, name)]


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default_factory() if field.default_factory else field.default
    return "" if value in (None, "", {}, []) or isinstance(value, BaseModel) else value_text(value)


def value_text(value: Any) -> str:
    text = "true" if value is True else "false" if value is False else str(value)
    return f"`{text}`"


def keys(model: type[BaseModel]) -> Iterator[list[str]]:
    for name, field in model.model_fields.items():
        if name != "method":
            kind = ", ".join([words(field.annotation), *(bound for part in field.metadata for bound in bounds(part))])
            shown = "" if model is study.Stage else default(field)  # what a stage leaves out depends on the others
            yield [f"`{name}`", kind, shown, field.description or ""]


def settings() -> Iterator[list[str]]:
    """The training settings, with the comments of TrainConfig."""
    comments = dict(re.findall(r"^    (\w+): [^#\n]*  # (.*)$", inspect.getsource(TrainConfig), re.MULTILINE))
    for field in fields(TrainConfig):
        name = "lambda" if field.name == "lam" else field.name
        choices = train._WORDS.get(field.name)
        expected = " or ".join(f"`{w}`" for w in choices()) if choices else train._EXPECTED.get(field.name, ("", ""))[1]
        assert field.default is not MISSING
        value = list(field.default) if isinstance(field.default, tuple) else field.default
        kind = expected or words(study.FIELDS[name])
        yield [f"`{name}`", kind, "" if value is None else value_text(value), comments.get(field.name, "")]


def study_file() -> str:
    head = ["key", "type", "default", "what it is"]
    parts = [
        "# The study file\n",
        AUTHOR,
        f"{inspect.cleandoc(FILE)}\n",
        *(f"## {title}\n\n{inspect.getdoc(model)}\n\n{table(head, keys(model))}\n" for title, model in MODELS.items()),
        f"## Training settings\n\nThe keys of `base` and of `space`.\n\n{table(['setting', *head[1:]], settings())}\n",
        f"## Metrics\n\n{', '.join(f'`{name}`' for name in study.METRICS)}; `best_` takes the best point of the curve "
        "instead of its last (the first of equal ones), and the weights, test figures and confusion matrix of a trial "
        "are those of that point. The test images choose nothing: there is no metric of theirs.\n",
    ]
    return "\n".join(parts)


FILE = """
A study file is YAML 1.2 (`1e-3` is a number, `no` is a word; no tags, anchors or aliases). `sieve validate FILE` names
every mistake in it, one line each; `--set path=value` replaces a single value for one launch. The keys of
the first table stand at the top of the file. A study that was launched keeps its specification: another one under the
same name is refused, but for `description`, `remarks`, `published` and `limits`, and for more points of a grid, a list
or a random search.

```yaml
name: first
dataset: digits
base: {batch_size: 50, epochs: 25, momentum: 0.9}
space:
  lambda: {low: 1e-6, high: 1e-1, log: true}
  eta: {low: 1e-3, high: 0.5, log: true}
  hidden_sizes: [[50], [100], [75, 50]]
search: {method: coarse-to-fine, stages: 4, trials_per_stage: 8}
```
"""


def commands(command: click.Command, name: str) -> Iterator[str]:
    """A section for each command below this one."""
    for word, below in getattr(command, "commands", {}).items():
        if below.hidden:
            continue
        if hasattr(below, "commands"):
            yield from commands(below, f"{name} {word}")
        else:
            yield f"## {name} {word}\n\n{one_command(below, f'{name} {word}')}"


def one_command(command: click.Command, name: str) -> str:
    """Its help, how it is called, and a table of its arguments and options."""
    usage, rows = [name], list[list[str]]()
    for p in command.params:
        if getattr(p, "hidden", False):
            continue
        if p.param_type_name == "argument":
            said = f"{str(p.name).upper()}{'...' if p.nargs == -1 else ''}"
            usage.append(said if p.required else f"[{said}]")
        else:
            said = ", ".join([*p.opts, *p.secondary_opts])
        given = p.default if isinstance(p.default, int | str | Path) and p.default is not False else None
        rows.append([f"`{said}`", "" if given is None else value_text(given), getattr(p, "help", None) or ""])
    if any(cell.startswith("`--") for cell, *_ in rows):
        usage.insert(1, "[OPTIONS]")
    options = f"\n{table(['', 'default', 'what it is'], rows)}\n" if rows else ""
    return f"{inspect.cleandoc(command.help or '')}\n\n    {' '.join(usage)}\n{options}"


def command_line() -> str:
    app = get_command(cli.app)
    return "\n".join(["# Commands\n", AUTHOR, f"{inspect.cleandoc(cli.__doc__ or '')}\n", *commands(app, "sieve")])


def pages() -> dict[Path, str]:
    """What each generated page should hold."""
    return {HERE / "study-file.md": study_file(), HERE / "commands.md": command_line()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)

"""A study as one self-contained HTML page and as CSV: what was asked, what came out, how to repeat it.

`gather` reads a study; all else is a function of what it read. Whatever text goes into the page is escaped on
its way, for only `Html` counts as markup.
"""

import base64
import csv
import io
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from optuna.trial import TrialState
from PIL.Image import Image

from core.data import write_whole
from search import figures, plan
from search.errors import StudyFailed
from search.outbox import Outbox, progress_points, readable, run_name, spread, unpack
from search.outcome import Outcome, conclude, fate, results, score, side, why
from search.plan import Finished, Result, Slot
from search.settings import Settings
from search.storage import Attempt, StudyRecord, failed_attempts, finished_attempts
from search.study import Choice, Published, Range, StudySpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 6  # configurations that are all drawn; of more, the BEST
BEST = 3
PAIRS = 6  # heat maps, or search paths
SCATTER = 2  # tolerances of a published figure; a larger deviation over our seeds excuses nothing
TEMPLATE = 96  # pixels of a class's template
FATES = ("complete", "pruned", "diverged", "failed", "left", "running")


# ---- reading


class Layer(NamedTuple):
    """A trained first layer w [d, h], and how to draw it: see figures.weight_tiles."""

    w: NDArray[Any]
    image_shape: Sequence[int] | None = None
    scale: NDArray[Any] | None = None
    classes: Sequence[str] | None = None


class Confusion(NamedTuple):
    """counts [c, c] of the test images: true class by predicted class."""

    counts: Sequence[Sequence[int]]
    classes: Sequence[str] = ()


@dataclass(frozen=True)
class Material:
    """All that a report says. Curves, layers and matrices are those of the configurations in `drawn`."""

    spec: StudySpec
    attempts: Sequence[Attempt]
    outcome: Outcome | None  # None without any result
    drawn: Sequence[Result] = ()
    curves: Mapping[Slot, Sequence[tuple[int, Mapping[str, float]]]] = field(default_factory=dict)  # (step, metrics)
    layers: Mapping[Slot, Layer] = field(default_factory=dict)
    confusion: Mapping[Slot, Confusion] = field(default_factory=dict)
    datasets: Mapping[str, str] = field(default_factory=dict)  # name -> digest
    versions: Mapping[str, str] = field(default_factory=dict)
    written: float = 0.0  # unix seconds


def html(record: StudyRecord, settings: Settings) -> bytes:
    """The page of a stored study."""
    return page(gather(record, settings)).encode()


def write(record: StudyRecord, settings: Settings, folder: Path) -> list[Path]:
    """Write report.html and trials.csv into a folder, which is made if need be."""
    material = gather(record, settings)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"report.html": page(material), "trials.csv": trials_csv(material)}
    for name, text in texts.items():
        write_whole(folder / name, text.encode())
    return [folder / name for name in texts]


def gather(record: StudyRecord, settings: Settings, few: int = FEW) -> Material:
    """Read a study: trials from its storage; curves, layers and digests from this machine's outbox, if it has them.

    few: up to so many configurations are all drawn, of more only the best.
    """
    spec, attempts = record.spec, record.attempts()
    settled = finished_attempts(attempts)
    try:
        outcome = conclude(record)
    except StudyFailed:
        outcome = None
    drawn = best_configurations(spec, settled, outcome, few)
    curves: dict[Slot, list[tuple[int, dict[str, float]]]] = {}
    layers: dict[Slot, Layer] = {}
    confusion: dict[Slot, Confusion] = {}
    with Outbox(settings.outbox) as box:
        for attempt in (settled[slot] for configuration in drawn for slot in configuration.slots):
            slot, uid = attempt.slot, record.uid(attempt.slot, attempt.attempt)
            curves[slot] = [(step, metrics) for step, _, metrics in progress_points(box.records(uid, "trial_progress"))]
            for last in box.records(uid, "trial_weights")[-1:]:
                stored, about = unpack(last.blob or b""), last.payload
                layers[slot] = Layer(stored["w"], about["image_shape"], stored.get("scale"), about["classes"])
            for end in box.records(uid, "trial_ended"):
                if end.payload["confusion"] is not None:
                    confusion[slot] = Confusion(end.payload["confusion"], end.payload["classes"] or ())
        first = {a.slot.stage: record.uid(a.slot, a.attempt) for a in reversed(attempts)}
        begun = [begun.payload["tags"] for uid in first.values() for begun in box.records(uid, "trial_begun")]
    datasets = {tags["dataset"]: tags["dataset_digest"] for tags in begun if "dataset_digest" in tags}
    versions = record.attrs.get("versions", {})
    return Material(spec, attempts, outcome, drawn, curves, layers, confusion, datasets, versions, written=time.time())


def best_configurations(
    spec: StudySpec, settled: Mapping[Slot, Attempt], outcome: Outcome | None, few: int
) -> list[Result]:
    """The configurations to draw, each with its repeats: the chosen one, those of its stage, the rest, by mean."""
    if outcome is None:
        return []
    chosen = set(outcome.chosen.slots)
    stage = max(slot.stage for slot in chosen)
    finished = [f for f in results(spec, settled.values(), {}) if math.isfinite(f.score)]
    found = plan.ranked(plan.results(sorted(finished, key=lambda f: f.slot), _configuration))
    found.sort(key=lambda r: (not chosen & set(r.slots), r.slots[0].stage != stage))
    return found if len(found) <= few else found[:BEST]


def _configuration(finished: Finished) -> str:
    return f"{finished.slot.stage}.{finished.slot.index}"


# ---- CSV


def trials_csv(material: Material) -> str:
    """One line for each attempt, in the order in which they began."""
    names = list(material.spec.dimensions)
    found = dict.fromkeys(key for a in material.attempts for key, v in a.attrs.items() if isinstance(v, int | float))
    measured = [key for key in found if key not in ("repeat", "attempt")]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\r\n")
    head = ["number", "stage", "slot", "repeat", "attempt", *names, "value"]
    rows.writerow([*head, *measured, "status", "reason"])
    for a in material.attempts:
        place = [a.number, a.attrs["stage"], str(a.slot), a.slot.repeat, a.attempt]
        told = [a.params.get(name, "") for name in names] + ["" if a.value is None else a.value]
        rows.writerow([*place, *told, *(a.attrs.get(key, "") for key in measured), fate(a), why(a)])
    return text.getvalue()


# ---- published figures


class Measured(NamedTuple):
    """A figure of ours, over the runs of a setting."""

    values: Sequence[float]  # of each run that has it
    without: int  # runs of the setting without a result

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        return statistics.stdev(self.values) if self.n > 1 else None

    @property
    def variance(self) -> float:
        return statistics.variance(self.values) if self.n > 1 else 0.0


class Compared(NamedTuple):
    """A published figure beside ours."""

    published: Published
    ours: Measured
    other: Measured | None  # that of the setting it is below
    difference: float | None  # ours less the published one, or less the other one
    verdict: str


def compare(material: Material) -> list[Compared]:
    """Each published figure beside ours, over the last stage that has its setting (or the study's choice)."""
    return [_compare(material, published) for published in material.spec.published]


def _compare(material: Material, published: Published) -> Compared:
    ours = _measured(material, published.metric, published.where)
    other = _measured(material, published.metric, published.below) if published.below else None
    than = other.mean if other else published.value
    difference = None if ours.mean is None or than is None else ours.mean - than
    missing = [found for found in (ours, other) if found and found.mean is None]
    if missing:
        verdict = "no result" if any(found.without for found in missing) else "not run"
    elif difference is None:
        verdict = "in words only"
    else:
        verdict = _verdict(published, ours, other, difference)
    return Compared(published, ours, other, difference, verdict)


def _verdict(published: Published, ours: Measured, other: Measured | None, difference: float) -> str:
    """Seed noise is two deviations of the difference; a published figure counts as one run with our deviation.

    Runs that scatter by more than SCATTER tolerances would excuse any figure: then the distance is a difference.
    """
    if other:
        noise = 2 * math.sqrt(ours.variance / ours.n + other.variance / other.n)
        if abs(difference) > noise:
            return "reproduced" if difference < 0 else "different"
        return "within seed noise" if noise else "different"
    if published.tolerance is not None and abs(difference) <= published.tolerance * (1 + 1e-9) + 1e-12:
        return "reproduced"
    noise = 2 * math.sqrt((published.deviation or ours.deviation or 0.0) ** 2 + ours.variance / ours.n)
    if published.tolerance is None and not noise:
        return "no tolerance given"
    excusable = published.tolerance is None or (ours.deviation or 0.0) <= SCATTER * published.tolerance
    return "within seed noise" if excusable and abs(difference) <= noise else "different"


def _measured(material: Material, metric: str, where: Mapping[str, Any]) -> Measured:
    runs = _runs_of(material, where)
    told = [a.attrs | {material.spec.metric: a.value} for a in runs if a.value is not None]
    values = [figures[metric] for figures in told if metric in figures]
    return Measured(values, len(runs) - len(values))


def _runs_of(material: Material, where: Mapping[str, Any]) -> list[Attempt]:
    """The settled attempts with this setting, or those of the study's choice."""
    settled = finished_attempts(material.attempts)
    if not where:
        return [settled[slot] for slot in material.outcome.chosen.slots] if material.outcome else []
    met = [a for a in settled.values() if _meets(material.spec, a, where)]
    return [a for a in met if a.slot.stage == max(b.slot.stage for b in met)]


def _meets(spec: StudySpec, attempt: Attempt, where: Mapping[str, Any]) -> bool:
    """Whether an attempt was trained with these settings, searched or fixed."""
    given = spec.config(attempt.params, **attempt.attrs["overrides"]).to_params() | attempt.params

    def same(a: Any, b: Any) -> bool:
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (a, b))
        return math.isclose(a, b, rel_tol=1e-6) if numbers else str(a) == str(b)

    return all(name in given and same(given[name], value) for name, value in where.items())


# ---- HTML


def reason(compared: Compared) -> str:
    """Why ours differs, if it does."""
    return compared.published.why if compared.verdict in ("different", "within seed noise") else ""


class Html(str):
    """Text that is markup already; any other text is escaped on its way into the page."""

    __slots__ = ()


def _join(parts: Iterable[object]) -> Html:
    return Html("".join(part if isinstance(part, Html) else escape(str(part)) for part in parts))


def _tag(name: str, *inside: object, **attributes: str) -> Html:
    words = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{words}>{_join(inside)}</{name}>")


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], **attributes: str) -> Html:
    """Cells that are Html and begin with <td are taken as they are."""

    def cell(value: object) -> Html:
        if isinstance(value, Html) and value.startswith("<td"):
            return value
        number = isinstance(value, int | float) or (isinstance(value, str) and value[:1] in "+-−0123456789" and value)
        return _tag("td", _number(value), class_="number") if number else _tag("td", value)

    body = _join(_tag("tr", *map(cell, row)) for row in rows)
    return _tag(
        "div",
        _tag("table", _tag("thead", _tag("tr", *(_tag("th", name) for name in head))), _tag("tbody", body)),
        class_="table",
        **attributes,
    )


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _four(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _section(title: str, *inside: object) -> Html:
    shown = [part for part in inside if part]
    return _tag("section", _tag("h2", title), *shown) if shown else Html()


def page(material: Material) -> str:
    """The whole report as one HTML document that needs nothing else."""
    spec = material.spec
    body = [
        _header(material),
        _result(material),
        _section("Published figures beside ours", _published(material)),
        _section("Curves", *map(_picture, curves(material))),
        _section(
            "Where it looked", _pair(paths(material)), _pair(heat_maps(material)), *map(_picture, slices(material))
        ),
        _section("What the first layer learned", _pair(layers(material), "pair tiles")),
        _section("Mistakes on the test images", *map(_picture, _confusions(material))),
        _section("Configurations that were repeated", _repeated(material)),
        _section("Stages", _stages(material)),
        _section("Space", _space(spec)),
        _section("Trials", _download(material), _trials(material)),
        _section("To repeat it", *_repeat(material)),
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = Html(
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(spec.name)}: report</title><style>{STYLE}</style>"
    )
    document = _tag("html", _tag("head", head), _tag("body", _tag("main", *body)), lang="en")
    return f"<!DOCTYPE html>\n{document}\n"


def _header(material: Material) -> Html:
    spec, attempts = material.spec, material.attempts
    counts = Counter(fate(a) for a in attempts)
    words = [f"{counts[word]} {word}" for word in FATES if counts[word]]
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(material.written))
    line = f"{spec.search.method} over {', '.join(spec.dimensions)} · {len(attempts)} trials"
    return _tag(
        "header",
        _tag("h1", spec.name),
        *(_tag("p", text, class_="question") for text in spec.description.split("\n\n") if text),
        _tag("p", f"{line}: {', '.join(words) or 'none yet'} · written {when}", class_="quiet"),
    )


def _result(material: Material) -> Html:
    spec, outcome = material.spec, material.outcome
    if outcome is None:
        return _section("Result", _tag("p", "No trial has a result yet.", class_="warning"))
    chosen = outcome.chosen
    runs = "one run" if chosen.n == 1 else f"mean and deviation of {chosen.n} runs"
    cards = [_card(spec.metric, spread(chosen.mean, chosen.deviation), runs)]
    if outcome.test_accuracy:
        cards.append(_card("test_accuracy", spread(*outcome.test_accuracy), "not used to choose"))
    cards += [_card(name, _number(value), "chosen") for name, value in readable(chosen.params).items()]
    warnings = [*outcome.border]
    if outcome.failed:
        warnings.append(f"{outcome.failed} slots failed; `sieve retry {spec.name}` runs them again")
    return _section(
        "Result", _tag("div", *cards, class_="cards"), *(_tag("p", text, class_="warning") for text in warnings)
    )


def _card(name: str, value: str, note: str) -> Html:
    return _tag(
        "div", _tag("span", name, class_="quiet"), _tag("strong", value), _tag("span", note, class_="quiet"),
        class_="card",
    )  # fmt: skip


def _published(material: Material) -> Html:
    def row(c: Compared) -> list[object]:
        p, n, without = c.published, c.ours.n, c.ours.without
        counted = f"{n} run{'s' * (n != 1)}" if n else ""
        if without:
            counted += f"{', ' if counted else ''}{without} without a result"
        return [
            run_name(p.where) if p.where else p.label or "the study's choice",
            p.metric,
            f"below {run_name(p.below)}" if p.below else spread(p.value, p.deviation),
            spread(c.ours.mean, c.ours.deviation),
            Html(_tag("td", counted, class_="quiet")),
            "" if c.difference is None else f"{c.difference:+.4f}",
            "" if p.tolerance is None else f"{p.tolerance:g}",
            Html(_tag("td", c.verdict, class_=f"verdict {c.verdict.partition(' ')[0]}")),
            " · ".join(text for text in (p.label if p.where else "", p.note, reason(c)) if text),
        ]

    head = ["setting", "figure", "published", "ours", "", "difference", "tolerance", "verdict", "note"]
    compared = compare(material)
    return _table(head, map(row, compared), id="published") if compared else Html()


class Drawing(NamedTuple):
    """A figure to be drawn, and what it shows."""

    caption: str
    draw: Callable[[], "Image | Figure"]


def _picture(drawing: Drawing) -> Html:
    """A figure, or in words why there is none: no figure may cost the report."""
    caption = drawing.caption
    try:
        drawn = drawing.draw()
        kind, data = ("png", figures.png(drawn)) if isinstance(drawn, Image) else ("svg+xml", figures.svg(drawn))
    except Exception as error:
        return _tag("p", f"{caption}: could not be drawn ({type(error).__name__}: {error})", class_="warning")
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    image = Html(f'<img src="{source}" alt="{escape(caption)}">')
    return _tag("figure", image, _tag("figcaption", caption))


def _pair(drawings: Sequence[Drawing], shape: str = "pair") -> Html:
    """Figures side by side."""
    return _tag("div", *map(_picture, drawings), class_=shape) if drawings else Html()


def _name(material: Material, configuration: Result) -> str:
    mean = configuration.mean if material.spec.maximise else -configuration.mean
    first = configuration.slots[0]
    stage = next(a.attrs["stage"] for a in material.attempts if a.slot == first)
    runs = f" · {configuration.n} runs" if configuration.n > 1 else ""
    found = spread(mean, configuration.deviation)
    return f"{run_name(configuration.params)} · {stage}{runs} · {material.spec.metric} {found}"


def curves(material: Material) -> list[Drawing]:
    """Loss, cost, accuracy and eta of each of the configurations to draw."""
    drawn = []
    for configuration in material.drawn:
        runs = [material.curves[slot] for slot in configuration.slots if material.curves.get(slot)]
        if runs:
            caption = _name(material, configuration) + (" · band: one deviation" if len(runs) > 1 else "")
            x_label = unit(material, configuration.slots[0])
            x, table = figures.stack(runs)
            if "eta" in table and np.nanmin(table["eta"]) == np.nanmax(table["eta"]):
                del table["eta"]  # constant
            drawn.append(Drawing(caption, partial(figures.curves, x, table, x_label=x_label)))
    return drawn


def unit(material: Material, slot: Slot) -> str:
    """What a step of a trial's curves is."""
    attempt = next(a for a in material.attempts if a.slot == slot)
    config = material.spec.config(attempt.params, **attempt.attrs["overrides"])
    return "update" if config.eval_every else "epoch"


def _numeric(spec: StudySpec) -> dict[str, Range]:
    return {name: d for name, d in spec.dimensions.items() if isinstance(d, Range)}


class Valued(NamedTuple):
    """A trial with a result."""

    slot: Slot
    params: Mapping[str, Any]
    attrs: Mapping[str, Any]
    value: float


def _valued(material: Material) -> list[Valued]:
    complete = (a for a in material.attempts if a.state == TrialState.COMPLETE)
    return [Valued(a.slot, a.params, a.attrs, a.value) for a in complete if a.value is not None]


def paths(material: Material) -> list[Drawing]:
    """Coarse to fine: where each stage's points and box lay, for each two of the ranges, or one beside the metric."""
    spec, found, ranges = material.spec, _valued(material), _numeric(material.spec)
    if spec.search.method != "coarse-to-fine" or not found or not ranges:
        return []
    stages, values = [a.attrs["stage"] for a in found], [a.value for a in found]
    boxes = {info.name: box for info, box in _boxes(material) if box and info.name in stages}
    chosen = material.outcome.chosen if material.outcome else None
    metric = Range(low=min(values), high=math.nextafter(max(values), math.inf))
    axes = dict(ranges) if len(ranges) > 1 else ranges | {spec.metric: metric}
    drawn = []
    for x, y in list(combinations(axes, 2))[:PAIRS]:
        whole = {spec.metric: (metric.low, metric.high)}
        told = [{**a.params, spec.metric: a.value} for a in found]
        best: dict[str, Any] | None = {**chosen.params, spec.metric: chosen.mean} if chosen else None
        drawn.append(
            Drawing(
                f"{x} and {y}: a point for each trial, a box for each stage, a star for the choice",
                partial(
                    figures.search_path,
                    [params[x] for params in told],
                    [params[y] for params in told],
                    stages,
                    names=(x, y),
                    log=(axes[x].log, axes[y].log),
                    boxes={stage: (*(box | whole)[x], *(box | whole)[y]) for stage, box in boxes.items()},
                    best=(best[x], best[y]) if best else None,
                ),
            )
        )
    return drawn


def _boxes(material: Material) -> list[tuple[plan.StageInfo, plan.Box | None]]:
    """Each stage of the plan with its box."""
    settled = finished_attempts(material.attempts)
    failed = {slot: a.params for slot, a in failed_attempts(material.attempts).items()}
    finished = results(material.spec, settled.values(), failed)
    return list(zip(plan.stages(material.spec), plan.boxes(material.spec, finished), strict=True))


def heat_maps(material: Material) -> list[Drawing]:
    """A grid: the metric over each two of its axes; with further axes, the best over those."""
    spec, found = material.spec, _valued(material)
    axes = [name for name in spec.dimensions if len({a.params[name] for a in found}) > 1]
    if spec.search.method != "grid" or len(axes) < 2:
        return []
    sign = 1 if spec.maximise else -1
    finished = [Finished(a.slot, dict(a.params), sign * a.value) for a in found if a.attrs["stage"] == "grid"]
    configurations = plan.results(finished)
    drawn = []
    for x, y in list(combinations(axes, 2))[:PAIRS]:
        cells: dict[tuple[Any, Any], float] = {}
        for c in configurations:
            place = c.params[x], c.params[y]
            cells[place] = max(cells.get(place, -math.inf), c.mean)
        over = "mean over repeats" if len(axes) == 2 else f"best over {', '.join(n for n in axes if n not in (x, y))}"
        caption = f"{spec.metric} by {x} and {y}" + ("" if len(axes) == 2 and spec.repeats == 1 else f" ({over})")
        xs, ys, values = [x for x, _ in cells], [y for _, y in cells], [sign * v for v in cells.values()]
        drawn.append(Drawing(caption, partial(figures.heat_map, xs, ys, values, names=(x, y, spec.metric))))
    return drawn


def slices(material: Material) -> list[Drawing]:
    """The metric by each parameter."""
    spec, found = material.spec, _valued(material)
    axes = {n: d for n, d in spec.dimensions.items() if len({a.params.get(n) for a in found}) > 1}
    if not axes or (len(axes) == 1 and paths(material)):  # which shows the same
        return []
    points = {name: [a.params[name] for a in found] for name in axes}
    log = {name for name, d in axes.items() if isinstance(d, Range) and d.log}
    choices = {name: d.choices for name, d in axes.items() if isinstance(d, Choice)}
    stages, values = [a.attrs["stage"] for a in found], [a.value for a in found]
    beyond = figures.fences(values) != (min(values), max(values))
    caption = f"{spec.metric} by each parameter" + ("; triangles lie far beyond the axis" if beyond else "")
    draw = partial(figures.slices, points, values, stages, y_label=spec.metric, log=log, choices=choices)
    return [Drawing(caption, draw)]


def layers(material: Material) -> list[Drawing]:
    """The first layer of each of the configurations to draw, as trained and in pixel space."""
    drawn = []
    for configuration in material.drawn:
        slot = configuration.slots[0]
        if layer := material.layers.get(slot):
            units = f"first {figures.MAX_UNITS} units" if layer.w.shape[1] == figures.MAX_UNITS else "units"
            what = "templates of the classes" if layer.classes else units
            name = f"{run_name(configuration.params)} · {slot} · {what}"
            shown = {"": None} if layer.scale is None else {" as trained": None, " in pixel space": layer.scale}
            tile = TEMPLATE if layer.classes else figures.TILE
            draw = partial(figures.weight_tiles, layer.w, layer.image_shape, classes=layer.classes, tile=tile)
            drawn += [Drawing(name + how, partial(draw, scale=scale)) for how, scale in shown.items()]
    return drawn


def _confusions(material: Material) -> list[Drawing]:
    """Of the chosen configuration's runs alone, added up."""
    slots = [slot for c in material.drawn[:1] for slot in c.slots if slot in material.confusion]
    if not slots:
        return []
    counts = np.sum([material.confusion[slot].counts for slot in slots], axis=0)
    classes = material.confusion[slots[0]].classes
    caption = "the chosen configuration" + (f", {len(slots)} runs added up" if len(slots) > 1 else "")
    return [Drawing(caption, partial(figures.confusion_matrix, counts, classes))]


def _repeated(material: Material) -> Html:
    """Mean and deviation over the runs of each configuration that has several, the best first."""
    spec, by_slot = material.spec, finished_attempts(material.attempts)
    groups = material.outcome.repeated if material.outcome else []
    chosen = set(material.outcome.chosen.slots) if material.outcome else set()

    def row(group: Result) -> list[object]:
        runs = [by_slot[slot] for slot in group.slots]
        tests = [a.attrs["test_accuracy"] for a in runs if "test_accuracy" in a.attrs]
        test = spread(statistics.fmean(tests), statistics.stdev(tests) if len(tests) > 1 else None) if tests else ""
        mark = _tag("span", "chosen", class_="chosen") if chosen & set(group.slots) else ""
        mean = spread(group.mean, group.deviation)
        params = [group.params[name] for name in spec.dimensions]
        return [runs[0].attrs["stage"], *params, group.n, mean, test, mark]

    head = ["stage", *spec.dimensions, "runs", spec.metric, "test_accuracy", ""]
    return _table(head, map(row, groups), id="repeated") if groups else Html()


def _stages(material: Material) -> Html:
    spec, settled = material.spec, finished_attempts(material.attempts)

    def row(info: plan.StageInfo, box: plan.Box | None) -> list[object]:
        done = [a for a in settled.values() if a.attrs["stage"] == info.name]
        scores = [score(spec, a) for a in done]
        best = max(scores, default=-math.inf)
        sides = ["" if box is None else side(spec.dimensions[n], box[n]) for n in spec.dimensions]
        set_ = run_name(done[0].attrs["overrides"]) if done else ""
        return [info.name, info.trials, len(done), _four(abs(best)) if math.isfinite(best) else "", *sides, set_]

    head = ["stage", "planned", "done", f"best {spec.metric}", *spec.dimensions, "set by the stage"]
    rows = [row(info, box) for info, box in _boxes(material)]
    told = [k for k in range(len(head)) if any(row[k] != "" for row in rows)]
    return _table([head[k] for k in told], ([row[k] for k in told] for row in rows), id="stages")


def _space(spec: StudySpec) -> Html:
    def row(name: str, d: Range | Choice) -> list[object]:
        if isinstance(d, Choice):
            return [name, "one of", _tag("td", ", ".join(map(_number, d.choices)))]
        kind = ("whole numbers, " if d.integer else "") + ("logarithmic" if d.log else "linear")
        return [name, kind, _tag("td", f"{d.low:g} to {d.high:g}")]

    return _table(["parameter", "scale", "values"], (row(n, d) for n, d in spec.dimensions.items()), id="space")


def _trials(material: Material) -> Html:
    spec = material.spec
    shown = sorted(material.attempts, key=lambda a: (-score(spec, a), a.slot, a.attempt))
    low, high = figures.fences([a.value for a in _valued(material)] or [0.0])
    chosen = set(material.outcome.chosen.slots) if material.outcome else set()

    def row(a: Attempt) -> list[object]:
        share = 0.0 if a.value is None else min(max((a.value - low) / ((high - low) or 1.0), 0.0), 1.0)
        bar = _tag("td", _four(a.value), class_="number bar", style=f"--share:{share:.0%}")
        status = "chosen" if a.slot in chosen and a.value is not None else fate(a)
        reason = why(a).removeprefix(status).lstrip(": ")
        cell = _tag("td", _tag("span", status, class_=f"state {status}"), " ", reason)
        more = [_four(a.attrs.get(name)) for name in ("test_accuracy",)]
        seconds = f"{a.attrs['seconds']:.2f}" if "seconds" in a.attrs else ""
        params = [a.params.get(name, "") for name in spec.dimensions]
        return [a.number, a.attrs["stage"], str(a.slot), *params, bar, *more, seconds, cell]

    head = ["number", "stage", "slot", *spec.dimensions, spec.metric, "test_accuracy", "seconds", "status"]
    return _table(head, map(row, shown), id="trials")


def _download(material: Material) -> Html:
    text = base64.b64encode(trials_csv(material).encode()).decode()
    link = _tag("a", "trials.csv", download="trials.csv", href=f"data:text/csv;charset=utf-8;base64,{text}")
    return _tag("p", "Best first. All that was measured, as CSV: ", link, ".", class_="quiet")


def _repeat(material: Material) -> list[Html]:
    spec = material.spec
    file = json.dumps(json.loads(spec.to_json()), indent=2)
    seeds = (
        f"study seed {spec.seed}; a trial's initial weights come from (seed, slot), "
        "the order of its data from (seed, repeat)"
    )
    facts = [
        ("seeds", seeds),
        *((f"dataset {name}", f"sha256 {digest}") for name, digest in material.datasets.items()),
        *material.versions.items(),
    ]
    command = f"sieve launch {spec.name}.yaml"
    return [
        _tag("p", f"Save the study below as {spec.name}.yaml; in an empty SIEVE_HOME run ", _tag("code", command), "."),
        _table(["what", "exactly"], [[name, _tag("td", text)] for name, text in facts], id="facts"),
        _tag("details", _tag("summary", f"{spec.name}.yaml (JSON is YAML too)"), _tag("pre", file, id="study")),
    ]


STYLE = """
:root { --ink: #1f2933; --quiet: #66727f; --line: #e3e8ee; --accent: #1f77b4; --soft: #f5f8fb; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: white;
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { margin: 0 0 .3rem; font-size: 2rem; line-height: 1.2; }
h2 { margin: 2.6rem 0 .8rem; padding-bottom: .3rem; font-size: 1.2rem; border-bottom: 2px solid var(--line); }
p { margin: .4rem 0; max-width: 75ch; }
.question { font-size: 1.1rem; white-space: pre-line; }
.quiet, figcaption { color: var(--quiet); font-size: .87rem; }
header p { max-width: none; }
.warning { padding: .5rem .8rem; border-left: 4px solid #d97706; background: #fff7ed; }
.cards { display: flex; flex-wrap: wrap; gap: .7rem; }
.card { display: flex; flex-direction: column; padding: .6rem 1rem; background: var(--soft);
  border: 1px solid var(--line); border-radius: 8px; }
.card strong { font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.table { overflow: auto; max-height: 34rem; border: 1px solid var(--line); border-radius: 8px; }
table { width: 100%; border-collapse: collapse; font-size: .87rem; }
th { position: sticky; top: 0; text-align: left; background: var(--soft); white-space: nowrap; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bar { background: linear-gradient(to right, #d6e6f2 var(--share), transparent var(--share)); }
.state, .verdict, td.quiet { white-space: nowrap; }
.chosen, .reproduced, .within { color: #15803d; font-weight: 600; }
.failed, .different { color: #b91c1c; font-weight: 600; }
.pruned, .diverged { color: #b45309; }
figure { margin: 1rem 0; }
img { display: block; max-width: 100%; height: auto; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 0 1.5rem;
  align-items: start; }
.tiles img { image-rendering: pixelated; }
pre { overflow: auto; max-height: 30rem; padding: 1rem; background: var(--soft); border-radius: 8px; font-size: .8rem; }
code { padding: .1rem .35rem; background: var(--soft); border-radius: 4px; }
#facts td { overflow-wrap: anywhere; }
@media print { .table, pre { max-height: none; overflow: visible; } figure { break-inside: avoid; } }
"""

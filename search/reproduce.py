"""The experiments of the reports: which studies they are, and one document of published figures beside ours.

All words about an experiment stand in its study file, all figures in the storage; the document is made of both, and
the same storage makes the same document.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from core.data import write_whole
from search import figures, report, run
from search.errors import StudyConflict, StudyFileError, UnknownStudy
from search.outbox import run_name
from search.outcome import open_study
from search.report import Compared, Drawing, Material, Measured
from search.settings import Settings
from search.study import Choice, StudySpec, difference, load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_DRAWN = 12  # configurations of a study whose curves are laid over each other
MOST_LINES = 6  # in one figure
MOST_AXES = 3  # of a grid that is drawn as maps
WIDEST = 1200  # pixels of a picture
COLOURS = 64

HEAD = """# The five reports, reproduced

`sieve reproduce` writes this page: it runs every study below that is not finished yet, and sets the figures that the
reports published beside ours. Ours are means and standard deviations over the runs of a setting, which differ in the
seeds of initial weights and of the order of the data. Everything is chosen by validation figures; test figures are
only reported.

Verdicts follow one rule. Within the tolerance that the study file states, a figure is **reproduced**; so is an order of
two settings that holds by more than seeds explain. A distance of at most two standard deviations, both of a single
run (the published figure, taken to scatter like ours) and of our mean, is **within seed noise**, unless our runs
scatter by more than twice the tolerance: that would excuse any figure. All else is **different**, and below the table
stands why, or that we cannot say.
"""


def studies(folder: Path, names: Sequence[str] = ()) -> list[StudySpec]:
    """The studies in a folder that reproduce something, or those of these names; each after the one it builds on.

    Raises StudyFileError.
    """
    found = {spec.name: spec for spec in map(load, sorted(folder.glob("*.yaml"))) if spec.published}
    if unknown := [name for name in names if name not in found]:
        known = f"expected some of {', '.join(found)}" if found else "it has no study with published figures"
        raise StudyFileError([f"{folder}: no such study, {name!r}; {known}" for name in unknown])
    ordered: dict[str, StudySpec] = {}

    def add(spec: StudySpec, building: tuple[str, ...]) -> None:
        source = spec.space_from.study if spec.space_from else None
        if source in building:
            raise StudyFileError([f"{folder}: {' and '.join(building)} take their spaces from each other"])
        if source in found:
            add(found[source], (*building, spec.name))
        ordered.setdefault(spec.name, spec)

    for name in sorted(names or found, key=lambda name: (not re.match(r"[a-z]\d", name), name)):
        add(found[name], ())
    return list(ordered.values())


def is_done(spec: StudySpec, settings: Settings) -> bool:
    """Whether the study ran to its end. Raises StudyConflict if another one has its name."""
    try:
        record = open_study(spec.name, settings)
    except UnknownStudy:
        return False
    if record.attrs.get("state") != "done":
        return False
    if differences := difference(record.spec, run.resolved(spec, settings)):
        raise StudyConflict(spec.name, differences)
    return True


def write(specs: Sequence[StudySpec], settings: Settings, out: Path) -> list[Path]:
    """Write reproduction.md, and its pictures into reproduction/, below the folder `out`; those written.

    Studies that are not finished are named, and left out.
    """
    pictures = out / "reproduction"
    pictures.mkdir(parents=True, exist_ok=True)
    summary, sections, versions, written = list[list[str]](), list[str](), dict[str, None](), list[Path]()
    for spec in specs:
        if not is_done(spec, settings):
            summary.append([f"[{spec.name}](../studies/{spec.name}.yaml)", "not finished", "", ""])
            continue
        record = open_study(spec.name, settings)
        material = report.gather(record, settings, few=MOST_DRAWN)
        material = replace(material, spec=run.resolved(spec, settings))  # with the file's words
        compared = report.compare(material)
        shown = list[tuple[str, str]]()
        for k, drawing in enumerate(drawings(material), 1):
            path = pictures / f"{spec.name}-{k}.png"
            write_whole(path, small(drawing.draw()))
            shown.append((drawing.caption, f"reproduction/{path.name}"))
            written.append(path)
        summary.append([f"[{spec.name}](#{spec.name})", *counts(compared)])
        sections.append(section(material, compared, shown))
        used = {**{f"data {name}": digest for name, digest in material.datasets.items()}, **material.versions}
        versions[", ".join(f"{name} {value}" for name, value in used.items())] = None
    head = ["study", "reproduced", "within seed noise", "different"]
    made = "\n".join(f"- {line}" for line in versions)
    text = "\n\n".join([HEAD.strip(), table(head, summary), *sections, "## Made with", made])
    write_whole(out / "reproduction.md", f"{text}\n".encode())
    for old in set(pictures.glob("*.png")) - set(written):
        old.unlink()
    return [out / "reproduction.md", *written]


# ---- words


def section(material: Material, compared: Sequence[Compared], shown: Iterable[tuple[str, str]]) -> str:
    """What one study asked, showed and looks like; shown: captions and addresses of its pictures."""
    spec = material.spec
    seconds = sum(a.attrs.get("seconds", 0.0) for a in material.attempts)
    facts = f"[`{spec.name}.yaml`](../studies/{spec.name}.yaml): {len(material.attempts)} trials, "
    facts += f"{seconds / 60:.1f} minutes of training."
    if material.outcome and len(material.spec.dimensions) and len(material.attempts) > 1:
        facts += f" Chosen by {spec.metric}: {run_name(material.outcome.chosen.params)}."
    why: dict[str, list[str]] = {}
    for c in compared:
        if (text := report.reason(c)) or c.verdict == "different":
            why.setdefault(text or "not explained.", []).append(f"{setting(c)} ({c.published.metric})")
    reasons = [f"- {'; '.join(places)}: {text}" for text, places in why.items()]
    parts = [f'<a id="{spec.name}"></a>', f"## {spec.description}", facts, comparison(compared)]
    if reasons:
        parts += ["Where ours differs:", "\n".join(reasons)]
    parts += [spec.remarks.strip()] if spec.remarks else []
    return "\n\n".join([*parts, *(f"![{caption}]({address})\n\n*{caption}*" for caption, address in shown)])


def counts(compared: Sequence[Compared]) -> list[str]:
    """How many of the figures got each verdict."""
    return [str(sum(c.verdict == verdict for c in compared)) for verdict in
            ("reproduced", "within seed noise", "different")]  # fmt: skip


def comparison(compared: Sequence[Compared]) -> str:
    """The published figures beside ours."""
    head = ["setting", "figure", "published", "ours", "runs", "difference", "verdict", "note"]
    return table(head, map(_row, compared))


def setting(compared: Compared) -> str:
    """What a published figure is about."""
    published = compared.published
    return run_name(published.where) if published.where else published.label or "the study's choice"


def _row(c: Compared) -> list[str]:
    p = c.published
    unit = partial(_amount, p.metric)
    published = unit(p.value, p.deviation) if p.value is not None else ""
    ours = _measured(unit, c.ours)
    if c.other:
        published = f"below {run_name(p.below)}"
        ours += f" against {_measured(unit, c.other)}"
    if p.tolerance is not None:
        published += f" (within {unit(p.tolerance)})"
    runs = f"{c.ours.n}"
    if c.ours.n > 1:
        runs += f": {unit(min(c.ours.values))} to {unit(max(c.ours.values))}"
    if c.ours.without:
        runs += f", {c.ours.without} without a result"
    difference = "" if c.difference is None else f"{'+' if c.difference > 0 else ''}{unit(c.difference)}"
    verdict = f"**{c.verdict}**" if c.verdict == "different" else c.verdict
    note = " · ".join(text for text in (p.label if p.where else "", p.note) if text)
    return [setting(c), p.metric, published, ours, runs, difference, verdict, note]


def _measured(unit: Any, found: Measured) -> str:
    return unit(found.mean, found.deviation) if found.mean is not None else "no result"


def _amount(metric: str, value: float, deviation: float | None = None) -> str:
    """Accuracies in per cent, all else as it is."""
    factor, sign, digits = (100, " %", 2) if metric.endswith("accuracy") else (1, "", 3)
    spread = "" if deviation is None else f" ± {factor * deviation:.{digits}f}"
    return f"{factor * value:.{digits}f}{spread}{sign}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# ---- pictures


def drawings(material: Material) -> list[Drawing]:
    """Few settings: their curves, over each other if they are several, and templates of classes; many: the metric."""
    spec, several = material.spec, len(material.drawn) > 1
    few = len(material.attempts) <= MOST_DRAWN * spec.repeats and not spec.confirm
    templates = [d for d in report.layers(material) if "templates" in d.caption and "pixel space" not in d.caption]
    found = overlays(material) if few and several else []
    if few and templates:
        found += [d for pair in zip(report.curves(material), templates, strict=False) for d in pair]
    else:
        found += report.curves(material)[:1]
    if not few or len(spec.dimensions) > 1:
        maps = report.heat_maps(material) if len(spec.dimensions) <= MOST_AXES else []
        found += maps or report.slices(material) or report.paths(material)
    return found + (templates[:1] if templates and not few else [])


def overlays(material: Material) -> list[Drawing]:
    """Loss and accuracy of all settings over each other; a figure for each optimizer, say, if they are many."""
    choices = {name: d.choices for name, d in material.spec.dimensions.items() if isinstance(d, Choice)}
    words = [name for name, values in choices.items() if name != "hidden_sizes" and isinstance(values[0], str)]
    many = len(material.drawn) > MOST_LINES

    def group(params: Mapping[str, Any]) -> str:
        return run_name({name: params[name] for name in words}) if many else ""

    found = []
    x_label = report.unit(material, material.drawn[0].slots[0])
    drawn = sorted(material.drawn, key=lambda c: (group(c.params), c.slots[0]))
    for title, members in groupby(drawn, key=lambda c: group(c.params)):
        runs = {}
        for c in members:
            name = run_name({n: v for n, v in c.params.items() if not (many and n in words)})
            if points := [material.curves[slot] for slot in c.slots if material.curves.get(slot)]:
                runs[name] = figures.stack(points)
        if runs:
            caption = ", ".join(text for text in (title, "training (dashed) and validation") if text)
            caption += "; bands: one deviation" if any(len(c.slots) > 1 for c in drawn) else ""
            found.append(Drawing(caption, partial(figures.overlay, runs, x_label=x_label)))
    return found


def small(picture: "Image.Image | Figure") -> bytes:
    """A PNG of few colours, no wider than WIDEST."""
    image = Image.open(io.BytesIO(figures.png(picture))).convert("RGB")
    if image.width > WIDEST:
        size = WIDEST, round(image.height * WIDEST / image.width)
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

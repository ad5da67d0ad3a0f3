"""The report: hand-computed figures found again in the parsed page, in the CSV and in the drawings."""

import base64
import csv
import io
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna import load_study
from optuna.trial import TrialState
from optuna_dashboard import get_note
from typer.testing import CliRunner

from search import report, run, study
from search.cli import app
from search.errors import UnknownStudy
from search.outbox import Outbox
from search.outcome import Outcome, open_study, study_note
from search.plan import Result, Slot
from search.report import Confusion, Layer, Material
from search.settings import Settings
from search.storage import Attempt, StudyRecord
from search.study import StudySpec, restore

EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;"
Spec = Callable[..., StudySpec]


class Page(HTMLParser):
    """What a browser would find: the tables by id, the pictures by caption, all tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.pictures: dict[str, bytes] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.by_id: dict[str, str] = {}
        self._rows: list[list[str]] | None = None
        self._id = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag == "div":
            self._id = given.get("id") or ""
        elif tag == "pre":
            self._id = given.get("id") or ""
            self.by_id[self._id] = ""
        elif tag == "table":
            self._rows = self.tables.setdefault(self._id, [])
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
        elif tag in ("td", "th") and self._rows is not None:
            self._rows[-1].append("")
        elif tag == "img":
            kind, _, data = (given["src"] or "").partition(";base64,")
            assert kind in ("data:image/png", "data:image/svg+xml")
            self.pictures[given["alt"] or ""] = base64.b64decode(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._rows = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._rows and self._rows[-1]:
            self._rows[-1][-1] += data
        elif self._id in self.by_id:
            self.by_id[self._id] += data

    def column(self, table: str, name: str) -> list[str]:
        head, *rows = self.tables[table]
        return [row[head.index(name)] for row in rows]

    def picture(self, *words: str) -> str:
        """The one drawing whose caption has these words; matplotlib leaves every text in a comment."""
        (found,) = [data for caption, data in self.pictures.items() if all(word in caption for word in words)]
        return found.decode()


def attempt(slot: str, params: Mapping[str, Any], value: float | None, stage: str = "list", **attrs: Any) -> Attempt:
    state = attrs.pop("state", TrialState.COMPLETE)
    number = attrs.pop("number", 0)
    given = {"stage": stage, "slot": slot, "attempt": 1, "repeat": Slot.parse(slot).repeat, "overrides": {}} | attrs
    return Attempt(Slot.parse(slot), number, number + 1, 1, dict(params), state, value, given)


def outcome(spec: StudySpec, runs: Sequence[Attempt], **parts: Any) -> Outcome:
    """These runs are the chosen ones; figured out with the standard library alone."""
    values, tests = [a.value or 0.0 for a in runs], [a.attrs["test_accuracy"] for a in runs]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    chosen = Result(runs[0].params, statistics.mean(values), deviation, len(runs), tuple(a.slot for a in runs))
    test = statistics.mean(tests), statistics.stdev(tests) if len(tests) > 1 else None
    repeated = [chosen] if len(runs) > 1 else []
    return Outcome(**{
        "study": spec.name, "metric": spec.metric, "chosen": chosen, "test_accuracy": test, "repeated": repeated,
        "border": [], "stages": [], "table": list(runs), "failed": 0, "unsent": 0, **parts,
    })  # fmt: skip


def listed(**parts: Any) -> StudySpec:
    settings = [{"lambda": 0.0, "eta": 0.1}, {"lambda": 0.1, "eta": 0.1}]
    given = {"name": "two", "dataset": "digits", "base": {"epochs": 2, "hidden_sizes": []}, "repeats": 2}
    return restore(given | {"search": {"method": "list", "settings": settings}} | parts)


@pytest.fixture
def repeated() -> Material:
    """Two settings, two runs each, and figures that somebody published."""
    published = [
        {"where": {"lambda": 0, "eta": 0.1}, "value": 0.52, "tolerance": 0.031, "note": "close"},
        {"where": {"lambda": 0}, "value": 0.5, "tolerance": 0.04},
        {"where": {"lambda": 0.1}, "metric": "val_accuracy", "value": 0.5, "deviation": 0.01},
        {"where": {"lambda": 7}, "value": 0.5, "tolerance": 0.1},
        {"value": 0.4, "label": "best of all", "tolerance": 0.2},
        {"note": "said in words"},
        {"where": {"epochs": 2, "hidden_sizes": "[]", "lambda": 0}, "value": 0.55, "tolerance": 0},
        {"where": {"lambda": 0.1}, "value": 0.5},
        {"where": {"lambda": 0.1}, "below": {"lambda": 0}, "why": "not to be said"},
        {"where": {"lambda": 0}, "below": {"lambda": 0.1}, "note": "an order", "why": "too few"},
        {"where": {"lambda": 0}, "below": {"lambda": 7}},
        {"where": {"lambda": 0}, "value": 0.5, "tolerance": 0.03},
    ]
    spec = listed(published=published, description="Is <b>less</b> more?")
    one, other = {"lambda": 0.0, "eta": 0.1}, {"lambda": 0.1, "eta": 0.1}
    runs = [
        attempt("s0.i0.r0", one, 0.6, test_accuracy=0.5, seconds=1.25, number=0),
        attempt("s0.i0.r1", one, 0.8, test_accuracy=0.6, seconds=1.5, number=1),
        attempt("s0.i1.r0", other, 0.25, test_accuracy=0.2, number=2, val_accuracy=0.25),
        attempt("s0.i1.r1", other, None, state=TrialState.PRUNED, reason="diverged at update 7", number=3),
    ]
    curve = [(1, {"loss/train": 2.0, "loss/val": 2.5}), (2, {"loss/train": 1.0, "loss/val": 1.5})]
    return Material(
        spec,
        runs,
        outcome(spec, runs[:2]),
        drawn=[outcome(spec, runs[:2]).chosen],
        curves={runs[0].slot: curve, runs[1].slot: curve},
        layers={runs[0].slot: Layer(np.eye(64, 10, dtype=np.float32), (8, 8), None, list("0123456789"))},
        confusion={run.slot: Confusion(np.eye(10, dtype=int).tolist(), list("0123456789")) for run in runs[:2]},
        datasets={"digits": "ab" * 32},
        versions={"numpy": "9.8.7", "BLAS": "openblas 1.2 with kernel Zen"},
    )


def test_published_figures_stand_beside_our_means(repeated: Material) -> None:
    """Mean and deviation over the repeats of the setting, the difference, and whether it is more than seeds explain."""
    page = Page(report.page(repeated))
    assert page.column("published", "ours")[:3] == ["0.5500 ± 0.0707", "0.5500 ± 0.0707", "0.2500"]
    assert page.column("published", "published")[2] == "0.5000 ± 0.0100"
    assert page.column("published", "difference")[:5] == ["+0.0300", "+0.0500", "-0.2500", "", "+0.1500"]
    assert page.column("published", "difference")[8:] == ["-0.3500", "+0.3500", "", "+0.0500"]
    assert page.column("published", "verdict") == [
        "reproduced", "within seed noise", "different", "not run", "reproduced", "in words only", "reproduced",
        "no tolerance given", "reproduced", "different", "not run", "different",
    ]  # fmt: skip
    assert page.column("published", "note")[8:10] == ["", "an order · too few"]
    assert page.column("published", "setting")[:2] == ["lambda=0, eta=0.1", "lambda=0"]
    assert page.column("published", "setting")[4] == "best of all"
    assert "1 run, 1 without a result" in page.column("published", "")[2]


def test_the_page_says_what_was_asked_chosen_and_used(repeated: Material) -> None:
    """Question, choice with mean and deviation, status and reason of each trial, digest, versions and seeds."""
    page = Page(report.page(repeated))
    assert "Is <b>less</b> more?" in page.text
    assert "0.7000 ± 0.1414" in page.text
    assert page.column("trials", "val_accuracy") == ["0.8000", "0.6000", "0.2500", ""]
    assert page.column("trials", "slot") == ["s0.i0.r1", "s0.i0.r0", "s0.i1.r0", "s0.i1.r1"]
    assert page.column("trials", "status")[::3] == ["chosen ", "diverged at update 7"]
    assert page.column("repeated", "test_accuracy") == ["0.5500 ± 0.0707"]
    assert (page.column("repeated", "eta"), page.column("repeated", "lambda")) == (["0.1"], ["0"])
    facts = dict(page.tables["facts"][1:])
    assert facts["dataset digits"] == "sha256 " + "ab" * 32
    assert facts["BLAS"] == "openblas 1.2 with kernel Zen"
    assert "study seed 0" in facts["seeds"]


def test_the_study_in_the_page_is_the_study(quick: Spec) -> None:
    """Saved as a file, the text of the page is read as an equal study, small numbers and all."""
    spec = quick(description="a: b # c\n'd'")
    page = Page(report.page(Material(spec, [], None)))
    assert study.loads(page.by_id["study"]).to_json() == spec.to_json()


def test_the_csv_holds_every_attempt(repeated: Material) -> None:
    """Read again, it has the parameters, values, states and reasons that went in; the page carries the same text."""
    text = report.trials_csv(repeated)
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [float(row["value"]) for row in rows[:3]] == [0.6, 0.8, 0.25]
    assert [(row["slot"], row["lambda"], row["status"]) for row in rows[2:]] == [
        ("s0.i1.r0", "0.1", "complete"), ("s0.i1.r1", "0.1", "diverged")
    ]  # fmt: skip
    assert (rows[3]["value"], rows[3]["reason"], rows[0]["seconds"]) == ("", "diverged at update 7", "1.25")
    (link,) = [a["href"] for tag, a in Page(report.page(repeated)).tags if tag == "a"]
    assert base64.b64decode((link or "").partition("base64,")[2]).decode() == text


def test_text_from_outside_stays_text(repeated: Material) -> None:
    """Markup in the description, a note, a label, a reason or a class name becomes neither tag nor attribute."""
    spec = listed(description=EVIL, published=[{"note": EVIL, "label": EVIL, "value": 0.1}])
    broken = attempt("s0.i1.r0", {"lambda": 0.1, "eta": 0.1}, None, state=TrialState.FAIL, reason="Error\n" + EVIL)
    layers = {slot: layer._replace(classes=[EVIL] * 10) for slot, layer in repeated.layers.items()}
    material = Material(
        spec, [*repeated.attempts[:2], broken], repeated.outcome, repeated.drawn, repeated.curves, layers,
        datasets={EVIL: EVIL}, versions={EVIL: EVIL},
    )  # fmt: skip
    page = Page(report.page(material))
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "link", "form", "base"}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert page.text.count(EVIL) >= 6
    assert EVIL in page.column("trials", "status")[-1]


def test_the_page_asks_for_nothing_from_outside(repeated: Material) -> None:
    """Every address in it is data, and its policy forbids the rest."""
    page = Page(report.page(repeated))
    addresses = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href")]
    assert addresses
    assert all((address or "").startswith("data:") for address in addresses)
    assert any("default-src 'none'" in (attrs.get("content") or "") for tag, attrs in page.tags if tag == "meta")


def test_a_figure_that_fails_costs_only_itself(repeated: Material) -> None:
    """Weights that do not fit their image are said to be undrawable; every other figure is there."""
    slot = repeated.attempts[0].slot
    whole = Page(report.page(repeated))
    material = Material(**{**vars(repeated), "layers": {slot: Layer(np.ones((5, 2), np.float32), (8, 8))}})
    page = Page(report.page(material))
    assert len(page.pictures) == len(whole.pictures) - 1
    assert "could not be drawn (ValueError" in page.text


def test_a_grid_becomes_a_heat_map() -> None:
    """Over eta and lambda, the mean over the repeats of each pair is the number in its cell."""
    spec = restore(
        {"name": "grid", "dataset": "digits", "base": {"epochs": 2}, "search": {"method": "grid"}, "repeats": 2,
         "space": {"eta": [0.1, 0.01], "lambda": [0.0, 1.0]}, "metric": "val_loss"}
    )  # fmt: skip
    runs = [
        attempt(f"s0.i{i}.r{r}", {"eta": eta, "lambda": lam}, i + 0.5 * r, "grid", test_accuracy=0.5)
        for i, (eta, lam) in enumerate([(0.1, 0.0), (0.1, 1.0), (0.01, 0.0), (0.01, 1.0)])
        for r in (0, 1)
    ]
    page = Page(report.page(Material(spec, runs, outcome(spec, runs[:2]))))
    drawn = page.picture("val_loss by eta and lambda", "mean over repeats")
    for text in ("0.2500", "1.250", "2.250", "3.250", "eta", "lambda", "val_loss"):
        assert f"<!-- {text} -->" in drawn


def test_a_grid_of_three_axes_shows_the_best_over_the_third() -> None:
    """Each pair of axes gets a map; a cell is the best that any value of the other axis reached."""
    spec = restore(
        {"name": "grid", "dataset": "digits", "base": {"epochs": 2}, "search": {"method": "grid"},
         "space": {"eta": [0.1, 0.01], "lambda": [0.0, 1.0], "batch_size": [10, 20]}}
    )  # fmt: skip
    cells = [(e, lam, b) for e in (0.1, 0.01) for lam in (0.0, 1.0) for b in (10, 20)]
    runs = [
        attempt(f"s0.i{i}.r0", dict(zip(("eta", "lambda", "batch_size"), cell, strict=True)), 0.11 * (i + 1), "grid",
                test_accuracy=0.5)
        for i, cell in enumerate(cells)
    ]  # fmt: skip
    page = Page(report.page(Material(spec, runs, outcome(spec, runs[-1:]))))
    assert sum("(best over" in caption for caption in page.pictures) == 3
    drawn = page.picture("eta", "lambda", "best over batch_size")
    assert [f"<!-- {text} -->" in drawn for text in ("0.2200", "0.4400", "0.6600", "0.8800", "0.1100")] == [
        True
    ] * 4 + [False]


def test_a_study_that_was_run_is_reported_whole(settings: Settings, quick: Spec) -> None:
    """Coarse to fine with confirm: boxes as the runner stored them, paths, curves with bands, weights, matrix, CSV."""
    spec = quick(description="From coarse to fine.")
    found = run.launch(spec, settings, workers=1, publish=False, report=report.html)
    record = open_study("quick", settings)
    folder = settings.home / "written"
    assert report.write(record, settings, folder) == [folder / "report.html", folder / "trials.csv"]
    page = Page((folder / "report.html").read_text())
    stored = record.attrs["stages"]
    assert page.column("stages", "stage") == [stage["name"] for stage in stored]
    assert page.column("stages", "eta")[:3] == ["{:.3g} to {:.3g}".format(*s["box"]["eta"]) for s in stored[:3]]
    path = page.picture("eta and lambda: a point")
    assert all(f"<!-- {stage['name']} -->" in path for stage in stored)
    curves = [caption for caption in page.pictures if "band: one deviation" in caption]
    assert len(curves) == 2
    assert "2 runs" in curves[0]
    assert any("pixel space" in caption for caption in page.pictures)
    assert "the chosen configuration, 2 runs added up" in page.pictures
    assert f"{found.chosen.mean:.4f}" in page.text
    rows = list(csv.DictReader(io.StringIO((folder / "trials.csv").read_text())))
    assert len(rows) == len(record.attempts())
    with Outbox(settings.outbox) as box:
        (end,) = box.records(record.id, "study_ended")
        digest = json.loads(json.dumps(box.records(f"{record.id}/s0.i0.r0/1", "trial_begun")[0].payload["tags"]))
    assert (end.blob or b"").startswith(b"<!DOCTYPE html>")
    assert f"sha256 {digest['dataset_digest']}" in page.text
    assert dict(page.tables["facts"][1:])["numpy"] == np.__version__
    assert set(end.payload["repeated"]) == {f"{record.id}/s3.i{i}.r{r}/1" for i in (0, 1) for r in (1, 2)}
    scores = [float(row["value"]) for row in rows if row["slot"].startswith("s3.i0.")]
    assert end.payload["repeated"][f"{record.id}/s3.i0.r1/1"]["mean"] == pytest.approx(statistics.mean(scores))


def test_a_report_that_fails_does_not_fail_the_study(settings: Settings, quick: Spec) -> None:
    """The study ends with its result, and a warning names what to do."""

    def broken(record: StudyRecord, settings: Settings) -> bytes:
        raise MemoryError("no room")

    said: list[str] = []
    spec = quick(search={"method": "random", "trials": 2}, confirm=False)
    found = run.launch(spec, settings, workers=1, publish=False, report=broken, warn=said.append)
    assert found.chosen.n == 1
    assert said == ["warning: there is no report: MemoryError: no room; `sieve report quick` tries again"]


def test_a_study_without_a_result_has_a_report(settings: Settings, quick: Spec) -> None:
    """Nothing has run, or all of it failed: the page says so and still shows space, stages and study."""
    failed = attempt("s0.i0.r0", {"lambda": 1e-3, "eta": 0.1, "hidden_sizes": "[]"}, None, "stage-1",
                     state=TrialState.FAIL, reason="Traceback\nMemoryError: no room")  # fmt: skip
    page = Page(report.page(Material(quick(), [failed], None)))
    assert "No trial has a result yet." in page.text
    assert page.column("trials", "status") == ["failed MemoryError: no room"]
    assert page.column("space", "values") == ["0.001 to 1", "[], [16], [16, 8]", "1e-06 to 0.1"]


def test_the_note_in_the_dashboard_sums_the_study_up(settings: Settings, quick: Spec) -> None:
    """Question, result with mean and deviation, links, repeated configurations, each stage's box, the whole spec."""
    spec = quick(description="Why?")
    found = run.launch(spec, settings, workers=1, publish=False)
    text = study_note(spec, found.stages, ("7", "abc"), settings, found)
    parts = text.split("\n\n")
    assert parts[0] == "Why?"
    assert parts[1].startswith(
        f"**val_accuracy {found.chosen.mean:.4f} ± {found.chosen.deviation:.4f}** (2 runs): eta="
    )
    assert "[charts](http://127.0.0.1:5000/#/experiments/7/" in text
    assert "[report and summary](http://127.0.0.1:5000/#/experiments/7/runs/abc?" in text
    assert text.count("| 2 |") == 2
    stored = open_study("quick", settings)
    narrowed = "{:.3g} to {:.3g}".format(*stored.attrs["stages"][2]["box"]["eta"])
    assert re.search(rf"^\| stage-3 \| 4 \| {narrowed} \|", text, re.MULTILINE)
    assert json.loads(parts[-1].removeprefix("```json").removesuffix("```")) == json.loads(spec.to_json())
    attrs = stored.storage.get_study_system_attrs(stored.study_id)
    kept = get_note(load_study(study_name="quick", storage=stored.storage))
    assert kept == study_note(spec, found.stages, None, settings, found)
    assert max(len(text) for key, text in attrs.items() if "note_str" in key) <= 2045  # what the dashboard allows


def test_the_command_writes_into_a_folder_of_its_own(settings: Settings, quick: Spec, tmp_path: Path) -> None:
    """Where it is told, or below reports/ at home, and it says so; an unknown study is exit code 2."""
    run.launch(quick(search={"method": "random", "trials": 2}, confirm=False), settings, workers=1, publish=False)
    environment = {"SIEVE_HOME": str(settings.home)}
    for words, folder in ([], settings.home / "reports" / "quick"), (["--out", f"{tmp_path}/out"], tmp_path / "out"):
        done = CliRunner().invoke(app, ["report", "quick", *words], env=environment)
        assert done.output == f"wrote {folder}/report.html\nwrote {folder}/trials.csv\n"
        assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert CliRunner().invoke(app, ["report", "quack"], env=environment).exit_code == 2


def test_an_unknown_study_makes_nothing(settings: Settings, tmp_path: Path) -> None:
    """No folder, no database."""
    with pytest.raises(UnknownStudy):
        report.write(open_study("nope", settings), settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()

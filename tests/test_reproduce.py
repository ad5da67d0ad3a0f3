"""Reproducing reports: tiny studies run for real, and figures counted by hand found again in the document."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from search import reproduce, run
from search.cli import app
from search.errors import StudyConflict, StudyFileError
from search.outcome import conclude, open_study
from search.settings import Settings
from search.study import restore

SMALL: dict[str, Any] = {
    "dataset": {"name": "digits", "train": 300, "validation": 100, "test": 100},
    "base": {"batch_size": 50, "epochs": 2, "hidden_sizes": []},
    "search": {"method": "list", "settings": [{"lambda": 0, "eta": 0.1}, {"lambda": 10, "eta": 0.1}]},
    "repeats": 2,
}
PUBLISHED = [
    {"where": {"lambda": 0}, "value": 0.5, "tolerance": 0.5},
    {"where": {"lambda": 0}, "below": {"lambda": 10}, "why": "Ten is far too much."},
    {"where": {"lambda": 0}, "metric": "val_loss", "value": 99.0, "note": "wrong | by far"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two linked studies, the first in alphabetical order built on the second, and one that reproduces nothing."""
    path = tmp_path / "studies"
    path.mkdir()
    space = {"lambda": [0, 0.1, 1], "eta": {"low": 0.01, "high": 1.0, "log": True}}
    files = {
        "b2-coarse": SMALL | {"space": space, "search": {"method": "random", "trials": 4}, "repeats": 1},
        "b1-fine": SMALL
        | {"space": space, "space_from": {"study": "b2-coarse", "top": 0.5}, "search": {"method": "grid", "points": 2}},
        "a1-two": SMALL | {"remarks": "As *expected*.", "description": "Two settings."},
        "aside": SMALL,
    }
    for name, file in files.items():
        published = {} if name == "aside" else {"published": PUBLISHED if name == "a1-two" else [{"value": 0.5}]}
        (path / f"{name}.yaml").write_text(yaml.safe_dump(file | {"name": name} | published))
    return path


def rows(text: str) -> list[list[str]]:
    """The cells of every line of a table."""
    return [re.split(r" (?<!\\)\| ", line[2:-2]) for line in text.splitlines() if line.startswith("| ")]


def test_studies_come_after_those_they_build_on(folder: Path) -> None:
    """All that have published figures, or the named ones with what they need; an unknown name lists the known."""
    assert [spec.name for spec in reproduce.studies(folder)] == ["a1-two", "b2-coarse", "b1-fine"]
    assert [spec.name for spec in reproduce.studies(folder, ["b1-fine"])] == ["b2-coarse", "b1-fine"]
    with pytest.raises(StudyFileError, match="no such study, 'aside'; expected some of a1-two, b1-fine, b2-coarse"):
        reproduce.studies(folder, ["aside"])


def test_studies_in_a_ring_are_refused(folder: Path) -> None:
    """Two studies that take their spaces from each other can never run."""
    for one, other in (("b1-fine", "b2-coarse"), ("b2-coarse", "b1-fine")):
        path = folder / f"{one}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"space_from": {"study": other}}))
    with pytest.raises(StudyFileError, match="take their spaces from each other"):
        reproduce.studies(folder)


def test_one_command_runs_and_writes_and_only_what_is_left(folder: Path, settings: Settings, tmp_path: Path) -> None:
    """A named study first, the rest later, each once; what is not finished is said; stored results rewrite the page."""
    environment = {"SIEVE_HOME": str(settings.home)}
    command = ["reproduce", "--studies", str(folder), "--out", str(tmp_path / "docs"), "--no-publish", "--workers", "1"]
    done = CliRunner().invoke(app, [*command, "a1-two"], env=environment)
    assert done.exit_code == 0, done.output
    page = tmp_path / "docs" / "reproduction.md"
    assert [row[1] for row in rows(page.read_text())[2:5]] == ["1", "not finished", "not finished"]
    done = CliRunner().invoke(app, command, env=environment)
    assert done.exit_code == 0, done.output
    assert "study 'a1-two' is done" in done.output
    assert "| not finished |" not in page.read_text()
    assert [len(open_study(n, settings).attempts()) for n in ("a1-two", "b2-coarse")] == [4, 4]
    text = page.read_bytes()
    page.unlink()
    (tmp_path / "docs" / "reproduction" / "old.png").write_bytes(b"")
    done = CliRunner().invoke(app, [*command, "--write-only"], env=environment)
    assert (done.exit_code, page.read_bytes()) == (0, text)
    addresses = re.findall(r"!\[.*\]\((.*)\)", text.decode())
    assert {tmp_path / "docs" / a for a in addresses} == set((tmp_path / "docs" / "reproduction").iterdir())
    for address in addresses:
        with Image.open(tmp_path / "docs" / address) as image:
            assert image.width <= reproduce.WIDEST
            assert len(image.getcolors() or []) > 1


def test_the_document_sets_published_beside_ours(folder: Path, settings: Settings, tmp_path: Path) -> None:
    """Mean and deviation as counted from the stored trials, the difference, the verdict, and why it differs."""
    (spec,) = reproduce.studies(folder, ["a1-two"])
    run.launch(spec, settings, workers=1, publish=False)
    reproduce.write([spec], settings, tmp_path)
    text = (tmp_path / "reproduction.md").read_text()
    attempts = open_study("a1-two", settings).attempts()
    plain, held = ([a.attrs for a in attempts if a.params["lambda"] == lam] for lam in (0, 10))
    first, second, third = rows(text)[-3:]
    ours = [100 * a["test_accuracy"] for a in plain]
    counted = f"2: {min(ours):.2f} % to {max(ours):.2f} %"
    mean, other = np.mean(ours), 100 * np.mean([a["test_accuracy"] for a in held])
    assert first[2:5] == ["50.00 % (within 50.00 %)", f"{mean:.2f} ± {np.std(ours, ddof=1):.2f} %", counted]
    assert first[6] == "reproduced"
    assert second[2] == "below lambda=10"
    assert second[5:7] == [f"+{mean - other:.2f} %", "**different**"]
    loss = np.mean([a["val_loss"] for a in plain])
    assert third[5:8] == [f"{loss - 99:.3f}", "**different**", "wrong \\| by far"]
    assert "- lambda=0 (test_accuracy): Ten is far too much.\n- lambda=0 (val_loss): not explained.\n" in text
    assert "As *expected*." in text
    assert rows(text)[2][1:] == ["1", "0", "2"]


def test_a_space_from_another_study_is_written_down(folder: Path, settings: Settings) -> None:
    """It needs the other one finished; then the stored space lies where the best half of the other's trials lay."""
    coarse, fine = reproduce.studies(folder, ["b1-fine"])
    with pytest.raises(StudyFileError, match=r"space_from.study: 'b2-coarse' is not finished in .*; launch it first"):
        run.launch(fine, settings, workers=1, publish=False)
    run.launch(coarse, settings, workers=1, publish=False)
    run.launch(fine, settings, workers=1, publish=False)
    trials = sorted(open_study("b2-coarse", settings).attempts(), key=lambda a: -(a.value or 0.0))[:2]
    etas = [a.params["eta"] for a in trials]
    stored = open_study("b1-fine", settings)
    assert stored.spec.dimensions["eta"].model_dump(include={"low", "high"}) == {"low": min(etas), "high": max(etas)}
    assert {a.params["eta"] for a in stored.attempts()} == {min(etas), max(etas)}
    assert run.launch(fine, settings, workers=1, publish=False).table == conclude(stored).table


def test_results_of_another_specification_are_refused(folder: Path, settings: Settings, tmp_path: Path) -> None:
    """A stored study of that name with other trials makes no document; other words do not matter."""
    (spec,) = reproduce.studies(folder, ["a1-two"])
    run.launch(spec, settings, workers=1, publish=False)
    given = spec.model_dump(mode="json")
    with pytest.raises(StudyConflict, match="seed: 0 as stored, 1 as given"):
        reproduce.write([restore(given | {"seed": 1})], settings, tmp_path)
    reproduce.write([restore(given | {"remarks": "In other words."})], settings, tmp_path)
    assert "In other words." in (tmp_path / "reproduction.md").read_text()

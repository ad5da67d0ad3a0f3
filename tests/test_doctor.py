"""`sieve doctor`: each part that a study needs is looked at where it is, and a finding says what to do."""

from contextlib import closing

import pytest

from search import doctor
from search.outbox import Outbox, study_begun
from search.settings import Settings
from search.storage import open_storage


def by_part(settings: Settings) -> dict[str, list[doctor.Finding]]:
    found: dict[str, list[doctor.Finding]] = {}
    for finding in doctor.examine(settings):
        found.setdefault(finding.what, []).append(finding)
    return found


def test_a_new_home_is_fine_and_stays_away(settings: Settings) -> None:
    """Before the first launch every part is fine, workers have one BLAS thread, and nothing is made."""
    found = by_part(settings)
    assert {part for part, findings in found.items() if not all(finding.ok for finding in findings)} <= {"blas"}
    assert "threads: 1" in found["blas"][0].text
    assert {"home", "storage", "mlflow", "data", "outbox", "executor", "versions"} <= found.keys()
    assert not settings.home.exists()


def test_what_is_down_is_named_with_what_to_do(settings: Settings) -> None:
    """A tracking server, a database and a scheduler that do not answer, and records not sent, one line each."""
    given = {
        "SIEVE_HOME": str(settings.home),
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "SIEVE_EXECUTOR": "dask://127.0.0.1:9",
        "SIEVE_STORAGE": "postgresql://sieve:S3cr3t-canary@127.0.0.1:9/sieve",
    }
    with closing(Outbox(settings.outbox)) as box:
        box.put([study_begun("a", {}, {}, 0.0)])
    pytest.importorskip("psycopg")
    pytest.importorskip("distributed")
    found = by_part(Settings.from_environment(given))
    bad = {part: str(findings[0]) for part, findings in found.items() if not findings[0].ok}
    assert bad.keys() == {"storage", "mlflow", "outbox", "executor"}
    assert "correct SIEVE_STORAGE" in bad["storage"]
    assert "`sieve sync`" in bad["outbox"]
    assert "dask scheduler" in bad["executor"]
    assert "correct MLFLOW_TRACKING_URI" in bad["mlflow"]
    assert "S3cr3t-canary" not in str(found)
    assert not any("\n" in line for line in bad.values())


def test_a_store_that_is_there_is_opened(settings: Settings) -> None:
    """An existing storage is opened and its studies are counted."""
    settings.home.mkdir()
    open_storage(settings.storage)
    assert "0 studies" in by_part(settings)["storage"][0].text

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from search.errors import SettingsError
from search.settings import Settings, redact


def test_everything_is_embedded_in_one_home_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any variable, all stores are files under ./mlruns, as absolute paths."""
    monkeypatch.chdir(tmp_path)
    settings = Settings.from_environment({})
    assert settings.home == tmp_path / "mlruns"
    assert settings.storage == f"sqlite:///{tmp_path}/mlruns/sieve.db"
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    assert (settings.data_dir, settings.executor) == (None, "local")
    assert (settings.mlflow_ui, settings.dashboard_ui) == ("http://127.0.0.1:5000", "http://127.0.0.1:8080")
    folders = [settings.outbox, settings.checkpoints, settings.artifacts, settings.trial_artifacts, settings.locks]
    names = ["outbox/outbox.db", "checkpoints", "artifacts", "dashboard", "locks"]
    assert folders == [tmp_path / "mlruns" / name for name in names]
    assert settings.data_cache == tmp_path / "mlruns" / "data"


def test_each_part_moves_by_itself(tmp_path: Path) -> None:
    """Every variable overrides its own part, and an empty one counts as unset."""
    settings = Settings.from_environment(
        {
            "SIEVE_HOME": str(tmp_path),
            "SIEVE_STORAGE": "postgresql+psycopg://sieve@db/sieve",
            "MLFLOW_TRACKING_URI": "http://user:secret@mlflow:5000/",
            "SIEVE_DATA_DIR": "/data",
            "SIEVE_EXECUTOR": "dask://scheduler:8786",
            "SIEVE_DASHBOARD_UI": "",
        }
    )
    assert settings.home == tmp_path
    assert settings.storage == "postgresql+psycopg://sieve@db/sieve"
    assert settings.tracking_uri == "http://user:secret@mlflow:5000/"
    assert settings.data_dir == Path("/data")
    assert settings.executor == "dask://scheduler:8786"
    assert settings.mlflow_ui == "http://mlflow:5000"  # a link, so without the user
    assert settings.dashboard_ui == "http://127.0.0.1:8080"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SIEVE_HOME", "/tmp/a?b"),
        ("SIEVE_HOME", "~no-such-user/mlruns"),
        ("SIEVE_STORAGE", "sieve.db"),
        ("SIEVE_STORAGE", "http://[::1"),
        ("SIEVE_STORAGE", "postgresql://db/sieve?user=a&password=S3cr3t-canary"),
        ("SIEVE_STORAGE", "postgresql://db/sieve?sslPassword=S3cr3t-canary"),
        ("MLFLOW_TRACKING_URI", "mlruns"),
        ("SIEVE_EXECUTOR", "ray"),
        ("SIEVE_EXECUTOR", "dask://host"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_name(variable: str, value: str) -> None:
    """The message begins with the variable and repeats no password."""
    with pytest.raises(SettingsError, match=f"^{variable}: ") as caught:
        Settings.from_environment({variable: value})
    assert "S3cr3t-canary" not in str(caught.value)


@given(st.text(st.characters(exclude_characters="&#?"), max_size=20).map(lambda s: f"S3cr3t{s}canary"))
@example("S3cr3t/@:canary")
def test_no_password_passes_redaction(password: str) -> None:
    """Whatever characters a password has, nothing of it is left."""
    for url in (f"postgresql://user:{password}@host/name", f"postgresql://host/name?password={password}&x=1"):
        redacted = redact(url)
        assert "S3cr3t" not in redacted
        assert "canary" not in redacted
        assert "host/name" in redacted


def test_settings_print_without_their_urls(tmp_path: Path) -> None:
    """A traceback that shows the settings shows no password."""
    url = "postgresql://user:S3cr3t-canary@host/name"
    settings = Settings.from_environment({"SIEVE_HOME": str(tmp_path), "SIEVE_STORAGE": url})
    assert "S3cr3t-canary" not in repr(settings)

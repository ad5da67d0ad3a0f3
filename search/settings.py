"""Where things are kept: the environment turned into URLs and folders, once, at the start of a command."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from search.errors import SettingsError

_SECRET_KEY = r"(?:ssl)?(?:password|passwd|pwd)"


@dataclass(frozen=True)
class Settings:
    """Addresses of the stores and folders. The URLs stay out of `repr`: they may hold a password."""

    home: Path
    storage: str = field(repr=False)
    tracking_uri: str = field(repr=False)
    data_dir: Path | None = None
    executor: str = "local"
    mlflow_ui: str = "http://127.0.0.1:5000"
    dashboard_ui: str = "http://127.0.0.1:8080"

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> "Settings":
        """Read SIEVE_HOME, SIEVE_STORAGE, SIEVE_DATA_DIR, SIEVE_EXECUTOR, SIEVE_MLFLOW_UI, SIEVE_DASHBOARD_UI
        and MLFLOW_TRACKING_URI; an empty variable counts as unset.

        Raises SettingsError, naming the variable, for a value that cannot be meant.
        """
        given = {key: value for key, value in env.items() if value}
        home = _folder("SIEVE_HOME", given.get("SIEVE_HOME", "mlruns"))
        if set("?#") & set(str(home)):
            raise SettingsError(f"SIEVE_HOME: expected a folder without ? or # in its path, got {home}")
        storage = _url(given, "SIEVE_STORAGE", sqlite_url(home / "sieve.db"))
        storage = re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", storage)
        if not storage.startswith(("sqlite:///", "postgresql+")):
            raise SettingsError(f"SIEVE_STORAGE: expected sqlite:///... or postgresql://..., got {redact(storage)!r}")
        tracking_uri = _url(given, "MLFLOW_TRACKING_URI", sqlite_url(home / "mlflow.db"))
        data_dir = given.get("SIEVE_DATA_DIR")
        executor = given.get("SIEVE_EXECUTOR", "local")
        if executor != "local" and not re.fullmatch(r"dask://[^/\s]+:\d+", executor):
            raise SettingsError(f"SIEVE_EXECUTOR: expected 'local' or dask://host:port, got {executor!r}")
        server = tracking_uri if tracking_uri.startswith(("http://", "https://")) else "http://127.0.0.1:5000"
        return cls(
            home=home,
            storage=storage,
            tracking_uri=tracking_uri,
            data_dir=_folder("SIEVE_DATA_DIR", data_dir) if data_dir else None,
            executor=executor,
            mlflow_ui=given.get("SIEVE_MLFLOW_UI", _without_user(server)).rstrip("/"),
            dashboard_ui=given.get("SIEVE_DASHBOARD_UI", "http://127.0.0.1:8080").rstrip("/"),
        )

    def make_home(self) -> None:
        """Make the home if it is not there yet, for this user alone."""
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def outbox(self) -> Path:
        """The queue of what is still to be published (an SQLite file)."""
        return self.home / "outbox" / "outbox.db"

    @property
    def checkpoints(self) -> Path:
        """States of running trials."""
        return self.home / "checkpoints"

    @property
    def artifacts(self) -> Path:
        """MLflow's artifacts in the embedded default."""
        return self.home / "artifacts"

    @property
    def trial_artifacts(self) -> Path:
        """Optuna's artifact store, which the dashboard shows."""
        return self.home / "dashboard"

    @property
    def locks(self) -> Path:
        """File locks: one runner for each study, one publisher for each home."""
        return self.home / "locks"

    @property
    def data_cache(self) -> Path:
        """Datasets, downloaded and converted to memory-mapped arrays."""
        return self.home / "data"


def sqlite_url(path: Path) -> str:
    """The URL of an SQLite file, which SQLAlchemy, MLflow and `sqlite_path` take for that file."""
    text = path.as_posix()
    return f"sqlite:///{text.replace('%', '%25') if '%' in text and _decodes() else text}"


def sqlite_path(url: str) -> Path:
    """The file that an SQLite URL names, as SQLAlchemy reads it."""
    text = url.removeprefix("sqlite:///").partition("?")[0]
    return Path(unquote(text) if "%" in text and _decodes() else text)


def _decodes() -> bool:
    """Whether SQLAlchemy decodes the path of a URL: it does from 2.1 on."""
    return [int(part) for part in metadata.version("sqlalchemy").split(".")[:2]] >= [2, 1]


def redact(url: str) -> str:
    """`url` with every password in it replaced by ***, for messages and logs."""
    url = re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url, flags=re.DOTALL)
    return re.sub(rf"([?&]{_SECRET_KEY}=)[^&#]*", r"\1***", url, flags=re.IGNORECASE)


def _folder(variable: str, value: str) -> Path:
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError as error:  # "~" where nobody is at home
        raise SettingsError(f"{variable}: expected a folder, got {value!r}: {error}") from None


def _url(given: Mapping[str, str], variable: str, default: str) -> str:
    url = given.get(variable, default)
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if not parts.scheme or "://" not in url:
        raise SettingsError(f"{variable}: expected a URL such as {default}, got {redact(url)!r}")
    keys = [key for key, _ in parse_qsl(parts.query, keep_blank_values=True)]
    if any(re.fullmatch(_SECRET_KEY, key, re.IGNORECASE) for key in keys):
        raise SettingsError(
            f"{variable}: a password in the query of a URL ends up in logs, got {redact(url)!r}; "
            "write scheme://user:password@host/name, or keep it in PGPASSFILE"
        )
    return url


def _without_user(url: str) -> str:
    """`url` as a link that may be printed: neither user nor password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

"""What several tests need: a home of their own, small studies, and the shared CIFAR-10 where it is."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from search.settings import Settings
from search.study import StudySpec, restore

# NumPy's threads and kernel are chosen when it is imported; the Makefile sets the same.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

QUICK: dict[str, Any] = {
    "name": "quick",
    "dataset": {"name": "digits", "train": 300, "validation": 100, "test": 100},
    "base": {"batch_size": 50, "epochs": 3, "momentum": 0.9},
    "space": {
        "lambda": {"low": 1e-6, "high": 1e-1, "log": True},
        "eta": {"low": 1e-3, "high": 1.0, "log": True},
        "hidden_sizes": [[], [16], [16, 8]],
    },
    "search": {"method": "coarse-to-fine", "stages": 3, "trials_per_stage": 4},
    "confirm": {"top": 2, "repeats": 2},
}


@pytest.fixture(scope="session")
def new_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs: making its tables takes ten seconds, copying it none."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    code = f"from mlflow import MlflowClient; MlflowClient('sqlite:///{path}').search_experiments()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return path


@pytest.fixture
def new_home(tmp_path: Path, new_mlflow: Path) -> Callable[[str], Settings]:
    """Makes embedded homes in the folder of this test, each with an MLflow database that is ready."""

    def make(name: str) -> Settings:
        home = tmp_path / name
        home.mkdir()
        shutil.copy(new_mlflow, home / "mlflow.db")
        return Settings.from_environment({"SIEVE_HOME": str(home)})

    return make


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """An embedded home in a folder of this test, which does not exist yet."""
    return Settings.from_environment({"SIEVE_HOME": str(tmp_path / "home")})


@pytest.fixture
def quick() -> Callable[..., StudySpec]:
    """A study of seconds; keyword arguments replace parts of it."""
    return lambda **parts: restore(QUICK | parts)

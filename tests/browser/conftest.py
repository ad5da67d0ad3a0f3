"""A screenshot of whatever page a failing test was looking at, under the test's temporary folder."""

from collections.abc import Generator
from typing import Any

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    outcome = yield
    given = getattr(item, "funcargs", {})
    if outcome.when == "call" and outcome.failed and "page" in given:
        path = given["tmp_path"] / "failed.png"
        given["page"].screenshot(path=path)
        outcome.sections.append(("what the browser showed", f"{path}\n{given['page'].url}"))
    return outcome

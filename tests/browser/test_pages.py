"""What a person sees in a real headless Chromium: MLflow, the Optuna dashboard and the report of a small study."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from search import report, tracking
from search.outbox import Outbox
from search.outcome import conclude, open_study
from search.settings import Settings
from tests.conftest import QUICK
from tests.oracle import study_id

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright's Python package is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
WAIT = 60_000  # milliseconds, for a page on a busy machine

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, new_mlflow: Path) -> Iterator[Settings]:
    """A study that was launched from the command line, and `sieve ui` on its home."""
    home = tmp_path_factory.mktemp("shown")
    shutil.copy(new_mlflow, home / "mlflow.db")
    mlflow, dashboard = free_ports(2)
    ours = {"SIEVE_HOME": str(home), "SIEVE_MLFLOW_UI": f"http://127.0.0.1:{mlflow}"}
    ours |= {"SIEVE_DASHBOARD_UI": f"http://127.0.0.1:{dashboard}", "HOME": str(home)}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SIEVE_", "MLFLOW_"))} | ours
    sieve = str(Path(sys.executable).with_name("sieve"))
    published = [{"value": 0.9, "tolerance": 0.2, "note": "what others found"}]
    study = QUICK | {"description": "Which lambda and eta?", "published": published}
    (home / "quick.yaml").write_text(yaml.safe_dump(study))
    command = [sieve, "launch", str(home / "quick.yaml"), "--workers", "1"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=200)
    with (home / "shown.log").open("wb") as log:
        ports = ["--mlflow-port", str(mlflow), "--dashboard-port", str(dashboard)]
        ui = subprocess.Popen([sieve, "ui", *ports], env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while b"Ctrl-C ends both" not in (home / "shown.log").read_bytes():
                assert ui.poll() is None, (home / "shown.log").read_text()
                assert time.monotonic() < deadline, "the servers did not come up"
                time.sleep(0.2)
            yield Settings.from_environment(ours)
        finally:
            ui.send_signal(signal.SIGINT)
            ui.wait(timeout=30)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, tmp_path: Path) -> Iterator[Any]:
    context = chromium.new_context(viewport={"width": 1700, "height": 1100}, accept_downloads=True)
    context.set_default_timeout(WAIT)
    yield context.new_page()
    context.close()


@pytest.fixture(scope="module")
def best(shown: Settings) -> Any:
    """The best trial as Optuna's storage has it."""
    return conclude(open_study("quick", shown)).table[0]


@pytest.fixture(scope="module")
def links(shown: Settings) -> dict[str, str]:
    """The addresses that `sieve ui` prints."""
    with closing(Outbox(shown.outbox)) as box:
        experiment, _ = box.links(uid=study_id(shown, "quick"))[study_id(shown, "quick")]
    return tracking.links(shown, experiment)


def test_the_run_table_answers_which_setting_won(page: Any, links: dict[str, str], best: Any) -> None:
    """Through the saved view: trials alone, the best mean first, what was searched and what came out as columns."""
    page.goto(links["table"])
    page.get_by_text("MLflow Assistant").wait_for()  # at a browser's first visit, over a third of the page
    page.get_by_role("button", name="Close").last.click()
    column = page.locator("[role=gridcell][col-id='metrics.`repeats/mean`']")
    column.first.wait_for()
    page.locator("[role=columnheader][col-id='metrics.`result/test_accuracy`']").wait_for()
    values = [float(text) for text in column.all_inner_texts() if text != "-"]
    assert len(values) > 1
    assert values == sorted(values, reverse=True)
    assert page.get_by_text("16 matching runs").is_visible()
    columns = {cell.get_attribute("col-id") for cell in page.locator("[role=columnheader][col-id]").all()}
    assert {f"params.`{name}`" for name in best.params} <= columns
    assert {"metrics.`result/test_accuracy`", "metrics.`repeats/mean`"} <= columns
    name = page.locator("[role=gridcell][col-id='attributes.`Run Name`']").first.inner_text()
    assert f"eta={best.params['eta']:.3g}" in name


def test_the_charts_overlay_training_and_validation(page: Any, links: dict[str, str]) -> None:
    """Parallel coordinates over the searched parameters, and cost, loss and accuracy with both lines in one chart."""
    page.goto(links["charts"])
    for section in ("Which setting won", "Learning curves", "Parameters"):
        page.get_by_text(section, exact=False).first.wait_for()
    for axis in ("log10_eta", "log10_lambda", "hidden_sizes"):
        page.locator("svg text", has_text=axis).first.wait_for()
    page.get_by_text("Learning curves", exact=False).first.scroll_into_view_if_needed()
    for kind in ("cost", "loss", "accuracy"):
        page.get_by_text(f"{kind}/train vs {kind}/val").first.wait_for()
    lines = page.locator(".js-plotly-plot .scatterlayer .trace path.js-line")
    lines.first.wait_for(state="attached")
    dashes = {(line.get_attribute("style") or "").partition("stroke-dasharray:")[2][:3] for line in lines.all()}
    assert len(dashes) > 1  # solid and dashed: two metrics of one run


def test_the_image_grid_shows_the_weights_of_the_trials(page: Any, links: dict[str, str]) -> None:
    """Scrolled to the grids, there are pictures that really loaded."""
    page.goto(links["charts"])
    heading = page.get_by_text("Weights and confusion matrices").first
    heading.wait_for()
    pictures = page.locator("img[src*='get-artifact'], img[src^='blob:']")
    for _ in range(30):
        heading.scroll_into_view_if_needed()
        page.mouse.move(900, 800)
        page.mouse.wheel(0, 600)
        page.wait_for_timeout(500)
        if pictures.count() >= 3:
            break
    page.wait_for_function(
        "() => [...document.querySelectorAll('img')].filter(i => i.src.includes('get-artifact') && i.naturalWidth > 0)"
        ".length >= 3"
    )


def test_a_trial_in_the_dashboard_has_its_picture_and_leads_to_mlflow(page: Any, shown: Settings, best: Any) -> None:
    """The note's image loads; its link, clicked, opens the run of that very trial."""
    record = open_study("quick", shown)
    page.goto(f"{shown.dashboard_ui}/dashboard/studies/{record.study_id}/trials?numbers={best.number}")
    page.get_by_text(f"Trial {best.number} (trial_id={best.trial_id})").wait_for()
    for name in ("stage", "slot", "repeat"):
        assert page.get_by_text(f"{name} {best.attrs[name]}", exact=True).first.is_visible()
    page.wait_for_function("() => [...document.images].some(i => i.alt == 'first layer' && i.naturalWidth > 60)")
    page.get_by_text("curves, images and weights in MLflow").click()
    current = page.context.pages[-1]
    current.get_by_text(f"eta={best.params['eta']:.3g}").first.wait_for()
    assert shown.mlflow_ui in current.url


def test_the_study_in_the_dashboard_says_what_came_out(page: Any, shown: Settings) -> None:
    """Its note has the result with mean and deviation, the repeated configurations, and links into MLflow."""
    record = open_study("quick", shown)
    chosen = conclude(record).chosen
    page.goto(f"{shown.dashboard_ui}/dashboard/studies/{record.study_id}/note")
    page.get_by_text(f"{chosen.mean:.4f} ± {chosen.deviation:.4f}").first.wait_for()
    assert page.locator("td", has_text="eta=").count() == 2
    (address,) = (a.get_attribute("href") for a in page.get_by_role("link", name="charts").all())
    assert address.startswith(f"{shown.mlflow_ui}/#/experiments/")


def test_the_summary_run_carries_the_report(page: Any, links: dict[str, str], shown: Settings) -> None:
    """MLflow shows the page among the artifacts of the study's summary run."""
    with closing(Outbox(shown.outbox)) as box:
        experiment, run_id = box.links(uid=study_id(shown, "quick"))[study_id(shown, "quick")]
    address = tracking.run_link(shown, experiment, run_id).replace("?", "/artifacts/report.html?")
    page.goto(address)
    frame = page.frame_locator("iframe").last
    frame.get_by_text("Which lambda and eta?").first.wait_for()
    assert frame.get_by_role("heading", name="To repeat it").count() == 1


def test_the_report_opens_from_disk(page: Any, shown: Settings, best: Any, tmp_path: Path) -> None:
    """Tables and figures are there, all of them loaded, nothing was asked of any network, nothing was blocked."""
    written, table = report.write(open_study("quick", shown), shown, tmp_path / "report")
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(written.as_uri())
    assert page.get_by_role("heading", name="quick").is_visible()
    assert page.locator("#trials tbody tr").count() == len(table.read_text().splitlines()) - 1 == 16
    first = page.locator("#trials tbody tr").first.inner_text()
    assert f"{best.value:.4f}" in first
    assert str(best.slot) in first
    assert "reproduced" in page.locator("#published tbody tr").first.inner_text()
    sizes = page.evaluate("() => [...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])")
    assert len(sizes) >= 6
    assert all(complete and natural > 50 and shown_width > 50 for complete, natural, shown_width in sizes)
    width = page.evaluate("() => [document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]  # nothing sticks out
    with page.expect_download() as download:
        page.get_by_role("link", name="trials.csv").click()
    assert download.value.path().read_bytes() == table.read_bytes()
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert said == []

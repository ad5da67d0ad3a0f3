"""What the documents say, held against the program: references, links, files, examples, and every command."""

import ast
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from search import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("C*.md")), *sorted(ROOT.glob("docs/*.md"))]
WALKED = ["README.md", "docs/tutorial.md"]
CIFAR = "SIEVE_DATA_DIR" in os.environ
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_references_are_those_of_the_program() -> None:
    """A key, a setting, a command or an option that is undocumented, or documented and gone, fails here."""
    for path, text in runpy.run_path(str(ROOT / "docs" / "generate.py"))["pages"]().items():
        assert path.read_text() == text, f"{path.name}: run `make docs`"


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    text = BLOCK.sub("", page.read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    given = re.findall(r'<a (?:id|name)="([^"]+)"', text)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings} | set(given)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every file, picture and heading that a page links to is there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    """A path into a folder of the project, in backticks or in a command, is the path of a file."""
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "mlruns")
    for path in re.findall(rf"(?<![\w/.])((?:{folders})/[\w./-]*\w)", page.read_text()):
        assert (ROOT / path).exists() or list(ROOT.glob(f"{path}.*")), path


def test_every_setting_of_the_environment_is_documented() -> None:
    """The pages name each SIEVE_ variable that the program reads, and no other."""
    sources = [*ROOT.glob("core/*.py"), *ROOT.glob("search/*.py"), ROOT / "docker-compose.yml"]
    if len(sources) == 1:
        pytest.skip("the package is tested without its source")
    read = {word for path in sources for word in re.findall(r"SIEVE_\w+", path.read_text())} - {"SIEVE_FAILPOINT"}
    assert {word for path in PAGES for word in re.findall(r"SIEVE_\w+", path.read_text())} == read


# ---- commands


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, content) of each fenced block."""
    yield from BLOCK.findall(page.read_text())


def lines(text: str) -> list[str]:
    """The commands of a block of shell, without comments; a backslash goes on."""
    return [line for line in re.sub(r"\s*(?<!\S)#.*", "", text.replace("\\\n", "")).splitlines() if line.strip()]


def sieve_commands(page: Path) -> Iterator[str]:
    text = page.read_text()
    spans = [line for kind, block in blocks(page) if kind == "sh" for line in lines(block)]
    spans += re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
    for span in spans:
        yield from re.findall(r"(?<![\w/.'-])sieve ((?!sieve\b)[a-z][^;&|>)]*)", span)


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "commands"], ids=name)
def test_every_command_that_is_named_exists(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A subcommand or an option that a page names, in a block or in a sentence, is one of the program."""
    for words in sieve_commands(page):
        get_command(cli.app).main([*shlex.split(words), "--help"], prog_name=f"sieve {words}", standalone_mode=False)
        assert "Usage:" in capsys.readouterr().out, words


@pytest.fixture
def clone(tmp_path: Path, new_mlflow: Path) -> Path:
    """What a newcomer has in hand after `make install`, in a folder of its own."""
    for given in ("Makefile", "studies", "examples"):
        (tmp_path / given).symlink_to(ROOT / given)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "mlruns").mkdir()
    shutil.copy(new_mlflow, tmp_path / "mlruns" / "mlflow.db")
    return tmp_path


def shell(command: str, folder: Path) -> "subprocess.Popen[str]":
    ours = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    kept = {k: v for k, v in os.environ.items() if k == "SIEVE_DATA_DIR" or not k.startswith(("SIEVE_", "MLFLOW_"))}
    return subprocess.Popen(
        ["bash", "-c", f"set -e; {command}"], cwd=folder, env=kept | ours, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def end(process: "subprocess.Popen[str]") -> str:
    """What it said until it ended; it must end well."""
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, f"{process.args}: {said}"
    return said


def walk(command: str, folder: Path) -> None:
    """Run a command as it stands, or as much of it as this machine can."""
    if command.startswith("make "):  # what the target runs, its environment being there already
        recipe = end(shell(f"{command} -n --no-print-directory -o .venv/installed", folder))
        command = re.sub(r"^#.*\n", "", recipe, flags=re.MULTILINE).strip()
    if command.startswith("docker compose"):
        check_compose(command)
    elif command.endswith("sieve ui"):
        watch(command, folder)
    elif "cifar" in command and not CIFAR:
        for file in folder.glob("*cifar*.yaml"):
            end(shell(f"sieve validate {file}", folder))
    elif "sieve data fetch" not in command:  # it takes 160 MB from a server elsewhere
        end(shell(command, folder))


def check_compose(command: str) -> None:
    """The services that it names are those of the compose file: there may be no Docker here."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    words = [word.partition("=")[0] for word in shlex.split(command)[2:] if not word.startswith("-")]
    assert words[0] in ("up", "run", "exec", "stop", "build", "down", "logs")
    assert not words[1:] or words[1] in services, command


def watch(command: str, folder: Path) -> None:
    """Both pages answer, and Ctrl-C ends the command."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    mlflow, dashboard = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    said = ""
    with shell(f"exec {command} --mlflow-port {mlflow} --dashboard-port {dashboard}", folder) as process:
        for line in process.stdout or ():
            said += line
            if line.startswith("Ctrl-C"):  # both pages have answered
                process.send_signal(signal.SIGINT)
    assert process.returncode == 0, said
    assert said.endswith("ended\n"), said


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", WALKED)
def test_a_page_can_be_followed(page: str, clone: Path) -> None:
    """Whoever writes the files that a page shows and types its commands, from the top down, sees none of them fail."""
    typed = 0
    for language, text in blocks(ROOT / page):
        if named := re.match(r"# ([\w-]+\.(?:yaml|py))\n", text):
            (clone / named[1]).write_text(text)
        elif language == "sh":
            for command in lines(text):
                walk(command, clone)
                typed += 1
        else:
            assert language in ("", "text"), f"what is this block for?\n{text}"
    assert typed > 5


# ---- examples


def example(file: str, folder: Path) -> str:
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / file)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(folder.iterdir())
    return done.stdout


def test_the_example_of_fit(tmp_path: Path) -> None:
    """Two classes that no line separates are learnt at the highest of its learning rates, and not at the lowest."""
    shares = [float(line.split()[2]) for line in example("fit.py", tmp_path).splitlines()]
    assert len(shares) == 3
    assert shares[0] < 0.7 < 0.8 < shares[-1]


def test_the_example_of_the_objective(tmp_path: Path) -> None:
    """Optuna's own loop finds networks that read most of the digits, within the ranges of the study."""
    said = re.fullmatch(r"validation accuracy ([\d.]+) with (\{.*\})\n", example("objective.py", tmp_path))
    assert said
    assert float(said[1]) > 0.8
    params = ast.literal_eval(said[2])
    assert params.keys() == {"eta", "hidden_sizes", "lambda"}
    assert 1e-3 <= params["eta"] <= 0.5


def test_the_example_of_the_sampler(tmp_path: Path) -> None:
    """Coarse to fine comes near the one minimum of the function, which is written beside it."""
    said = re.fullmatch(r"least value ([\d.]+) with (\{.*\})\n", example("sampler.py", tmp_path))
    assert said
    assert float(said[1]) < 0.05
    params = ast.literal_eval(said[2])
    assert params["rate"] == pytest.approx(0.01, rel=0.5)
    assert params["angle"] == pytest.approx(2.0, abs=0.25)

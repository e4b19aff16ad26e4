"""Locks, scripts and pages: no address in what installs, no link into nothing."""

import re
import subprocess
import sys
import tomllib

import pytest

from tests.house.tree import ROOT, text

LOCKS = sorted(path.name for path in ROOT.glob("requirements*.lock"))
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("scripts", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
)
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PINNED = re.compile(r"^([A-Za-z0-9._-]+)(\[[^]]*\])?==([^ ;\\]+)", re.MULTILINE)
# Spelled in halves: this very file is checked as well.
INDEX = re.compile("py" + r"pi\.org|python" + "hosted|registry" + r"\.npmjs")


def pins(lock: str) -> dict[str, str]:
    return {name.lower(): version for name, _, version in PINNED.findall(text(lock))}


def test_locks_are_there():
    assert LOCKS == ["requirements-cuda13.lock", "requirements-tpu.lock", "requirements.lock"]


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_pin_by_hash_and_name_no_address(lock):
    content = text(lock)
    assert "://" not in content
    assert not re.search(
        r"^\s*-", re.sub(r"(?m)^\s*--hash=sha256:[0-9a-f]{64}.*$", "", content), re.M
    )
    lines = [line for line in content.splitlines() if line and not line.startswith((" ", "#"))]
    assert all(PINNED.match(line) and line.endswith("\\") for line in lines)


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_agree_with_the_project(lock):
    found = pins(lock)
    assert found["jax"] == found["jaxlib"] == "0.11.2"
    project = tomllib.loads(text("pyproject.toml"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[\[<>=,]", entry)[0].lower().replace("_", "-") for entry in wanted}
    assert names - set(found) == set()


def test_accelerator_locks_only_add():
    plain = pins("requirements.lock")
    for lock in LOCKS:
        found = pins(lock)
        assert {name: found.get(name) for name in plain} == plain


def test_no_file_names_a_package_index():
    folders = ("jaxllm", "pallas_kernels", "tests", "scripts", ".ci", "configs", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    wrong = [
        str(path.relative_to(ROOT))
        for path in files
        if path.suffix in {"", ".py", ".md", ".toml", ".lock", ".yaml", ".yml", ".sh", ".json"}
        and INDEX.search(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert wrong == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_fetch_from_no_address(script):
    far = re.compile(r"https?://(?!127\.0\.0\.1|localhost)[\w.]+")
    assert far.findall(text(script)) == []


@pytest.mark.parametrize(
    "script", ["scripts/setup", "scripts/quickstart", "scripts/test", ".ci/run"]
)
def test_shell_scripts_parse_and_can_be_run(script):
    assert (ROOT / script).stat().st_mode & 0o111 == 0o111
    assert subprocess.run(["bash", "-n", script], cwd=ROOT).returncode == 0


def test_quickstart_looks_where_models_are_kept(tmp_path, monkeypatch):
    from jaxllm.core import runtime
    from jaxllm.zoo.pull import CATALOGUE

    script = text("scripts/quickstart")
    assert re.search(r"^model=(.*)$", script, re.MULTILINE)[1] in CATALOGUE
    line = re.search(r"^cache=.*$", script, re.MULTILINE)[0]
    for name, value in (("HOME", "h"), ("XDG_CACHE_HOME", "x"), ("JAXLLM_CACHE", "j")):
        monkeypatch.setenv(name, str(tmp_path / value))
        if name == "HOME":
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
            monkeypatch.delenv("JAXLLM_CACHE", raising=False)
        command = ["bash", "-c", f'{line}\necho "$cache/models"']
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout.strip() == str(runtime.models_dir())


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text(page))
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_commands_of_the_readme_exist():
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text("README.md"), re.DOTALL))
    named = set(re.findall(r"(?:^|[\s`/])jaxllm +([a-z][a-z-]+)\b", code))
    run = "import sys; from jaxllm.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", run, "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert {name for name in named if not re.search(rf"\b{name}\b", done.stdout)} == set()

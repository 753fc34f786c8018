"""Claims about the house itself: what imports what, what the wheel holds, what the README says."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["cache", "train", "analyze", "cli"]


def modules() -> list[Path]:
    return [ROOT / "cli.py", *(file for package in ORDER[:3] for file in (ROOT / package).glob("*.py"))]


def imported(source: str) -> set[str]:
    """Top-level names that a module imports, relative imports apart."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def against_the_arrow(package: str, source: str) -> set[str]:
    later = set(ORDER[ORDER.index(package) + 1 :]) | {"tests"}
    return imported(source) & later


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file):
    package = file.stem if file.parent == ROOT else file.parent.name
    assert against_the_arrow(package, file.read_text()) == set()


def test_the_arrow_test_can_fail():
    assert against_the_arrow("train", "from analyze.tensor import x") == {"analyze"}
    assert against_the_arrow("analyze", "def f():\n    import cli") == {"cli"}


def loads(module: str, code: str) -> bool:
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint({module!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.split()[-1] == "True"


@pytest.mark.parametrize(
    "words", [["--help"], ["cache", "--help"], ["train", "--help"], ["analyze", "--help"], ["train", "--k", "0"]]
)
def test_help_and_usage_errors_load_no_torch(words):
    assert not loads("torch", f"from cli import app; app({words!r})")


def test_the_torch_test_can_fail():
    assert loads("torch", "import train.run")


def test_plain_help_is_short():
    """At most 15 options outside the panel "Advanced", each with a help line."""
    import typing

    from analyze.config import AnalyzeConfig
    from cache.config import CacheConfig
    from train.config import TrainConfig

    for config in (CacheConfig, TrainConfig, AnalyzeConfig):
        hints = [typing.get_args(hint) for hint in typing.get_type_hints(config, include_extras=True).values()]
        assert all(len(hint) >= 2 and len(hint[1]) > 10 for hint in hints)
        assert sum("advanced" not in hint for hint in hints) <= 15


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """Names in a wheel built from a copy of the sources, so that nothing of an earlier build gets in."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in (*ORDER[:3], "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("cli.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, copy]
    subprocess.run(command, check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("*.whl"))).namelist()


def test_the_wheel_holds_the_four_modules_and_their_data(wheel):
    tops = {name.split("/")[0] for name in wheel if ".dist-info/" not in name}
    assert tops == {"cache", "train", "analyze", "cli.py"}
    sources = {str(file.relative_to(ROOT)) for file in modules()}
    assets = {
        f"cache/assets/{name}" for name in ("text.txt", "SOURCES.md", "model/model.safetensors", "model/tokenizer.json")
    }
    assert sources | assets | {"analyze/report.html.j2"} <= set(wheel)
    assert not any("make_default_model" in name or "test" in name for name in wheel)


def test_assets_stay_small():
    sizes = {
        file.name: file.stat().st_size
        for file in (ROOT / "cache/assets").rglob("*")
        if file.suffix != ".py" and file.is_file()
    }
    assert sum(sizes.values()) <= 4_000_000 and sizes["text.txt"] <= 500_000


def test_git_ignores_no_source():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = [
        *ORDER[:3],
        "cli.py",
        "tests",
        "cache/store.py",
        "cache/assets/text.txt",
        "cache/assets/model/model.safetensors",
    ]
    done = subprocess.run(["git", "check-ignore", "--no-index", *names], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ""


def test_every_command_of_the_readme_parses():
    """Each `cli ...` line in a code block names options that exist."""
    blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    lines = [part.strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]
    commands = [line.split("#")[0].split() for line in lines if re.match(r"(\S*/)?cli ", line)]
    assert {words[1] for words in commands} >= {"cache", "train", "analyze"}
    from typer.main import get_command

    from cli import app

    known = {name: {o for p in c.params for o in p.opts} for name, c in get_command(app).commands.items()}
    for words in commands:
        assert {word for word in words[2:] if word.startswith("--")} <= known[words[1]], " ".join(words)

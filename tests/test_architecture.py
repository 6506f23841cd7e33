"""The shape of the house: which way imports point, how large a file and a function may be, which names exist."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
CHAIN = ("launch", "data_curation", "pretrain", "downstream")
MODULES = sorted(path for package in CHAIN for path in (REPOSITORY / package).rglob("*.py"))
ALL_FILES = [*MODULES, *sorted((REPOSITORY / "tests").rglob("*.py"))]
TOP_LEVEL = {"pretrain", "data_curation", "downstream", "launch", "tests", "pyproject.toml", "README.md", "LICENSE"}


def _name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def _imports(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}:{node.lineno}: imports are absolute, so that the chain can be read"
            found.add(node.module or "")
    return found


def _roots(path: Path) -> set[str]:
    return {module.split(".")[0] for module in _imports(path)}


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_point_down_the_chain(path: Path) -> None:
    own = CHAIN.index(path.relative_to(REPOSITORY).parts[0])
    forbidden = _roots(path) & set(CHAIN[own + 1 :])
    assert not forbidden, f"{_name(path)} imports {forbidden}: an import only ever points left in {CHAIN}"
    assert "tests" not in _roots(path)


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_torch_stays_where_it_belongs(path: Path) -> None:
    package = path.relative_to(REPOSITORY).parts[0]
    if package == "data_curation" or (package == "launch" and path.name != "distributed.py"):
        assert "torch" not in _roots(path), f"{_name(path)} must run without torch"
    assert not _roots(path) & {"torchvision", "timm", "omegaconf", "hydra", "lightning"}


@pytest.mark.parametrize("path", ALL_FILES, ids=_name)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 350, f"{_name(path)} has {len(text.splitlines())} lines; split it (350 at most)"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{_name(path)}:{node.lineno}: {node.name} has {length} lines (60 at most)"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_public_names_exist(path: Path) -> None:
    if path.name == "__init__.py" and not path.read_text().strip():
        return
    module = importlib.import_module(_dotted(path))
    names = getattr(module, "__all__", None)
    assert names is not None, f"{_name(path)} has no __all__"
    missing = [name for name in names if not hasattr(module, name)]
    assert not missing, f"{_name(path)}: __all__ names {missing}, which do not exist"
    undocumented = [
        name for name in names if callable(getattr(module, name)) and not (getattr(module, name).__doc__ or "").strip()
    ]
    assert not undocumented, f"{_name(path)}: no docstring on {undocumented}"


def test_names_of_files_say_what_is_in_them() -> None:
    assert not [_name(path) for path in ALL_FILES if path.stem in {"utils", "util", "helpers", "misc", "common"}]


def test_the_trainer_knows_no_stage() -> None:
    """The three stages are three sets of settings over one loop; a trainer that asks which it runs has lost that."""
    knowing = [
        _name(path) for path in (REPOSITORY / "pretrain").rglob("*.py") if re.search("stage", path.read_text(), re.I)
    ]
    assert not knowing


def _tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name]


def test_top_level_holds_what_it_should() -> None:
    top = {name.split("/")[0] for name in _tracked()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_no_machine_path_in_the_project() -> None:
    """A path of somebody's machine in a file is a command that fails on every other machine."""
    homes = re.compile(r"(?<![\w.])/(?:work|home|root|Users|scr\d*|mnt)/")
    own = Path(__file__).resolve()
    found = []
    for name in _tracked():
        path = REPOSITORY / name
        if path == own or path.suffix not in {".py", ".md", ".yaml", ".toml", ".sh", ""} or not path.is_file():
            continue
        found += [f"{name}:{n}" for n, line in enumerate(path.read_text().splitlines(), 1) if homes.search(line)]
    assert not found

"""What the project promises as a whole: its face, its dependencies, its documents."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sfumato
from sfumato import errors

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src" / "sfumato").rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
README = (ROOT / "README.md").read_text()

CONTRACT = {"Budget", "Ledger", "PrivacyEngine", "SfumatoError", "accounting", "record", "rows"}
OPTIONAL = {
    "dp_accounting", "jinja2", "jsonargparse", "matplotlib", "opacus", "pandas", "peft", "PIL", "pyarrow",
    "rich", "safetensors", "sklearn", "tqdm", "transformers", "yaml",
}  # fmt: skip


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running ``code``."""
    program = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


# ------------------------------------------------------------------------------------------------------- the face


def test_all_is_sorted_and_complete() -> None:
    assert list(sfumato.__all__) == sorted(sfumato.__all__)
    assert set(sfumato.__all__) >= CONTRACT
    for name in sfumato.__all__:
        assert getattr(sfumato, name) is not None
    public = {
        name
        for name, value in vars(sfumato).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("sfumato.")
    }
    assert public <= set(sfumato.__all__)


def callables(owner: object, prefix: str = "sfumato") -> Iterator[tuple[str, Callable[..., object]]]:
    """Every public function, class and method that is reached through ``__all__``."""
    for name in getattr(owner, "__all__", None) or (n for n in vars(owner) if not n.startswith("_")):
        value, path = getattr(owner, name), f"{prefix}.{name}"
        if not getattr(value, "__module__", "sfumato").startswith("sfumato"):
            continue  # what a module imports
        if inspect.ismodule(value):
            if not value.__name__.startswith("sfumato"):
                continue  # what a module imports
            yield from callables(value, path)
        elif inspect.isclass(value) and not issubclass(value, BaseException):
            yield path, value
            yield from callables(value, path)
        elif inspect.isfunction(value):
            yield path, value


def test_no_public_call_swallows_misspelt_keywords() -> None:
    found = dict(callables(sfumato))
    assert "sfumato.PrivacyEngine.make_private" in found
    for path, call in found.items():
        kinds = {p.kind for p in inspect.signature(call).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds, path


def test_version_is_the_one_in_pyproject() -> None:
    assert sfumato.__version__ == PROJECT["version"]


def test_importing_sfumato_loads_no_extra() -> None:
    code = "import sfumato\nfor name in sfumato.__all__: getattr(sfumato, name)"
    already = loaded_after("import torch")  # torch itself takes tqdm where it finds it
    assert not (loaded_after(code) - already) & OPTIONAL


@pytest.mark.parametrize("module", ["accounting", "sampling", "errors"])
def test_these_load_without_torch(module: str) -> None:
    assert "torch" not in loaded_after(f"import sfumato.{module}")


def test_every_error_derives_from_the_base_and_is_in_the_tree() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]
    assert classes
    for error in classes:
        assert issubclass(error, errors.SfumatoError)
        assert error.__doc__
        assert error.__name__ in (errors.__doc__ or "")


# --------------------------------------------------------------------------------------------------- source rules


def walk(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(), str(path)))


def unsafe_reads(tree: Iterator[ast.AST]) -> Iterator[str]:
    """Ways to load a file that can run code from it."""
    picklers = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for node in tree:
        if isinstance(node, ast.Import):
            yield from (f"import {a.name}" for a in node.names if a.name.partition(".")[0] in picklers)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in picklers:
            yield f"from {node.module} import ..."
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.serialization.load"}:
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            yield from ("from torch import load" for a in node.names if a.name == "load")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield "allow_pickle"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_source_never_unpickles(path: Path) -> None:
    assert list(unsafe_reads(walk(path))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(p)",
        "read = torch.load",
        "from torch import load",
        "numpy.load(p, allow_pickle=True)",
    ],
)
def test_the_search_for_unsafe_reads_has_power(code: str) -> None:
    assert list(unsafe_reads(ast.walk(ast.parse(code))))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_a_file_is_one_concept(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= 400, f"{lines} lines: is this one concept?"


# --------------------------------------------------------------------------------------------------- dependencies


def distribution(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_extras_exist() -> None:
    assert set(EXTRAS) >= {"cli", "data", "hf", "bench", "dev"}


def test_every_requirement_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    wanted = [*PROJECT["dependencies"], *(r for extra in EXTRAS.values() for r in extra)]
    assert {distribution(r) for r in wanted} <= set(pins)
    assert pins["torch"] == "2.13.0"


# ------------------------------------------------------------------------------------------------------ documents


def test_readme_shows_the_two_commands_and_ci_runs_the_second() -> None:
    assert "make demo" in README
    assert "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_readme_example_runs_and_keeps_its_promise(tmp_path: Path) -> None:
    """The blocks of the README are one session."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", README, flags=re.M | re.S))
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d for the record with the most; \d+ steps are left", done.stdout), done.stdout
    assert {"digits.db", "digits.ckpt"} <= {p.name for p in tmp_path.iterdir()}
    assert re.search(r"BatchNorm2d.*No problem found", done.stdout, flags=re.S), done.stdout
    match = re.search(r"accuracy (\d\.\d+) at epsilon (\d\.\d+)", done.stdout)
    assert match, done.stdout
    accuracy, spent = float(match[1]), float(match[2])
    assert accuracy > 0.88
    assert 2.9 <= spent <= 3.0


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", path.read_text())
    assert [t for t in targets if not (path.parent / t).exists()] == []


def test_every_package_has_its_place_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    names = {p.relative_to(ROOT / "src" / "sfumato").parts[0].removesuffix(".py") for p in SOURCES} - {"__init__"}
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_decisions_are_numbered_without_a_gap_and_say_all_three_things() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [int(p.name[:3]) for p in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        for heading in ("## Context", "## Decision", "## Consequences"):
            assert heading in page.read_text(), f"{page.name} lacks {heading!r}"


def test_every_known_gap_has_a_severity() -> None:
    text = (ROOT / "docs" / "known-gaps.md").read_text()
    gaps = re.findall(r"^### .*$", text, flags=re.M)
    assert gaps
    assert [gap for gap in gaps if not re.search(r" · (high|medium|low)$", gap)] == []

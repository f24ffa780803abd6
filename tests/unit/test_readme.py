"""What the documents say exists: files that they link to, and names that their examples import."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import unimoe

ROOT = Path(unimoe.__file__).parent
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "docs/moai.md",
    "docs/prompts_and_data.md",
    "docs/routing.md",
    "starter_corpus/README.md",
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROMPTS = (ROOT / "docs/prompts_and_data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.+?)^```", README + PROMPTS, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    file = ROOT / document
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", file.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (file.parent / link).exists()]
    assert not missing


def test_which_file_to_open_names_files() -> None:
    table = README.partition("## Which file to open")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| .+ \| \[(.+)\]\((.+)\) \|$", table, re.MULTILINE)
    assert len(rows) > 8
    assert len(rows) == sum(line.startswith("| ") for line in table.splitlines()) - 1  # the header
    for name, target in rows:
        assert name == target
        assert (ROOT / target).is_file(), target


# Packages of folders, whose texts are maps.
MAPPED = ("conversion", "trainers")
FOLDERS = sorted(str(path.parent.relative_to(ROOT)) for name in MAPPED for path in (ROOT / name).glob("*/__init__.py"))


@pytest.mark.parametrize("package", MAPPED)
def test_the_map_of_a_package_names_its_folders(package: str) -> None:
    assert {name for name in FOLDERS if name.startswith(f"{package}/")} <= {
        f"{package}/{name}" for name in _map(package)
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_map_of_a_folder_names_its_files(folder: str) -> None:
    assert {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"} <= _map(folder)


def _map(folder: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", importlib.import_module(f"unimoe.{folder.replace('/', '.')}").__doc__))


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_compile_and_import_what_exists(code: str) -> None:
    for statement in ast.walk(ast.parse(code)):
        if isinstance(statement, ast.ImportFrom) and statement.module.partition(".")[0] == "unimoe":
            module = importlib.import_module(statement.module)
            for alias in statement.names:
                assert hasattr(module, alias.name), f"{statement.module}.{alias.name}"


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2

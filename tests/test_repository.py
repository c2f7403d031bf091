"""What holds for the repository as a whole: names, words, layers, documents and the wheel."""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import subprocess
import sys
import tokenize
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import zeroshard

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "zeroshard"
SHIM = ROOT / "shim" / "src" / "deepspeed"
TEXT_SUFFIXES = {".json", ".md", ".py", ".toml", ".txt", ".yaml", ".yml"}
WRITTEN_BY_US = ("src", "shim", "tests", "docs", "examples", "benchmarks", "tools", ".ci")

OUTPUT = ROOT / "examples" / "seeds" / "output"  # what its scripts leave behind

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_files() -> Iterator[Path]:
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in TEXT_SUFFIXES | {""} and path.name != ".git":
            yield path
    for folder in WRITTEN_BY_US:
        for path in (ROOT / folder).rglob("*"):
            if (
                path.is_file()
                and path.suffix in TEXT_SUFFIXES | {""}
                and OUTPUT not in path.parents
            ):
                yield path


def documents() -> list[Path]:
    folders = ("docs", "examples")
    nested = [path for folder in folders for path in (ROOT / folder).rglob("*.md")]
    return sorted(
        path
        for path in [*ROOT.glob("*.md"), *ROOT.glob("shim/*.md"), *nested]
        if OUTPUT not in path.parents
    )


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(document: Path) -> set[str]:
    prose = FENCE.sub("", document.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.+)$", prose, re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings]
    return {heading.replace(" ", "-") for heading in kept}


def words_of_code(source: str) -> Iterator[tuple[int, str]]:
    """Yield each name and string in `source` with its line, leaving comments and docstrings out."""
    fstring_middle = getattr(tokenize, "FSTRING_MIDDLE", -1)
    layout = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
    before = tokenize.ENCODING
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            continue
        stands_alone = token.type == tokenize.STRING and before in layout
        if token.type in {tokenize.NAME, fstring_middle} or (
            token.type == tokenize.STRING and not stands_alone
        ):
            yield token.start[0], token.string
        before = token.type


def test_public_names_are_sorted_and_complete() -> None:
    listed = list(zeroshard.__all__)
    assert listed == sorted(set(listed))
    assert all(hasattr(zeroshard, name) for name in listed)
    public = {
        name
        for name, value in vars(zeroshard).items()
        if not name.startswith("_") and not isinstance(value, type(zeroshard))
    }
    modules = {"checkpoint", "checkpointing", "zero"}
    assert public - {"annotations", "TYPE_CHECKING", "Any", "import_module"} | modules == set(
        listed
    )


def test_stages_are_named_only_in_configuration_and_the_lifetime_table() -> None:
    # build.py translates the configuration into core objects: there the number becomes a value.
    # A checkpoint tells which stage wrote it, in its manifest and under DeepSpeed's names.
    # config_command.py has an option of the key's name, getters.py a call of DeepSpeed's.
    allowed = {
        PACKAGE / "checkpoint" / "manifest.py",
        PACKAGE / "checkpoint" / "signposts.py",
        PACKAGE / "core" / "lifetime.py",
        PACKAGE / "engine" / "build.py",
        PACKAGE / "engine" / "getters.py",
        PACKAGE / "launch" / "config_command.py",
    }
    found = [
        f"{relative(path)}:{line}: {word}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path not in allowed and PACKAGE / "config" not in path.parents
        for line, word in words_of_code(path.read_text(encoding="utf-8"))
        # Prose is left alone: an error message may name the JSON key. What is staged is on its way.
        if "stage" in word.lower().replace("staged", "") and " " not in word
    ]
    assert found == []


def test_no_file_mentions_a_path_of_the_machine_it_was_written_on() -> None:
    roots = "|".join(["work", "root", "home", "Users"])
    machine_path = re.compile(rf"(?<![\w.\-/])/(?:{roots})/\w+")
    found = [
        f"{relative(path)}: {match.group()}"
        for path in text_files()
        for match in machine_path.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_our_text_is_ascii() -> None:
    found = [
        relative(path) for path in text_files() if not path.read_text(encoding="utf-8").isascii()
    ]
    assert found == []


@pytest.mark.parametrize("document", documents(), ids=relative)
def test_python_blocks_in_documents_compile(document: Path) -> None:
    for language, block in FENCE.findall(document.read_text(encoding="utf-8")):
        if language == "python":
            ast.parse(block, filename=relative(document))


@pytest.mark.parametrize("document", documents(), ids=relative)
def test_links_between_documents_resolve(document: Path) -> None:
    prose = FENCE.sub("", document.read_text(encoding="utf-8"))
    broken = []
    for link in LINK.findall(prose):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name) if name else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_reached_from_the_index() -> None:
    reached: set[Path] = set()
    waiting = [ROOT / "docs" / "index.md"]
    while waiting:
        page = waiting.pop()
        if page.suffix == ".md" and page not in reached:
            reached.add(page)
            links = LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
            inside = [link.partition("#")[0] for link in links if "://" not in link]
            waiting += [(page.parent / link).resolve() for link in inside if link]
    pages = (ROOT / "docs").rglob("*.md")
    assert [relative(page) for page in sorted(pages) if page not in reached] == []


def test_readme_leads_with_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first_block = FENCE.search(readme)
    assert first_block is not None
    commands = [line.split("#")[0].strip() for line in first_block.group(2).strip().splitlines()]
    assert commands == ["make demo", "make test"]


def test_the_configuration_page_is_what_the_schema_says() -> None:
    command = [sys.executable, str(ROOT / "tools" / "make_reference.py"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None or importlib.util.find_spec("build") is None,
    reason="the build tools are not installed",
)
@pytest.mark.parametrize("package", [PACKAGE, SHIM], ids=lambda package: package.name)
def test_a_wheel_is_pure_python_and_holds_only_its_package(package: Path, tmp_path: Path) -> None:
    project = package.parent.parent
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
    ]
    built = subprocess.run([*command, str(project)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {package.name}
    modules = {str(path.relative_to(package.parent)) for path in package.rglob("*.py")}
    assert modules <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("entry_points.txt") for name in names)

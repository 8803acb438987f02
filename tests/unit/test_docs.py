"""What the documentation says holds: links lead somewhere, code compiles, recipes load, commands and names exist."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import unitrain
from unitrain import registry

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
MAKE_TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Block(NamedTuple):
    """A fenced block: its language, first line number and text."""

    language: str
    line: int
    text: str


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    for found in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield Block(found[1], text.count("\n", 0, found.start()) + 2, found[2])


def anchors(text: str) -> set[str]:
    """The names of a page's headings, as links spell them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    """Links to files or headings that do not exist; addresses of other hosts are not followed."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        if not file.exists():
            yield f"{page.name}: {link} leads nowhere"
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            yield f"{page.name}: {link} names no heading of {file.name}"


def broken_python(text: str) -> Iterator[str]:
    """Python blocks that do not compile, and names of unitrain that it does not have."""
    for block in blocks(text):
        if block.language != "python":
            continue
        try:
            tree = ast.parse(block.text)
        except SyntaxError as error:
            yield f"line {block.line + (error.lineno or 1) - 1}: {error.msg}"
            continue
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name(id="unitrain"), attr=name):
                    used = [name]
                case ast.ImportFrom(module="unitrain", names=names):
                    used = [alias.name for alias in names]
                case _:
                    continue
            yield from (f"line {block.line}: unitrain has no {name!r}" for name in used if name not in unitrain.__all__)


def broken_recipes(text: str) -> Iterator[str]:
    """Whole recipes (they name a trainer) that do not load; a trainer's file is the page's block with its class."""
    for block in blocks(text):
        trainer = re.search(r"^trainer: (\S+):(\S+)$", block.text, re.MULTILINE)
        if block.language != "yaml" or not trainer:
            continue
        if trainer[1].endswith(".py"):
            code = [other.text for other in blocks(text) if f"class {trainer[2]}(" in other.text]
            Path(trainer[1]).write_text("".join(code[:1]), encoding="utf-8")
        Path("block.yaml").write_text(block.text, encoding="utf-8")
        try:
            unitrain.load_recipe(Path("block.yaml"))
        except unitrain.UnitrainError as error:
            yield f"line {block.line}: {error}"


def broken_commands(text: str) -> Iterator[str]:
    """`make x` of targets that the Makefile does not have."""
    commands = [block.text for block in blocks(text) if block.language in ("sh", "console")]
    inline = re.findall(r"`(make [^`]+)`", text)
    for target in re.findall(r"^\$? ?make ([a-z]+)", "\n".join([*commands, *inline]), re.MULTILINE):
        if target not in MAKE_TARGETS:
            yield f"the Makefile has no target {target!r}"


def broken_table(text: str) -> Iterator[str]:
    """The tables of strategies and launchers, against the registry."""
    for kind, known in (("strategy", registry.STRATEGIES), ("launcher", registry.LAUNCHERS)):
        found = re.findall(rf"^\| {kind} \|.*\n\|[-| :]+\n((?:\|.*\n)+)", text, re.MULTILINE)
        names = {name for rows in found for name in re.findall(r"^\| `(\w+)`", rows, re.MULTILINE)}
        if names != set(known):
            yield f"the rows of `| {kind} |` are {sorted(names)}, the registry has {sorted(known)}"


@pytest.fixture(autouse=True)
def _folder_for_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pages
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


@pages
def test_python_blocks_compile_and_use_names_that_exist(page: Path) -> None:
    assert list(broken_python(page.read_text(encoding="utf-8"))) == []


@pages
def test_recipes_load(page: Path) -> None:
    assert list(broken_recipes(page.read_text(encoding="utf-8"))) == []


@pages
def test_make_has_the_targets_that_pages_name(page: Path) -> None:
    assert list(broken_commands(page.read_text(encoding="utf-8"))) == []


def test_the_readme_lists_every_strategy_and_launcher() -> None:
    assert list(broken_table((ROOT / "README.md").read_text(encoding="utf-8"))) == []


def test_generated_pages_are_current() -> None:
    for name, text in runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"].items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text(), f"{name}: run python docs/generate.py"


def test_the_readme_shows_the_recipe_that_the_demo_runs() -> None:
    first = next(
        block for block in blocks((ROOT / "README.md").read_text(encoding="utf-8")) if block.language == "yaml"
    )
    Path("shown.yaml").write_text(first.text, encoding="utf-8")
    assert unitrain.load_recipe("shown.yaml") == unitrain.load_recipe(ROOT / "recipes" / "gpt_tiny.yaml")


def test_each_check_fails_on_a_page_that_deserves_it(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](gone.md) [b](#two) [c](#one) [d](page.md)\n", encoding="utf-8")
    assert [sentence.split(": ")[1] for sentence in broken_links(page)] == [
        "gone.md leads nowhere",
        "#two names no heading of page.md",
    ]
    assert list(broken_python("```python\nx = = 1\n```\n")) == ["line 2: invalid syntax"]
    assert list(broken_python("```python\nunitrain.Nothing\nunitrain.Trainer\n```\n")) == [
        "line 2: unitrain has no 'Nothing'"
    ]
    mine = "```python\nclass Mine(Trainer):\n    pass\n```\n```yaml\ntrainer: mine.py:Mine\ntrain: {%s: 1}\n```\n"
    assert "stepz" in next(broken_recipes(mine % "stepz"))
    assert list(broken_recipes(mine % "steps")) == []
    assert list(broken_commands("`make nothing`, `make test`\n")) == ["the Makefile has no target 'nothing'"]
    assert len(list(broken_table("| strategy | what |\n|---|---|\n| `single` | one |\n"))) == 2

"""`trainer:` in a recipe finds its class, or says what is there instead."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from unitrain.errors import RecipeError
from unitrain.trainer_path import resolve_trainer

pytestmark = pytest.mark.fast

SOURCE = """
from unitrain.trainer import Trainer

class Mine(Trainer):
    pass

class Other:
    pass
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; what a test imports from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def test_a_module_in_the_working_directory_is_found(folder: Path) -> None:
    (folder / "mine_1.py").write_text(SOURCE)
    assert resolve_trainer("mine_1:Mine").__module__ == "mine_1"


def test_a_file_is_found_here_or_beside_the_recipe_and_loaded_once(folder: Path) -> None:
    (folder / "recipes").mkdir()
    (folder / "recipes" / "mine_2.py").write_text("import beside_2\n" + SOURCE)
    (folder / "recipes" / "beside_2.py").write_text("")
    found = resolve_trainer("mine_2.py:Mine", beside=folder / "recipes")
    assert found is resolve_trainer("recipes/mine_2.py:Mine")
    assert found is resolve_trainer(f"{folder}/recipes/mine_2.py:Mine")


def test_a_file_may_be_named_like_another_module(folder: Path) -> None:
    (folder / "random.py").write_text(SOURCE)
    assert resolve_trainer("random.py:Mine").__name__ == "Mine"
    assert hasattr(sys.modules["random"], "shuffle"), "Python's own is still there"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("mine_3.py:Mein", "mine_3.py has no Mein, did you mean 'Mine'?; its trainers: Mine"),
        ("mine_3.py:Other", "Other is not a subclass of unitrain.Trainer; its trainers: Mine"),
        ("mine_3:Nope", "its trainers: Mine"),
        ("there/is/none.py:Mine", "the file 'there/is/none.py', which is not in"),
        ("there_is_none:Mine", "there is no module 'there_is_none' in"),
        ("unitrain.there_is_none:Mine", "there is no module 'unitrain.there_is_none'"),
        ("json:Mine", "it has no subclass of unitrain.Trainer"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(folder: Path, path: str, says: str) -> None:
    (folder / "mine_3.py").write_text(SOURCE)
    with pytest.raises(RecipeError) as refusal:
        resolve_trainer(path)
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "error"),
    [("import no_such_package", ModuleNotFoundError), ("1 / 0", ZeroDivisionError), ("def f(:", SyntaxError)],
)
@pytest.mark.parametrize("path", ["broken:Mine", "broken.py:Mine"])
def test_an_error_inside_the_module_comes_through_as_it_is(
    folder: Path, path: str, text: str, error: type[Exception]
) -> None:
    (folder / "broken.py").write_text(text)
    for _ in range(2):  # a half-loaded module is not kept
        with pytest.raises(error):
            resolve_trainer(path)

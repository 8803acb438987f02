"""A copy of the project's code: what goes along, what is refused by name, and that later edits do not reach a rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unitrain.errors import UserError
from unitrain.recipe import CodeRecipe, DataRecipe, Recipe
from unitrain.recipe_file import load_recipe
from unitrain.snapshot import MIB, digest, looks_secret, settle, survey, take

CODE = CodeRecipe(snapshot=True)


def git(folder: Path, *words: str) -> str:
    who = [
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "protocol.file.allow=always",
    ]
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with a package, a trainer's file, an ignored folder of data and a run."""
    top = tmp_path / "project"
    files = {
        "mine.py": "class Mine: ...",
        "pkg/__init__.py": "",
        "pkg/net.py": "LAYERS = 2",
        "old.txt": "old",
        ".gitignore": "data/\n*.log\n",
        "data/big.bin": "x",
        "noise.log": "",
        "runs/gpt-1/recipe.yaml": "trainer: a:B",
        "runs/gpt-1/checkpoints/part.bin": "x" * 100,
    }
    for path, text in files.items():
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_text(text)
    git(top, "init", "-q")
    git(top, "add", "mine.py", "pkg", ".gitignore", "old.txt")
    git(top, "commit", "-q", "-m", "one")
    return top


def recipe(project: Path, **code: object) -> Recipe:
    return Recipe(trainer=f"{project / 'mine.py'}:Mine", code=CodeRecipe(snapshot=True, **code))  # type: ignore[arg-type]


def paths(project: Path, **code: object) -> list[str]:
    return [file.path for file in survey(project, recipe(project, **code)).files]


def test_tracked_changed_and_new_files_go_along_and_ignored_ones_and_runs_do_not(project: Path, tmp_path: Path) -> None:
    (project / "pkg/net.py").write_text("LAYERS = 3")
    (project / "new\nname.py").write_text("")
    (project / "old.txt").unlink()
    (project / "tool.sh").write_text("#!/bin/sh\n")
    (project / "tool.sh").chmod(0o755)
    found = survey(project, recipe(project))
    assert [file.path for file in found.files] == [
        ".gitignore", "mine.py", "new\nname.py", "pkg/__init__.py", "pkg/net.py", "tool.sh",
    ]  # fmt: skip
    assert found.changed == ("old.txt", "pkg/net.py")
    assert found.new == ("new\nname.py", "tool.sh")
    run = tmp_path / "run"
    run.mkdir()
    record = take(found, run)
    assert (run / "code/pkg/net.py").read_text() == "LAYERS = 3"
    assert (run / "code/tool.sh").stat().st_mode & 0o777 == 0o555
    assert (run / "code/mine.py").stat().st_mode & 0o777 == 0o444
    assert record == json.loads((run / "code.json").read_text())
    assert record["commit"] == git(project, "rev-parse", "HEAD").strip()
    diff = (run / "code.diff").read_text()
    assert "+LAYERS = 3" in diff and "-old" in diff
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")], "no draft stays"


def test_the_digest_knows_names_kinds_and_contents_and_nothing_else(project: Path, tmp_path: Path) -> None:
    def taken(name: str) -> str:
        (tmp_path / name).mkdir()
        found: str = take(survey(project, recipe(project)), tmp_path / name)["sha256"]
        return found

    first = taken("a")
    os.utime(project / "mine.py", (1, 1))
    assert taken("b") == first
    (tmp_path / "b/code/pkg/__pycache__").mkdir()
    (tmp_path / "b/code/pkg/__pycache__/net.pyc").write_bytes(b"x")
    assert digest(tmp_path / "b/code") == first
    (project / "mine.py").chmod(0o755)
    assert len({first, second := taken("c")}) == 2
    (project / "pkg/net.py").rename(project / "pkg/nets.py")
    assert len({first, second, third := taken("d")}) == 3
    (project / "pkg/nets.py").write_text("LAYERS = 4")
    assert len({first, second, third, taken("e")}) == 4


SECRET = (
    *(".env", ".env.local", "prod.env", "id_rsa", "id_ed25519", "deploy_rsa", "server.PEM", "tls.key", ".netrc"),
    *("credentials.json", "aws-credentials.csv", "credentials", ".git-credentials", "service-account-prod.json"),
    *("secrets.yaml", "secret.txt", ".npmrc", ".pypirc", "kubeconfig", "a.kdbx", ".htpasswd", "hub.token"),
    *(".aws/config", "home/.ssh/known", ".kube/config", ".docker/config.json"),
)
HARMLESS = (
    *("id_rsa.pub", ".env.example", "secrets.py", "tokenizer.json", "keys.py", "docs/credentials.md", "monkey.txt"),
    *("environment.yaml", "tokens.bin", "src/token.py", "passenger.csv"),
)


@pytest.mark.fast
def test_names_of_secrets_are_known() -> None:
    assert [name for name in SECRET if not looks_secret(f"deep/{name}")] == []
    assert [name for name in HARMLESS if looks_secret(name)] == []


def test_secrets_and_large_files_are_refused_by_name_and_may_be_allowed(project: Path) -> None:
    (project / ".env").write_text("TOKEN=1")
    (project / "weights.bin").write_bytes(b"\0" * (11 * MIB))
    key = "-----BEGIN OPENSSH " + "PRIVATE KEY-----\nAAAAB3NzaC1yc2EAAAADAQABAAABgQ\n"
    (project / "notes.txt").write_text(key)
    with pytest.raises(UserError) as caught:
        survey(project, recipe(project))
    for words in (
        "'.env' has the name of a secret",
        "'weights.bin' has 11.0 MiB, more than code.file_mb=10",
        "'notes.txt' holds a private key",
        "code.leave_out",
    ):
        assert words in str(caught.value)
    assert {".env", "weights.bin", "notes.txt"} <= set(paths(project, allow=(".env", "*.bin", "notes.txt")))
    assert not {".env", "weights.bin", "notes.txt"} & set(paths(project, leave_out=(".env", "*.bin", "notes.txt")))
    with pytest.raises(UserError, match=r"would copy 11.0 MiB, more than code.total_mb=5; .*'weights.bin'"):
        survey(project, recipe(project, allow=(".env", "*.bin", "notes.txt"), total_mb=5.0))


def test_a_removed_secret_is_not_kept_in_the_diff(project: Path, tmp_path: Path) -> None:
    (project / ".env").write_text("TOKEN=hunter2")
    git(project, "add", "-f", ".env")
    git(project, "commit", "-q", "-m", "two")
    (project / ".env").unlink()
    take(survey(project, recipe(project)), tmp_path)
    assert "hunter2" not in (tmp_path / "code.diff").read_text()


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("/etc/passwd", "'a' is a link out of the project, to '/etc/passwd'"),
        ("../outside", "'a' is a link out of the project, to '../outside'"),
        ("pkg/../../outside", "'a' is a link out of the project"),
        ("data/big.bin", "'a' is a link to 'data/big.bin', which does not go along"),
    ],
)
def test_a_link_that_leads_out_is_refused(project: Path, target: str, says: str) -> None:
    (project / "a").symlink_to(target)
    with pytest.raises(UserError, match="cannot copy all files") as caught:
        survey(project, recipe(project, allow=("*",)))
    assert says in str(caught.value)
    assert "a" not in paths(project, leave_out=("a",))


def test_a_link_within_the_project_stays_a_link(project: Path, tmp_path: Path) -> None:
    (project / "pkg/again.py").symlink_to("net.py")
    (project / "package").symlink_to("pkg")
    take(survey(project, recipe(project)), tmp_path)
    assert os.readlink(tmp_path / "code/pkg/again.py") == "net.py"
    assert (tmp_path / "code/package/net.py").read_text() == "LAYERS = 2"


def test_a_file_that_becomes_a_link_before_it_is_copied_is_not_followed(project: Path, tmp_path: Path) -> None:
    found = survey(project, recipe(project))
    (project / "old.txt").unlink()
    (project / "old.txt").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="cannot be copied"):
        take(found, tmp_path)
    assert list(tmp_path.glob("*code*")) == []


def test_submodules_and_repositories_within_go_along(project: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    git(inner, "init", "-q")
    (inner / "sub.py").write_text("")
    git(inner, "add", "sub.py")
    git(inner, "commit", "-q", "-m", "one")
    git(project, "submodule", "--quiet", "add", str(inner), "third/sub")
    git(project, "clone", "-q", str(inner), "beside")
    (project / "third/sub/new.py").write_text("")
    found = paths(project)
    assert {"third/sub/sub.py", "third/sub/new.py", "beside/sub.py"} <= set(found)


def test_what_the_recipe_itself_needs_must_go_along(project: Path) -> None:
    wanted = recipe(project).replace(data=DataRecipe(name="mine", options={"path": "data/big.bin", "text": "x" * 5000}))
    with pytest.raises(UserError, match=r"data.path is in 'data/big.bin', which code.snapshot does not copy"):
        survey(project, wanted)
    linked = wanted.replace(code=CodeRecipe(snapshot=True, link=("data",)))
    assert survey(project, linked).links == ("data",)
    (project.parent / "other.py").write_text("")
    with pytest.raises(UserError, match=r"trainer is in .*other.py, outside of the project"):
        survey(project, wanted.replace(trainer=f"{project.parent / 'other.py'}:Mine"))


def test_linked_data_is_seen_as_it_is_later(project: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    take(survey(project, recipe(project, link=("data",))), run)
    (project / "data/big.bin").write_text("later")
    assert (run / "code/data/big.bin").read_text() == "later"
    _, again = settle(recipe(project, link=("data",)), run, project)
    assert again is None, "the run has its copy, and the link is none of what it holds"


def test_without_git_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Recipe(trainer="mine:Mine", code=CODE)
    with pytest.raises(UserError, match=r"not a git repository.*code.snapshot=false"):
        survey(tmp_path, wanted)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs git"):
        survey(tmp_path, wanted)


def test_a_program_that_the_repository_names_is_not_run(project: Path, tmp_path: Path) -> None:
    evil = project / "evil.sh"
    evil.write_text(f"#!/bin/sh\ntouch {tmp_path / 'executed'}\n")
    evil.chmod(0o755)
    for key in ("core.fsmonitor", "diff.external", "diff.mine.textconv", "diff.mine.command"):
        git(project, "config", key, str(evil))
    (project / ".gitattributes").write_text("*.py diff=mine\n")
    (project / "mine.py").write_text("changed")
    run = tmp_path / "run"
    run.mkdir()
    take(survey(project, recipe(project)), run)
    assert "+changed" in (run / "code.diff").read_text()
    assert not (tmp_path / "executed").exists()


@pytest.mark.fast
@pytest.mark.parametrize("value", ["/etc", "../x", "a/../b", ".", ""])
def test_patterns_start_at_the_top_of_the_project(value: str) -> None:
    for key in ("allow", "leave_out", "link"):
        with pytest.raises(UserError, match=f"code.{key} has"):
            CodeRecipe(**{key: (value,)})


def test_a_recipe_names_the_trainer_in_the_copy_and_a_new_copy_leaves_the_old_one(
    project: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    settled, found = settle(recipe(project), run, project)
    assert settled.trainer == "code/mine.py:Mine" and found is not None
    take(found, run)
    (run / "recipe.yaml").write_text(f"trainer: {settled.trainer}\ncode: {{snapshot: true}}\n")
    loaded = load_recipe(run / "recipe.yaml")
    assert loaded.trainer == f"{run.resolve() / 'code/mine.py'}:Mine"
    assert settle(loaded, run, project) == (loaded.replace(trainer="code/mine.py:Mine"), None)

    live, none = settle(loaded.replace(code=CodeRecipe()), run, project)
    assert (live.trainer, none) == (f"{project / 'mine.py'}:Mine", None)

    (project / "mine.py").write_text("class Mine: x = 2")
    again, new = settle(loaded, run, project, anew=True)
    assert again.trainer == "code/mine.py:Mine" and new is not None
    take(new, run)
    assert (run / "code/mine.py").read_text() == "class Mine: x = 2"
    assert (run / "code-1/mine.py").read_text() == "class Mine: ..."
    assert (run / "code-1.json").exists()

    (run / "code/mine.py").chmod(0o644)
    (run / "code/mine.py").write_text("edited")
    with pytest.raises(UserError, match=r"somebody has edited it; .*--new-code"):
        settle(loaded, run, project)


RANK = """
import sys
from pathlib import Path
from unitrain.snapshot import enter
check = enter(Path(sys.argv[1]))
import pkg.net, tool
check()
print(pkg.net.LAYERS, tool.__file__, Path.cwd())
"""


def rank(run: Path, cwd: Path, *paths: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """A process that enters the snapshot and imports what is in it."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), *sys.path])}
    command = [sys.executable, "-c", before + RANK, str(run)]
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, check=False, timeout=60)


def test_a_rank_imports_from_the_copy_whatever_has_become_of_the_project(project: Path) -> None:
    (project / "src").mkdir()
    (project / "src/tool.py").write_text("")
    run = project / "runs/gpt-2"
    run.mkdir()
    take(survey(project / "pkg", recipe(project)), run)
    (project / "pkg/net.py").write_text("LAYERS = 99")
    done = rank(run, project, project, project / "src")
    assert done.returncode == 0, done.stderr
    code = run / "code"
    assert done.stdout == f"2 {code / 'src/tool.py'} {code / 'pkg'}\n"


FINDER = """
import importlib.util, sys
class Editable:
    def find_spec(self, name, path=None, target=None):
        if name == "tool":
            return importlib.util.spec_from_file_location(name, {path!r})
sys.meta_path.insert(0, Editable())
"""


def test_a_module_that_comes_from_the_project_itself_all_the_same_is_refused(project: Path) -> None:
    (project / "src").mkdir()
    (project / "src/tool.py").write_text("")
    run = project / "runs/gpt-2"
    run.mkdir()
    take(survey(project, recipe(project)), run)
    done = rank(run, project, before=FINDER.format(path=str(project / "src/tool.py")))
    assert done.returncode == 1
    assert "the module tool was imported from" in done.stderr

"""What the images and their test bed promise, read from their files; every rule is shown to fail on a broken file."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from unitrain.agent.job import read_job
from unitrain.errors import ExitCode
from unitrain.run import Run

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
SECRETS = ("--mount=type=secret,id=pip.conf", "--mount=type=secret,id=ca.crt")
COMPILER = {"deepspeed"}  # it compiles operators as it runs
HOST = re.compile(r"\b(?:[\w-]+\.)+(?:com|org|io|net|dev|ai|cn|edu)\b")


def script(name: str) -> ModuleType:
    """A script of docker/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docker_{name}", DOCKER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILD, INSTALL = script("build"), script("install")


@dataclass(frozen=True)
class Line:
    """One instruction: of which stage, its name and what follows."""

    stage: str
    name: str
    rest: str


class Images:
    """A Dockerfile, read."""

    def __init__(self, text: str) -> None:
        self.parents: dict[str, str] = {}
        self.lines: list[Line] = []
        stage = ""
        bare = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        for line in re.sub(r"\\\n", " ", bare).splitlines():
            if not line.strip():
                continue
            name, _, rest = line.strip().partition(" ")
            if name == "FROM":
                parent, _, stage = rest.partition(" AS ")
                self.parents[stage] = parent
            self.lines.append(Line(stage, name, " ".join(rest.split())))

    def chain(self, stage: str) -> list[str]:
        """The stages whose layers an image has, the first one first."""
        return [*(self.chain(self.parents[stage]) if stage in self.parents else []), stage]

    def last(self, stage: str, name: str) -> str:
        """What counts of an instruction that replaces the one before; empty where there is none."""
        chain = self.chain(stage)
        found = sorted(
            (chain.index(line.stage), line.rest)
            for line in self.lines
            if line.stage in chain[1:] + chain[:1] and line.name == name
        )
        return found[-1][1] if found else ""


def runs_as_nobody_in_particular(images: Images) -> Iterator[str]:
    """A number, because Kubernetes cannot tell whether a name is root's."""
    for family in BUILD.FAMILIES:
        user = images.last(family, "USER")
        if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user):
            yield f"{family} runs as {user!r}"


def starts_without_a_shell(images: Images) -> Iterator[str]:
    """A shell as PID 1 keeps SIGTERM to itself."""
    for line in images.lines:
        if line.name in ("ENTRYPOINT", "CMD"):
            try:
                json.loads(line.rest)
            except ValueError:
                yield f"{line.name} of {line.stage} is a shell's: {line.rest}"
    for family in BUILD.FAMILIES:
        if images.last(family, "ENTRYPOINT") != '["tini", "--"]':
            yield f"{family} has no init"


def builds_on_what_the_builder_names(images: Images) -> Iterator[str]:
    """No registry is ours to choose."""
    known = {"${BASE_IMAGE}", "scratch"}
    for stage, parent in images.parents.items():
        if parent not in known:
            yield f"{stage} is from {parent}"
        known.add(stage)
    for line in images.lines:
        if line.name == "ARG" and line.rest.startswith("BASE_IMAGE=") and "/" in line.rest:
            yield f"a registry is named: {line.rest}"
        if line.name == "COPY" and (found := re.search(r"--from=(\S+)", line.rest)) and found[1] not in known:
            yield f"{line.stage} copies from {found[1]}"


def installs_tested_versions(images: Images) -> Iterator[str]:
    """Whatever pip fetches is pinned, and fetched as the builder configured it."""
    pins = constraints()
    for line in images.lines:
        if (
            line.name != "RUN"
            or "--no-index" in line.rest
            or not re.search(r"\bpip \w|install\.py|build horovod", line.rest)
        ):
            continue
        for secret in SECRETS:
            if secret not in line.rest:
                yield f"{line.stage} fetches without {secret}"
        for command in re.split(r"&&|;|\|", line.rest):
            if re.search(r"\bpip \w|install\.py|build horovod", command) and "/wanted/with_pip" not in command:
                yield f"{line.stage} fetches without with_pip: {command.strip()}"
            for word in (re.search(r"pip install (.*)", command) or ["", ""])[1].split():
                if "==" not in word and word.lower() not in pins:
                    yield f"{line.stage} installs {word} in any version"


def keeps_no_configuration(images: Images) -> Iterator[str]:
    """What is in a layer is everybody's who has the image."""
    for line in images.lines:
        if line.name in ("ENV", "ARG", "LABEL") and re.search(
            r"PIP_|INDEX|PROXY|TOKEN(?!IZER)|PASSWORD|SECRET", line.rest, re.I
        ):
            yield f"{line.stage} keeps {line.rest}"
        if re.search(r"--(extra-)?index-url|--trusted-host|pip\.conf(?!\s)(?!,)|\.netrc", line.rest):
            yield f"{line.stage} names an index: {line.rest}"
        if line.name == "ADD":
            yield f"{line.stage} adds {line.rest}, which may be a download"


def leaves_compilers_behind(images: Images) -> Iterator[str]:
    """They are what an intruder would bring along."""
    for family in set(BUILD.FAMILIES) - COMPILER:
        for line in images.lines:
            if line.stage in images.chain(family) and re.search(r"g\+\+|gcc|build-essential|make\b", line.rest):
                yield f"{family} has a compiler from {line.stage}"


def leaves_no_lists_of_packages(images: Images) -> Iterator[str]:
    """They are 20 MB, and old the next day."""
    for line in images.lines:
        if "apt-get update" in line.rest and "rm -rf /var/lib/apt/lists/*" not in line.rest:
            yield f"{line.stage} keeps apt's lists"
        if "apt-get install" in line.rest and "--no-install-recommends" not in line.rest:
            yield f"{line.stage} installs what is only recommended"


RULES: dict[Callable[[Images], Iterator[str]], tuple[tuple[str, str], ...]] = {
    runs_as_nobody_in_particular: (
        ("USER 10001:10001\n\n\n# ---- deepspeed", "USER root\n\n\n# ---- deepspeed"),
        ("USER 10001:10001\n\n\n# ---- deepspeed", "USER unitrain\n\n\n# ---- deepspeed"),
        ("USER 10001:10001\n\n\n# ---- deepspeed", "\n\n\n# ---- deepspeed"),
    ),
    starts_without_a_shell: (
        ('ENTRYPOINT ["tini", "--"]', "ENTRYPOINT tini --"),
        ('ENTRYPOINT ["tini", "--"]', ""),
        ('CMD ["unitrain", "list", "strategies"]', "CMD unitrain list strategies"),
        ("FROM jax-packages AS jax\n", 'FROM jax-packages AS jax\nENTRYPOINT ["sh", "-c"]\n'),
    ),
    builds_on_what_the_builder_names: (
        ("FROM ${BASE_IMAGE} AS base", "FROM python:3.11 AS base"),
        ("ARG BASE_IMAGE=python", "ARG BASE_IMAGE=registry.local/python"),
        ("COPY docker/wheels", "COPY --from=elsewhere docker/wheels"),
    ),
    installs_tested_versions: (
        ("pip install torch ", "pip install torch unheard-of "),
        (SECRETS[1] + " ", ""),
        ("/wanted/with_pip python -m pip install torch", "python -m pip install torch"),
        (
            "/wanted/with_pip python /wanted/install.py ${EXTRAS} ray",
            "/wanted/with_pip python -m pip install unheard-of",
        ),
    ),
    keeps_no_configuration: (
        ("PYTHONUNBUFFERED=1", "PYTHONUNBUFFERED=1 PIP_CONFIG_FILE=/x"),
        ("COPY docker/wheels /wheels/", "COPY docker/wheels /wheels/\nCOPY pip.conf /etc/pip.conf"),
        ("pip install torch", "pip install --index-url=x torch"),
        ("COPY docker/wheels", "ADD docker/wheels"),
    ),
    leaves_compilers_behind: (
        ("FROM horovod-packages AS horovod\n", "FROM horovod-wheel AS horovod\n"),
        ("ca-certificates tini", "ca-certificates tini g++"),
    ),
    leaves_no_lists_of_packages: (
        (" && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin", " && true"),
        ("--no-install-recommends ", ""),
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_image(rule: Callable[[Images], Iterator[str]]) -> None:
    assert list(rule(Images(DOCKERFILE))) == []


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [(rule, before, after) for rule, changes in RULES.items() for before, after in changes],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_rule_fails_on_an_image_that_breaks_it(
    rule: Callable[[Images], Iterator[str]], before: str, after: str
) -> None:
    assert before in DOCKERFILE
    assert list(rule(Images(DOCKERFILE.replace(before, after, 1)))) != []


def test_there_is_an_image_for_every_family_and_a_family_for_every_backend() -> None:
    assert set(BUILD.FAMILIES) <= set(Images(DOCKERFILE).parents)
    families = {*BUILD.FAMILIES, "accelerate"}  # an extra: EXTRAS="tokenizers accelerate"
    from unitrain import registry

    for name, entry in registry.STRATEGIES.items():
        assert {name, entry.extra, entry.framework} & families, name


def test_what_is_copied_into_a_stage_reaches_the_builder_and_nothing_else_does() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", "all is left out that is not named"
    allowed = {line[1:] for line in rules if line.startswith("!")}
    copied = set()
    for line in Images(DOCKERFILE).lines:
        if line.name == "COPY":
            copied.update(word for word in line.rest.split()[:-1] if not word.startswith("--"))
    assert {word for word in copied if not any(Path(word).is_relative_to(name) for name in allowed)} == set()
    assert {name for name in allowed if not any(Path(word).is_relative_to(name) for word in copied)} == set()
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_no_host_is_named() -> None:
    for path in [*DOCKER.glob("*"), ROOT / "docs" / "docker.md"]:
        if path.is_file():
            assert not HOST.search(path.read_text(encoding="utf-8")), path
    assert HOST.search("FROM registry.example.com/python")


def test_pip_in_a_build_is_told_of_the_constraints_and_of_the_secrets() -> None:
    text = (DOCKER / "with_pip").read_text(encoding="utf-8")
    assert 'PIP_CONSTRAINT="$here/constraints.txt"' in text
    for secret in SECRETS:
        assert f"/run/secrets/{secret.rpartition('=')[2]}" in text
    assert os.access(DOCKER / "with_pip", os.X_OK)


# ---- the test bed ----


def two_nodes(text: str) -> dict[str, Any]:
    """The services of the compose file that run an agent, all others left out."""
    services: dict[str, Any] = yaml.safe_load(text)["services"]
    return {name: service for name, service in services.items() if "unitrain.agent" in service["command"]}


def test_each_node_of_the_test_bed_starts_one_agent_and_all_meet_at_the_first() -> None:
    nodes = two_nodes(COMPOSE)
    assert [node["command"][node["command"].index("--node") + 1] for node in nodes.values()] == ["0", "1"]
    (meet,) = {node["command"][node["command"].index("--meet") + 1] for node in nodes.values()}
    assert meet.partition(":")[0] == next(iter(nodes.values()))["hostname"]
    for name, node in nodes.items():
        assert node["hostname"] == name
        assert "entrypoint" not in node, "the image's init is PID 1"
        assert isinstance(node["command"], list), "no shell between"


def test_the_test_bed_is_private_and_without_privileges() -> None:
    bed = yaml.safe_load(COMPOSE)
    assert bed["networks"]["cluster"]["internal"] is True
    for name, service in bed["services"].items():
        assert service["networks"] == ["cluster"], name
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert not {"privileged", "ports", "network_mode", "pid", "ipc", "user", "devices"} & set(service), name
        assert not [mount for mount in service["volumes"] if "docker.sock" in mount], name


def test_a_stopped_node_has_longer_than_its_agent_takes() -> None:
    for node in two_nodes(COMPOSE).values():
        assert int(node["stop_grace_period"].removesuffix("s")) > 30


# ---- the scripts ----


def constraints() -> set[str]:
    """The names that constraints.txt pins."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {line.partition("==")[0].lower() for line in lines if "==" in line}


def wanted(*extras: str) -> list[str]:
    """What install.py asks pip for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(INSTALL.requirements(project, extras))


def test_an_image_gets_the_packages_own_requirements_and_those_of_its_extras() -> None:
    names = {Requirement(line).name for line in wanted("jax")}
    assert {"numpy", "torch", "jax", "flax"} <= names
    assert "tensorflow-cpu" not in names


def test_an_extra_that_names_others_is_followed() -> None:
    assert {"jax", "deepspeed", "scikit-learn"} <= {Requirement(line).name for line in wanted("all")}


def test_an_unknown_extra_is_refused_by_name() -> None:
    with pytest.raises(SystemExit, match=r"no extra 'jaxx'; unitrain has .*jax"):
        wanted("jaxx")


def test_pips_own_settings_become_secrets_without_what_only_this_machine_has(tmp_path: Path) -> None:
    listing = (
        ":env:.cert='/etc/ssl/mine.crt'\n"
        "global.index-url='https://user:password@packages.local/simple'\n"
        "global.extra-index-url='file:///opt/simple https://more.local/simple'\n"
        "global.find-links='/opt/wheels'\n"
        "global.cert='/etc/ssl/other.crt'\n"
        "site.require-virtualenv='true'\n"
    )
    settings = BUILD.pip_settings(listing)
    secrets = BUILD.write_secrets(settings, tmp_path)
    assert secrets["ca.crt"] == Path("/etc/ssl/mine.crt"), "the environment goes before files"
    assert secrets["pip.conf"].read_text() == (
        "[global]\n"
        "index-url = https://user:password@packages.local/simple\n"
        "extra-index-url = https://more.local/simple\n"
    )
    assert secrets["pip.conf"].stat().st_mode & 0o077 == 0
    known = argparse.Namespace(docker="docker", name="unitrain", base="b", extras=None, network=None)
    words = BUILD.command("torch", known, secrets)
    assert f"id=pip.conf,src={secrets['pip.conf']}" in words
    assert "BASE_IMAGE=b" in words and not [word for word in words if "password" in word]


def test_wheels_that_only_this_machine_has_are_found(tmp_path: Path) -> None:
    (tmp_path / "torch-2.13.0-py3-none-any.whl").touch()
    (tmp_path / "notes.txt").touch()
    found = BUILD.local_wheels({"find-links": f"{tmp_path} /nowhere"})
    assert [path.name for path in found] == ["torch-2.13.0-py3-none-any.whl"]


def prepare(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code of docker/prepare.py."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
    code: int = script("prepare").main()
    return code


def test_preparing_makes_the_folder_that_agents_start_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, recipe = tmp_path / "run", ROOT / "recipes" / "gpt_tiny.yaml"
    shape = ("--nodes", "2", "--nproc", "3", "--strategy", "ddp")
    assert prepare(monkeypatch, recipe, run_dir, *shape, "train.steps=7") == 0
    assert Run.exists(run_dir)
    assert "steps: 7" in Run(run_dir).recipe_path.read_text()
    job = read_job(run_dir)
    assert (job.run_id, job.nodes, job.nproc) == ("run", 2, 3)
    assert prepare(monkeypatch, recipe, run_dir, *shape, "train.steps=8") == 0
    assert "steps: 7" in Run(run_dir).recipe_path.read_text(), "a run that is there goes on as it was"


def test_a_bad_recipe_is_refused_before_a_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ROOT / "recipes" / "gpt_tiny.yaml"
    code = prepare(monkeypatch, recipe, tmp_path / "run", "--nodes", "2", "--strategy", "fsdp3")
    assert code == ExitCode.BAD_RECIPE
    assert "no strategy named 'fsdp3'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""Building Horovod: a build that fails, and one that was done before."""

from __future__ import annotations

import importlib.util
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from unitrain.build import horovod
from unitrain.errors import UnitrainError


def test_a_failing_build_shows_the_compilers_last_lines_and_where_all_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "fails"
    script.write_text("#!/bin/sh\necho '[ 10%] Building'; echo '[ 15%] Building'; echo error: $WHY; exit 2\n")
    script.chmod(stat.S_IRWXU)
    with pytest.raises(UnitrainError, match=r"error: no such thing") as caught:
        horovod._watch([str(script)], {"WHY": "no such thing"}, tmp_path / "log")
    assert str(tmp_path / "log") in str(caught.value)
    assert (tmp_path / "log").read_text().count("Building") == 2
    assert capsys.readouterr().out.count("10% after") == 1


@pytest.mark.skipif(importlib.util.find_spec("horovod") is None, reason="needs Horovod, which this test does not build")
def test_a_second_build_finds_the_first_and_does_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "unitrain.build", "horovod", "--cache", str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout
    assert not (tmp_path / "cache").exists()

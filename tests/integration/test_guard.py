"""Training that goes wrong by itself: lost updates, loss spikes and replicas that differ; and its audit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from unitrain.audit import audit
from unitrain.checkpoint import CheckpointReader
from unitrain.errors import Diverged
from unitrain.ledger import FILE, read_ledger
from unitrain.run import Run

from .runs import ROWS, checkpoints, copied, events, fit, launch, losses, metrics, resume, unitrain

TRAINERS = Path(__file__).with_name("guard_trainers.py")
SPIKE = ["guard={spike: 30, window: 16}", "train.eval_every=0", "checkpoint.every=7", "checkpoint.async=false"]


def trainer(name: str) -> str:
    return f"trainer={TRAINERS}:{name}"


def weights(folder: Path) -> dict[tuple[str, str], bytes]:
    """All bits of the last checkpoint."""
    held = CheckpointReader(checkpoints(folder)[-1]).role("model")
    return {pair: held.read(*pair, (0,) * len(info.shape), info.shape).tobytes() for pair, info in held.tensors.items()}


def assert_clean(folder: Path, **facts: Any) -> None:
    found = audit(Run(folder))
    assert found.problems == []
    assert {name: getattr(found, name) for name in facts} == facts


@pytest.fixture(scope="module")
def spiked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose step 18 has poisoned samples, on two ranks."""
    folder = tmp_path_factory.mktemp("guard") / "spiked"
    launch(ROWS, folder, "ddp-2", trainer("Poisoned"), *SPIKE).succeeded()
    return folder


def test_a_spike_goes_back_once_and_skips_its_samples(spiked: Path) -> None:
    (rollback,) = events(spiked, "rollback")
    assert (rollback["step"], rollback["to"], rollback["skip"], rollback["number"]) == (18, 14, [170, 180], 1)
    assert max(losses(spiked)) < rollback["limit"] < rollback["loss"]
    assert len(losses(spiked)) == 20
    assert CheckpointReader(checkpoints(spiked)[-1]).state["guard"]["skipped"] == [[170, 180]]
    assert_clean(spiked, steps=20, rollbacks=1, redone=0)
    first, second = audit(Run(spiked)).epochs
    assert (first.once, first.skipped, first.missing, first.repeated) == (193, 10, 0, 0)
    assert (second.once, second.to_come) == (7, 196)


def test_a_resume_after_a_rollback_decides_the_same(spiked: Path, tmp_path: Path) -> None:
    again = copied(spiked, tmp_path / "again", up_to=14)  # its checkpoint knows nothing of the rollback
    resume(again, "ddp-2").succeeded()
    assert len(events(again, "rollback")) == 1, "the ledger knows it"
    assert (losses(again), weights(again)) == (losses(spiked), weights(spiked))
    assert_clean(again, rollbacks=1)

    forgot = copied(spiked, tmp_path / "forgot", up_to=14)
    lines = (forgot / FILE).read_bytes().splitlines(keepends=True)
    (forgot / FILE).write_bytes(b"".join(lines[:3]))  # begin, 1 to 7, 8 to 14
    resume(forgot, "ddp-2").succeeded()
    assert len(events(forgot, "rollback")) == 2, "the losses are in the checkpoint, and lead to the same decision"
    assert (losses(forgot), weights(forgot)) == (losses(spiked), weights(spiked))
    assert_clean(forgot, rollbacks=1)


def test_a_run_that_is_stopped_in_a_spike_saves_nothing_of_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "signal").touch()
    few = [trainer("Interrupted"), *SPIKE, "train.log_every=20"]
    stopped = fit(ROWS, run, *few)
    assert (stopped.exit_code, stopped.step) == (75, 14)
    assert fit(ROWS, run, *few).exit_code == 0
    fit(ROWS, tmp_path / "whole", *few)
    assert weights(run) == weights(tmp_path / "whole")
    assert_clean(run, rollbacks=1, steps=20)


def test_one_spike_after_the_other_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"the loss of step 18 is .*, above .*, after 1 rollbacks"):
        fit(ROWS, tmp_path / "run", trainer("Hopeless"), *SPIKE, "guard.max_rollbacks=1")
    assert len(events(tmp_path / "run", "rollback")) == 1


def test_updates_that_are_lost_are_counted_at_logged_steps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(ROWS, run, trainer("Lost"), "train.log_every=4")
    assert [record["skipped"] for record in metrics(run)] == [0, 2, 2, 2, 2]
    assert [(event["step"], event["total"]) for event in events(run, "step_lost")] == [(5, 1), (8, 2)]


def test_too_many_lost_updates_in_a_row_end_the_run_without_a_restart(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = launch(ROWS, run, "ddp-2", trainer("NotFinite"), "guard.max_skips=5", "train.steps=40")
    assert ended.code == 70
    assert "the updates of 5 steps in a row, up to step 16, were lost" in ended.last_line
    assert events(run, "restart") == []
    again = unitrain("repro", run / "failures" / "0001", cwd=tmp_path).succeeded()
    assert "reproduced: step 16 raised unitrain.errors.Diverged" in again.out


def test_a_rank_whose_weight_was_flipped_is_named_and_replaced(tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["guard.digest_every=5", "checkpoint.every=10"]
    ended = launch(ROWS, run, "ddp-2", trainer("Flipped"), *more, "recovery.restarts=0")
    assert ended.code == 70
    assert "after step 15 the replicas of role 'model' differ: rank 1 holds another param 2.weight" in ended.err
    resume(run, "ddp-2").succeeded()
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    (undisturbed / "flipped").touch()
    launch(ROWS, undisturbed, "ddp-2", trainer("Flipped"), *more).succeeded()
    assert losses(run) == losses(undisturbed)


def test_the_audit_finds_a_doctored_ledger_and_a_lost_line(spiked: Path, tmp_path: Path) -> None:
    lines = (spiked / FILE).read_bytes().splitlines(keepends=True)
    facts = [json.loads(line) for line in lines]
    assert [line["kind"] for line in facts] == ["begin", "steps", "steps", "rollback", "steps"]
    assert_clean(spiked)
    doctored = {f"without line {number}": lines[:number] + lines[number + 1 :] for number in range(len(lines))}
    doctored["another CRC"] = [line.replace(b'"last": 7', b'"last": 6') for line in lines]
    doctored["nothing"] = []
    run = tmp_path / "run"
    shutil.copytree(spiked, run)
    for name, left in doctored.items():
        (run / FILE).write_bytes(b"".join(left))
        assert not audit(Run(run)).clean, name
    ended = unitrain("audit", run, cwd=tmp_path)
    assert (ended.code, ended.out.splitlines()[-1]) == (70, "the records do not prove it")
    (run / FILE).write_bytes(b"".join(lines) + b'{"n": 5, "ki')  # torn by a crash
    assert "every sample was used exactly once" in unitrain("audit", run, cwd=tmp_path).succeeded().out


def test_the_audit_is_clean_over_kills_resumes_and_resizes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    few = ["train.eval_every=0", "checkpoint.every=7", trainer("Allergic")]
    assert launch(ROWS, run, "ddp-2", *few, "train.steps=45", "recovery.restarts=0").code == 70
    fit(ROWS, run, *few[:2], "train.steps=45", trainer("Slow"))
    assert_clean(run, steps=45, redone=0)
    assert [attempt.world_size for attempt in audit(Run(run)).attempts] == [2, 1]
    assert [(epoch.once, epoch.to_come) for epoch in audit(Run(run)).epochs] == [(203, 0), (203, 0), (44, 159)]
    assert read_ledger(run / FILE).problems == []
    assert all(event["bytes"] and event["step"] % 7 in (0, 3) for event in events(run, "checkpoint"))


def test_a_failure_leaves_a_capsule_that_repeats_it_and_holds_no_secret(tmp_path: Path) -> None:
    run, canary = tmp_path / "run", "canary-7f3a91"
    path = tmp_path / "run.yaml"
    path.write_text(ROWS)
    names = ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MY_PASSWORD", "GOOGLE_CREDENTIALS", "NCCL_AUTH"]
    flags = ["--strategy", "ddp", "--nproc", "2", "--run-dir", run]
    settings = [trainer("Allergic"), "checkpoint.every=7", "recovery.restarts=0"]
    secret = {name: canary for name in names}
    ended = unitrain("launch", path, *flags, *settings, cwd=tmp_path, NCCL_DEBUG="WARN", **secret)
    assert (ended.code, ended.last_line) == (70, "ArithmeticError: cannot bear sample 17")
    assert f"unitrain repro {run.relative_to(tmp_path)}/failures/0001" in ended.err
    capsule = json.loads((run / "failures" / "0001" / "capsule.json").read_text())
    assert (capsule["step"], capsule["attempt"], capsule["seed"], capsule["world_size"]) == (17, 0, 0, 2)
    assert capsule["exception"] == {"type": "ArithmeticError", "message": "cannot bear sample 17"}
    assert 17 in capsule["sample_ids"]
    assert len(capsule["sample_ids"]) == 10
    assert "guard_trainers.py" in capsule["traceback"]
    assert Path(capsule["checkpoint"]) == checkpoints(run)[-1]
    assert capsule["environment"]["NCCL_DEBUG"] == "WARN"
    assert capsule["versions"].keys() >= {"python", "torch", "numpy"}
    assert canary not in "".join(file.read_text(errors="replace") for file in run.rglob("*") if file.is_file())

    left = sorted(run.rglob("*"))
    again = unitrain("repro", run / "failures" / "0001", cwd=tmp_path).succeeded()
    assert "reproduced: step 17 raised ArithmeticError: cannot bear sample 17" in again.out
    assert f"from {capsule['checkpoint']}" in again.out
    assert sorted(run.rglob("*")) == left, "a replay leaves nothing behind"
    (run / "recipe.yaml").rename(run / "recipe.old")
    capsule["exception"]["message"] = "something else"
    (run / "failures" / "0001" / "capsule.json").write_text(json.dumps(capsule))
    other = unitrain("repro", run / "failures" / "0001", cwd=tmp_path)
    assert (other.code, "not reproduced: step 17 raised" in other.out) == (70, True)

"""What the environment of a run holds in secret is in no file that the run leaves, and in nothing that it prints."""

from __future__ import annotations

from pathlib import Path

from .runs import ROWS, trainer, unitrain

CANARY = "canary-d41d8cd98f00b204"
NAMES = (
    *("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "GITHUB_TOKEN"),
    *("GOOGLE_APPLICATION_CREDENTIALS", "AZURE_STORAGE_KEY", "MY_PASSWORD", "DATABASE_URL", "NCCL_SECRET", "SLURM_JWT"),
)


def test_no_secret_of_the_environment_is_written_or_printed(tmp_path: Path) -> None:
    """By a launch, a resume, a refusal, status and logs: bytes of every file, checkpoints included."""
    (tmp_path / "rows.yaml").write_text(ROWS)
    secrets = {name: f"{CANARY}-{number}" for number, name in enumerate(NAMES)}
    folder = tmp_path / "run"
    said = [
        unitrain("launch", "rows.yaml", "--run-dir", "run", "--nproc", "2", cwd=tmp_path, **secrets).succeeded(),
        unitrain("resume", "run", "train.steps=25", cwd=tmp_path, **secrets).succeeded(),
        unitrain("resume", "run", "train.seed=5", "train.steps=30", cwd=tmp_path, **secrets),
        unitrain("resume", "run", trainer("NoSuchTrainer"), cwd=tmp_path, **secrets),
        unitrain("status", "run", "--json", cwd=tmp_path, **secrets),
        unitrain("logs", "run", cwd=tmp_path, **secrets),
    ]
    assert [ended.code == 0 for ended in said] == [True, True, False, False, True, True]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"job.json", "agent.json", "events.jsonl", "MANIFEST.json", "state.json"} <= {path.name for path in files}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in "".join(ended.out + ended.err for ended in said)

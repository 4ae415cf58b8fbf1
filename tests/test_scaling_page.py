"""The commands of the page about big models work as they stand."""

from __future__ import annotations

import os
import re
import shlex
import subprocess

# Its loggers keep the stderr of the moment at which it is imported, which must be none that a test captures.
import lightning.pytorch  # noqa: F401
import pytest

from lowrank_pl.cli.app import main
from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
(SCRIPT,) = [block for block in BLOCKS if "#SBATCH" in block]
COMMANDS = [block for block in BLOCKS if block is not SCRIPT]
BASE = "meta-llama/Meta-Llama-3-70B"


def dry_run(words, capsys, monkeypatch):
    """Return what a dry run of the command prints, with the shapes of the base in its place."""
    monkeypatch.chdir(ROOT)
    program, *words = [word.replace(BASE, "shapes:llama-3.2-1b") for word in words]
    assert program == "lowrank"
    main([word for word in words if word != "--dry_run"] + ["--dry_run"])
    return capsys.readouterr().out


def run_script(folder):
    """Run the script where the programs of SLURM only tell their words; return those of ``srun``."""
    (folder / "bin").mkdir()
    for name, code in {"srun": 'printf "%s\\n" "$@"', "scontrol": "echo node1; echo node2"}.items():
        program = folder / "bin" / name
        program.write_text(f"#!/bin/sh\n{code}\n")
        program.chmod(0o755)
    (folder / "job.sbatch").write_text(SCRIPT)
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "123", "SLURM_CPUS_PER_TASK": "8"}
    paths = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "job.sbatch"], cwd=folder, env={**os.environ, **slurm, **paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[:2]))
def test_commands_have_a_dry_run(command, capsys, monkeypatch):
    assert "weighted moments" in dry_run(shlex.split(command.replace("\\\n", " ")), capsys, monkeypatch)


def test_the_script_starts_sixteen_processes_on_two_nodes(tmp_path, capsys, monkeypatch):
    told = dry_run(run_script(tmp_path), capsys, monkeypatch)
    assert "16 processes on 2 nodes, one a GPU, weights sharded" in told


def test_the_script_asks_for_as_many_tasks_as_the_trainer_has_devices(tmp_path):
    words = run_script(tmp_path)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", SCRIPT, re.MULTILINE))
    assert words[words.index("--trainer.num_nodes") + 1] == asked["nodes"]
    assert words[words.index("--trainer.devices") + 1] == asked["ntasks-per-node"] == asked["gpus-per-node"]


def test_the_script_resumes_where_there_is_a_checkpoint(tmp_path):
    assert "--ckpt_path" not in run_script(tmp_path)
    (tmp_path / "again").mkdir()
    checkpoint = tmp_path / "again" / "runs" / "llama-70b" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    assert run_script(tmp_path / "again")[-2:] == ["--ckpt_path", str(checkpoint)]

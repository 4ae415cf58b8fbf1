"""Commands that are killed while they change files, and given again: their results are those that nobody disturbed.

    python -m tests.faults.kill_points [--points 14] [--only fit ...]

Every stage runs once as it is. It is then killed at points spread evenly over all changes that it makes to files
(``tests.faults.dying``), each time from the same start, and the same command is given again, with ``--ckpt_path last``
where that is how a run goes on. Plans, weights, masks and scores must have the same bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lowrank_pl.training.checkpointing import read_checkpoint
from lowrank_pl.utils.files import canonical_json
from tests.helpers import SMOKE
from tests.helpers.fork_server import OURS, serving

TEXT = "--text python-docs --length 32 --sequences 8"
FIT = f"fit -c {SMOKE} --trainer.max_steps 8 --checkpoint.every_n_train_steps 3 --finish.max_new_tokens 4"
QUICK = (
    "{learning: {mask: {class_path: lowrank_pl.methods.masks.ARA}, steps: 6, sequences: 4, start: fisher}, "
    "decomposition: {kind: two_sided}, refit: {sequences: 4}, prune: {}}"
)


@dataclass(frozen=True)
class Stage:
    """A command that is killed.

    Args:
        words: The command.
        after: The stages whose results it starts from.
        resume: What is added to the words when the command is given again.
    """

    words: str
    after: tuple[str, ...] = ()
    resume: str = ""


STAGES = {
    "decompose": Stage(
        f"decompose random:llama --decomposition.kind two_sided {TEXT} --cache disk --store factors --json out.json"
    ),
    "allocate": Stage(f"allocate random:llama --method fisher --keep 0.5 {TEXT} --output plan.json --json out.json"),
    "allocate strs": Stage(f"allocate random:llama --method strs --keep 0.5 {TEXT}"),
    "allocate zs_svd": Stage(f"allocate random:llama --method zs_svd --settings.rounds 2 --keep 0.5 {TEXT}"),
    "refit": Stage("refit plan.json --settings.sequences 8 --output refitted.json --json out.json", ("allocate",)),
    "heal": Stage(
        "heal -c heal --model.plan plan.json --model.settings.tokens 256 --data.learning.text python-docs "
        "--data.learning.length 32 --data.learning.sequences 8 --data.validation.sequences 2 "
        "--trainer.accelerator cpu --checkpoint.every_n_train_steps 3 --run run --json out.json",
        ("allocate",),
        resume="--ckpt_path last",
    ),
    "export": Stage("export refitted.json --output model --json out.json", ("allocate", "refit")),
    "export again": Stage(
        "export refitted.json --output model --keep 0.5 0.4 --merge", ("allocate", "refit", "export again")
    ),
    "prune": Stage(f"prune random:llama --keep 0.5 {TEXT} --output pruned --json out.json"),
    "rotate": Stage("rotate random:llama --output turned --json out.json"),
    "upcycle": Stage(
        "upcycle -c upcycle --model.base random:llama --trainer.max_steps 4 --trainer.val_check_interval 2 "
        "--data.learning.text python-docs --data.learning.length 32 --data.learning.sequences 8 "
        "--data.validation.sequences 2 --trainer.accelerator cpu --checkpoint.every_n_train_steps 2 --run run "
        "--json out.json",
        resume="--ckpt_path last",
    ),
    "fit": Stage(f"{FIT} --run run --json out.json", resume="--ckpt_path last"),
    "fit anew": Stage(f"{FIT} --run run", ("fit anew",)),
    "fit all": Stage(
        f"{FIT} --run run --model.prune.share 0.5 --finish.refit.sequences 8 "
        "--model.mask Rescaled --model.decomposition.kind two_sided",
        resume="--ckpt_path last",
    ),
    "compare": Stage(
        "compare random:llama --methods uniform quick --keep 0.7 0.5 --length 32 --sequences 8 --score_length 32 "
        "--score_sequences.docs 4 --scores docs=python-docs::part=50%-100% --run run -c recipes.yaml --json out.json"
    ),
}  # fmt: skip
"""By name. A stage that comes after itself replaces its own older results."""

UNLIKE = {
    "seconds", "minutes", "date",
    "tokens_per_second", "peak_memory", "machine", "command", "digest", "digests", "sha256",
}  # fmt: skip
"""Keys of JSON files whose values depend on the moment."""


@dataclass(frozen=True)
class Outcome:
    """What came of one killed run that was given again."""

    kind: str
    said: str = ""


class Runner:
    """Runs commands in one folder, which therefore has the same path in all of them.

    Args:
        folder: A folder for all that is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.record = folder, folder / "home", folder / "record"
        self.printed = folder / "printed"
        self.printed.mkdir()
        (folder / "starts").mkdir()

    def run(self, words: str, kill_at: int = 0) -> tuple[int, str]:
        """Run a command; return its exit status and what it wrote to stderr."""
        temporary = self.folder / "tmp"
        temporary.mkdir()
        # What a process leaves there is nothing to find again.
        environment = {**os.environ, "LOWRANK_HOME": str(self.home / "cache"), "TMPDIR": str(temporary)}
        command = [sys.executable, "-m", "tests.faults.dying", str(kill_at), str(self.record), *words.split()]
        process = OURS.start(command, output=self.printed, env=environment, cwd=self.home)
        try:
            status = process.wait(600)
        finally:
            process.kill()
        shutil.rmtree(temporary, ignore_errors=True)
        return status, process.printed()[1]

    def start(self, name: str) -> None:
        """Make the folder that a stage starts from."""
        place = self.folder / "starts" / name.replace(" ", "-")
        if not place.exists():
            shutil.rmtree(self.home, ignore_errors=True)
            self.home.mkdir()
            (self.home / "recipes.yaml").write_text(f"recipes:\n  quick: {QUICK}\n")
            for before in STAGES[name].after:
                status, said = self.run(STAGES[before].words)
                assert status == 0, said
            shutil.copytree(self.home, place, symlinks=True)
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(place, self.home, symlinks=True)

    def whole(self, name: str) -> tuple[list[str], dict[str, str]]:
        """Run a stage that nobody kills; return its changes and its results."""
        self.start(name)
        status, said = self.run(STAGES[name].words)
        assert status == 0, said
        return self.record.read_text().splitlines(), results(self.home)

    def killed(self, name: str, kill_at: int, expected: dict[str, str]) -> Outcome:
        """Kill a stage before a change, give the command again, and compare the results."""
        stage = STAGES[name]
        self.start(name)
        status, said = self.run(stage.words, kill_at)
        if status != -signal.SIGKILL:
            return Outcome("not killed", f"status {status}: {said[-300:]}")
        status, said = self.run(f"{stage.words} {stage.resume}")
        if status:
            clean = status in (1, 2) and said.rstrip().rpartition("\n")[2].startswith("lowrank: error: ")
            return Outcome("clean error" if clean else "other error", said[-2000:])
        found = results(self.home)
        if found == expected:
            return Outcome("same bits")
        differ = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        left = all(Path(name).name.startswith(".") and name not in expected for name in differ)
        return Outcome("same bits, files left" if left else "other bits", ", ".join(differ))


def results(home: Path) -> dict[str, str]:
    """Return a digest of every file's content, less what depends on the moment, by its path in ``home``."""
    found = {}
    for path in sorted(home.rglob("*")):
        name = str(path.relative_to(home))
        if path.is_file() and "tfevents" not in name and path.suffix not in (".lock", ".html", ".png", ".sha256"):
            found[name] = hashlib.sha256(_content(path).encode()).hexdigest()
    return found


def _content(path: Path) -> str:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            # The checksum and the digest cover the seconds too.
            notes = {
                key: value
                for key, value in (file.metadata() or {}).items()
                if key not in ("seconds", "crc32_of_file", "sha256_of_sigma_and_all_notes")
            }
        parts = {key: [str(part.dtype), part.shape, part.tobytes().hex()] for key, part in sorted(tensors.items())}
        return canonical_json([notes, parts])
    if path.suffix == ".ckpt":
        read = read_checkpoint(path)
        return "".join(_leaves({key: read[key] for key in ("global_step", "state_dict", "optimizer_states")}))
    if path.suffix == ".json":
        return canonical_json(_without_moments(json.loads(path.read_text())))
    if path.suffix == ".yaml":
        return "\n".join(line for line in path.read_text().splitlines() if not line.startswith("ckpt_path"))
    if path.suffix == ".md":
        return ""
    return path.read_bytes().hex()


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key in value:
            yield f"{key}:"
            yield from _leaves(value[key])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)
    else:
        yield f"{value.tolist() if hasattr(value, 'tolist') else value};"


def _without_moments(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_moments(one) for key, one in value.items() if key not in UNLIKE}
    if isinstance(value, str):
        return re.sub(r"in [\d.]+ minutes", "", value)
    return [_without_moments(one) for one in value] if isinstance(value, list) else value


def points(changes: int, most: int) -> list[int]:
    """Return at most ``most`` numbers from 1 to ``changes``, evenly spread; odd and even ones.

    >>> points(3, 20), points(100, 5)
    ([1, 2, 3], [1, 26, 51, 75, 100])
    """
    if changes <= most:
        return list(range(1, changes + 1))
    return [1 + round(number * (changes - 1) / (most - 1)) for number in range(most)]


def main() -> None:
    """Kill all stages, and print what came of it.

    Raises:
        SystemExit: With status 1 if any point gave other bits, an error, or was not reached.
    """
    parser = argparse.ArgumentParser(description="Kill commands at many points, and compare what they leave.")
    parser.add_argument("--points", type=int, default=14, help="points of a stage")
    parser.add_argument("--only", nargs="*", choices=[*STAGES], help="stages; all by default")
    asked = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    with serving(), tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder))
        for name in asked.only or STAGES:
            changes, expected = runner.whole(name)
            for kill_at in points(len(changes), asked.points):
                outcome = runner.killed(name, kill_at, expected)
                counts[name, outcome.kind] += 1
                if outcome.kind != "same bits":
                    print(f"{name} {kill_at} of {len(changes)}, at {changes[kill_at - 1]}: {outcome.kind}")
                    print(f"    {outcome.said}", flush=True)
            found = {kind: count for (stage, kind), count in counts.items() if stage == name}
            print(f"{name}: {found}", flush=True)
    total: Counter[str] = Counter()
    for (_, kind), count in counts.items():
        total[kind] += count
    print(f"{total.total()} points: {dict(total)}")
    sys.exit(set(total) != {"same bits"})


if __name__ == "__main__":
    main()

"""The command ``lowrank``: finds the command that was asked for, and ends a user's mistake in one sentence."""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import wraps
from importlib import import_module
from typing import Any

import cyclopts
from cyclopts.argument import ArgumentCollection
from jsonargparse import ArgumentError

from lowrank_pl.cli.config_files import ConfigFileError
from lowrank_pl.cli.help_page import HelpFormatter
from lowrank_pl.cli.parameters import FLAGS, Given, split_words
from lowrank_pl.cli.parse_errors import explain_parse_error
from lowrank_pl.cli.renamed import COMMAND_NAMES, explain_old_names
from lowrank_pl.utils.machine_limits import explain_limit
from lowrank_pl.version import __version__

__all__ = ["COMMANDS", "TRAINING_COMMANDS", "UNWANTED_LINES", "command_line", "flags_of", "main"]

COMMANDS: dict[str, tuple[str, str]] = {
    "fit": ("lowrank_pl.cli.fit:fit", "Learn ranks for a model, export it and score it beside the baselines."),
    "evaluate": (
        "lowrank_pl.cli.evaluate:evaluate",
        "Score an export or any base model: perplexity on texts, accuracy on tasks.",
    ),
    "evaluate-plan": (
        "lowrank_pl.cli.evaluate:evaluate_plan",
        "Score a plan without exporting it, as it is or in several sizes, beside its dense base.",
    ),
    "decompose": (
        "lowrank_pl.cli.decompose:decompose",
        "Make a model's factors, one block in memory at a time; allocate and fit then find them made.",
    ),
    "allocate": (
        "lowrank_pl.cli.allocate:allocate",
        "Write a rank plan without training, by a closed-form allocator.",
    ),
    "refit": (
        "lowrank_pl.cli.refit:refit",
        "Refit a plan's factors in closed form, block by block, to the compressed model's own inputs.",
    ),
    "heal": (
        "lowrank_pl.cli.heal:heal",
        "Train a compressed model's factors, or a LoRA adapter on it, against the dense model's logits.",
    ),
    "quantize": (
        "lowrank_pl.cli.quantize:quantize",
        "Round the matrices of a plan to a few bits, by what errors cost in the metric of its factors.",
    ),
    "prune": (
        "lowrank_pl.cli.prune:prune",
        "Prune redundant hidden neurons from every MLP, or heads and neurons as LLM-Pruner does.",
    ),
    "rotate": (
        "lowrank_pl.cli.rotate:rotate",
        "Write a dense model with the same outputs and other weights: its residual stream is turned at random.",
    ),
    "upcycle": (
        "lowrank_pl.cli.upcycle:upcycle",
        "Make a mixture of experts from a dense model: copy its MLPs, and train the copies apart.",
    ),
    "export": (
        "lowrank_pl.cli.export:export",
        "Turn any plan into a model that transformers loads, checked by a reload in a fresh process.",
    ),
    "doctor": (
        "lowrank_pl.cli.doctor:doctor",
        "Examine an exported model; the exit status is 0 if it is healthy, with or without warnings, and 1 if broken.",
    ),
    "report": (
        "lowrank_pl.cli.report:report",
        "Write one HTML page about a finished run, an export or a comparison, and refresh the model card.",
    ),
    "compare": (
        "lowrank_pl.cli.compare:compare",
        "Compare methods on one model: the same statistics and factors, the same budgets, the same texts to score.",
    ),
    "bench": (
        "lowrank_pl.cli.bench:bench",
        "Measure how fast compressed models run beside the dense one, or what learning and statistics cost.",
    ),
}
"""By name, the function of each command, and the first sentence of its docstring: listing imports none of them."""

TRAINING_COMMANDS = ("fit", "heal", "upcycle")
"""The commands whose options LightningCLI reads."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one sentence and a non-zero exit status.

    Args:
        argv: The words after ``lowrank``; by default those of this process.

    Raises:
        SystemExit: With status 1 after an error, 2 after words that can't be understood, 130 after Ctrl-C.
    """
    # Threads that spin while they wait slow a run several times beside one other busy process. OpenMP reads the
    # variable when torch is imported, which has not happened yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if argv is None else argv)
    _set_up_logging()
    if words and words[0] not in COMMANDS and not words[0].startswith("-"):
        sys.exit(_complain(f"error: {_unknown_command(words[0])}", 2))
    try:
        _run(words)
    except KeyboardInterrupt as interrupt:
        advice = str(interrupt) or "what was finished is kept"
        sys.exit(_complain(f"interrupted: {advice}, nothing half-written is left", 130))
    except (ArgumentError, cyclopts.CycloptsError, ConfigFileError) as error:
        sys.exit(_complain(f"error: {_usage_mistake(words, error)}", 2))
    except Exception as error:
        sentence = _mistake(error)
        if sentence is None or os.environ.get("LOWRANK_DEBUG"):
            raise
        sys.exit(_complain(sentence, 1))


def command_line(command: str | None = None) -> cyclopts.App:
    """Return the parser of all commands but ``TRAINING_COMMANDS``.

    Args:
        command: The command that will be run. Its help is its whole docstring; the others are only listed.
    """
    app = cyclopts.App(
        name="lowrank",
        suppress_keyboard_interrupt=False,  # `main` says what an interruption leaves.
        help="Compress large language models with low-rank factors whose ranks are learned.",
        help_epilogue=(
            "``lowrank COMMAND --help`` lists the options of a command; ``-c FILE`` reads them from YAML, and "
            "``-c NAME`` from a file that lowrank_pl ships for the command, such as ``lowrank fit -c best``. "
            "``LOWRANK_DEBUG=1`` shows the traceback of an error; ``LOWRANK_HOME`` is the folder of token and factor "
            "caches."
        ),
        help_format="rst",
        help_formatter=HelpFormatter(),
        version=f"lowrank {__version__}",
        default_parameter=FLAGS,
        result_action="return_value",
    )
    for name, (function, sentence) in COMMANDS.items():
        if name == command:
            app.command(_command(function), name=name)
        else:
            app.command(function, name=name, help=sentence)
    return app


def flags_of(command: str) -> ArgumentCollection:
    """Return the flags of a command other than ``TRAINING_COMMANDS``, with what its help says about each."""
    return command_line(command)[command].assemble_argument_collection(default_parameter=FLAGS, parse_docstring=True)


def _command(path: str) -> Callable[..., Any]:
    """Return the function at ``path`` without the type that it returns, which takes seconds to import."""
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)

    @wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    command.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if name != "return"}
    return command


def _run(words: list[str]) -> Any:
    if words and words[0] in TRAINING_COMMANDS:
        module, _, name = COMMANDS[words[0]][0].partition(":")
        return getattr(import_module(module), name)(words[1:])
    words, sources = split_words(words)
    app = command_line(words[0] if words else None)
    app.config = [Given(sources)]
    return app(words, exit_on_error=False, print_error=False)


def _unknown_command(word: str) -> str:
    if word in COMMAND_NAMES:
        return f"there is no command {word!r}: it is called {COMMAND_NAMES[word]!r} now"
    near = "".join(f"did you mean {match!r}? " for match in get_close_matches(word, COMMANDS, n=1))
    return f"there is no command {word!r}: {near}The commands are {', '.join(COMMANDS)}"


def _usage_mistake(words: list[str], error: Exception) -> str:
    """Return what is wrong with the words, and which of them are old names."""
    said = explain_parse_error(str(error)) if isinstance(error, ArgumentError) else str(error)
    sentence = " ".join(said.split()).rstrip(".")
    if words[0] not in COMMANDS:
        return f"{sentence}; `lowrank --help` lists the commands"
    renamed = explain_old_names(words[0], words[1:])
    return f"{renamed or sentence}; `lowrank {words[0]} --help` lists the options"


def _mistake(error: Exception) -> str | None:
    """Return the sentence for a user's mistake or the machine's limits; None for a mistake of ours."""
    # What was never imported can't have been raised.
    known = {
        "lowrank_pl.cli.doctor": "BrokenModelError",
        "lowrank_pl.export.hub": "UploadError",
        "lowrank_pl.export.reload": "ExportError",
        "lowrank_pl.utils.distributed": "LostProcessError",
        "lightning.fabric.utilities.exceptions": "MisconfigurationException",
    }
    for module, name in known.items():
        if module in sys.modules and isinstance(error, getattr(sys.modules[module], name)):
            return str(error) if name == "BrokenModelError" else f"error: {error}"
    limit = explain_limit(error)
    if limit is not None:
        return f"error: {limit}"
    # Lightning refuses some settings with a plain RuntimeError.
    lightnings = isinstance(error, RuntimeError) and _raised_in(error) == "lightning"
    said = " ".join(str(error).splitlines())
    if lightnings and "SLURM" in said:
        said += "; for one process inside of an allocation, unset SLURM_NTASKS"
    return f"error: {said}" if lightnings or isinstance(error, ValueError | OSError) else None


def _raised_in(error: Exception) -> str:
    """Return the package whose code raised ``error``."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _complain(message: str, status: int) -> int:
    # Words of the user may hold what changes a terminal.
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in message)
    print(f"lowrank: {shown}", file=sys.stderr)
    return status


UNWANTED_LINES = (
    "Tip: For seamless",  # advertises
    "TPU available",
    "`Trainer.fit` stopped: `max_",  # the progress bar shows it
    "Detected KeyboardInterrupt",  # `main` says it
)
"""Parts of log lines of Lightning that no user of this command needs."""


EXPECTED_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning 2.6 on torch 2.13
    r"Found \d+ module\(s\) in eval mode",  # the frozen base, on purpose
    r"Checkpoint directory .* exists and is not empty",  # of a resumed run
    r'Be aware that when using `ckpt_path`.*: \["ModelCheckpoint\{[^"]*"\]',  # only the steps that it saves at differ
    r"The dirpath has changed",  # of a run resumed in another folder
    r"Detected an existing checkpoint in .*last\.ckpt",  # FSDP2
    r".*does not have many workers",  # the sequences are in memory
    r".*number of training batches .* is smaller than the logging interval",
)
"""Patterns of warnings about what is meant to be so."""


def _set_up_logging() -> None:
    """Leave the terminal to this package: other libraries show warnings only, and no expected ones."""
    # Of several processes that do the same, the first one speaks.
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    first = int(next(filter(None, ranks), 0)) == 0
    level = logging.INFO if first else logging.WARNING
    shown = logging.StreamHandler(sys.stderr)
    # These libraries print their messages themselves.
    shown.addFilter(lambda record: not record.name.startswith(("lightning.", "huggingface_hub.")))
    logging.basicConfig(level=level, format="%(name)s: %(message)s", handlers=[shown])
    libraries = ("httpx", "httpcore", "fsspec", "matplotlib", "datasets", "urllib3", "absl", "lm_eval")
    for name in (*libraries, "lowrank_pl.plans.budget"):
        # FinishRun shows the notes of the budget once, at the end.
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_wanted)
    threading.excepthook = _failed_thread
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _failed_thread(failed: threading.ExceptHookArgs) -> None:
    """Say in one line what keeps TensorBoard's thread from writing; it passes the error on to who writes next."""
    limit = None if failed.exc_value is None else explain_limit(failed.exc_value)
    if limit is None or not type(failed.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failed)
    else:
        logging.getLogger(__name__).error("TensorBoard's events can't be written: %s", limit)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not any(line in record.getMessage() for line in UNWANTED_LINES)

"""Generated flags of every command: the command gets to its work, or says in one sentence why it can't."""

from __future__ import annotations

import json
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from lowrank_pl.cli.app import COMMANDS, TRAINING_COMMANDS, flags_of, main
from tests.helpers import SMOKE
from tests.helpers.fuzzing import counted
from tests.helpers.run_folder import write_run

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore")]


class AtWork(BaseException):
    """Raised where the work of a command would begin."""


WORK = (
    "lightning.pytorch.Trainer.fit", "lowrank_pl.calibration.build_by_block.build_factors_by_block",
    "lowrank_pl.cli.bench_cases.decompositions", "lowrank_pl.cli.bench_cases.speed",
    "lowrank_pl.cli.bench_cases.statistics", "lowrank_pl.cli.bench_cases.steps",
    "lowrank_pl.costs.forecast.print_forecast", "lowrank_pl.export.reload._ask_fresh_process",
    "lowrank_pl.factors.decomposition.decompose", "lowrank_pl.factors.store.FactorStore.factors",
    "lowrank_pl.report.comparison.write_comparison_page", "lowrank_pl.report.page.write_page",
)  # fmt: skip
"""What takes long, besides the first forward pass of a model."""

PLACES = {
    "base": ["random:llama", "random:gpt2", "random:no", "layers:llama-3-8b:x", "package:no", "no/model", "run"],
    "text": ["python-docs", "python-docs::part=0%-10%", "text.txt", "rows.jsonl", "hub:no/no", "a=text.txt", "*.txt"],
    "path": ["new.json", "new/new.json", "text.txt", "text.txt/below", "run", "/dev/null", ".", "plan.json", "x" * 300],
    "kind": ["auto", "cpu", "cuda:99", "meta", "float16", "svd", "two_sided", "pivoted", "ram", "disk", "decode"],
    "name": ["uniform", "fisher", "strs", "zs_svd", "ara", "best+refit", "piqa", "no+prune", "../up"],
}  # fmt: skip
NUMBERS = ["0", "1", "2", "0.5", "-1", "1e-3", "nan", "inf", "-inf", "1e400", "9" * 25, "1_000", "0x1", "1.5", "32"]
ODD = [
    "", " ", "-", "--", "true", "false", "null", "None", "[]", "[1, 2]", "{}", "{a: 1}", "{a: {b: null}}", "{1: 2}",
    "{", "[a", "&a [*a]", "!!python/name:os.system", "a: b: c", "\u2603", "\x00", "\x1b[31m", "\ud83d", "%s", "{0}",
    "a=b=c", "8GB", "GB", "$HOME", "\n", "2020-01-01", "'", '"',
]  # fmt: skip
WORDS = st.text(st.characters(exclude_characters="/~*?[."), max_size=4)
LIKELY = {kind: st.sampled_from(values) for kind, values in PLACES.items()} | {"number": st.sampled_from(NUMBERS)}
VALUE = st.one_of(*LIKELY.values(), st.sampled_from(ODD), WORDS)
KINDS = {
    "base": "base model reference directory plan run", "text": "text", "path": "output json store scores ckpt_path",
    "kind": "dtype device kind storage cache case labels strategy accelerator precision",
    "name": "method methods plotted tasks mask optimizer baselines recipes",
}  # fmt: skip
"""What the last part of a flag's name says of its value; the values of all others are numbers."""

FIT_FLAGS = (
    "run", "json", "ckpt_path", "seed_everything", "model.base", "model.keep", "model.mask", "model.optimizer",
    "model.mask.init_args.steps", "model.optimizer.init_args.lr", "model.lr_scheduler", "model.start.plan",
    "model.start.keep", "model.prune", "model.prune.share", "model.constraints.floors", "model.constraints.include",
    "model.decomposition.kind", "model.decomposition.at_keep", "model.store", "model.compute.inactive_gate_stride",
    "model.data_terms", "model.data_terms.divergence_kind", "data.learning.text", "data.learning.length",
    "data.learning.sequences", "data.validation.sequences", "data.batch_size", "data.seed", "data.statistics",
    "finish.baselines", "finish.prompts", "finish.refit", "finish.refit.blends", "finish.score.text",
    "finish.score.length", "finish.streamed", "trainer.max_steps", "trainer.max_epochs", "trainer.precision",
    "trainer.callbacks", "trainer.callbacks.monitor", "trainer.devices", "trainer.strategy", "trainer.accelerator",
    "trainer.logger", "trainer.val_check_interval", "trainer.limit_train_batches", "checkpoint.every_n_train_steps",
    "checkpoint.monitor", "checkpoint.save_top_k", "monitor.every_n_steps", "samples.prompts", "dry_run",
)  # fmt: skip


HEAL_FLAGS = (
    "run", "json", "ckpt_path", "seed_everything", "model.plan", "model.settings.tokens", "model.settings.train",
    "model.settings.lr", "model.settings.warmup", "model.settings.lora", "model.settings.lora.rank",
    "model.settings.lora.targets", "model.teacher", "model.store", "model.gradient_checkpointing",
    "data.learning.text", "data.learning.length", "data.learning.sequences", "data.validation.sequences",
    "data.batch_size", "data.seed", "finish.json", "trainer.max_steps", "trainer.precision", "trainer.callbacks",
    "trainer.devices", "trainer.strategy", "trainer.accelerator", "checkpoint.every_n_train_steps",
)  # fmt: skip


UPCYCLE_FLAGS = (
    "run", "json", "ckpt_path", "seed_everything", "model.base", "model.base.dtype", "model.mixture",
    "model.mixture.experts", "model.mixture.chosen", "model.mixture.lr", "model.mixture.balance", "data.learning.text",
    "data.learning.length", "data.learning.sequences", "data.validation.sequences", "data.batch_size", "finish.json",
    "trainer.max_steps", "trainer.precision", "trainer.callbacks", "trainer.devices", "trainer.strategy",
)  # fmt: skip


MAPPINGS = ("settings", "floors", "score_sequences", "recipes", "decomposition")


def names_of(command):
    if command in TRAINING_COMMANDS:
        return {"fit": FIT_FLAGS, "heal": HEAL_FLAGS, "upcycle": UPCYCLE_FLAGS}[command]
    names = tuple(flag.name[2:] for flag in flags_of(command) if flag.name != "*")
    return (*names, *(f"{name}.x" for name in names if name in MAPPINGS))


NAMES = {command: names_of(command) for command in COMMANDS}
GIVEN = {
    "allocate": "random:llama --length 16 --sequences 2", "bench": "decode --base random:llama",
    "compare": "random:llama --length 16 --sequences 2 --score_length 16 --scores text.txt",
    "doctor": "run/model",
    "decompose": "random:llama --length 16 --sequences 2", "evaluate": "random:llama --text text.txt --length 16",
    "evaluate-plan": "plan.json --text text.txt --length 16", "export": "plan.json",
    "fit": f"-c {SMOKE} --data.learning.text text.txt --data.learning.length 16 --data.learning.sequences 4",
    "heal": "-c heal --model.plan plan.json --data.learning.text text.txt --data.learning.length 16 "
    "--data.learning.sequences 4 --data.validation.sequences 1 --model.settings.tokens 64 --trainer.accelerator cpu",
    "prune": "random:llama --keep 0.5 --length 16 --sequences 2", "quantize": "plan.json",
    "refit": "plan.json", "report": "run", "rotate": "random:llama",
    "upcycle": "-c upcycle --model.base random:llama --data.learning.text text.txt --data.learning.length 16 "
    "--data.learning.sequences 4 --data.validation.sequences 1 --trainer.accelerator cpu",
}  # fmt: skip
"""Words of each command that get it to its work."""


@pytest.fixture(scope="module")
def _at_work(tmp_path_factory):
    """A folder with a file of every kind, and commands that end where their work would begin."""
    folder = tmp_path_factory.mktemp("flags")
    write_run(folder / "run")
    (folder / "text.txt").write_text("Words of a text. " * 100)
    (folder / "rows.jsonl").write_text(json.dumps({"text": "Words of a row. " * 100}))
    words = ["random:llama", "--text", str(folder / "text.txt"), "--length", "16", "--sequences", "2"]
    main(["allocate", *words, "--keep", "0.5", "--output", str(folder / "plan.json")])

    def stop(*_, **__):
        raise AtWork

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in WORK:
            patch.setattr(name, stop)
        patch.setattr(PreTrainedModel, "__call__", stop)
        yield


def run(command, words):
    """Run a command that has no work to do; a ``ValueError`` stands for one clean sentence."""
    err = StringIO()
    with counted(f"flags of {command}"), redirect_stderr(err), redirect_stdout(StringIO()), suppress(AtWork):
        try:
            main([command, *words])
        except SystemExit as ended:
            status = ended.code
        else:
            status = 0
        if status:
            # One line, without anything that changes the terminal.
            said = [line for line in err.getvalue().split("\n") if line.startswith("lowrank: ")]
            assert (status, len(said)) in ((1, 1), (2, 1)), err.getvalue()
            assert err.getvalue().endswith(f"{said[0]}\n")
            assert len(said[0]) > len("lowrank: error: ")
            assert said[0].isprintable()
            raise ValueError(said[0])


def flag_of(name):
    """A flag with values that it may take, or with any; its name may be wrong."""
    last = name.rpartition(".")[2]
    likely = LIKELY[next((kind for kind, names in KINDS.items() if last in names.split()), "number")]
    between = st.sampled_from([" ", " ", " ", "=", ""])
    values = st.lists(likely, min_size=1, max_size=1) | st.lists(likely | VALUE, min_size=1, max_size=2)
    return st.tuples(st.sampled_from([name] * 9 + [name[:-1]]), between, values)


FLAGS = {
    command: st.one_of(*map(flag_of, names)) | st.tuples(WORDS, st.sampled_from(" ="), st.lists(VALUE, min_size=1))
    for command, names in NAMES.items()
}


def words_of(flags):
    """Return the words of generated flags: with the values behind them, with the first after =, or without any."""
    for name, between, values in flags:
        yield from {"": [f"--{name}"], "=": [f"--{name}={values[0]}"], " ": [f"--{name}", *values]}[between]


def tries(command, part):
    """Settings for a part of the usual number of tries; Lightning's parser is slow."""
    count = settings.default.max_examples // (3 * part if command in TRAINING_COMMANDS else part)
    return settings(max_examples=count, suppress_health_check=[*HealthCheck])


@pytest.mark.usefixtures("_at_work")
@pytest.mark.parametrize("command", COMMANDS)
def test_flags(command):
    @tries(command, 8)
    @given(flags=st.lists(FLAGS[command], max_size=3), first=st.booleans(), alone=st.integers(0, 9))
    def tried(flags, first, alone):
        made, needed = [*words_of(flags)], [] if alone == 0 else GIVEN[command].split()
        run(command, [*made, *needed] if first else [*needed, *made])

    tried()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | VALUE,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.usefixtures("_at_work")
@pytest.mark.parametrize("command", COMMANDS)
def test_settings_in_a_file(command):
    @tries(command, 12)
    @given(chosen=st.dictionaries(st.sampled_from(NAMES[command]) | WORDS, JSON, max_size=3))
    def tried(chosen):
        nested = {}
        for name, value in chosen.items():
            place, *parts = nested, *name.split(".")
            for part in parts[:-1]:
                place = place.setdefault(part, {}) if isinstance(place, dict) else {}
            if isinstance(place, dict):
                place[parts[-1]] = value
        with open("made.yaml", "w") as file:  # noqa: PTH123
            yaml.safe_dump(nested, file)
        run(command, [*GIVEN[command].split(), "-c", "made.yaml"])

    tried()

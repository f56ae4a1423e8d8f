# One command each. Everything is installed into .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEEDS ?= 1

.PHONY: help install demo test test-pipelines test-others test-kernels test-cluster faults faults-short interrupts suite study-short screenshots lint bench bench-scaling
.PHONY: bench-extract bench-loader bench-reads bench-scale bench-evaluate bench-gpu bench-optimizer bench-prepared fuzz model audit ui clean

help:
	@echo "make demo     install, then the whole way on the embedded benchmark (SEEDS=N for more seeds)"
	@echo "make test     install, then the tests, without those of faults"
	@echo "make test-kernels  the fused GPU kernels, held to the plain form without a GPU, by Triton's interpreter (2 min)"
	@echo "make faults   the tests of faults: killed workers, nodes and heads, full disks, lost servers (14 min)"
	@echo "make faults-short  those of them that take less than 10 minutes together"
	@echo "make interrupts  each step is interrupted at random moments and continued (MINUTES=N: for so long)"
	@echo "make suite    two benchmarks, two models: the whole way to one table, checked (5 min)"
	@echo "make study-short  two settings × two seeds by one command, to a table and a figure, checked (4 min)"
	@echo "make screenshots  the MLflow pages of the suite's runs as pictures (needs Chromium)"
	@echo "make test-cluster  the same model and store on four nodes (5 min)"
	@echo "make lint     ruff and mypy"
	@echo "make bench    direct against factorised form, speed and memory; parameters and multiply-adds (20 min)"
	@echo "make fuzz     500 files of each kind of clock, track, damage and link, and damaged real clips (30 min; KINDS=a,b COUNT=N SEED=N)"
	@echo "make model    random histories of a store's writers, local and on S3: jobs that sleep, die, take over (MINUTES=N)"
	@echo "make bench-scaling  extraction and a training step on 1 and 2 workers, and a model of 8 to 512 GPUs (10 min)"
	@echo "make bench-extract  extraction, manifest in and Parquet out, against the decoder's own rate (15 min)"
	@echo "make bench-loader  what loading a batch costs, in the loaders and in the training process (2 min)"
	@echo "make bench-reads  clips a second that training reads, from each store and decoded on the fly (5 min)"
	@echo "make bench-scale  plans, drivers, loaders and requests to S3 at 1,000 to 1,000,000 clips (10 min)"
	@echo "make bench-evaluate  ranks and intervals of 10,000 texts × 10,000 videos: seconds, pairs a second, memory"
	@echo "make bench-prepared  prepared videos with their basis and lean ones: bytes, milliseconds, error (1 min)"
	@echo "make bench-optimizer  BertAdam's step over fused AdamW's, at ViT-B/32 (1 min)"
	@echo "make bench-gpu  on a machine with a GPU and with its own torch: ceilings, step, head, loader, training (6 min)"
	@echo "make audit    known vulnerabilities of the pinned packages, by pip-audit (asks the package index)"
	@echo "make ui       the MLflow UI over all runs, on http://127.0.0.1:$(PORT)"
	@echo "make install  only the virtual environment"
	@echo "make clean    removes it, build and egg-info"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else "error: Python %d.%d; 3.11 or 3.12 is needed: make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/python pipelines/demo.py --config conf/demo.yaml --seeds $(SEEDS)

# Two processes: one runs the tests that share a Ray, which wait much, the other one all others.
test: install
	$(MAKE) --no-print-directory --jobs 2 --keep-going test-pipelines test-others

test-pipelines: install
	$(BIN)/python -m pytest tests/pipelines --durations=25

test-others: install
	$(BIN)/python -m pytest tests --ignore tests/pipelines --durations=25

# Triton is large and of no use without a GPU but for this: an environment that has it is made by this alone.
$(VENV)/kernels: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,kernels]'
	touch $@

test-kernels: $(VENV)/kernels
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m kernels tests/model/fused/test_kernels.py

# What is killed and when is drawn from a seed, which a failure prints: GARE_TEST_SEED=N makes it the same again.
faults: install
	$(BIN)/python -m pytest -m faults --durations=0

faults-short: install
	$(BIN)/python -m pytest -m "faults and not long" --durations=0

# MINUTES=N: new moments for so long, local and on S3.
interrupts: install
	GARE_INTERRUPT_MINUTES=$(or $(MINUTES),0) $(BIN)/python -m pytest -m faults -s --show-capture=no tests/pipelines/test_interrupted_steps.py

suite: install
	$(BIN)/python -m tests.scripts.suite

study-short: install
	$(BIN)/python -m tests.scripts.study_short

screenshots: install
	$(BIN)/python -m tests.scripts.screenshots

test-cluster: install
	$(BIN)/python -m pytest -m cluster

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m tests.benchmarks --picture .github/assets/bench.png
	$(BIN)/python -m tests.benchmarks.size

fuzz: install
	$(BIN)/python -m tests.benchmarks.fuzz $(if $(KINDS),--kinds $(KINDS)) $(if $(COUNT),--count $(COUNT)) $(if $(SEED),--seed $(SEED))

# WHERE=local, s3 or a kind of S3 (kept, refused, unseen); SEED=N begins there, EXAMPLES=N histories a seed.
WHERE ?= all
EXAMPLES ?= 50
model: install
	$(BIN)/python -m tests.writers --minutes $(or $(MINUTES),10) --where $(WHERE) --examples $(EXAMPLES) $(if $(SEED),--seed $(SEED))

bench-scaling: install
	$(BIN)/python -m tests.benchmarks.scaling

bench-extract: install
	$(BIN)/python -m tests.benchmarks.extraction

bench-loader: install
	$(BIN)/python -m tests.benchmarks.loader

bench-reads: install
	$(BIN)/python -m tests.benchmarks.reads

bench-scale: install
	$(BIN)/python -m tests.benchmarks.scale --picture .github/assets/scale.png

bench-prepared: install
	$(BIN)/python -m tests.benchmarks.prepared

bench-optimizer: install
	$(BIN)/python -m tests.benchmarks.optimizer

bench-evaluate: install
	$(BIN)/python -m tests.benchmarks.evaluation

# With the machine's own Python, whose torch fits its driver: no environment is made and nothing is installed.
# GPU="--parts step,head" takes some parts alone; GPU=--help lists them.
GPU_PYTHON ?= python3
bench-gpu:
	$(GPU_PYTHON) -m tests.benchmarks.gpu $(GPU)

# In an environment of its own, so that its packages are not among those that it looks at. --strict: a package
# that nothing is known of (no way to the public index, a private one) is a fault and not a silent pass.
AUDIT ?= --strict
audit: install
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit==2.10.1'
	$(VENV)/audit/bin/pip-audit $(AUDIT) --requirement constraints.txt --no-deps --disable-pip

PORT ?= 5000
GARE_ROOT ?= $(HOME)/.gare
ui: export GARE_ROOT := $(GARE_ROOT)
ui: install
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --host 127.0.0.1 --port $(PORT) --backend-store-uri "$$($(BIN)/python -c 'import os; from cluster.tracking import resolve_tracking_uri as at; print(at("sqlite:///mlflow.db", os.environ["GARE_ROOT"]))')"

clean:
	rm -rf $(VENV) build *.egg-info

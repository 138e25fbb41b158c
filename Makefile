# Every target installs what it needs first. PYTHON=/path/to/python3.12 chooses another interpreter.
PYTHON ?= python3
PY := .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint bench gpu torture doctor clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' Makefile | awk -F '\t' '{printf "make %-11s %s\n", $$1, $$2}'

setup:  ## install everything into .venv: system packages where permitted, requirements.txt, this repository
	@PYTHON=$(PYTHON) bash scripts/setup.sh

demo: setup  ## write the built-in synthetic dataset, train a small network on it, evaluate
	rm -rf runs/demo
	$(PY) write_dataset.py --source.kind=synthetic --write.folder=data/demo --write.overwrite=true
	$(PY) train_imagenet.py --config demo.yaml

test: setup  ## run all tests
	$(PY) -m pytest -n 2 --dist loadfile

test-fast: setup  ## run the tests that are not marked slow
	$(PY) -m pytest -n 2 --dist loadfile -m "not slow"

lint: setup  ## check style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/clang-format --dry-run --Werror fast_imagenet/native/*.[ch] tests/*.c tests/native/*.c

bench:  ## measure speed against the peers: make bench IMAGES=folder of photographs (500 px or more)
	@test -d "$(IMAGES)" || { echo "IMAGES='$(IMAGES)' is not a folder of photographs: make bench IMAGES=/path/to/folder" >&2; exit 2; }
	@PYTHON=$(PYTHON) bash scripts/setup.sh
	@PYTHON=$(PYTHON) bash scripts/setup_bench.sh
	$(PY) benchmarks/run_all.py --images "$(IMAGES)"

gpu: setup  ## on a GPU: tests, steps, memory, training; GPU_DATA=folder GPU_MINUTES=10 GPU_RECORDS=records
	$(PY) benchmarks/gpu.py --minutes "$(or $(GPU_MINUTES),10)" --records "$(or $(GPU_RECORDS),records)" \
		$(if $(GPU_DATA),--data "$(GPU_DATA)")

torture: setup  ## kill processes, damage files, fill disks, and count what held: under 20 minutes
	$(PY) -m tests.torture

doctor:  ## report what is missing on this machine, and how to fix it
	@if [ -x $(PY) ]; then $(PY) -m tools.doctor; else $(PYTHON) -m tools.doctor; fi

clean:  ## remove .venv, compiled files and caches; data/ and runs/ stay
	rm -rf .venv .venv-bench .ruff_cache .pytest_cache .mypy_cache build fast_imagenet/native/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

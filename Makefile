# Every target installs what it needs first. PYTHON=/path/to/python3.12 chooses another interpreter.
PYTHON ?= python3
PY := .venv/bin/python
.PHONY: setup demo test lint bench torture doctor clean

setup:  ## system packages where permitted, .venv from requirements.txt; nothing when up to date
	@PYTHON=$(PYTHON) bash scripts/setup.sh

demo: setup  ## write the embedded data set, train a small network on it afresh, evaluate
	rm -rf runs/demo
	$(PY) write_dataset.py --source.kind=synthetic --write.folder=data/demo --write.overwrite=true
	$(PY) train_imagenet.py --config demo.yaml

test: setup  ## the whole test suite
	$(PY) -m pytest

lint: setup  ## style and common mistakes
	$(PY) -m ruff check .

bench:  ## speed beside the peers: make bench IMAGES=folder of photographs (500 px or more)
	@test -d "$(IMAGES)" || { echo "IMAGES='$(IMAGES)' is no folder of photographs: make bench IMAGES=/path/to/folder" >&2; exit 2; }
	@PYTHON=$(PYTHON) bash scripts/setup.sh
	$(PY) benchmarks/run_all.py --images "$(IMAGES)"

torture: setup  ## kill, cut, flip and fill, under 20 minutes; the counts go to records/torture/
	$(PY) -m tests.torture

doctor:  ## what is missing on this machine, warnings, and how to fix them
	@if [ -x $(PY) ]; then $(PY) -m tools.doctor; else $(PYTHON) -m tools.doctor; fi

clean:  ## removes .venv and caches; data/ and runs/ stay
	rm -rf .venv .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

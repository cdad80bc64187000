# Every target does its own set-up, once: the stamp file below is rebuilt only when pyproject.toml changes.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help install demo test check soak versions bench measure bench-report clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP)  ## a virtual environment with lit-accel and everything it needs

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"lit-accel needs Python 3.11 to 3.13; this is {v[0]}.{v[1]}. Run: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[dev]'
	@# On all cores, where pip would take one. Some libraries ship files that are no Python of this version.
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true
	@touch $@

demo: $(STAMP)  ## train a small GPT densely and by V-cycle on real text; writes runs/demo
	$(BIN)/python -m scripts.demo

test: $(STAMP)  ## the tests, two-process ones included
	@# A process a core and one more, since some tests wait for processes that they have started. The tests of a file
	@# share one, because some share a run that takes long.
	$(BIN)/python -m pytest -n $$($(BIN)/python -c 'import os; print((os.cpu_count() or 1) + 1)') --dist loadfile

check: $(STAMP)  ## lint, format and type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# The type checker knows nothing of package-dir: show it the package as it is installed.
	@rm -rf .typecheck && mkdir -p .typecheck/lit_accel
	@ln -s $(CURDIR)/lit_accel/* .typecheck/lit_accel/ && ln -s $(CURDIR)/strategies .typecheck/lit_accel/strategies
	cd .typecheck && $(CURDIR)/$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p lit_accel

soak: $(STAMP)  ## kill runs of every method, resume and compare them, for MINUTES (30)
	$(BIN)/python -m scripts.soak --minutes $(or $(MINUTES),30) --seed $(or $(SEED),$$(date +%s))

versions: $(STAMP)  ## the fast tests with the lowest and the highest supported versions, each in its own environment
	$(BIN)/python -m scripts.versions
	$(MAKE) bench-report

data/fashion-mnist:  ## Fashion-MNIST, from Debian's package of it
	@command -v apt-get >/dev/null || { echo "Put the IDX files of Fashion-MNIST into data/fashion-mnist."; exit 1; }
	mkdir -p .cache/fashion-mnist data
	cd .cache/fashion-mnist && apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb .
	cp -r .cache/fashion-mnist/usr/share/datasets/fashion-mnist data/

bench: $(STAMP) data/fashion-mnist  ## go on with the study of what the methods are worth; may be killed at any time
	$(BIN)/python -m scripts.bench
	$(MAKE) bench-report

measure: $(STAMP)  ## what steps and transitions cost, measured anew, and first comparisons, which resume where they stopped
	$(BIN)/python -m scripts.measure_transition
	$(BIN)/python -m scripts.measure_realised_share
	$(BIN)/python -m scripts.measure_layer_dropping
	$(BIN)/python -m scripts.measure_token_dropping
	$(BIN)/python -m scripts.measure_mixed_sparsity
	$(BIN)/python -m scripts.measure_plan
	$(BIN)/python -m scripts.measure_models
	$(BIN)/python -m scripts.compare_layer_dropping
	$(BIN)/python -m scripts.compare_token_dropping
	$(BIN)/python -m scripts.compare_mixed_sparsity
	$(BIN)/python -m scripts.compare_presets --lrs 0.004 --seeds 0
	$(BIN)/python -m scripts.compare_presets --lrs 0.004 --seeds 0 --setup 'width 64'
	$(BIN)/python -m scripts.compare_vision --choices
	$(MAKE) bench-report

bench-report: $(STAMP)  ## write every measured table and picture from the result files
	$(BIN)/python -m scripts.report_results

clean:  ## remove the environment, caches and runs
	rm -rf $(VENV) .typecheck .mypy_cache .ruff_cache .pytest_cache .hypothesis .cache runs build *.egg-info

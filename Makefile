# The commands of the project. `make help` lists them.
#
# Everything runs in .venv, an editable install: Python edits are live, and a change of C++ or of pyproject.toml makes the
# next target reinstall (an editable install alone would keep the old extension).

PYTHON ?= $(shell bash tools/find_python.sh)
PY := .venv/bin/python
ALGO ?= grpo
# A trainer takes and frees activations of many megabytes all the time; kept in the heap they need no fresh pages.
TRAIN := MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=17179869184 $(PY)
EXTENSION_SOURCES := $(wildcard kernels/csrc/*) CMakeLists.txt pyproject.toml
# Tests run with PYTHONSAFEPATH: the repository root must not be on sys.path, where the folder kernels/ would shadow a package of that name.
RUN := PYTHONSAFEPATH=1 $(PY)

.PHONY: help demo demo-tiny test test-slow test-long dev ext lint format bench kl-gate chaos package-check clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: .venv/.installed-demo ## GRPO on the real SmolLM2-135M-Instruct, on the CPU
	$(TRAIN) examples/demo.py

demo-tiny: .venv/.installed-demo ## the same loop on a tiny model that visibly learns (ALGO=grpo or ppo)
	$(TRAIN) examples/demo_tiny.py --algo $(ALGO)

test: .venv/.installed-test ## the test suite
	$(RUN) -m pytest -m "not slow and not long"

test-slow: .venv/.installed-test ## heavier forms, minutes each
	$(RUN) -m pytest -m "slow and not long"

test-long: .venv/.installed-test ## the full sizes
	$(RUN) -m pytest -m long

dev: .venv/.installed-test .venv/.installed-demo .venv/.installed-dev ## everything a developer needs; rebuilds the extension

ext: ## rebuild only the extension, incrementally, into the editable install
	PATH="$(CURDIR)/.venv/bin:$$PATH" cmake -S . -B build/ext -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(CURDIR)/$(PY) > /dev/null
	PATH="$(CURDIR)/.venv/bin:$$PATH" cmake --build build/ext
	for so in build/ext/_cpu.*.so; do cp $$so kernels/cpu/.new && mv kernels/cpu/.new kernels/cpu/$$(basename $$so); done

lint: .venv/.installed-test .venv/.installed-dev .links/zerokl ## ruff, mypy and the import rules
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	MYPYPATH=.links .venv/bin/mypy -p zerokl.kernels -p zerokl.weight_sync -p zerokl.rollout -p zerokl.integrations
	PYTHONPATH=.links .venv/bin/lint-imports

format: .venv/.installed-dev ## let ruff lay out the code
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: .venv/.installed-test ## the main benchmark: decode and prefill against the machine's peaks
	$(PY) benchmarks/cpu_decode.py --json

kl-gate: .venv/.installed-test ## every way to schedule a job against the trainer's forward: exactly 0, or it fails
	$(PY) benchmarks/kl_gate.py

chaos: .venv/.installed-test ## 10 minutes of faults on a real server; every answer is an undisturbed engine's, or it fails
	$(PY) benchmarks/chaos.py

package-check: .venv/.installed-test .venv/.installed-dev ## build wheel and sdist, install the wheel apart, compare with the folders
	$(RUN) -m pytest -m package tests/packaging

clean: ## forget the environment and all builds
	rm -rf .venv build dist .links

.venv/bin/python:
	@bash tools/check_system.sh "$(PYTHON)"
	$(PYTHON) -m venv --clear .venv
	$(PY) -m pip install --quiet --upgrade pip

.venv/.installed-%: .venv/bin/python $(EXTENSION_SOURCES)
	@bash tools/check_system.sh $(PY)
	@$(PY) -m pip --version > /dev/null 2>&1 || $(PY) -m ensurepip # an environment that was made without
	$(PY) -m pip install --quiet --editable ".[$(if $(filter dev,$*),dev,cpu,$*)]"
	@touch $@

# mypy and import-linter read the rooms under their installed names.
.links/zerokl:
	mkdir -p $@
	for room in rollout weight_sync kernels integrations; do ln -sfn ../../$$room $@/$$room; done

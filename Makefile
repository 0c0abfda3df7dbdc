# make demo   watch a 1M-parameter model learn by semi-online DPO, then measure it (4 minutes on 2 cores)
# make test   lint, and the fast tests           make slow   the tests that take minutes
# make docs-test  the walkthrough, the exercises and the commands of the documents (a quarter of an hour)
# make lint   ruff alone                         make venv   only install, from requirements-$(DEVICE).txt
# make figures  redraw the figures and tables of results/ from the runs there, without training (minutes)
# make clean  remove .venv and the demo's run
#
# Every target sets up .venv first when it is missing or its lock has changed.
# DEVICE=gpu installs the CUDA build of everything; PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
DEVICE ?= $(if $(wildcard .venv/requirements-gpu.txt),gpu,cpu)

LOCK := requirements-$(DEVICE).txt
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
RUN := runs/demo

.PHONY: help demo figures test slow docs-test lint venv clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

demo: venv
	@echo "demo: train the tiny model with --sync-every 10, evaluate seed and trained, report in $(RUN)/"
	@rm -rf $(RUN)
	@$(PY) train_dpo.py --sync-every 10 --run-dir $(RUN)
	@test -e $(RUN)/export/100 || { echo "demo: stopped; make demo begins again" >&2; exit 1; }
	@ln -s ../../tiny/llama $(RUN)/seed
	@$(PY) evaluate.py --model $(RUN)/seed $(RUN)/export/100 --data tiny@test --n 10 --out '$(RUN)/eval/{}.json'
	@$(PY) tables/report.py --runs $(RUN)

figures: venv
	@for script in $(filter-out tables/run.sh tables/scales.sh,$(wildcard tables/*.sh)); do \
	  echo "figures: $$script"; DRAW=1 bash $$script || exit 1; done
	@DRAW=1 bash tables/table1.sh gpu
	@$(PY) tables/claims.py

test: lint
	@echo "test: the fast tests (make slow runs the others)"
	@$(PY) -m pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

docs-test: venv
	@$(PY) -m pytest -q tests/test_docs.py tests/test_docs_commands.py tests/test_readme.py

slow: venv
	@echo "slow: the tests that take minutes"
	@$(PY) -m pytest -q -m slow

lint: venv
	@echo "lint: ruff"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check --quiet .

venv: .venv/$(LOCK)

# The copy of the lock is made last, as the mark of a whole install: what is cut short is done again.
# Many machines get torch's CUDA build from pip, which works without a GPU but not without its CUDA libraries:
# the last pip line adds them, and does nothing for a CPU build.
.venv/$(LOCK): $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || { \
	  echo "venv: $(PYTHON) is not Python 3.11 to 3.14: name one, as in 'make PYTHON=python3.12'" >&2; exit 1; }
	@echo "venv: installing $(LOCK) into .venv (gigabytes: some minutes without a word)"
	@rm -rf .venv
	@$(PYTHON) -m venv .venv
	@$(PIP) --no-deps -r $(LOCK)
	@test $(DEVICE) != cpu || ! ls .venv/lib/*/site-packages/torch/lib/libtorch_cuda.so >/dev/null 2>&1 || \
	  echo "venv: pip took the CUDA build of torch: adding its libraries (4 GB more; for the CPU build, set" \
	       "PIP_EXTRA_INDEX_URL to the CPU index that PyTorch's install page names, and run make clean)"
	@$(PIP) --no-warn-conflicts --constraint requirements-gpu.txt torch
	@cp $(LOCK) $@

clean:
	rm -rf .venv $(RUN)

# One command for each thing one does here. It needs Python 3.11 or newer, pip, git and make, and installs the rest
# into .venv, from settings.ini. `make PYTHON=/path/to/python3.12` chooses the interpreter.

JOBS ?= 2
RUNS ?= $(CURDIR)/runs
BIN := .venv/bin
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

# One thread a process: several run side by side, and small tensors do not gain from more.
export OMP_NUM_THREADS ?= 1
# nbdev and Jupyter start `python` by name: it has to be the one of .venv.
export PATH := $(CURDIR)/$(BIN):$(PATH)

say = @printf '\n== %s\n' $(1)

.PHONY: help demo results refresh test torture hard load slim audit lab docs check-docs readme clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo     ordinary and modular training side by side on a small data set, from nothing, in minutes;'
	@echo '              JOBS=2 runs at a time'
	@echo 'make results  make demo anew, keep its rows in results/demo.csv and put its table in the README'
	@echo 'make refresh  picture, tables and README of the front page anew, after rows in results/ have changed'
	@echo 'make test     everything that is checked: style, exports, README, all notebooks, tests/'
	@echo 'make torture  kill trainings, searches, fine-tunings and so on at random moments, and let them go on'
	@echo 'make hard     damaged and invented files$(comma) wrong arguments$(comma) hostile names: what comes of each'
	@echo 'make load     200 notebooks$(comma) 8 at a time; memory of 14$(comma)697 sub-tasks and of 50$(comma)000 masks'
	@echo 'make slim     install without extras into a new environment$(comma) use it there$(comma) say what it weighs'
	@echo 'make audit    licences and known vulnerabilities of what is installed$(comma) by tools of an environment of their own'
	@echo 'make lab      the notebooks in JupyterLab'
	@echo 'make docs     the site, in _docs/; make check-docs opens every page of it in a headless browser'
	@echo 'make readme   README.md from nbs/index.ipynb'
	@echo 'make clean    remove what can be built again; the environment and runs/ stay'
	@echo
	@echo 'The first of them installs the packages into .venv, which takes a few minutes.'

.venv/.ready: settings.ini setup.py
	@test -n '$(PYTHON)' || { echo 'No Python 3.11 or newer found; give one: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo '$(PYTHON) is not a working Python 3.11 or newer' >&2; exit 1; }
	$(call say,'installing modnb and what it needs into .venv')
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: .venv/.ready
	$(call say,'training and taking apart: study demo of nbs/experiments/matrix.yaml')
	@$(BIN)/python -m modnb.lab.commands run demo --jobs $(JOBS) --runs $(RUNS)
	$(call say,'the table')
	@cat $(RUNS)/demo/report.txt

# Measured anew: finished runs of an older version of the package would count as done.
results: .venv/.ready
	rm -rf runs/fresh
	@$(MAKE) --no-print-directory demo RUNS=$(CURDIR)/runs/fresh
	$(call say,'results/demo.csv$(comma) nbs/images/masks.png and the README from this demo')
	cp runs/fresh/demo/all_rows.csv results/demo.csv
	cp runs/fresh/demo/masks.png nbs/images/masks.png
	@$(MAKE) --no-print-directory refresh

refresh: .venv/.ready
	$(call say,'the front page and the README from results/')
	$(BIN)/python docs/build.py refresh
	$(BIN)/python docs/build.py readme

test: .venv/.ready
	$(call say,'style (ruff)')
	$(BIN)/ruff check .
	$(call say,'exports in step$(comma) README in step$(comma) rules of the repository')
	$(BIN)/python -m pytest -q tests/test_repository.py
	$(call say,'every notebook (nbdev_test)')
	$(BIN)/nbdev_test --n_workers $(JOBS) --timing
	$(call say,'tests/ (pytest)')
	$(BIN)/python -m pytest -q tests --ignore tests/test_repository.py -n $(JOBS) --dist loadfile

torture: .venv/.ready
	$(BIN)/python tests/torture.py --write results/hard_use/kills.json

hard: .venv/.ready
	$(BIN)/python tests/hard_use.py --write results/hard_use/attempts.json

load: .venv/.ready
	$(BIN)/python tests/load.py --write results/hard_use/load.json

slim: .venv/.ready
	$(BIN)/python tests/slim.py --write results/hard_use/slim.json

audit: .venv/.ready
	$(BIN)/python tests/audit.py --write results/hard_use/audit.json

lab: .venv/.ready
	$(call say,'JupyterLab: stop it with Ctrl-C')
	$(BIN)/jupyter lab nbs

# nbdev's own commands would install Quarto system-wide where it is missing, so they are called only where it is there.
docs: .venv/.ready readme
	$(call say,'the experiments$(comma) with the values on their pages$(comma) unless that was done before')
	$(BIN)/python docs/build.py experiments
	$(call say,'the site: _docs/index.html')
	@if command -v quarto >/dev/null; \
		then $(BIN)/python docs/build.py sidebar && touch README.md && $(BIN)/nbdev_docs && \
			$(BIN)/python docs/build.py search; \
		else $(BIN)/python docs/build.py site; fi

check-docs: .venv/.ready
	$(call say,'every page of _docs/ in a headless Chromium or Chrome$(comma) at the width of a desk and of a phone')
	$(BIN)/python tests/check_site.py

readme: .venv/.ready
	$(call say,'README.md from nbs/index.ipynb')
	$(BIN)/python docs/build.py readme

clean:
	$(call say,'removing the site$(comma) caches and build products; .venv and runs/ stay')
	rm -rf _docs _proc _site build dist .pytest_cache .ruff_cache .hypothesis nbs/nbdev.yml nbs/sidebar.yml
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

comma := ,

# make ablation | test | quick | lab | check | dist    each installs what it needs first
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin

.PHONY: ablation test quick lab check dist lock

ablation: $(VENV)/installed
	$(BIN)/workbench run sweeps/quickstart.yaml $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

quick: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 -m unit $(ARGS)

lab: $(VENV)/installed
	@case "$$(id -u) $(ARGS)" in "0 "*--allow-root*) ;; "0 "*) \
	  echo "JupyterLab refuses to run as root. In a container: make lab ARGS=--allow-root" >&2; exit 1;; esac
	$(BIN)/jupyter labextension disable "@jupyterlab/apputils-extension:announcements" > /dev/null 2>&1 || true
	$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 notebooks/00_quickstart.ipynb $(ARGS)

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dist: $(VENV)/installed
	$(BIN)/python -m build

lock: $(VENV)/installed
	$(BIN)/python -m pip freeze --exclude-editable

$(VENV)/installed: pyproject.toml setup.py requirements.lock tools/install.py
	$(PYTHON) tools/install.py $(VENV)

# make ablation | test | quick | lab | check | docs | dist    each installs what it needs first
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin

.PHONY: ablation test quick lab check docs dist lock

ablation: $(VENV)/installed
	$(BIN)/workbench run sweeps/quickstart.yaml $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

quick: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 -m unit $(ARGS)

lab: $(VENV)/installed
	@case "$$(id -u) $(ARGS)" in "0 "*--allow-root* | "0 "*--version*) ;; "0 "*) \
	  echo "JupyterLab refuses to run as root. In a container: make lab ARGS=--allow-root" >&2; exit 1;; esac
	$(BIN)/jupyter labextension disable "@jupyterlab/apputils-extension:announcements" > /dev/null 2>&1 || true
	mkdir -p my_notebooks # copies that git ignores; an existing one stays as it is
	for file in notebooks/*.ipynb; do [ -e "my_$$file" ] || cp "$$file" "my_$$file"; done
	$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 my_notebooks/00_quickstart.ipynb $(ARGS)

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed # read it with search: python3 -m http.server --directory site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict $(ARGS)

dist: $(VENV)/installed
	$(BIN)/python -m build

lock: $(VENV)/installed
	$(BIN)/python -m pip freeze --exclude-editable

$(VENV)/installed: pyproject.toml setup.py requirements.lock tools/install.py
	$(PYTHON) tools/install.py $(VENV)

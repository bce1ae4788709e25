# The two commands are `make demo` and `make test`; both do all set-up.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORKERS ?= 2

.PHONY: demo test lint unit campaign bench clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[server,agent,search,dev]'
	touch $@

demo: $(INSTALLED) ## the main job on real images, with the service and an agent started beside it
	$(BIN)/search-client run recipes/digits.yaml

test: lint unit ## everything that must pass

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(INSTALLED)
	$(BIN)/python -m pytest -m "not campaign" -n $(WORKERS) --dist loadfile

campaign: $(INSTALLED) ## the long tests
	$(BIN)/python -m pytest -m campaign

bench: $(INSTALLED) ## every benchmark, quickly
	for program in benchmarks/*.py; do $(BIN)/python $$program --quick || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info runs

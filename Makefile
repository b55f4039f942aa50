PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint clean

# Everything lands in .venv; nothing else on the machine is touched but the model cache.
setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# Fetch the default model (93 MB, once), scan it for attention sinks, write demo/scan.html.
demo: setup
	$(BIN)/sinklens scan --out demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv demo

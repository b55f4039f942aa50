PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-real test-latest torture architectures notebooks docs lint clean

# Everything lands in .venv; nothing else on the machine is touched but the model cache.
setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# Fetch the default model (93 MB, once) and write a report of its sinks: demo/index.html. QUICK=1 takes less text.
demo: setup
	$(BIN)/sinklens report $(if $(QUICK),--quick) --out demo

# Everything on tiny models; what takes real models, notebooks or a browser is the second target's.
SLOW := real or notebook or browser
test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not ($(SLOW) or torture)"

test-real: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "($(SLOW)) and not torture"

# Everything that goes wrong, at full size: 50 kills, 10,000 fuzz cases, every function stopped at 20 moments. Hours.
torture: setup
	$(BIN)/python benchmarks/torture.py

# The table of docs/architectures.md, from the run of its tests.
architectures: setup
	$(BIN)/python -m pytest tests/check/test_architectures.py -p no:xdist --architectures-table

# The matrix of architectures on the newest TransformerLens and transformers, in an environment of its own.
test-latest:
	$(PYTHON) -m venv .venv-latest
	grep "^torch==" constraints.txt > .venv-latest/constraints.txt
	.venv-latest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-latest/constraints.txt -e ".[dev]"
	.venv-latest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-latest/constraints.txt \
		--upgrade transformer-lens transformers
	.venv-latest/bin/python -m pip list 2>/dev/null | grep -iE "^(transformer-lens|transformers|torch) "
	.venv-latest/bin/python -m pytest -n 2 --dist worksteal tests/check/test_architectures.py tests/bridge/test_capabilities.py

# Run every notebook and keep its outputs, with static images (needs Chromium).
notebooks: setup
	$(BIN)/python notebooks/execute.py

# The documentation site in docs/_build/html; a warning is an error.
docs: setup
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf .venv .venv-latest demo

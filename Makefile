# The two commands: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
SLOW ?= tests
STAMP = $(VENV)/.installed

.PHONY: demo test test-slow check install format clean schemas

install: $(STAMP)

# torch is pinned in constraints.txt: an unpinned one brings gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

demo: $(STAMP)
	$(PY) examples/demo.py

# two processes, each a file at a time
test: $(STAMP)
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# One part alone: make test-slow SLOW=tests/test_train_run.py
test-slow: $(STAMP)
	$(PY) -m pytest -m "slow and not gpu" $(SLOW)

check: $(STAMP)
	$(VENV)/bin/ruff format --check suanli tests benchmarks examples
	$(VENV)/bin/ruff check suanli tests benchmarks examples
	$(VENV)/bin/mypy
	$(PY) -m pytest -q tests/test_layers.py tests/test_schemas.py

format: $(STAMP)
	$(VENV)/bin/ruff format suanli tests benchmarks examples
	$(VENV)/bin/ruff check --fix suanli tests benchmarks examples

schemas: $(STAMP)
	$(PY) -m suanli.base.schema

clean:
	rm -rf $(VENV) demo-engine demo-engine-weights.safetensors build *.egg-info

# Two commands on a fresh machine with Python 3.11, pip and make: `make demo` and `make test`.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint format wheel clean

demo: $(STAMP)
	rm -rf demo
	$(BIN)/hf-unlearn demo --output_dir demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

# The long ones; and everything once as on a machine whose user has not set MKL_CBWR, which tests otherwise do.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow
	HF_UNLEARN_TESTS_MKL=default $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo build dist *.egg-info

# Two commands on a fresh machine with Python 3.11, pip and make: `make demo` and `make test`.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint format docs dist clean

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

# All pages and the API reference, into site/. Links to files of the repository need its address: make docs REPOSITORY=https://github.com/OWNER/hf_unlearn
docs: $(STAMP)
	$(BIN)/python -c "import latex2mathml, mkdocstrings, zensical" 2>/dev/null || $(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e ".[docs]"
	$(BIN)/python docs/builder/prepare.py build/docs $(REPOSITORY)
	PYTHONPATH=docs/builder $(BIN)/zensical build --strict --clean -f mkdocs.yml

# What PyPI gets, with whole addresses: make dist REPOSITORY=https://github.com/OWNER/hf_unlearn
dist: $(STAMP)
	@test -n "$(REPOSITORY)" || { echo "REPOSITORY: missing; set it to the address of the repository"; exit 2; }
	rm -rf build/dist dist && mkdir -p build/dist && git archive HEAD | tar -x -C build/dist
	$(BIN)/python .ci/addresses.py $(REPOSITORY) build/dist
	$(BIN)/python -m build --outdir dist build/dist

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo build dist site *.egg-info

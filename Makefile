# Two commands on a fresh machine with Python 3.11 or newer, pip and make: `make demo` and `make test`.

PYTHON ?= $(shell for one in python3.11 python3.12 python3.13 python3; do $$one -c '' 2> /dev/null && echo $$one && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
# Of each part of the package what asks most of the libraries, all that talks to the Hub, and the whole way from recipe to model.
LOWEST_TESTS := tests/unlearning/test_trainer.py tests/unlearning/test_peft.py tests/unlearning/language/test_sft.py tests/influence/test_trainer_sft.py \
	tests/unlearning/diffusion/test_vdu_saving.py tests/gan/test_gan_trainer.py tests/filtering/drawing/test_filtered_pipeline.py \
	tests/hub tests/metrics/test_metric_shells.py tests/jobs/recipe tests/jobs/test_recipes.py

.PHONY: demo test test-slow test-quantised test-lowest lint format docs dist clean

demo: $(STAMP)
	rm -rf demo
	$(BIN)/hf-unlearn demo --output_dir demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

# The long ones; and everything once as on a machine whose user has not set MKL_CBWR, which tests otherwise do.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow
	HF_UNLEARN_TESTS_MKL=default $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

# Adapters on weights in 4 bits, with a bitsandbytes that no other test has.
test-quantised: $(STAMP)
	$(BIN)/python -m pip install --quiet --progress-bar off --no-deps --upgrade -c constraints.txt --target $(VENV)/quantised bitsandbytes
	PYTHONPATH=$(VENV)/quantised $(BIN)/python -m pytest tests/unlearning/test_quantised.py

# Pins of constraints-lowest.txt win over those of constraints.txt.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -m "not slow" -n 2 --dist worksteal $(LOWEST_TESTS)

$(LOWEST)/.installed: pyproject.toml constraints.txt constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	names=$$(sed -n 's/^\([A-Za-z_0-9-]*\)==.*/\1/p' constraints-lowest.txt | paste -sd '|'); \
	{ cat constraints-lowest.txt; grep -viE "^($$names)==" constraints.txt; } > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --progress-bar off -c $(LOWEST)/constraints.txt -e ".[dev]"
	touch $@

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
	@echo "installing into $(VENV), once: about 2 GB, minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) demo build dist site *.egg-info

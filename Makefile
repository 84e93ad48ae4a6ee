# `make demo` and `make test` do all their own set-up in .venv; nothing else is needed but Python, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# CPU wheels of torch come from its own index where the default index has none; here the pin decides.
STAMP := $(VENV)/.installed

.PHONY: demo test lint types unit bench clean

demo: $(STAMP)
	$(BIN)/python -m sparseray demo --out demo

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check sparseray tests benchmarks
	$(BIN)/ruff format --check sparseray tests benchmarks

types: $(STAMP)
	$(BIN)/mypy

# Two processes of about equal length: most of what starts clusters, and everything else, whose output follows
# when both are done.
unit: $(STAMP)
	@$(BIN)/python -m pytest -m "not ray" tests > $(VENV)/rest.log 2>&1 && \
	$(BIN)/python -m pytest tests/test_resume.py >> $(VENV)/rest.log 2>&1 & rest=$$!; \
	$(BIN)/python -m pytest -m ray --ignore=tests/test_resume.py; clusters=$$?; \
	wait $$rest; status=$$?; cat $(VENV)/rest.log; \
	exit $$((clusters + status))

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache

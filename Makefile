# `make demo` and `make test` do all their own set-up in .venv; nothing else is needed but Python, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# CPU wheels of torch come from its own index where the default index has none; here the pin decides.
STAMP := $(VENV)/.installed
# Well over half of all installed files, of which next to none is imported: not compiled beforehand. pip compiles on one core.
SELDOM := transformers/models|openai/types|/tests?/|/testing/|/_inductor/|scipy/|fontTools/|networkx/|ray/(rllib|data|serve|tune|train|llm)/|/pip/|/mypyc?/|/setuptools/
WORKERS ?= 3
# Hundreds of processes start in the tests, and each would compile all that it loads once more.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-long clients checks unit clean

demo: $(STAMP)
	$(BIN)/python -m sparseray demo --out demo

# Two at a time, as on two cores: types and lint beside the tests.
test: $(STAMP)
	$(MAKE) --no-print-directory -j2 checks unit

checks: $(STAMP)
	$(BIN)/ruff check sparseray tests benchmarks
	$(BIN)/ruff format --check sparseray tests benchmarks
	$(BIN)/mypy

# Each worker takes the next test when it is done, and none compiles for half a minute what the others compile too. What starts
# Ray is two groups, of which each runs in one worker: those two wait half of the time, for processes that start, and the third
# one computes meanwhile.
unit: $(STAMP)
	$(BIN)/python tests/compile_loops.py
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup tests

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long tests

# Other people's clients, in an environment of their own: their requirements are not ours.
clients: $(STAMP)
	$(PYTHON) -m venv .clients
	.clients/bin/python -m pip install --quiet --disable-pip-version-check litellm langchain-openai "lm-eval[api]" transformers guidellm openapi-python-client
	$(BIN)/python -m pytest tests/test_clients.py tests/test_imported_clients.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[dev]"
	$(BIN)/python -m compileall -qq -j 2 -x '$(SELDOM)' $(VENV)/lib sparseray || true
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache

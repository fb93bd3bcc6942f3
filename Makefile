VENV ?= .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help

.PHONY: help install check test long wheel clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## an editable install with everything the tests need, in $(VENV)
	test -d $(VENV) || python3 -m venv $(VENV)
	$(BIN)/pip install -e '.[test]' -c constraints.txt

check: ## what CI checks: style, types and tests against the built wheel
	.ci/run

test: ## the tests, without the long ones
	$(BIN)/pytest

long: ## the long tests alone, hours of them, and docs/LONG.md: 20,000 damaged files, kills, every scheme's memory, oldest and newest releases
	mkdir -p build
	-$(BIN)/pytest -m long --junitxml=build/long.xml
	$(BIN)/python -m benchmarks.long build/long.xml

wheel: ## the wheel, in dist/
	$(BIN)/python -m build --wheel

clean: ## what was built
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

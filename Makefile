# Everything a newcomer or CI needs; each target makes .venv if it is missing.
PYTHON ?= python3
EXTRAS ?= dev
BIN := .venv/bin

.PHONY: install demo ui test lint bench clean
install: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: install
	$(BIN)/sieve launch studies/quickstart.yaml
ui: install
	$(BIN)/sieve ui
test: install
	OPENBLAS_NUM_THREADS=1 $(BIN)/pytest
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
clean:
	rm -rf .venv

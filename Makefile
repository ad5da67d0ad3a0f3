# Everything a newcomer or CI needs; each target makes .venv if it is missing.
PYTHON ?= python3
EXTRAS ?= dev
BIN := .venv/bin
FAULTS ?= fault or long

# One BLAS thread per process, and the kernel that OpenBLAS itself would choose.
export OPENBLAS_NUM_THREADS := 1
export OMP_NUM_THREADS := 1
unexport OPENBLAS_CORETYPE

.PHONY: install demo ui test faults lint docs wheel-test bench bench-search bench-scale clean
install: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv; this takes about a minute"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: install # a first study on the handwritten digits, in under two minutes
	$(BIN)/sieve launch studies/quickstart.yaml
ui: install # MLflow and the Optuna dashboard on what is in mlruns/
	$(BIN)/sieve ui
test: install
	$(BIN)/pytest
faults: install # everything that can go wrong (FAULTS=long: what `make test` leaves out); fills in docs/reliability.md
	$(BIN)/pytest -m "$(FAULTS)" --figures=docs/reliability.md
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
wheel-test: # the wheel in empty environments, on the oldest and the newest dependencies
	PYTHON=$(PYTHON) .ci/wheel-test
docs: install # the references of study files and commands
	$(BIN)/python docs/generate.py
bench: install # speed, beside PyTorch and scikit-learn where they are installed; what tracking costs
	$(BIN)/python tests/bench/bench_train.py
	$(BIN)/python tests/bench/bench_service.py
	$(BIN)/python tests/bench/bench_tracking.py
	$(BIN)/python tests/bench/bench_scale.py
bench-scale: install # many trials and many workers
	$(BIN)/python tests/bench/bench_scale.py
bench-search: install # regret, beside Optuna's samplers
	$(BIN)/python tests/bench/bench_search.py
clean:
	rm -rf .venv

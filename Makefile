# Everyday commands, in the environment of `bash tests/run.sh` (or any other: make check BIN=path/to/venv/bin).
BIN ?= .venv/bin

.PHONY: check lint types arrows fast test quickstart clean

check: lint types arrows fast ## what a change must pass before it is reviewed

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

arrows:
	$(BIN)/lint-imports

fast: ## tests that need no emulated cluster and no DeepSpeed launch
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow"

test:
	bash tests/run.sh

quickstart:
	bash launch/quickstart.sh

clean:
	rm -rf build espresso_ds.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	rm -f /dev/shm/deepspeed_allreduce_buffer_*

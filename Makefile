# Two commands do everything on a fresh machine: make run, make test.
PYTHON ?= python3
BIN := .venv/bin
# Real data for the slow tests, where a checkout stands beside them.
BACKDOOR_BENCH_DATA ?= $(wildcard ../shared/data)
export BACKDOOR_BENCH_DATA

.PHONY: venv run table report test test-slow lint format bench clean

venv: .venv/.done

.venv/.done: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

run: venv
	$(BIN)/python run.py attack=badnets defense=trap

# make table TABLE=trap_table1 ARGS="budget=small dataset=photo_digits": what is done is skipped
ifeq ($(MAKECMDGOALS)$(TABLE),table)
$(error Which table? make table TABLE=trap_table1)
endif
table: venv
	@$(BIN)/python run.py -m experiment=$(TABLE) $(ARGS); code=$$?; \
	  $(BIN)/python scripts/make_tables.py $(TABLE) $(ARGS) || code=$$?; exit $$code

# A static site over everything measured below ROOTS; open report/index.html.
ROOTS ?= outputs
report: venv
	$(BIN)/python scripts/report.py $(ROOTS) --out report

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-launchers.lock
	$(BIN)/python -m pytest -m "slow" -s

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv
	$(BIN)/python scripts/benchmark.py

clean:
	rm -rf .venv outputs .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info

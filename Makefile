# Every target makes its own virtual environment first: a fresh clone needs only Python 3.11 or later and make.
PYTHON ?= python3
BIN := .venv/bin
# Tests are split over this many processes, each with one thread: on two cores that beats one process with two threads.
JOBS ?= 2

.PHONY: audit demo test quick fuzz versions mutants check docs format clean shuffled

demo: .venv/.installed
	$(BIN)/python examples/demo.py

test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) --dist loadgroup --no-loadscope-reorder --timeout 600 --durations=25 -p no:randomly $(ARGS)

# The same in a random order, which must not matter; the seed that is printed repeats it (ARGS="-p randomly --randomly-seed=1").
shuffled: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) --dist loadgroup --no-loadscope-reorder --timeout 600 $(ARGS)

# Random models beyond the seeds that `make test` runs: make fuzz GRAPHS=5000 SEED=1000
GRAPHS ?= 1000
SEED ?= 1000
fuzz: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz $(GRAPHS) --seed $(SEED)

# Small defects, put into what decides, one at a time: which of them does no test see? make mutants COUNT=200 SEED=1
COUNT ?= 100
mutants: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants $(COUNT) --seed $(SEED)

# Ranges of dependencies, nothing unpickled, and known vulnerabilities where pip-audit's database can be reached.
audit: .venv/.installed
	$(BIN)/pytest -q tests/test_dependencies.py
	$(BIN)/python tests/audit.py

# What changes most, in about two minutes of two cores: no zoo of models, no pipelines, no compilation by Inductor, no other processes. Their files are not imported.
quick: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) --dist loadgroup --no-loadscope-reorder --timeout 120 -p no:randomly -m "not (zoo or pipelines or compiles or slow or gpu)" $(ARGS)

# The canaries and the core of the tests on each version of PyTorch, into docs/versions.md: make versions VERSIONS="2.13 2.15"
versions: .venv/.installed
	$(BIN)/python tests/support/matrix.py $(VERSIONS)

check: .venv/.installed build/typed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPYPATH=build/typed $(BIN)/mypy build/typed/ras_compile tests/support/typed_user.py
	cd build/typed && $(CURDIR)/$(BIN)/lint-imports --no-cache $(CURDIR)/pyproject.toml

# The documentation as a site, into build/site. A warning, and with that a dead link, is an error.
docs: .venv/.docs build/typed
	PYTHONPATH=build/typed $(BIN)/mkdocs build --strict

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,dev]'
	touch $@

.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

# The package as it is installed, as links: mypy and import-linter cannot see through setuptools' package-dir mapping.
.PHONY: build/typed shuffled
build/typed:
	rm -rf $@ && mkdir -p $@/ras_compile
	ln -s $(CURDIR)/ras_compile/* $(CURDIR)/passes $(CURDIR)/kernels $@/ras_compile/

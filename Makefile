# Two commands on a fresh machine: `make demo` and `make test`. Python 3.11 or newer is all they need.
#
# torch is installed first, from wherever your pip takes it. To choose a build, name the index that
# has it, for example one of the CPU or CUDA indexes that pytorch.org lists:
#     make demo TORCH_INDEX=<url of the index>
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
AUDIT := $(VENV)/audit
TORCH := $(shell grep -m1 '^torch==' constraints.txt)

.PHONY: demo test lint audit format setup clean

demo: setup
	$(BIN)/safeft demo

# Two files at a time, each with one thread: as much as two cores can do. In the order of their names:
# xdist would leave the files of few and long tests to the end, where one core waits for the other.
#
# The rules of deploy/prometheus are tested with promtool, which comes with Prometheus (on Debian:
# apt-get install prometheus prometheus-alertmanager). Without it those tests are skipped.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pip check
	$(BIN)/python -m tests.dependencies

# Known vulnerabilities of the pinned versions. It asks PyPI, and fails where that does not know a
# package (as mirrors do not): an audit that could not look is not one that found nothing.
audit: $(AUDIT)/bin/pip-audit
	$(AUDIT)/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

$(AUDIT)/bin/pip-audit:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install 'pip-audit>=2.10,<3'

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.installed

# The stamp comes last: an interrupted installation is taken up again.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and "safeft needs Python 3.11 or newer; this is %d.%d. Choose one with PYTHON=..." % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info

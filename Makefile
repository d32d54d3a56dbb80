# VENV= (empty) runs everything under $(PYTHON) as it is and installs nothing.
VENV ?= .venv
CUDA ?= cuda13
PYTEST_ARGS ?=
# A worker keeps a file to itself, so that what one test compiled serves the next.
WORKERS ?= 2
export PYTHON

ifeq ($(strip $(VENV)),)
RUN := $(or $(PYTHON),python3)
else
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_GPU := $(VENV)/.installed-$(CUDA)
INSTALLED_EVAL := $(VENV)/.installed-eval
endif

.PHONY: demo test test-gpu test-eval lint format clean

demo: $(INSTALLED)
	JAX_PLATFORMS=cpu $(RUN) -m jaxcodec.demo

test: $(INSTALLED)
	JAX_PLATFORMS=cpu $(RUN) -m pytest --numprocesses $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-gpu: $(INSTALLED_GPU)
	JAXCODEC_TEST_DEVICE=gpu $(RUN) -m pytest tests/pallas_kernels $(PYTEST_ARGS)

test-eval: $(INSTALLED_EVAL)
	JAX_PLATFORMS=cpu $(RUN) -m pytest tests/serve/real_harness.py $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m pyrefly check --python-interpreter-path $(RUN)

format: $(INSTALLED)
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

ifdef INSTALLED
$(INSTALLED): pyproject.toml constraints.txt
	@$(RUN) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { python=$$(scripts/find_python.sh) && "$$python" -m venv --clear $(VENV); }
	$(RUN) -m pip install -qq --constraint constraints.txt --editable '.[test,dev]'
	@touch $@

$(INSTALLED_GPU): $(INSTALLED)
	$(RUN) -m pip install -qq --constraint constraints.txt --editable '.[$(CUDA)]'
	@touch $@

$(INSTALLED_EVAL): $(INSTALLED)
	$(RUN) -m pip install -qq --constraint constraints.txt --editable '.[eval]'
	@touch $@
endif

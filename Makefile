# Everything runs from a fresh clone: each target makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
INTEROP_VENV ?= .venv-interop
BIN = $(VENV)/bin
# Sharding is tested on simulated devices. Their collectives hold threads, of which two programs at once can run out.
ON_EIGHT_DEVICES = XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_CPU_ENABLE_ASYNC_DISPATCH=false
# Python compiles a module when it is first imported, and most of what is installed never is.
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: train test lint interop environments clean

train: $(VENV)/.installed
	$(BIN)/python train.py

# Worksteal, because a few quick ones take minutes, and what waits behind them is then taken by the other process.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto -m "not quick"
	$(BIN)/python -m pytest -n auto --dist worksteal -m quick
	$(ON_EIGHT_DEVICES) $(BIN)/python -m pytest -n 2 --dist loadfile -m quick tests/parallel

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Opens what we write with GPTQModel, transformers and PEFT, mlx-lm and ONNX Runtime, which live in an environment of
# their own, reads what compressed-tensors, mlx-lm and GPTQModel's AWQ write, and runs lm-eval's tasks on a model of ours.
interop: $(VENV)/.installed-eval $(INTEROP_VENV)/.installed
	LOTAQAF_INTEROP_PYTHON=$(abspath $(INTEROP_VENV)/bin/python) $(BIN)/python -m pytest -n 2 --dist loadfile -m quick tests/interop --run-interop

# Both at once, by `make -j2 environments`.
environments: $(VENV)/.installed-eval $(INTEROP_VENV)/.installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, found %s: run make with PYTHON=python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.installed-eval: $(VENV)/.installed-test
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[eval]'
	touch $@

# torch first: GPTQModel asks for it while it is being installed.
$(INTEROP_VENV)/.installed: constraints-interop.txt $(VENV)/bin/python
	$(PYTHON) -m venv $(INTEROP_VENV)
	$(INTEROP_VENV)/bin/python $(PIP_INSTALL) -c constraints-interop.txt torch numpy
	$(INTEROP_VENV)/bin/python $(PIP_INSTALL) -c constraints-interop.txt \
		'gptqmodel==7.6.0' peft optimum transformers gguf compressed-tensors 'mlx[cpu]' mlx-lm onnxruntime-genai
	touch $@

clean:
	rm -rf $(VENV) $(INTEROP_VENV) output

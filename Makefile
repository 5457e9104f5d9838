# make install | test | test-slow | test-vllm | demo | serve-demo | lint | gates | bench. Each makes .venv on its first call and reuses it.
# make gpu runs in your own environment: see there.
PYTHON ?= python3
BIN := .venv/bin
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h')
CUDA := $(shell find csrc tests -name '*.cu' -o -name '*.cuh')
SOURCES := $(CSRC) $(filter csrc/%,$(CUDA)) CMakeLists.txt cmake/cuda.cmake setup.py pyproject.toml

.PHONY: install test test-slow test-vllm demo serve-demo lint gates bench bench-pytest gpu

install: .venv/built

.venv/requirements: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

# the build uses the pinned tools of .venv, not an isolated environment's
.venv/built: .venv/requirements $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

.venv/demo: requirements-demo.txt .venv/built
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-demo.txt
	touch $@

# two processes; their threads wait asleep, since each process has as many as there are cores
test: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 $(ARGS)

# the ops' whole tests on simulated kernels, and the kit with each version of Triton that is supported
test-slow: install
	$(BIN)/python -m pytest -m slow $(ARGS)

.venv-vllm/requirements: requirements-vllm.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-compile -r requirements-vllm.txt
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# the plugin in vLLM, in an environment of vLLM's own; the package is that of `make install`, found by its entry points
test-vllm: install .venv-vllm/requirements
	$(BIN)/python setup.py --quiet egg_info --egg-base .venv-vllm
	PYTHONPATH="$(CURDIR):$(CURDIR)/.venv-vllm" OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q -o addopts= \
		--confcutdir=tests/engines tests/engines $(ARGS)

demo: .venv/demo
	$(BIN)/python examples/demo/finetune.py $(ARGS)

serve-demo: .venv/demo
	$(BIN)/python -m lora_kernels serve-demo $(ARGS)

lint: .venv/requirements
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC) $(CUDA)

# compiles every shipped kernel for every GPU, without one, by every supported Triton, and writes tests/gates/table.json
gates: install
	$(BIN)/python -m lora_kernels.testing.gates $(ARGS)

bench: install
	$(BIN)/python -m bench $(ARGS)

# without the options of `make test`, which skips benchmarks
bench-pytest: install
	$(BIN)/python -m pytest -o addopts= bench/lora_linear.py bench/weight_norm.py $(ARGS)

# on a machine with a GPU, with the Python on PATH (or PYTHON=...) and not .venv's, whose torch may have no CUDA. It needs:
# pip install -e . triton peft transformers matplotlib. ARGS="--minutes 8": what is worth most, within them; bench/gpu/offline.sh
# prepares that for a machine without a network
gpu:
	$(PYTHON) -m bench.gpu $(ARGS)

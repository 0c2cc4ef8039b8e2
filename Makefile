# The commands of README.md and CONTRIBUTING.md. Each works alone, from a fresh clone.
#
#   make demo        build, then train the detector of examples/ on digits, evaluate it and draw its work
#   make quickstart  build, then train one encoder layer on a real photograph, and draw where it looks
#   make test        build, then run the whole test suite; SUBJECT=operator: that folder of tests/ alone,
#                    MARK=executor: the tests that run the CUDA kernels on the CPU alone
#   make bench       build, then run all benchmarks but convergence (an hour); docs/benchmarks.md says how its
#                    records become the pages' figures
#   make convergence build, then compare training with deformable and dense attention (an hour)
#   make bench-check build, then hold speed against the committed ratios (two minutes)
#   make fuzz        build, then try to break the operator with random and hostile calls: MINUTES=1
#   make sanitize    the same, and tests, under address, undefined-behaviour and thread sanitizers
#   make arm         the CPU kernels compiled for 64-bit Arm, run by qemu on random problems
#   make reliability fuzz, sanitize and arm for as long as the README's table says, and write its files (40 minutes)
#   make gpu         on a machine with a CUDA device: build for it, test, measure, compute-sanitizer
#   make docs        the documentation as a site, in build/docs (a minute; needs neither torch nor a compiler)
#   make lint        check format, style and types
#   make executor    build the native programs that tests use: executor, fuzzer, runtimes
#   make machine-code  (needs nvcc) compile the CUDA kernels for sm_90 and hold the machine code against the budget
#   make memory-traffic  count what the CUDA kernels ask of memory, on the CPU, and hold it against its budget
#   make wheel       the wheel of a release, with CUDA kernels for every GPU (ten minutes; ARCH=aarch64: Arm's)
#   make abi         try a wheel under other versions of torch and Python (downloads gigabytes): WHEEL=file
#   make compat      run models of other libraries before and after ours, and write docs/compatibility.md: a
#                    fresh environment with all of them (seven gigabytes, half an hour)
#   make clean       remove what the others made
#
# They install pinned requirements into a virtual environment. To use an existing Python instead, one
# that has torch, setuptools, CMake and Ninja: make test PYTHON=/path/to/python VENV=

PYTHON ?= python3
VENV ?= .venv
ABI_TORCH ?= torch==2.10.0 torch
ABI_PYTHON ?=
ARCH ?= $(shell uname -m)
WHEEL ?=
GPU_OPTIONS ?=
MARK ?=
MINUTES ?= 1
FUZZ_OPTIONS ?=
RELIABILITY ?= benchmarks/results/reliability
BENCH ?= build/bench
SUBJECT ?=

ifeq ($(VENV),)
  RUN := $(PYTHON)
  REQUIREMENTS :=
  DOCS_REQUIREMENTS :=
else
  RUN := $(abspath $(VENV))/bin/python
  REQUIREMENTS := $(VENV)/requirements.stamp
  DOCS_REQUIREMENTS := $(VENV)/requirements-docs.stamp
  export PATH := $(abspath $(VENV))/bin:$(PATH)
endif

NATIVE := CMakeLists.txt setup.py pyproject.toml $(wildcard csrc/* csrc/*/*)
FORMATTED := $(wildcard $(foreach folder,csrc csrc/* tests/cuda/executor tests/cuda/executor/* tests/fuzz \
  tests/operator benchmarks/*, \
  $(foreach kind,h cpp cuh cu,$(folder)/*.$(kind))))
# What must hold for every instruction set, not only the best one of this machine.
KERNEL_TESTS := $(foreach name,forward backward same_bits special_numbers module,tests/operator/test_$(name).py)
OTHER_CAPABILITIES := import msda; i = msda.info(); \
  print(*(set(i['cpu_capabilities_supported']) - {i['cpu_capability']}))
# Test files side by side, one on each core, where pytest-xdist is installed.
SIDE_BY_SIDE := from importlib.util import find_spec; import os; \
  print(f'-n {os.cpu_count()} --dist loadfile' if find_spec('xdist') else '')
# Absolute: what tests start in other folders must find it, too.
export MSDA_BUILD_DIR := $(abspath build/cmake)
# CUDA kernels, which take minutes to compile, where a GPU can run them: code for every GPU, some of it
# compiled when it is loaded, instead of ready-made code for each, as a package has.
MSDA_CUDA ?= $(shell nvidia-smi -L >/dev/null 2>&1 || echo 0)
TORCH_CUDA_ARCH_LIST ?= 7.5+PTX 9.0+PTX
FOR_THIS_MACHINE := MSDA_CUDA=$(MSDA_CUDA) TORCH_CUDA_ARCH_LIST="$(TORCH_CUDA_ARCH_LIST)"

.PHONY: demo quickstart test bench convergence bench-check fuzz sanitize arm reliability gpu docs \
  lint machine-code memory-traffic wheel abi compat clean executor
.DELETE_ON_ERROR:

demo: build/installed.stamp
	$(RUN) examples/deformable_detr/demo.py

quickstart: build/installed.stamp
	$(RUN) examples/quickstart.py

# OpenVINO's CMake folder where the package is installed; ONNX Runtime's headers are on no index.
OPENVINO_CMAKE := from importlib.util import find_spec as find; from pathlib import Path; \
  print(Path(find('openvino').origin).parent / 'cmake' if find('openvino') else '')
MSDA_ONNXRUNTIME_INCLUDE ?=

# The native programs that tests use: the CUDA kernels on the CPU, the CPU kernels on random problems,
# and the operator for other runtimes.
executor: build/installed.stamp
	$(FOR_THIS_MACHINE) cmake -S . -B $(MSDA_BUILD_DIR) -DMSDA_CUDA_EXECUTOR=ON -DMSDA_FUZZ=ON \
	  -DOpenVINO_DIR="$$($(RUN) -c "$(OPENVINO_CMAKE)")" \
	  -DMSDA_ONNXRUNTIME_INCLUDE="$(MSDA_ONNXRUNTIME_INCLUDE)" \
	  -DPython3_EXECUTABLE=$$($(RUN) -c "import sys; print(sys.executable)")
	cmake --build $(MSDA_BUILD_DIR) --target cuda_executor kernels_fuzz runtimes

test: executor
	set -e; workers=$$($(RUN) -c "$(SIDE_BY_SIDE)"); \
	OMP_NUM_THREADS=1 $(RUN) -m pytest $$workers $(if $(MARK),-m $(MARK)) tests/$(SUBJECT); \
	for capability in $(if $(SUBJECT)$(MARK),,$$($(RUN) -c "$(OTHER_CAPABILITIES)")); do \
	  MSDA_CPU_CAPABILITY=$$capability \
	    $(RUN) -m pytest -q $$workers -m "not executor" $(KERNEL_TESTS); done

bench: executor
	set -e; for name in operator capabilities fused peers scaling detector settings paper transformers runtimes; do \
	  $(RUN) -m benchmarks $$name --output $(BENCH)/$$name.json; done

convergence: build/installed.stamp
	$(RUN) -m benchmarks convergence --runs $(BENCH)/convergence --output $(BENCH)/convergence.json $(CONVERGENCE)

bench-check: build/installed.stamp
	$(RUN) -m benchmarks check $(CHECK)

fuzz sanitize arm: build/installed.stamp
	$(RUN) tests/fuzz/run.py $@ --minutes $(MINUTES) $(FUZZ_OPTIONS)

reliability: build/installed.stamp
	set -e; best=$$($(RUN) -c "import msda; print(msda.info()['cpu_capability'])"); \
	$(RUN) tests/fuzz/run.py fuzz --minutes 12 --output $(RELIABILITY)/fuzz-$$best.json; \
	$(RUN) tests/fuzz/run.py sanitize --minutes 4 --output $(RELIABILITY)/sanitize.json; \
	$(RUN) tests/fuzz/run.py arm --minutes 3 --output $(RELIABILITY)/arm.json
	$(RUN) -m benchmarks report

gpu: $(REQUIREMENTS)
	$(RUN) -m benchmarks gpu all $(GPU_OPTIONS)

# The variable: Material says where to go on when it ends in 2027 (zensical.org reads the same mkdocs.yml).
docs: $(DOCS_REQUIREMENTS)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

lint: $(REQUIREMENTS)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	clang-format --dry-run --Werror $(FORMATTED)
	$(RUN) -m mypy

machine-code: $(REQUIREMENTS)
	$(RUN) -m tests.cuda.machine_code check --arch sm_90

memory-traffic: executor
	$(RUN) -m tests.cuda.memory_traffic check

wheel: $(REQUIREMENTS)
	env -u MSDA_BUILD_DIR $(RUN) tests/packaging/build_release.py --arch $(ARCH)

abi: $(REQUIREMENTS)
	$(RUN) tests/packaging/try_versions.py $(if $(WHEEL),--wheel $(WHEEL)) $(ABI_PYTHON:%=--python %) $(ABI_TORCH)

compat: $(REQUIREMENTS)
	MSDA_CUDA=0 $(RUN) -m tests.integrations.compatibility $(COMPAT)

clean:
	rm -rf build dist out msda.egg-info msda/include msda/libmsda.* msda/libmsda_cpu.* $(VENV)

build/installed.stamp: $(REQUIREMENTS) $(NATIVE)
	$(FOR_THIS_MACHINE) $(RUN) -m pip install -q --no-build-isolation --no-deps -e .
	mkdir -p build && touch $@

$(VENV)/requirements.stamp: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements-dev.txt
	touch $@

$(VENV)/requirements-docs.stamp: requirements-docs.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements-docs.txt
	touch $@

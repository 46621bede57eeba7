# Every target first makes .venv and installs what it needs; the stamp files in .venv make the second call instant.
#   make PYTHON=python3.12     builds .venv with another interpreter
#   make test ARGS="-k near"   hands options on to pytest

PYTHON ?= python3
# One test process per core. Each imports torch, so a big machine's memory sets the limit.
WORKERS ?= auto
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := pyproject.toml constraints.txt
LIBRARY := setup.py $(wildcard csrc/*.cpp csrc/*.h)

# pip's isolated builds take constraints from the environment: older pips from PIP_CONSTRAINT, newer ones from
# PIP_BUILD_CONSTRAINT. Both are lists separated by spaces, so a space in the path is written as in a URL.
empty :=
space := $(empty) $(empty)
export PIP_CONSTRAINT := file://$(subst $(space),%20,$(CURDIR))/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-slow sanitize valgrind lint format types bench bench-gpu clean

help:  ## this list
	@echo "Vicinal: make <target>"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

demo: .venv/.with-demo .venv/.library  ## a minute of live training, then the tour: a page of pictures and figures
	rm -rf demo/training
	$(BIN)/vicinal train digits --out demo/training
	$(BIN)/vicinal tour --out demo

# Each worker computes with one thread: workers x cores threads would fight for the same cores.
test: .venv/.with-test .venv/.with-natten .venv/.library  ## the tests, in parallel, without the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 $(ARGS)

test-slow: .venv/.with-test .venv/.library  ## the slow tests only
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 -m "slow and not gpu" $(ARGS)

# A second build of the kernels, in which every wrong access and every undefined operation ends the program; loops stand
# for matrix registers, whose accesses no tool sees, so that set 5 also runs where there are none. A recording of the
# tests' calls is run again by a small program, which is much quicker than all of Python under such tools.
SANITIZERS := -g -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZED := build/sanitized/vicinal/_cpu.so
# for $(call replay,LIBRARY,FLAGS)
replay = $(CXX) -O1 -std=c++17 $(2) -Icsrc csrc/tests/replay.cpp $(1) -Wl,-rpath,"$(CURDIR)/$(dir $(1))" -o build/replay
sanitize: .venv/.with-test .venv/.library $(SANITIZED)  ## the CPU kernels under AddressSanitizer, UBSan and valgrind (Linux, gcc)
	$(BIN)/python -m tests.ops.record_calls build/calls.bin
	$(call replay,$(SANITIZED),$(SANITIZERS))
	for isa in 1 2 3 4 5; do for strategy in 0 1 2; do build/replay build/calls.bin $$isa $$strategy || exit 1; done; done
	OMP_NUM_THREADS=1 LD_PRELOAD="`$(CXX) -print-file-name=libasan.so` `$(CXX) -print-file-name=libstdc++.so`" \
		ASAN_OPTIONS=detect_leaks=0 VICINAL_CPU_LIBRARY=$(abspath $(SANITIZED)) \
		$(BIN)/python -m pytest tests/ops/test_cpu.py tests/ops/test_cpu_colours.py tests/ops/test_cpu_dense.py tests/ops/test_cpu_matrices.py tests/ops/test_cpu_random.py tests/ops/test_cpu_fuzz.py $(ARGS)
	$(MAKE) valgrind

# Every third problem: it is some fifty times slower. It knows nothing beyond AVX2.
valgrind: .venv/.with-test .venv/.library  ## the CPU kernels under valgrind, on the tests' problems
	$(BIN)/python -m tests.ops.record_calls build/calls.bin 3
	$(call replay,src/vicinal/_cpu.so,-g)
	for isa in 1 2; do for strategy in 0 2; do \
		valgrind --quiet --error-exitcode=9 build/replay build/calls.bin $$isa $$strategy || exit 1; done; done

$(SANITIZED): $(LIBRARY) | .venv/.with-test
	@$(PIP) install "setuptools>=77"
	CXXFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" VICINAL_REQUIRE_LIBRARY=1 $(BIN)/python setup.py --quiet \
		build_ext --build-lib build/sanitized --build-temp build/sanitized

lint: .venv/.with-lint  ## formatting and lint rules, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: .venv/.with-lint  ## format the code and apply the lint rules' safe fixes
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

types: .venv/.with-lint  ## type-check the package
	$(BIN)/mypy src/vicinal

bench: .venv/.with-test .venv/.with-natten .venv/.library  ## measure this machine, and NATTEN too where it installs; prints the table
	PYTHONPATH=.venv/natten $(BIN)/python -m vicinal.measure $(ARGS)

bench-gpu: .venv/.with-test .venv/.library  ## measure a GPU against dense kernels and others' sparse ones; ARGS="video --resume"
	$(BIN)/python -m vicinal.measure gpu $(ARGS)

clean:  ## remove caches, builds, runs and the demo; .venv stays
	rm -rf build dist demo runs .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find $(wildcard src tests benchmarks examples recipes) -name __pycache__ -prune -exec rm -rf {} +

# A virtual environment that works is kept, however it was made, and completed; a broken one is replaced.
.venv/.created:
	@if ! $(BIN)/python -c "" 2>/dev/null; then \
		command -v "$(PYTHON)" >/dev/null || { \
			echo "Vicinal needs Python 3.11 or newer, but there is no $(PYTHON) here: try make PYTHON=/path/to/python."; exit 1; }; \
		"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
			echo "Vicinal needs Python 3.11 or newer, but $(PYTHON) is `"$(PYTHON)" -V 2>&1`: try make PYTHON=python3.12."; exit 1; }; \
		echo "Creating .venv with `"$(PYTHON)" -V 2>&1`"; \
		"$(PYTHON)" -m venv --clear .venv; \
	fi
	@$(BIN)/python -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
		echo "Vicinal needs Python 3.11 or newer, but .venv holds `$(BIN)/python -V 2>&1`: delete it and call make again."; exit 1; }
	@$(BIN)/python -c "import pip" 2>/dev/null || $(BIN)/python -m ensurepip
	@touch $@

# The NATTEN adapter is compared with the original, which needs no kernels for that. It goes beside the environment's
# packages, not among them: transformers would find it and take it for the one it was written for. Its set-up compiles
# for hours where it sees a GPU, so it sees none. Where it cannot be had, the tests that need it are skipped and say so.
.venv/.with-natten: constraints.txt | .venv/.with-test
	@CUDA_VISIBLE_DEVICES= NATTEN_CUDA_ARCH= $(PIP) install --target .venv/natten --upgrade --no-deps \
		--no-build-isolation natten || echo "NATTEN could not be installed; its tests will be skipped. To try again: rm $@"
	@touch $@

.venv/.with-%: $(SOURCES) | .venv/.created
	@echo "Installing vicinal[$*] and what it needs into .venv (the first time takes minutes: torch is large)"
	@$(PIP) install -c constraints.txt -e ".[$*]"
	@touch $@ .venv/.library

# The CPU kernels, compiled again when they change: only what has changed.
.venv/.library: $(LIBRARY) | .venv/.created
	@$(PIP) install --no-deps -e .
	@touch $@

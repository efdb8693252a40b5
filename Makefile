# The commands of every day. Each makes what it needs: `make test` works in a fresh clone.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Backends that must run, so that a skip cannot hide a loss.
REQUIRED := reference,cpu
CPP := $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' 2>/dev/null)

.PHONY: docs dist setup demo test test-deep lint format bench gpu-check clean

demo: setup
	$(BIN)/visionpulse demo --out build/demo.html

# A site in build/site: pages, and the reference from the docstrings; asks nothing of a network.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

# The source archive, and a wheel built from it that other Linux machines take; pip's isolated builds.
# The CUDA kernels are in it where VISIONPULSE_CUDA_ARCHS=90 asks for them.
dist: setup
	rm -rf dist build/dist
	$(BIN)/python -m build --outdir build/dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist/
	@ls dist

# Broad, in minutes, the same on every CPU: no clock in it. Two processes, which take what the other
# has left, with half of the random problems; a part, by PYTEST_ARGS, takes one process and all of them.
PYTEST := $(BIN)/pytest --require-backends $(REQUIRED)
SHARED := -n 2 --dist worksteal --examples 25
test: setup
	$(PYTEST) $(if $(PYTEST_ARGS),,$(SHARED)) $(PYTEST_ARGS)

# The rest, each proof only when what it depends on has changed: tests/proofs.py says on what.
# PROOFS=name,name runs some; FORCE=1 those too that are fresh; ALSO_ONE=COMMIT one of these.
test-deep: setup
	$(BIN)/python tests/proofs.py $(if $(PROOFS),--only $(PROOFS)) $(if $(FORCE),--force) \
		$(if $(ALSO_ONE),--also-one $(ALSO_ONE))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# A few minutes on two cores: the tables, then the ratios of short ops against the committed ones.
BENCH_ROWS := build/bench.jsonl
GATED := bench_layers.py --device cpu --shapes b1-4k --dtypes bf16,fp32 --rounds 15 \
	--baselines torch-sdpa-grouped
bench: setup
	$(BIN)/python benchmarks/bench_layers.py --device cpu --shapes b1-8k --dtypes bf16,fp32 --rounds 5 \
		--out $(BENCH_ROWS) $(BENCH_ARGS)
	$(BIN)/python benchmarks/bench_decode.py --device cpu --shapes b1-8k --dtypes bf16,fp32 --rounds 5 \
		--out $(BENCH_ROWS) $(BENCH_ARGS)
	$(BIN)/python benchmarks/bench_sweep.py --device cpu --shapes b1-1k,b1-8k --rounds 5 --out $(BENCH_ROWS) \
		$(BENCH_ARGS)
	$(BIN)/python benchmarks/compare.py benchmarks/results/cpu.jsonl --gate 0.6 --attempts 3 \
		--run "$(GATED)"

# On a machine with a GPU and no network: its own Python, with torch and the build tools in it.
RESULTS ?= results
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --results $(RESULTS) $(GPU_ARGS)

clean:
	rm -rf build dist *.egg-info visionpulse/*.so $(VENV)

# Without a GPU the CUDA kernels, half of all there is to compile, are built only when asked for by
# VISIONPULSE_CUDA_ARCHS: the tests compile what they need of them.
ifeq ($(shell nvidia-smi -L 2>/dev/null),)
export VISIONPULSE_CUDA_ARCHS ?= none
endif

# The environment and the kernels: anew when a pin or the build changed, kernels when a source did.
# They are compiled while torch is downloaded, which they do not need.
setup:
	@test -e $(READY) || echo "making $(VENV): packages and kernels; minutes, the first time"
	@$(MAKE) --no-print-directory -j 2 $(VENV)/.deps $(READY)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.tools: requirements-dev.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $$(grep -E '^(setuptools|cmake|ninja|pybind11)==' $<)
	touch $@

$(VENV)/.deps: requirements-dev.txt $(VENV)/.tools
	$(BIN)/python -m pip install --quiet -r $<
	touch $@

$(READY): $(VENV)/.tools pyproject.toml setup.py CMakeLists.txt $(CPP)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

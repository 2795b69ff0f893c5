# Everything a person types here is one of: make demo, make test, make lint, make bench-build, make bench-cpu,
# make bench-edge, make bench-serve,
# make conformance, make emulator, make fuzz-edge.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat requirements/all.txt pyproject.toml 2>/dev/null | cksum | cut -d' ' -f1)

.PHONY: demo test lint bench-build bench-cpu bench-serve bench-edge conformance emulator fuzz-edge clean help

help:
	@echo "make demo         set up, build the digits recipe for all its targets and run one bundle"
	@echo "make test         set up and pass all checks and tests"
	@echo "make lint         the quick checks only"
	@echo "make bench-build  print the build-time figures of the README"
	@echo "make conformance  print how many of the official ONNX tests pass through TVM, and why others don't"
	@echo "make emulator     fetch what tests run code of other CPUs on (make test does so too, at its first use)"
	@echo "make fuzz-edge    fuzz the edge runtime for SECONDS=600 with sanitizers"
	@echo "make bench-serve  compare our server with others, one load generator and one ONNX file for all"
	@echo "make bench-cpu    compare our CPU engines with ONNX Runtime, OpenVINO and PyTorch (an hour or so)"
	@echo "make bench-edge   sizes, start, memory and ARM instruction counts of the edge runtime and ONNX Runtime's"

demo: $(STAMP)
	@sh .ci/demo $(BIN)

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-build: $(STAMP)
	$(BIN)/python benchmarks/bench_build.py

# The engines to compare with are optional, so a failure to install them is a line in the output.
conformance: $(STAMP)
	$(BIN)/python -W ignore benchmarks/onnx_conformance.py --verbose

bench-cpu: $(STAMP)
	-$(BIN)/python -m pip install --quiet --no-deps -r requirements/bench.txt
	$(BIN)/python benchmarks/bench_cpu.py --peak $(BENCH_ARGS)

bench-edge: $(STAMP)
	$(BIN)/python benchmarks/bench_edge.py $(BENCH_ARGS)

# Each peer is installed into a virtual environment of its own, in the user's cache.
bench-serve: $(STAMP)
	$(BIN)/python benchmarks/bench_serve.py --install $(BENCH_ARGS)

emulator: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m helpers.emulated

$(STAMP): requirements/all.txt pyproject.toml
	@PYTHON=$(PYTHON) sh .ci/setup $(VENV)
	@rm -f $(VENV)/.installed-* && touch $@

SECONDS ?= 600
fuzz-edge: $(STAMP)
	$(BIN)/python tests/fuzz/edge.py $(SECONDS) $(SEED)

clean:
	rm -rf $(VENV) build *.egg-info artifacts/*/

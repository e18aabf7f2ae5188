# `make demo` and `make test` set up what they need in .venv and run; nothing else is necessary.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

.PHONY: setup demo test test-architectures test-real test-browser test-engines test-servers engines architectures docs lint bench bench-real format wheel clean

setup: $(READY)

# torch goes first and by itself, at the pinned version, so that no other package pulls in another build.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

demo: $(READY)
	$(BIN)/bake demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# One worker a core; `python -m pytest` alone runs everything in one process.
test: lint
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

# Every architecture of transformers, and the whole of the matrix; not part of `make test`: minutes.
test-architectures: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "architectures or exhaustive"

# Effects and costs on two small trained models, which it makes from packages; not part of `make test`: minutes.
test-real: $(READY)
	$(BIN)/python benchmarks/real_models.py build/real-models
	$(BIN)/python -m pytest -m real

# The page of `bake play` in a real browser, which has to be there (Debian's package chromium), and a Space in an
# environment of its own; not part of `make test`: minutes.
test-browser: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[browser]"
	$(BIN)/python -m pytest -m browser

# Write tests/data/architectures.csv anew; look at its difference before committing it.
architectures: $(READY)
	PYTHONPATH=. $(BIN)/python tests/golden.py

# The documentation as a site in build/site, and the reference page, from the declarations of the options.
docs: $(READY)
	$(BIN)/python -m bake.cli.reference > docs/reference.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Both sides of every comparison in one run; needs 7 GB of disk under build/.
bench: $(READY)
	$(BIN)/python benchmarks/bench.py

# What bake does on two small trained models, which it makes from packages; writes docs/real-models.md. Tens of minutes.
bench-real: $(READY)
	$(BIN)/python benchmarks/real.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(READY)
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) dist build

# Bakes in other inference engines for real, each compiled (with cmake) or installed into build/engines: half an hour the
# first time. `engines` runs every family again and writes tests/data/engines.csv and docs/engine-table.md.
LLAMA_CPP_PYTHON = 0.3.36
LLAMA_CPP = build/engines/llama_cpp_python-$(LLAMA_CPP_PYTHON)/vendor/llama.cpp
test-engines: $(READY) $(LLAMA_CPP)/build/bin/llama-server
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[gguf]"
	$(BIN)/python benchmarks/real_models.py build/real-models
	BAKE_LLAMA_CPP=$(LLAMA_CPP) $(BIN)/python -m pytest -m engines

test-servers: $(READY) $(LLAMA_CPP)/build/bin/llama-server
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[gguf,servers]"
	$(BIN)/python benchmarks/real_models.py build/real-models
	BAKE_LLAMA_CPP=$(LLAMA_CPP) $(BIN)/python -m pytest -m servers

engines: $(READY) $(LLAMA_CPP)/build/bin/llama-server
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[gguf]"
	$(BIN)/python benchmarks/real_models.py build/real-models
	$(BIN)/python benchmarks/engines.py mlx vllm transformers llama.cpp --llama-cpp $(LLAMA_CPP)

$(LLAMA_CPP)/build/bin/llama-server:
	mkdir -p build/engines
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
		--dest build/engines llama-cpp-python==$(LLAMA_CPP_PYTHON)
	tar xzf build/engines/llama_cpp_python-$(LLAMA_CPP_PYTHON).tar.gz -C build/engines
	cmake -S $(LLAMA_CPP) -B $(LLAMA_CPP)/build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF -DLLAMA_OPENSSL=OFF \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF
	cmake --build $(LLAMA_CPP)/build --parallel 2 --target llama-server llama-quantize

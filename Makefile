# `make demo` and `make test` each do all their set-up: a virtual environment, the install, the build of llama-cpp-python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
DEMO := demo

.PHONY: demo test quick lint format clean

TINY := tests/data/tiny-step35
PROMPT := class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n

demo: $(VENV)/.installed
	@mkdir -p $(DEMO)
	$(BIN)/convert-step35 run $(TINY) $(DEMO)/tiny-Q8_0.gguf --type Q8_0 --overwrite
	$(BIN)/convert-step35 run $(TINY) $(DEMO)/tiny-Q4_K_M.gguf --type Q4_K_M --overwrite
	$(BIN)/convert-step35 verify $(DEMO)/tiny-Q8_0.gguf --against $(TINY)
	$(BIN)/convert-step35 verify $(DEMO)/tiny-Q4_K_M.gguf --against $(TINY)
	$(BIN)/convert-step35 inspect $(DEMO)/tiny-Q4_K_M.gguf
	@printf '%b' '$(PROMPT)' > $(DEMO)/prompt.py
	$(BIN)/step35 generate $(DEMO)/tiny-Q4_K_M.gguf -n 64 --temp 0 --draft 3 -f $(DEMO)/prompt.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

# Every folder in under a minute: without torch, a browser, a server's process, or a build of llama.cpp of our own.
quick: $(VENV)/.installed-quick
	$(BIN)/python -m pytest --quick

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --warnings

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The build of llama-cpp-python takes minutes; pip keeps the wheel it builds, so it happens once a machine.
NATIVE := hatch_build.py $(wildcard converter/convert_step35/quantization/native/*.[ch]pp)

$(VENV)/.installed: pyproject.toml $(NATIVE) | $(VENV)/.created
	@echo "Installing step35; the first build of llama-cpp-python takes a few minutes ..."
	$(PIP) install --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(VENV)/.installed
	@echo "Installing the test tools and torch ..."
	$(PIP) install --editable '.[test]'
	@touch $@

$(VENV)/.installed-quick: pyproject.toml $(VENV)/.installed
	@echo "Installing pytest and hypothesis ..."
	$(PIP) install --editable '.[quick]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed-test
	@echo "Installing ruff and pyright ..."
	$(PIP) install --editable '.[dev]'
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "step35 needs Python 3.11 or newer, got " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO)

# Every target makes .venv by itself, again only when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: install demo balance ablations test test-lowest lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-dev.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt -e .
	touch $@

demo: install
	$(BIN)/python demo_vipolyqwen.py

balance: install
	$(BIN)/python benchmarks/balance.py

# Threads soon give way while they wait for others, or a second busy process would slow every step several times.
ablations: install
	GOMP_SPINCOUNT=5000 $(BIN)/python benchmarks/ablations.py

test: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

# The lowest versions that the repositories ask for (`requirements` in config_sentence_transformers.json); opt-in.
test-lowest: $(LOWEST)/.installed
	HF_HUB_OFFLINE=1 $(LOWEST)/bin/python -m pytest

$(LOWEST)/.installed: requirements.txt requirements-dev.txt constraints-lowest.txt pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt \
		-r requirements-dev.txt -e .
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LOWEST) outputs .pytest_cache .ruff_cache

# Every target makes .venv first, and again when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
REQUIREMENTS := requirements.txt pyproject.toml
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# Two test processes of one thread each, for two cores; `make test WORKERS=8` on a larger machine.
WORKERS ?= 2
PYTEST := -m pytest --numprocesses $(WORKERS) --dist worksteal
TEST_ENVIRONMENT := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: install demo balance bench ablations test test-lowest fuzz test-reliability api lint audit format clean

install: $(VENV)/.installed .typing/vipolyqwen

$(VENV)/.installed: $(REQUIREMENTS) constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	touch $@

# A link to this folder, so that type checkers and editors can follow `import vipolyqwen`.
.typing/vipolyqwen:
	mkdir -p .typing
	ln -sfn .. $@

demo: install
	$(BIN)/python demo_vipolyqwen.py

balance: install
	$(BIN)/python benchmarks/balance.py

# Ten minutes on two idle cores; also runs on CUDA.
bench: install
	$(BIN)/python benchmarks/encode_speed.py --long
	$(BIN)/python benchmarks/query_profile.py

# Waiting threads yield soon; otherwise a second busy process slows every step several times.
ablations: install
	GOMP_SPINCOUNT=5000 $(BIN)/python benchmarks/ablations.py

test: install
	$(TEST_ENVIRONMENT) $(BIN)/python $(PYTEST)

# Opt-in, about a quarter of an hour: random inputs and damaged files, other ones each time.
FUZZ_INPUTS ?= 20000
FUZZ_FILES ?= 60000
fuzz: install
	$(TEST_ENVIRONMENT) FUZZ_INPUTS=$(FUZZ_INPUTS) FUZZ_FILES=$(FUZZ_FILES) FUZZ_SEED=$$$$ \
		$(BIN)/python $(PYTEST) tests/fuzz

# Opt-in, an hour or two: faults at random moments; writes docs/reliability.md and docs/reliability.json.
RELIABILITY_KILLS ?= 50
RELIABILITY_SHARDED_KILLS ?= 10
test-reliability: install
	$(TEST_ENVIRONMENT) RELIABILITY_WRITE=1 RELIABILITY_KILLS=$(RELIABILITY_KILLS) \
		RELIABILITY_SHARDED_KILLS=$(RELIABILITY_SHARDED_KILLS) \
		$(BIN)/python -m pytest -m reliability tests/reliability

# Opt-in: the lowest versions that repositories require (`requirements` in config_sentence_transformers.json).
test-lowest: $(LOWEST)/.installed
	$(TEST_ENVIRONMENT) $(LOWEST)/bin/python $(PYTEST)

$(LOWEST)/.installed: $(REQUIREMENTS) constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python $(PIP_INSTALL) -c constraints-lowest.txt -e '.[dev]'
	touch $@

# pyright (settings in pyproject.toml) fails on imports that nothing resolves.
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Writes docs/api.md, the public surface, after a change that is meant.
api: install
	$(BIN)/python tests/api_surface.py

# Known vulnerabilities of the installed packages; asks pypi.org.
audit: install
	$(BIN)/python $(PIP_INSTALL) pip-audit
	$(BIN)/python -m pip_audit --local --skip-editable

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LOWEST) .typing build outputs .pytest_cache .ruff_cache

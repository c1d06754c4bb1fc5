# `make test` is what a change must pass; `make compare` is the quickest look at what the project does, `make compare-all`
# has every policy in it.
# PYTHON names the interpreter the virtual environment is made from: `make test PYTHON=python3.12`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' </dev/null 2>/dev/null)
# Written last, so an interrupted set-up is done again; named after the version, so another PYTHON is not ignored.
STAMP := $(VENV)/heatkv-$(VERSION).stamp
# Where the type checker looks: a fresh installation of the current source.
TYPED := build/typed

.PHONY: compare compare-all test lint types docs check-slow check-baseline baseline bench fuzz emoji clean

compare: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/heatkv compare --out results/compare

compare-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/heatkv compare --policies all --out results/compare-all

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup

# tools/size.py holds the limits of the code's size; raised for a new capability only.
lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python tools/size.py --check

# mypy follows neither the import hook of an editable installation nor the code in heatkv/__init__.py, and beside ./heatkv it
# would see a package without its policies. build/ goes first: setuptools would pack modules deleted since the last time.
types: $(STAMP)
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target $(TYPED) .
	cd $(TYPED) && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache" -p heatkv

# The site, into build/site; a warning is an error. Its pages of commands and of Python come from the package as installed.
docs: types
	NO_MKDOCS_2_WARNING=1 PYTHONPATH="$(CURDIR)" $(BIN)/mkdocs build --quiet

check-slow: $(STAMP) check-baseline docs
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -n 2 --dist loadgroup

# Bytes and fidelity of a few policies against those that are committed (docs/check.md). The statistics are committed too, so that
# the plans are the same everywhere; what was compared in an earlier run is not taken over. `make baseline` writes both anew.
BASELINE := benchmarks/baseline
BASELINE_RUN := --policies heatkv,streaming,snapkv --budgets 30%,10% --images 8 --pictures 8 --repeats 1
check-baseline: $(STAMP)
	rm -rf results/baseline
	OMP_NUM_THREADS=1 $(BIN)/heatkv compare $(BASELINE_RUN) --statistics $(BASELINE)/statistics.safetensors --out results/baseline
	$(BIN)/heatkv check results/baseline/results.json --against $(BASELINE)/results.json

baseline: $(STAMP)
	rm -rf results/baseline
	OMP_NUM_THREADS=1 $(BIN)/heatkv calibrate --samples 16 --out $(BASELINE)/statistics.safetensors
	OMP_NUM_THREADS=1 $(BIN)/heatkv compare $(BASELINE_RUN) --statistics $(BASELINE)/statistics.safetensors --out results/baseline
	cp results/baseline/results.json $(BASELINE)/results.json

# Processor time, which other programs on the machine disturb least. Then a table, as in docs/benchmarks.md.
bench: $(STAMP)
	mkdir -p results
	OMP_NUM_THREADS=1 $(BIN)/pytest benchmarks --benchmark-only --benchmark-autosave --benchmark-timer=time.process_time \
	  --benchmark-json results/bench.json
	$(BIN)/python benchmarks/suite_table.py results/bench.json

# Thousands of damaged and hostile files against every loader (SECURITY.md); `make fuzz FUZZ="--seed 1"` makes others.
FUZZ :=
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py $(FUZZ)

# Trains the embedded model again from the npm package emoji-datasource-google, unpacked in IMAGES; hours on two cores.
EMOJI := tools.emoji.train
emoji: $(STAMP)
	@[ -e "$(IMAGES)/emoji.json" ] || { echo "make emoji IMAGES=node_modules/emoji-datasource-google" >&2; exit 2; }
	$(BIN)/python -m $(EMOJI) vqvae --images "$(IMAGES)" --work results/emoji
	$(BIN)/python -m $(EMOJI) transformer --images "$(IMAGES)" --work results/emoji
	$(BIN)/python -m $(EMOJI) export --work results/emoji
	$(BIN)/python -m $(EMOJI) judge --images "$(IMAGES)" --work results/emoji

clean:
	rm -rf $(VENV) build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@case '$(VERSION)' in 3.11|3.12|3.13) ;; *) \
	  echo "HeatKV needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is $(or $(VERSION),not there). Name another: make PYTHON=python3.12" >&2; \
	  exit 2;; esac
	[ -e $@ ] || $(PYTHON) -m venv --clear $(VENV)
	rm -f $@
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

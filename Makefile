# Everything a person types. Set-up happens by itself, into .venv, on a machine with Python 3.11 or newer, pip and make.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
INSTALL := --quiet --constraint constraints.txt --editable '.[dev]'

MERGEKIT := .venv-mergekit
MERGEKIT_STAMP := $(MERGEKIT)/.installed

.PHONY: setup demo test chaos check format bench scale zoo mergekit clean

demo: setup ## sweep a small trained pair that ships with the package
	$(BIN)/transplant-ray demo

test: setup ## unit tests, spoilt inputs, integration tests
	$(BIN)/python -m pytest tests/unit tests/fuzz --numprocesses auto --dist loadfile
	$(BIN)/python -m pytest tests/integration

chaos: setup ## kill actors, tasks, nodes, trials and drivers, each at a random point
	$(BIN)/python -m pytest tests/chaos

check: setup ## lint, types, import floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## speed and memory, as ratios within one run
	$(BIN)/python tests/bench/bench_main.py
	$(BIN)/python tests/bench/bench_engine.py
	$(BIN)/python tests/bench/bench_training.py

scale: setup ## the pool, the driver and Tune beside 32 evaluators that sleep: ten minutes
	$(BIN)/python tests/bench/bench_scale.py

zoo: setup ## train the zoo again from its seeds
	$(BIN)/python jobs/build_zoo.py

setup: $(STAMP) ## install everything into .venv, pinned by constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	# uv takes half a minute, pip four; it does not read pip's settings, so pip has a try where it fails
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(BIN)/uv pip install --python $(BIN)/python $(INSTALL) || \
		$(BIN)/python -m pip install $(INSTALL)
	touch $(STAMP)

mergekit: $(MERGEKIT_STAMP) ## mergekit in a venv of its own, which takes from .venv what is there already: some seconds instead of minutes

$(MERGEKIT_STAMP): $(STAMP)
	rm -rf $(MERGEKIT)
	$(BIN)/python -m venv $(MERGEKIT)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(MERGEKIT)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	$(MERGEKIT)/bin/python -m pip install --quiet --constraint constraints.txt mergekit
	touch $(MERGEKIT_STAMP)

clean:
	rm -rf .venv $(MERGEKIT)

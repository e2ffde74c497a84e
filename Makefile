# Everything is set up in .venv from this file, pyproject.toml and constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SEEDS ?= 20
OUT ?= runs/demo

.PHONY: demo test check bench-randomness bench-gradients bench-mnist bench-accounting bench-policies bench-federation bench-hospitals bench-writers clean

.venv/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) "torch==2.13.0"
	$(PIP) -e .
	touch $@

.venv/.dev: .venv/.run
	$(PIP) -e ".[dev]"
	touch $@

demo: .venv/.run  ## the main job: four hospitals, one model, one budget
	$(BIN)/sfumato demo --seeds $(SEEDS) --out $(OUT)

test: .venv/.dev  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: .venv/.dev  ## style, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-randomness: .venv/.run  ## a million normal draws against torch.randn
	$(BIN)/python bench/randomness.py

bench-gradients: .venv/.run  ## one optimiser step, private against plain, beside the peers; ARGS="--models mlp" for less
	$(BIN)/python bench/gradients.py $(ARGS)

bench-mnist: .venv/.run  ## MNIST privately and plainly, accuracy and time; needs SFUMATO_DATA, the folder that holds mnist/
	$(BIN)/python bench/mnist.py $(ARGS)

bench-accounting: .venv/.run  ## how long accounting takes, beside dp-accounting
	$(BIN)/python bench/accounting.py $(ARGS)

bench-policies: .venv/.run  ## noise policies and schedules against fixed noise; needs SFUMATO_DATA, the folder of adult/ and mnist/; ARGS="--quick" for less
	$(BIN)/python bench/policies.py $(ARGS)

bench-federation: .venv/.run  ## one federated round beside pfl, Flower and a plain loop; ARGS="--tasks logistic mlp" for less
	$(BIN)/python bench/federation.py $(ARGS)

bench-hospitals: .venv/.run  ## federated algorithms on the hospitals, beside training alone and pooled
	$(BIN)/python bench/hospitals.py $(ARGS)

bench-writers: .venv/.run  ## MNIST by writer, with and without privacy; needs SFUMATO_DATA, the folder of mnist/ and qmnist_writers/
	$(BIN)/python bench/writers.py $(ARGS)

clean:
	rm -rf .venv bench/.envs runs build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

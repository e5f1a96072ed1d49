# Every command of the project. `make` alone lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := $(patsubst %/__init__.py,%,$(wildcard $(addsuffix /__init__.py,mtl_core train_jobs serve_app)))
DEMO := runs/demo/artifact
PORT ?= 8000
COMPOSE := MTL_UID=$$(id -u) PORT=$(PORT) docker compose -f docker/docker-compose.yml

export PYTEST_TIMEOUT ?= 300
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Hundreds of processes would each compile all of this anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv demo serve up down wheel test test-fast lint types notebook check docker-check readme-check format bench-snips bench-pair bench-train bench-weighting bench-serve bench-sweep docs clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## Create .venv and install what constraints.txt pins (PYTHON=python3.12 picks another Python)

demo: $(STAMP) ## Train on the corpus that comes with the project, then predict and compare sentences
	$(BIN)/python -m train_jobs.train --config train_jobs/configs/demo.yaml
	$(BIN)/python -m train_jobs.predict --artifact $(DEMO) \
		--text "The staff at the Grand Hotel in Lisbon were wonderful." \
		--text "Maria Lopez waited two hours in Berlin and the soup was disgusting." \
		--text "Acme Corp will open an office in Oslo in March."
	$(BIN)/python -m train_jobs.similarity --artifact $(DEMO) \
		--text "The food was delicious." \
		--text "I loved the meal." \
		--text "The train to Berlin was late."
	$(BIN)/python -m serve_app --artifact $(DEMO) --port 0 \
		--ask "The staff at the Grand Hotel in Lisbon were wonderful."

serve: $(STAMP) ## Serve what the demo trained (ARTIFACT=DIR serves another, PORT=8000)
	$(BIN)/python -m serve_app --artifact $(or $(ARTIFACT),$(DEMO)) --port $(PORT)

wheel: $(STAMP) ## Write to dist/ what the nodes of cluster.yaml install
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m build --wheel
	cp constraints.txt dist/

up: ## Serve what the demo trained from a Ray cluster in containers (docs/operations.md)
	@mkdir -p runs && umask 077 && mkdir -p docker/secrets && cd docker/secrets && \
		for name in ray_token api_keys; do test -s $$name || openssl rand -hex 32 > $$name; done
	$(COMPOSE) up --build --detach

down: ## Stop these containers
	$(COMPOSE) down

# Beside another a test may run out of time: what fails there has to pass alone.
test: $(STAMP) ## Run all tests, three files at a time, the longest first
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder || { \
		$(BIN)/python -m pytest -q -rp --last-failed --last-failed-no-failures none && \
		echo "these passed only when run again"; }

test-fast: $(STAMP) ## Run the tests that need no Ray cluster and take no more than seconds
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m "not cluster and not slow"

lint: $(STAMP) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## Check types
	$(BIN)/mypy $(PACKAGES)

notebook: $(STAMP) ## Run the quickstart notebook from top to bottom (SAVE=1 keeps its outputs)
	$(BIN)/python -m notebooks.execute $(if $(SAVE),--save)

check: lint types test ## Everything a change must pass: lint, types, test

docker-check: $(STAMP) ## Install and start in a fresh environment what the image does (minutes; TORCH_INDEX=URL)
	DOCKER_CHECK=1 $(BIN)/python -m pytest -q tests/serve_app/test_containers.py

readme-check: demo ## Train the demo, then run on it what README and docs say (15 minutes; with MTL_DATA benchmarks too, 35)
	README_CHECK=1 $(BIN)/python -m pytest -q tests/test_pages.py

format: $(STAMP) ## Sort imports, apply safe fixes, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-snips: $(STAMP) ## Measure joint intents and slots on SNIPS
	$(BIN)/python benchmarks/snips.py

bench-pair: $(STAMP) ## Measure one encoder on two data sets that share no labels
	$(BIN)/python benchmarks/disjoint_pair.py

bench-train: $(STAMP) ## Measure training beside its peers: what an epoch takes, then seconds to a score (about 70 minutes)
	$(BIN)/python -m benchmarks.train
	$(BIN)/python -m benchmarks.train.scores

bench-weighting: $(STAMP) ## Measure what a training step costs under each weighting strategy
	$(BIN)/python benchmarks/weighting.py

bench-serve: $(STAMP) ## Measure the server beside its peers (needs wrk; about 25 minutes)
	$(BIN)/python -m benchmarks.serve

bench-sweep: $(STAMP) ## Measure a sweep of heads on a frozen encoder beside one training
	$(BIN)/python benchmarks/frozen_sweep.py

docs: $(STAMP) ## Write the reference pages in docs/ from the code
	$(BIN)/python -m docs.make_reference

clean: ## Remove build leftovers and caches; runs and .venv stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	find . \( -path ./$(VENV) -o -path ./.git -o -path ./runs \) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing);" \
			"name another one: make venv PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

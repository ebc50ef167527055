# Two commands matter:  make up   (install, then serve)     make test   (install, then test)
.PHONY: up install test check unit integration kube deploy-check docs lock clean
SHELL := bash
# Bytecode is kept, whatever the environment says: without it every process compiles what it imports (vLLM: 12 s).
export PYTHONDONTWRITEBYTECODE :=

up: install            ## install everything and serve SmolLM2 on http://127.0.0.1:8000
	@.venv/bin/mooncake up $(ARGS)

install:               ## install the pinned packages into .venv (nothing to do when they are there)
	@scripts/install

check: install         ## style, types, layers
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

test: check            ## everything: style, types, layers, unit, simulation, contract, real engines, kubectl
	.venv/bin/python -m pytest

unit: install          ## unit and simulation tests, a quick look: four processes (they wait a lot), a third of the examples, nothing that must run alone
	.venv/bin/python -m pytest tests/unit tests/sim -m "not serial" \
	    -n 4 --dist worksteal --hypothesis-profile=quick

integration: install   ## only the tests with real engines
	.venv/bin/python -m pytest -m "integration"

kube: install          ## kubectl apply, scale, drain, restarts and delete under traffic, in a stand-in for Kubernetes, with times: four minutes
	.venv/bin/python -m pytest -m kube -s

deploy-check: install  ## manifests and container files: rendered, validated, checkov (which it installs into .venv-kube)
	@scripts/kube-parts || true
	.venv/bin/python -m pytest tests/deploy

docs: install          ## build/site: the documentation
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

lock: install          ## write requirements/cpu.lock anew from pyproject.toml
	@scripts/lock

clean:
	rm -rf .venv .venv-kube build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

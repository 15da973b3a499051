PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEEPSPEED := $(VENV)/deepspeed
VLLM := $(VENV)/vllm
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_WAIT_POLICY := PASSIVE  # threads that wait leave the core to others
export PYTHONPYCACHEPREFIX := $(CURDIR)/$(VENV)/pycache
# Bytecode is written there, whatever the caller's shell says: many tests start processes, and each of them would need
# ten seconds more to compile what it imports.
unexport PYTHONDONTWRITEBYTECODE
# What is imported is compiled then; compiling all that is installed takes pip three quarters of its time.
INSTALL := -m pip install --quiet --no-compile

OLDEST_PYTHON ?= python3.10
NEWEST_PYTHON ?= python3.13

.PHONY: demo test quick lint check quantised wheel docs notebooks dist compat benchmark gpu gpu-evidence test-browser test-deepspeed test-vllm clean

demo: $(VENV)/.installed  ## Pretrain, adapt three ways, save, load, merge and draw
	$(BIN)/python examples/quickstart.py

test: lint check  ## Everything that has to pass: 9 to 17 minutes on two cores
	$(MAKE) --jobs 2 --output-sync quantised wheel docs

quick: lint  ## What a change breaks first, in a minute
	$(BIN)/pytest -n 2 -m "not slow and not by_hand" tests/tensors tests/files tests/card tests/layers tests/tuner tests/test_architecture.py

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: $(VENV)/.installed
	$(BIN)/pytest -n 2 --dist worksteal

quantised: $(VENV)/quantised/.installed  ## Tests on weights quantised by packages that would slow every import down
	PYTHONPATH=$(VENV)/quantised $(BIN)/pytest -n 2 tests/layers/test_packed.py tests/layers/test_packed_training.py tests/tensors/test_quantised.py

wheel: $(VENV)/.installed  ## Build the wheel, and try it in an environment of its own
	set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(BIN)/python -m build --wheel --outdir "$$folder" . ; \
	$(PYTHON) -m venv "$$folder/venv"; \
	export PYTHONPYCACHEPREFIX="$$folder/pycache"; \
	"$$folder/venv/bin/python" $(INSTALL) "$$(ls $$folder/*.whl)[test]"; \
	cp -r tests examples benchmarks docs pyproject.toml README.md "$$folder"; \
	cd "$$folder"; venv/bin/pytest -m smoke

docs: $(VENV)/.installed  ## The documentation site, into .venv/site; every warning is an error, also of links inside it
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -d $(VENV)/doctrees docs $(VENV)/site

notebooks: $(VENV)/.installed  ## Run the notebooks and keep their outputs; downloads models and data, 20 minutes on one core
	$(BIN)/python docs/run_notebooks.py

dist: $(VENV)/.installed  ## The wheel and the source distribution into dist, checked; the latter is tried here, the former by make wheel
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(PYTHON) -m venv "$$folder"; \
	"$$folder/bin/python" $(INSTALL) twine check-wheel-contents; \
	"$$folder/bin/twine" check --strict dist/*; \
	"$$folder/bin/check-wheel-contents" dist/*.whl; \
	tar --extract --gzip --file dist/*.tar.gz --directory "$$folder" --strip-components 1; \
	"$$folder/bin/python" $(INSTALL) "$$(ls $(CURDIR)/dist/*.tar.gz)[test]"; \
	rm -r "$$folder/peft_child"; cd "$$folder"; bin/pytest -m smoke

compat: $(VENV)/oldest.txt $(VENV)/newest.txt  ## The tests with the oldest versions that pyproject.toml promises, and with the newest

$(VENV)/oldest.txt: export PIP_CONSTRAINT := $(CURDIR)/constraints-oldest.txt
$(VENV)/newest.txt: export PIP_CONSTRAINT :=
$(VENV)/oldest.txt: COMPAT_PYTHON := $(OLDEST_PYTHON)
$(VENV)/newest.txt: COMPAT_PYTHON := $(NEWEST_PYTHON)
$(VENV)/oldest.txt $(VENV)/newest.txt: pyproject.toml constraints-oldest.txt
	rm -rf $(basename $@)
	$(COMPAT_PYTHON) -m venv $(basename $@)
	$(basename $@)/bin/python $(INSTALL) ".[test,examples,plots]"
	$(basename $@)/bin/pytest -n 2 --dist worksteal -W default
	$(basename $@)/bin/pip freeze > $@

benchmark: $(VENV)/.installed  ## All methods side by side, into docs: 40 minutes on two cores; FLAGS=--long takes longer
	$(BIN)/python -m benchmarks.run --output docs $(FLAGS)

gpu: $(VENV)/.installed  ## On a machine with a GPU: its tests, steps, memory and the choice, into docs; 8 minutes
	$(BIN)/python -m benchmarks.gpu --output docs

gpu-evidence: $(VENV)/.installed  ## On a machine with a GPU and a network: what a language model of 1.7B learns and forgets; hours
	$(BIN)/python -m benchmarks.sft sft gsm8k --gpu --output runs/gpu_evidence --report docs/results/gpu

test-browser: $(VENV)/browser/.installed  ## The site and the pages of `inspect --html` in a browser; needs Chromium
	PYTHONPATH=$(VENV)/browser $(BIN)/pytest -m "by_hand or not by_hand" -k browser tests/test_docs.py tests/cli/test_pages.py

$(VENV)/browser/.installed: $(VENV)/.installed
	$(BIN)/python $(INSTALL) --target $(VENV)/browser playwright
	touch $@

# The tests' two processes share memory through an operator that DeepSpeed compiles when it is first used.
test-deepspeed: $(DEEPSPEED)/.installed  ## Training with DeepSpeed, in an environment of its own; on two busy cores 16 minutes
	PATH="$(CURDIR)/$(DEEPSPEED)/bin:$$PATH" TORCH_EXTENSIONS_DIR="$(CURDIR)/$(DEEPSPEED)/extensions" \
	DS_ACCELERATOR=cpu $(DEEPSPEED)/bin/pytest tests/integrations/test_deepspeed.py tests/tensors/test_partitioned.py

# Without its dependencies: some of them are for GPUs alone. Nothing is compiled here.
$(DEEPSPEED)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEEPSPEED)
	$(DEEPSPEED)/bin/python $(INSTALL) --editable ".[test]"
	$(DEEPSPEED)/bin/python $(INSTALL) setuptools wheel hjson ninja py-cpuinfo msgpack einops pydantic
	DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(DEEPSPEED)/bin/python $(INSTALL) --no-deps --no-build-isolation deepspeed
	touch $@

# The tests do without PEFT, as an environment that only serves; the example trains as well.
test-vllm: $(VLLM)/.installed  ## Serving with vLLM, in an environment of its own of 3 GB
	$(VLLM)/bin/pytest --show-capture=no tests/integrations/test_vllm*.py
	set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	PYTHONPATH=$(VLLM)/training $(VLLM)/bin/python examples/serve.py --output "$$folder"; \
	$(VLLM)/bin/python -m benchmarks.serving --size tiny --turns 1 --output "$$folder"

# The file names every package, so that torchaudio and torchvision, which vLLM asks for, can be left out.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	PIP_CONSTRAINT= $(VLLM)/bin/python $(INSTALL) --no-deps --requirement constraints-vllm.txt
	PIP_CONSTRAINT= $(VLLM)/bin/python $(INSTALL) --no-deps --no-build-isolation --editable .
	$(VLLM)/bin/python $(INSTALL) --no-deps --target $(VLLM)/training peft accelerate
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --editable ".[dev,examples,plots]"
	touch $@

$(VENV)/quantised/.installed: $(VENV)/.installed
	$(BIN)/python $(INSTALL) --no-deps --target $(VENV)/quantised bitsandbytes gguf hqq termcolor torchao
	$(BIN)/python -W ignore -m compileall -qq $(VENV)/quantised  # torchao would warn, and warnings are errors
	touch $@

clean:
	rm -rf $(VENV) runs

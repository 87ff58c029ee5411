# make train   sets everything up and trains Sequencer2D on scikit-learn's digits
# make test    sets everything up and runs the tests
# make setup   the environment alone, in .venv
# make parity  the tests against public PyTorch implementations, in an environment of their own (several GB)
# make kernels the GPU kernels compiled for an H200 without one, in an environment of its own, each where it is tightest;
#              SHAPES=all: at every shape; JAX=0.11.2: gradients in bfloat16, with that JAX
# make soak    three minutes of training under kill -9, beside a run that nobody kills; CI runs it
# make audit   known weaknesses of the installed packages, by pip-audit; needs the network
# make lint    ruff, as CI runs it

# Any of these that is 3.12 or newer; PYTHON=... overrides.
PYTHON ?= $(firstword $(foreach p,python3.12 python3.13 python3.14 python3 python,$(shell \
  $(p) -c 'import sys; sys.version_info >= (3, 12) and print("$(p)")' 2>/dev/null)))
RUN := .venv/bin/python
KERNELS := .venv-kernels$(addprefix -,$(JAX))
# The other tests of these files need no GPU's compiler, and make test has them.
SELECTED = $(if $(SHAPES),-m '') -k '$(if $(JAX),bfloat16 and grad,forward or grad) or training_step'

.PHONY: setup train test parity kernels soak audit lint clean

train: setup
	$(RUN) -m lra_jax.main --config configs/sequencer2d.py:digits --workdir runs/digits

test: setup
	$(RUN) -m pytest -n 2 -q

setup: .venv/ready

parity: .venv-parity/ready
	.venv-parity/bin/python -m pytest -n 2 -q tests/parity

kernels: $(KERNELS)/ready
	$(KERNELS)/bin/python -m pytest -n 2 -q tests/kernels/test_compiled.py tests/test_compile.py $(SELECTED)

soak: setup
	$(RUN) tests/soak.py --minutes 3 --kills 5

audit: setup
	$(RUN) -m pip install --quiet --disable-pip-version-check pip-audit
	$(RUN) -m pip_audit --skip-editable

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

.venv/ready: setup.cfg
	$(call environment,.venv,test)
	touch $@

.venv-parity/ready: .venv/ready
	$(call beside,.venv-parity,parity)
	.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check --no-deps timm
	touch $@

# JAX's CUDA plugin without CUDA: the assembler, ptxas, is that of the CUDA toolkit in PATH.
$(KERNELS)/ready: .venv/ready
	$(call beside,$(KERNELS),test)
	$(KERNELS)/bin/python -m pip install --quiet --disable-pip-version-check $(addprefix jax==,$(JAX)) nvidia-cuda-nvdisasm
	$(KERNELS)/bin/python -c 'import jax; print("\n".join(f"{p}=={jax.__version__}" for p in ("jax-cuda13-plugin", "jax-cuda13-pjrt")))' \
	  | $(KERNELS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement /dev/stdin
	touch $@

define environment
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { \
	  echo "error: lra_jax needs Python 3.12 or newer, found $$($(or $(PYTHON),python3) --version 2>&1 | head -n 1);" \
	    "install it, or name one: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(1)
	$(call newest_pip,$(1))
	$(call editable,$(1),$(2))
endef

# An environment that has .venv's packages but for those that are installed in it.
define beside
	.venv/bin/python -m venv $(1)
	$(call newest_pip,$(1))
	.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	$(call editable,$(1),$(2))
endef

# The pip that Python 3.12 brings has known weaknesses.
newest_pip = $(1)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
# setuptools warns of every editable installation.
editable = PYTHONWARNINGS=ignore $(1)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$(2)]"

clean:
	rm -rf .venv .venv-parity .venv-kernels* build dist *.egg-info runs

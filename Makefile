# Thin over the `pollen` command; `make help` lists the targets.
#
#   make pretrain                  trains the demo here: no GPU, no account
#   make pretrain RECIPE=oxe       any recipe of recipes/
#   make pretrain STEPS=3000       continues the same run further
#   make pretrain SET="a.b=c d=e"  overrides recipe keys

RECIPE ?= demo
STEPS ?=
SET ?=
CORPUS ?=
ARGS ?=
FOLDER ?=

CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
POLLEN := $(TARGET)/debug/pollen
OVERRIDES := $(foreach pair,$(SET),--set '$(pair)') $(if $(STEPS),--set train.steps=$(STEPS))

.DEFAULT_GOAL := help
.PHONY: help setup build build-cuda dist pretrain plan test test-faults test-interop test-large bench gpu-check gpu-bench bench-loader bench-memory bench-checkpoint lint fmt demo-data

help: ## Lists the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

setup: ## Installs the all-reduce library and the demo's S3 server into .pollen/, without root
	@scripts/install-gloo.sh
	@scripts/install-seaweedfs.sh

build: ## Builds the pollen command
	@$(CARGO) build --locked --workspace

build-cuda: ## Builds the pollen command for NVIDIA GPUs, optimised; needs no CUDA to build
	@$(CARGO) build --locked --release -p pollen-cli --features cuda

dist: ## Builds for size and packs what a GPU machine needs, 24 MiB at most: target/dist/pollen-cuda.tar.xz
	@$(CARGO) build --locked --profile dist -p pollen-cli --features cuda
	@scripts/dist.sh $(TARGET)/dist/pollen

pretrain: setup build ## Trains RECIPE (default demo), or continues its newest unfinished run
	@$(POLLEN) launch $(RECIPE) $(OVERRIDES)

plan: build ## Prints what RECIPE would do and cost, without starting it
	@$(POLLEN) plan $(RECIPE) $(OVERRIDES)

test: setup ## Runs all tests: units, golden vectors, two workers killed and resumed
	@$(CARGO) test --locked --workspace --features pollen-cli/faults

test-faults: setup ## Kills workers at every place of a run: POLLEN_FAULTS=all|PART-OF-A-NAME|K/N (docs/faults.md)
	@POLLEN_FAULTS=$${POLLEN_FAULTS:-all} $(CARGO) test --locked --workspace --features pollen-cli/faults --test faults

test-interop: setup build ## Runs on moto and Azurite; opens what Pollen writes with real Python packages (gigabytes)
	@scripts/test-interop-storage.sh
	@scripts/test-interop-lerobot.sh $(POLLEN)
	@scripts/test-interop-weights.sh $(POLLEN)

test-large: build ## Takes steps of the 947M model on the CPU, saves and loads it, in at most 20 GB (20 minutes)
	@scripts/test-large.py $(POLLEN)

bench: ## Measures training step and policy on the CPU beside the same graph in PyTorch (gigabytes)
	@$(CARGO) build --locked --release -p pollen-cli
	@scripts/bench-step.sh $(TARGET)/release/pollen --micro-batch 2 8 --operation-batch 2 $(ARGS)

gpu-check: build-cuda ## Checks that a GPU computes what it should, in stages; a run that was cut goes on
	@$(TARGET)/release/pollen gpu-check $(ARGS)

gpu-bench: build-cuda ## The same with the 947M model on a GPU; a run that was cut goes on
	@scripts/bench-step.sh $(TARGET)/release/pollen --device cuda --model configs/model/flower.toml \
		--cameras 1 2 --chunk 10 20 --micro-batch 64 128 256 32 16 --precision bf16 --pytorch-precision bf16 autocast \
		--compile none default max-autotune-no-cudagraphs --operation-batch 64 --rounds 1 --out target/gpu-bench $(ARGS)

bench-memory: ## Loads a million samples and checks that memory stays flat (many minutes)
	@$(CARGO) test --locked --package pollen-dataloader --test loader -- --ignored --nocapture a_million

bench-loader: ## Measures the loader on CORPUS, made by benches/loader/prepare.py (needs cmake and nasm)
	@test -n "$(CORPUS)" || { echo 'set CORPUS to a folder or URL, see docs/benchmarks.md' >&2; exit 2; }
	@$(CARGO) build --locked --release -p pollen-dataloader --example bench_loader --features pollen-dataloader/turbo
	@$(TARGET)/release/examples/bench_loader --data $(CORPUS)

bench-checkpoint: setup ## Measures checkpoints in FOLDER (default: temporary): rate beside plain write + fsync, stall of a step
	@$(CARGO) build --locked --release -p pollen-cli -p pollen-checkpoints --bin pollen --example bench_checkpoint
	@$(TARGET)/release/examples/bench_checkpoint $(if $(FOLDER),--folder $(FOLDER))
	@python3 benches/checkpoint/stall.py $(TARGET)/release/pollen $(FOLDER)

lint: ## Checks formatting, lints, documentation and the repository's own rules
	@$(CARGO) fmt --all --check
	@$(CARGO) clippy --locked --workspace --all-targets --features pollen-cli/faults -- -D warnings
	@$(CARGO) clippy --locked -p pollen-cli --features cuda -- -D warnings
	@RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps --quiet
	@scripts/check-repo.sh

fmt: ## Formats the code
	@$(CARGO) fmt --all

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

CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
POLLEN := $(TARGET)/debug/pollen
OVERRIDES := $(foreach pair,$(SET),--set '$(pair)') $(if $(STEPS),--set train.steps=$(STEPS))

.DEFAULT_GOAL := help
.PHONY: help setup build pretrain plan test test-interop bench-loader lint fmt demo-data

help: ## Lists the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: ## Installs the all-reduce library and the demo's S3 server into .pollen/, without root
	@scripts/install-gloo.sh
	@scripts/install-seaweedfs.sh

build: ## Builds the pollen command
	@$(CARGO) build --locked --workspace

pretrain: setup build ## Trains RECIPE (default demo), or continues its newest unfinished run
	@$(POLLEN) launch $(RECIPE) $(OVERRIDES)

plan: build ## Prints what RECIPE would do and cost, without starting it
	@$(POLLEN) plan $(RECIPE) $(OVERRIDES)

test: setup ## Runs all tests: units, golden vectors, two workers killed and resumed
	@$(CARGO) test --locked --workspace --features pollen-cli/faults

test-interop: setup build ## Runs on moto and Azurite; opens what Pollen writes with real Python packages (gigabytes)
	@scripts/test-interop-storage.sh
	@scripts/test-interop-lerobot.sh $(POLLEN)
	@scripts/test-interop-weights.sh $(POLLEN)

bench-loader: ## Measures the loader on CORPUS, made by benches/loader/prepare.py (needs cmake and nasm)
	@test -n "$(CORPUS)" || { echo 'set CORPUS to a folder or URL, see docs/benchmarks.md' >&2; exit 2; }
	@$(CARGO) build --locked --release -p pollen-dataloader --example bench_loader --features pollen-dataloader/turbo
	@$(TARGET)/release/examples/bench_loader --data $(CORPUS)

lint: ## Checks formatting, lints, documentation and the repository's own rules
	@$(CARGO) fmt --all --check
	@$(CARGO) clippy --locked --workspace --all-targets --features pollen-cli/faults -- -D warnings
	@RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps --quiet
	@scripts/check-repo.sh

fmt: ## Formats the code
	@$(CARGO) fmt --all

# `make` alone lists what there is. CI runs `make check`, and nothing else.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

# Tools that scripts/install.sh built are found before those of the machine.
TOOLS = . scripts/environment.sh;
NEXTEST = $(TOOLS) cargo nextest run --locked --features failpoints

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: ## watch changes of a private PostgreSQL arrive (Ctrl-C ends it and prints the proof)
	@scripts/install.sh demo
	cargo run --release --locked -- demo $(if $(SECONDS_MAX),--seconds $(SECONDS_MAX))

.PHONY: test
test: install-test ## all tests, against real servers, with 10 seeded kills
	$(NEXTEST)

.PHONY: check
check: lint deny test ## exactly what CI runs: format, lints, tests, tidy, dependencies

.PHONY: lint
lint: ## formatting and clippy, warnings are errors
	cargo fmt --check
	cargo clippy --locked --all-targets --features failpoints -- -D warnings

# The advisory database is fetched from GitHub, so it is a target of its own: CI has no way there.
.PHONY: deny
deny: install-check ## licences, banned crates and sources of the dependencies
	$(TOOLS) cargo deny --locked check bans licenses sources

.PHONY: advisories
advisories: install-check ## known vulnerabilities of the dependencies (fetches the database)
	$(TOOLS) cargo deny --locked check advisories

.PHONY: tidy
tidy: ## the rules of tests/tidy.rs alone: layers, sizes, links
	cargo test --locked --test tidy

.PHONY: chaos
chaos: install-test ## 100 kills at random moments, and 1 GB of WAL with a target down; nothing lost
	export WALRACE_CHAOS_KILLS=$${WALRACE_CHAOS_KILLS:-100} WALRACE_CHAOS_WAL_MB=$${WALRACE_CHAOS_WAL_MB:-1024}; \
	    $(NEXTEST) --profile chaos -E 'test(/chaos/)'

.PHONY: test-matrix
test-matrix: install-matrix ## the tests against PostgreSQL 14 to 18, one after the other
	for version in 14 15 16 17 18; do \
	    export WALRACE_PG_VERSION=$$version; $(NEXTEST) --test it; done

.PHONY: bench
bench: ## capture and sinks beside their yardsticks; writes bench/README.md (BENCH='--rows 100000')
	@scripts/install.sh bench
	cargo build --release --locked
	$(TOOLS) python3 bench/run.py $(BENCH)

.PHONY: bench-sinks
bench-sinks: ## the part about sinks alone (BENCH='--only redis_stream')
	@scripts/install.sh bench
	cargo build --release --locked
	$(TOOLS) python3 bench/sinks.py $(BENCH)

.PHONY: bench-crowd
bench-crowd: install-test ## nine healthy sinks beside three bad ones, 5,000 changes a second
	cargo build --release --locked
	$(TOOLS) python3 bench/crowd.py $(BENCH)

.PHONY: fmt
fmt: ## format the code
	cargo fmt

.PHONY: fuzz
fuzz: ## fuzz every parser of foreign bytes, FUZZ_SECONDS each (needs nightly and cargo-fuzz)
	cd fuzz && for target in $$(cargo +nightly fuzz list); do \
	    cargo +nightly fuzz run $$target -- -max_total_time=$${FUZZ_SECONDS:-60}; done

.PHONY: clean
clean: ## remove what was built (not what was installed)
	cargo clean

.PHONY: install-test
install-test:
	@scripts/install.sh test

.PHONY: install-matrix
install-matrix:
	@scripts/install.sh matrix

.PHONY: install-check
install-check:
	@scripts/install.sh check

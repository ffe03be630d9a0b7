# Everything there is to do with this repository. `make help` lists it.
#
# A Rust toolchain, gcc and make are needed; what else a target uses is installed by it (Debian, as root) or named by it.

CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
HOST := x86_64-unknown-linux-gnu
# As in: make run ARGS="--listen [::]:8080 --executors 2"
ARGS ?= --listen 127.0.0.1:8080
# The features that are part of the interface.
FEATURES := axum,tokio,glommio
# What `make semver` compares with.
BASELINE ?= $(shell git describe --tags --abbrev=0 2>/dev/null)
# In order of the time they take, the shortest first.
PROOFS ?= spread panics cycles activation crash-loop bodies scale idle orders escapes upgrades least-loaded ramp stall faults soak

.PHONY: help run test test-model test-asan check advisories msrv semver bench bench-messages bench-peers proofs clean toolchain test-tools bench-tools proof-tools

help:
	@echo 'make run          build (release) and serve on 127.0.0.1:8080; other flags in ARGS="..."'
	@echo 'make test         every test: unit, integration, documentation, examples, of the measuring programs; then test-model, test-asan'
	@echo 'make test-model   every interleaving of the inbox, its wake-up and calls (with loom)'
	@echo 'make test-asan    the tests of what has unsafe code, and of whole servers, under AddressSanitizer'
	@echo 'make check        formatting, lints, documentation, licences (with cargo-deny)'
	@echo 'make advisories   known defects of dependencies (with cargo-deny and the network)'
	@echo 'make msrv         does the oldest Rust that Cargo.toml states compile it? (with rustup and that toolchain)'
	@echo 'make semver       does the interface break that of the last tag, or BASELINE=REVISION? (with cargo-semver-checks)'
	@echo 'make bench        micro benches: driver, inbox, steering, timers'
	@echo 'make bench-messages  calls between executors beside channels and sockets; flags in MESSAGES_ARGS="..." (about 15 minutes)'
	@echo 'make bench-peers  cost of a request beside rivals; other flags in PEERS_ARGS="..." (about 25 minutes)'
	@echo '                  PEERS_ARGS=adapters: closure, hyper, tower and axum beside tokio; PEERS_ARGS=instructions: counted'
	@echo 'make proofs       long runs (PROOFS in the Makefile names all); which ones in PROOFS="..."; flags in PROOFS_ARGS'

run: toolchain
	$(CARGO) run --release --bin ringleader -- serve $(ARGS)

test: toolchain test-tools
	$(CARGO) test --features $(FEATURES)
	$(CARGO) test --package ringleader-peers --package ringleader-proofs
	$(MAKE) test-model
	$(MAKE) test-asan

# LOOM_MAX_PREEMPTIONS=3 looks further, and takes a minute more.
test-model: toolchain
	$(CARGO) test --package ringleader-model

# The sanitizer is not stable yet, but every stable x86-64 toolchain has it: RUSTC_BOOTSTRAP=1 lets it be used. A target
# is named so that build scripts and procedural macros stay without it. What is tested is what has unsafe code, and whole
# servers: messages between their executors, starts that fail, stops, restarts.
WITH_ASAN = RUSTC_BOOTSTRAP=1 RUSTFLAGS='-Zsanitizer=address' LSAN_OPTIONS=suppressions=$(CURDIR)/tests/lsan-suppressions.txt \
	$(CARGO) test --target $(HOST)
# It is about time, which the sanitizer changes: most of its thousand wakes are then lost, and each costs 250 ms.
SLOW_WITH_ASAN = --skip a_wake_that_glommio_loses
test-asan: toolchain
ifeq ($(shell uname -m),x86_64)
	$(WITH_ASAN) --lib -- net:: executor:: sys:: steering:: files:: shard_local:: blocking:: $(SLOW_WITH_ASAN)
	$(WITH_ASAN) --test integration -- peers:: lifecycle:: shard:: start:: testing:: embedding::a_server
else
	@echo 'test-asan: skipped, it is set up for x86-64 only'
endif

check: toolchain
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --all-features -- -D warnings
	@for features in '' axum tokio glommio; do \
		echo "features: $${features:-none}"; \
		$(CARGO) clippy --quiet --lib --no-default-features --features "$$features" -- -D warnings || exit 1; \
	done
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --no-deps --lib --no-default-features
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --no-deps --all-features
	$(CARGO) build --examples
	@if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny check bans licenses sources; \
	else echo 'check: cargo-deny is not installed; licences and sources of dependencies were not looked at'; fi

# Apart from `check`: it needs the network, and what it says changes without a change here.
advisories: toolchain
	$(CARGO) deny check advisories

# Apart from `check`: not everybody has that toolchain. Whatever its lints say is the present one's matter.
msrv: MSRV = $(shell sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
msrv: toolchain
	@rustup run $(MSRV) cargo --version >/dev/null 2>&1 || \
		{ echo 'Rust $(MSRV) is missing: rustup toolchain install $(MSRV) --profile minimal' >&2; exit 1; }
	rustup run $(MSRV) cargo check --lib --bins --features $(FEATURES)

# Apart from `check`: it needs something to compare with. The feature `internals` is no part of the interface.
semver: toolchain
	@test -n '$(BASELINE)' || { echo 'there is no tag yet; name what to compare with: make semver BASELINE=REVISION' >&2; exit 1; }
	@$(CARGO) semver-checks --version >/dev/null 2>&1 || \
		{ echo 'cargo-semver-checks is missing: cargo install cargo-semver-checks --locked' >&2; exit 1; }
	$(CARGO) semver-checks --package ringleader --baseline-rev $(BASELINE) --only-explicit-features --features $(FEATURES)

bench: toolchain
	$(CARGO) bench --features internals --bench '*'

bench-messages: toolchain
	$(CARGO) build --release --package ringleader-peers --bin bench-messages
	$(TARGET)/release/bench-messages $(MESSAGES_ARGS)

bench-peers: toolchain bench-tools
	$(CARGO) build --release --package ringleader --package ringleader-peers
	$(TARGET)/release/bench-peers $(PEERS_ARGS)

proofs: toolchain bench-tools proof-tools
	$(CARGO) build --release --package ringleader --package ringleader-proofs --package ringleader-peers
	@failed=; for proof in $(PROOFS); do \
		echo "== $$proof"; \
		$(TARGET)/release/ringleader-proofs $$proof --server $(TARGET)/release/ringleader $(PROOFS_ARGS) || failed="$$failed $$proof"; \
	done; \
	if [ -n "$$failed" ]; then echo "not met:$$failed" >&2; exit 1; fi

clean:
	$(CARGO) clean

toolchain:
	@command -v $(CARGO) >/dev/null || { echo 'cargo is missing: install Rust, 1.88 or later (https://rustup.rs)' >&2; exit 1; }
	@command -v cc >/dev/null || { echo 'cc is missing: install gcc (Debian: apt-get install gcc)' >&2; exit 1; }

# COMMAND:PACKAGE of Debian.
test-tools: TOOLS = curl:curl strace:strace python3:python3
proof-tools: TOOLS = systemd-socket-activate:systemd
bench-tools: TOOLS = wrk:wrk perf:linux-perf taskset:util-linux curl:curl strace:strace ip:iproute2
test-tools bench-tools proof-tools:
	@missing=; for tool in $(TOOLS); do \
		command -v $${tool%:*} >/dev/null || missing="$$missing $${tool#*:}"; \
	done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing$$missing"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing; \
	else \
		echo "needed, and not installed:$$missing (Debian: apt-get install$$missing)" >&2; exit 1; \
	fi

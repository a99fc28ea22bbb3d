# Everything a person or CI does with this project. `make` alone lists it.

CARGO      ?= cargo
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
BIN        := $(TARGET_DIR)/release/udp-fanout

# make demo
MODE  ?= tc_ebpf
COUNT ?= 30000
# make soak
SOAK_MINUTES ?= 10
# make fuzz
FUZZ_SECONDS ?= 60
# make run
CONFIG ?= config/udp-fanout.toml
# make test-kernels; none: those of scripts/test-kernels.sh
KERNELS ?=
# make install
PREFIX     ?= /usr/local
SYSCONFDIR ?= /etc
DESTDIR    ?=
# make image
IMAGE      ?= udp-fanout:latest
ENGINE     ?=
BASE       ?=
RUST_IMAGE ?=
IMAGE_ARGS ?=
# make vmlinux
BTF ?= /sys/kernel/btf/vmlinux

export CARGO

.DEFAULT_GOAL := help
.PHONY: help deps build run demo soak test test-kernels test-systemd fuzz lint fmt bench bench-kernel install deb image clean vmlinux config-docs

help: ## List the targets
	@echo 'udp-fanout: make TARGET [NAME=value ...]'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

deps: ## Install the Debian packages that are missing (as root or through sudo) and check the Rust toolchain
	@scripts/deps.sh build run test lint

build: ## Build the daemon: target/release/udp-fanout
	@scripts/deps.sh build
	$(CARGO) build --release --locked

run: ## Run the daemon on config/udp-fanout.toml, or on CONFIG=file
	@scripts/deps.sh build
	$(CARGO) run --release --locked -- run --config $(CONFIG)

demo: ## Show it at work in network namespaces: MODE=tc_ebpf (default) or userspace, COUNT=30000
	@scripts/deps.sh build run
	$(CARGO) build --profile demo --locked --bin udp-fanout
	@scripts/as-root.sh 'make demo' $(TARGET_DIR)/demo/udp-fanout demo --mode $(MODE) --count $(COUNT)

soak: ## Forward in both modes for SOAK_MINUTES=10 under reloads, link and health flaps: nothing lost, nothing grown
	@scripts/deps.sh build run
	$(CARGO) build --release --locked --bin udp-fanout
	$(CARGO) build --release --locked --package udp-fanout-lab --features soak --bin soak
	@scripts/as-root.sh 'make soak' $(TARGET_DIR)/release/soak --daemon $(BIN) --minutes $(SOAK_MINUTES)

test: ## Run every test: unit, BPF (root_*), network namespaces (netns_*); all, or it fails
	@scripts/deps.sh build run test
	@scripts/test.sh $(ARGS)

test-kernels: ## Run the BPF tier and some of the network tier under Debian's kernels, emulated: KERNELS="5.10 6.1 ..."
	@scripts/deps.sh build run test kernels
	@scripts/test-kernels.sh build
	@scripts/as-root.sh 'make test-kernels' scripts/test-kernels.sh run $(KERNELS)

test-systemd: deb ## Try the package under systemd, on an emulated machine: restarts, kills, upgrades, removal
	@scripts/deps.sh build run test kernels
	@KERNEL_TESTS=netns scripts/test-kernels.sh build
	@scripts/as-root.sh 'make test-systemd' env KERNEL_ONLY=systemd:: KERNEL_INIT=systemd scripts/test-kernels.sh run 6.1

fuzz: ## Feed parsers and the kernel program with inputs that libFuzzer makes up, FUZZ_SECONDS=60 each: ARGS='TARGET ...'
	@scripts/deps.sh build run fuzz
	@FUZZ_SECONDS='$(FUZZ_SECONDS)' scripts/fuzz.sh $(ARGS)

config-docs: ## Rewrite config/reference.toml and the tables of keys in docs/CONFIGURATION.md from the program's types
	UPDATE_DOCS=1 $(CARGO) test --locked --lib config::tests::generated

lint: ## Check formatting, lints, scripts, YAML, the Dockerfile, the systemd unit and licences
	@scripts/deps.sh build lint
	@scripts/lint.sh

fmt: ## Format the Rust and C sources
	@scripts/deps.sh build lint
	$(CARGO) fmt --all
	$(CARGO) fmt --manifest-path fuzz/Cargo.toml
	clang-format -i bpf/*.c bpf/*.h benches/*/*.c lab/src/*.c

bench: ## Run the benchmarks, beside the programs that others use instead (installs them): ARGS=--quick
	@scripts/deps.sh build run test bench
	@scripts/bench.sh $(ARGS)

bench-kernel: ## Compare the kernel program with the least that any could do, and with other ways through the kernel
	@scripts/deps.sh build run test bench
	@scripts/bench.sh --bench kernel -- $(ARGS)

install: ## Install what `make build` made: PREFIX=/usr/local, SYSCONFDIR=/etc, DESTDIR=
	@BIN='$(BIN)' PREFIX='$(PREFIX)' SYSCONFDIR='$(SYSCONFDIR)' DESTDIR='$(DESTDIR)' scripts/install.sh

deb: build ## Make a Debian package of what `make build` makes, in target/debian: DEBFULLNAME=, DEBEMAIL= name the maintainer
	@scripts/deps.sh build package
	@BIN='$(BIN)' OUT='$(TARGET_DIR)/debian' scripts/deb.sh

image: ## Build the container image IMAGE=udp-fanout:latest with docker, podman or buildah: BASE=, RUST_IMAGE=
	@IMAGE='$(IMAGE)' ENGINE='$(ENGINE)' BASE='$(BASE)' RUST_IMAGE='$(RUST_IMAGE)' IMAGE_ARGS='$(IMAGE_ARGS)' scripts/image.sh

clean: ## Remove what was built
	$(CARGO) clean

vmlinux: ## Regenerate vmlinux/vmlinux.h from BTF=/sys/kernel/btf/vmlinux
	@scripts/deps.sh run
	@scripts/vmlinux.sh '$(BTF)' vmlinux/vmlinux.h

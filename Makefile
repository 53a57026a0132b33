# Gaia's front door: `make help` lists what there is.
#
# Cargo is always asked, since only it knows what is out of date. What it makes is copied to out/ only where it changed,
# so that make knows what is out of date from there on.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Cargo and the kernel's build each use all cores by themselves.
.NOTPARALLEL:

# --- What to run ------------------------------------------------------------------------------------------------

# The graph and the device's settings that `make run` boots with. Images in the graph are those of out/branes.
GRAPH  ?= examples/all.zgraph.toml
CONFIG ?= examples/gaia.toml
# The ports of this machine behind which the appliance answers requests and its operators, the path that is asked until it answers, and
# its size.
PORT     ?= 8080
CONTROL  ?= 7250
URL_PATH ?= /hello
MEMORY   ?= 512
CPUS     ?= 2
# The machine's disk, made once and kept over runs; empty for a machine without one.
DATA     ?= out/data.img
# Not empty: the machine reaches this machine's network. What branes may reach of it, the graph says.
ONLINE   ?=
# Where `make install` puts the command, and below which folder, for whoever packs it.
PREFIX   ?= /usr/local
DESTDIR  ?=

# --- Where things are -------------------------------------------------------------------------------------------

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/gaia
# One target directory for each compiler, shared by all clones: Wasmtime takes minutes, and once is enough.
export CARGO_TARGET_DIR := $(CACHE)/target-$(or $(shell rustc -vV 2>/dev/null | sed -n 's/^commit-hash: \(.\{9\}\).*/\1/p'),unknown)
# To cargo, two clones are one: it knows the crates of a workspace by their place in it, and what is out of date by time. So
# after another clone has built here, all files of this one are made new.
ifneq ($(shell cat $(CARGO_TARGET_DIR)/clone 2>/dev/null),$(CURDIR))
$(shell mkdir -p $(CARGO_TARGET_DIR) && find . \( -path ./out -o -path ./.git \) -prune -o -type f -exec touch {} + && \
	printf %s '$(CURDIR)' >$(CARGO_TARGET_DIR)/clone)
endif
# No path of the machine that built it gets into a binary. Cargo compiles everything anew when these flags differ, so
# the clone's own path may not stand here; it need not, because cargo names the workspace's files relative to its root.
REMAP := --remap-path-prefix=$(or $(CARGO_HOME),$(HOME)/.cargo)=/cargo --remap-path-prefix=$(CARGO_TARGET_DIR)=/target
export CARGO_TARGET_WASM32_WASIP2_RUSTFLAGS := $(REMAP)
# The relocations of a static-pie are packed: 24 times smaller, and the whole system lives in memory.
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_MUSL_RUSTFLAGS := $(REMAP) -Clink-arg=-Wl,-z,pack-relative-relocs
# Set, it would hide both.
unexport RUSTFLAGS
# cargo-deny lives there.
export PATH := $(CACHE)/tools/bin:$(PATH)

# Every call of cargo has these: one set of profile flags, so each dependency is compiled once for each target.
FLAGS := --release --locked
# The default target is set in .cargo/config.toml.
BUILT := $(CARGO_TARGET_DIR)/x86_64-unknown-linux-musl/release
GUESTS_BUILT := $(CARGO_TARGET_DIR)/wasm32-wasip2/release/examples

TOOLS  := gaia gaia-image gaia-qemu gaia-debug gaia-hostile gaia-trivial
# Each file beside lib.rs and build.rs is a guest. Cargo writes a guest's file with `_` where its name has `-`.
GUESTS := $(filter-out lib build,$(notdir $(basename $(wildcard tests/branes/*.rs))))
BRANES := $(foreach guest,$(GUESTS),out/branes/$(subst _,-,$(guest)).wasm)

# Fuzz targets are for this machine itself, and compiled with flags of their own: so in a target directory of their own.
FUZZERS   := manifest allow settings wire files sites answers store
FUZZ_RUNS := $(if $(T),$(T),$(FUZZERS))
FUZZ_ENV  := CARGO_TARGET_DIR=$(CARGO_TARGET_DIR)-fuzz RUSTC_WORKSPACE_WRAPPER=$(CURDIR)/tests/fuzz/rustc.sh
FUZZ      := -p gaia-fuzz --target x86_64-unknown-linux-gnu

# $(call take,ARGUMENTS,FROM TO FROM TO …): builds with cargo, then copies what changed. Both under one lock, because
# in the shared cache a binary without a hash in its name belongs to whoever built last.
take = mkdir -p $(CACHE) out/bin out/branes && flock $(CARGO_TARGET_DIR).lock $(SHELL) $(.SHELLFLAGS) '\
	cargo build $(FLAGS) $(1); \
	while (($$\#)); do cmp -s "$$1" "$$2" || { cp "$$1" "$$2.new"; mv "$$2.new" "$$2"; }; shift 2; done' take $(2)

# --- The targets ------------------------------------------------------------------------------------------------

.PHONY: help
help: ## print this list
	@sed -n 's/^\([a-z-]*\):.* ## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20
	@echo
	@echo '  Variables of make run: GRAPH=$(GRAPH) CONFIG=$(CONFIG)'
	@echo '                         PORT=$(PORT) CONTROL=$(CONTROL) URL_PATH=$(URL_PATH) MEMORY=$(MEMORY) (MiB) CPUS=$(CPUS) ONLINE=$(ONLINE) DATA=$(DATA)'

.PHONY: setup
setup: ## install what is missing to build, run, check and measure
	@image/setup.sh

# Only what building and running needs.
.PHONY: ready
ready:
	@image/setup.sh run

.PHONY: run
run: ready image out/seed.cpio $(DATA) ## boot the appliance in QEMU with GRAPH and CONFIG, its ports 8080 at PORT and 7250 at CONTROL
	@out/bin/gaia-qemu run --kernel out/bzImage --initrd out/initramfs.zst --initrd out/seed.cpio \
		--append "$$(< image/cmdline)" $(if $(ONLINE),--online) $(if $(DATA),--data '$(DATA)') \
		--forward $(PORT):8080 --forward $(CONTROL):7250 --memory $(MEMORY) --cpus $(CPUS) --url-path $(URL_PATH)

.PHONY: test
test: ## everything: checks, images, and the tests that boot them; prints the seconds of each stage
	@report=''; \
	for stage in setup check image test-image vm-tests; do \
		echo "=== $$stage"; from=$${EPOCHREALTIME/[.,]/}; \
		$(MAKE) $$stage || { echo "=== $$stage failed"; exit 1; }; \
		took=$$(($${EPOCHREALTIME/[.,]/} - from)); \
		printf -v line '  %-12s%6d.%d s\n' $$stage $$((took / 1000000)) $$((took / 100000 % 10)); report+=$$line; \
	done; \
	echo '=== times'; printf '%s' "$$report"

.PHONY: check
check: setup tracked fmt deny clippy unit doc fuzz-short ## everything that needs no virtual machine

.PHONY: it
it: named ready image test-image ## run one test that boots the appliance: T=name
	@cargo test $(FLAGS) --test it -- --test-threads=1 --nocapture $(T)

.PHONY: fuzz
fuzz: setup $(FUZZERS:%=out/bin/fuzz-%) ## search for inputs that break a parser: T=manifest, allow, settings, wire, files, sites, answers, store; SECONDS=600
	@for target in $(FUZZ_RUNS); do tests/fuzz/run.sh $$target $(or $(SECONDS),600) $(CACHE)/fuzz/$$target; done

.PHONY: pictures
pictures: ready image ## take those of docs/pictures anew that are not what is seen any more
	@BLESS=1 cargo test $(FLAGS) --test it -- --test-threads=1 --nocapture picture

# Only what is named on the command line, so that the program's own defaults hold.
.PHONY: bench
bench: setup image out/bin/gaia-bench out/bin/gaia-trivial ## measure beside others, into bench/: QUICK=1, or ROUNDS=5 DURATION=3 CONCURRENCY=1,16,64
	@cargo test $(FLAGS) --test it -- --test-threads=1 --nocapture --ignored bench_
	@out/bin/gaia-bench run --cache $(CACHE)/tools-bench $(if $(QUICK),--quick) $(if $(ROUNDS),--rounds $(ROUNDS)) \
		$(if $(DURATION),--duration $(DURATION)) $(if $(CONCURRENCY),--concurrency $(CONCURRENCY)) $(BENCH)

.PHONY: soak
soak: ready image test-image out/interfaces ## the long versions of the tests, an hour of mixed load first: SECONDS=3600
	@GAIA_SOAK_SECONDS=$(or $(SECONDS),3600) cargo test $(FLAGS) --test it -- --test-threads=1 --nocapture soak::
	@GAIA_SOAK=1 cargo test $(FLAGS) --test reuse -- --nocapture
	@GAIA_SOAK=1 cargo test $(FLAGS) --test it -- --test-threads=1 --skip soak::

.PHONY: image
image: out/bzImage out/initramfs.zst $(BRANES) ## build the kernel, the initramfs and the guests into out/

.PHONY: man
man: out/bin/gaia ## write the command's manual into out/man: gaia.1, gaia-deploy.1, …
	@rm -rf out/man && out/bin/gaia man out/man

# Under their bare name, so that a shell finds the program wherever it is.
define completions
	(exec -a gaia out/bin/gaia completions $(1)) >out/completions/$(2)
	install -Dm644 out/completions/$(2) '$(DESTDIR)$(PREFIX)/share/$(3)/$(2)'
endef

.PHONY: install
install: man ## install the command gaia, ω beside it, its manual and what shells know of it: PREFIX=/usr/local
	@mkdir -p out/completions
	@install -Dm755 out/bin/gaia '$(DESTDIR)$(PREFIX)/bin/gaia'
	@ln -sf gaia '$(DESTDIR)$(PREFIX)/bin/ω'
	@install -d '$(DESTDIR)$(PREFIX)/share/man/man1' && install -m644 out/man/*.1 '$(DESTDIR)$(PREFIX)/share/man/man1'
	@$(call completions,bash,gaia,bash-completion/completions)
	@$(call completions,zsh,_gaia,zsh/site-functions)
	@$(call completions,fish,gaia.fish,fish/vendor_completions.d)
	@ln -sf gaia '$(DESTDIR)$(PREFIX)/share/bash-completion/completions/ω'
	@ln -sf gaia.fish '$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/ω.fish'
	@echo 'Installed gaia, also called ω, below $(DESTDIR)$(PREFIX)'

.PHONY: advisories
advisories: ## ask the advisory database about every dependency; needs the network, so no part of check
	@cargo deny --locked check advisories

.PHONY: clean
clean: ## remove out/
	@rm -rf out
	@echo 'Removed out/. The cache that all clones share is $(CACHE); rm -rf it for a build from nothing.'

# --- The parts of check and test --------------------------------------------------------------------------------

# Sources only: what is larger than 1 MiB was made by a program.
.PHONY: tracked
tracked:
	@! git rev-parse --is-inside-work-tree >/dev/null 2>&1 || git ls-files -z | \
	while IFS= read -rd '' file; do \
		[[ ! -f $$file ]] || (($$(stat -c %s -- "$$file") <= 1048576)) || { echo "$$file is larger than 1 MiB"; exit 1; }; \
	done

.PHONY: fmt
fmt:
	@cargo fmt --all --check

.PHONY: deny
deny:
	@cargo deny --locked check bans licenses sources

.PHONY: clippy
clippy:
	@cargo clippy $(FLAGS) --all-targets -- -D warnings
	@cargo clippy $(FLAGS) -p gaia-init --features debug-role --all-targets -- -D warnings
	@cargo clippy $(FLAGS) -p gaia-branes --all-targets --target wasm32-wasip2 -- -D warnings
	@cargo clippy $(FLAGS) -p gaia-schema -p gaia-interfaces --all-targets -- -D warnings
	@cargo clippy $(FLAGS) -p gaia-egress -p gaia-registry --all-targets -- -D warnings
	@$(FUZZ_ENV) cargo clippy $(FLAGS) $(FUZZ) -- -D warnings

.PHONY: unit
unit: out/interfaces
	@cargo test $(FLAGS) --lib --bins --test golden --test properties --test link --test reuse
	@cargo test $(FLAGS) --doc
	@cargo test $(FLAGS) -p gaia-branes --lib
	@cargo test $(FLAGS) -p gaia-egress
	@cargo test $(FLAGS) -p gaia-registry
	@cargo test $(FLAGS) -p gaia-schema --test schema

# From the same seeds and the same number of chance each time.
.PHONY: fuzz-short
fuzz-short: $(FUZZERS:%=out/bin/fuzz-%)
	@for target in $(FUZZERS); do tests/fuzz/run.sh $$target 7; done

.PHONY: doc
doc:
	@RUSTDOCFLAGS='-D warnings' cargo doc $(FLAGS) --no-deps

.PHONY: named
named:
	@[[ -n '$(T)' ]] || { echo 'usage: make it T=name, where name is a test in tests/it or part of one'; exit 2; }

.PHONY: test-image
test-image: out/initramfs-test.zst

# Of these files in tests/it two tests run at a time: they wait for a machine, and mind no neighbour.
PAIRS := boot disk memory power registries remote requests sandbox secrets supervision

.PHONY: vm-tests
vm-tests:
	@cargo test $(FLAGS) --test firmware --test run -- --test-threads=1
	@cargo test $(FLAGS) --test it -- --test-threads=2 $(PAIRS:%=%::)
	@cargo test $(FLAGS) --test it -- --test-threads=1 $(PAIRS:%=--skip %::)

# --- Files ------------------------------------------------------------------------------------------------------

# A recipe that depends on this always runs; whether its files changed decides about what depends on them.
.PHONY: always
always:

# PID 1 is built by itself, so that no other crate's needs switch on features of what it links.
out/bin/gaia-init: always
	@$(call take,-p gaia-init,$(BUILT)/gaia-init $@)

out/bin/gaia-init-debug: always
	@$(call take,-p gaia-init --features debug-role,$(BUILT)/gaia-init $@)

# As one call, so that their dependencies get the same features here as in the tests.
$(TOOLS:%=out/bin/%) &: always
	@$(call take,-p gaia-runtime -p gaia-image -p gaia-qemu -p gaia-tests --bins,$(foreach tool,$(TOOLS),$(BUILT)/$(tool) out/bin/$(tool)))

# By itself, so that what it needs switches on nothing in the runtime that it measures.
out/bin/gaia-bench: always
	@$(call take,-p gaia-bench,$(BUILT)/gaia-bench $@)

$(BRANES) &: always
	@$(call take,-p gaia-branes --examples --target wasm32-wasip2,$(foreach guest,$(GUESTS),$(GUESTS_BUILT)/$(guest).wasm out/branes/$(subst _,-,$(guest)).wasm))

$(FUZZERS:%=out/bin/fuzz-%) &: always
	@export $(FUZZ_ENV); $(call take,$(FUZZ) --bins,$(foreach target,$(FUZZERS),$(CARGO_TARGET_DIR)-fuzz/x86_64-unknown-linux-gnu/release/$(target) out/bin/fuzz-$(target)))

# The tool knows by itself whether the kernel it built before still is the one that is asked for.
out/bzImage out/kernel.config &: always out/bin/gaia-image
	@out/bin/gaia-image kernel --out-dir out

out/initramfs.zst: out/bin/gaia-init out/bin/gaia out/bin/gaia-image
	@out/bin/gaia-image initramfs --init out/bin/gaia-init --gaia out/bin/gaia --out $@

# The same, but init knows the role `debug`, and its binary is there; and the program that tries the sandboxes.
out/initramfs-test.zst: out/bin/gaia-init-debug out/bin/gaia out/bin/gaia-debug out/bin/gaia-hostile out/bin/gaia-image
	@out/bin/gaia-image initramfs --init out/bin/gaia-init-debug --gaia out/bin/gaia \
		--extra /bin/gaia-debug=out/bin/gaia-debug --extra /bin/gaia-hostile=out/bin/gaia-hostile --out $@

# A component for each interface of WASI 0.2, for the test of the link stage.
.PHONY: out/interfaces
out/interfaces:
	@cargo run $(FLAGS) -q -p gaia-interfaces -- $@

# Made where it is missing, and never again: it holds what the appliance keeps. So it does not matter which tool is newer.
ifneq ($(DATA),)
$(DATA): | out/bin/gaia-image
	@out/bin/gaia-image disk --out '$@' --size 1GiB
endif

out/seed.cpio: always $(BRANES) out/bin/gaia-image
	@out/bin/gaia-image seed --dir out/branes --config $(CONFIG) --graph $(GRAPH) --out $@

# Each target sets up what it needs (tests/setup) and can be run on a fresh Debian 12 or 13.
# `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

CARGO ?= cargo
PREFIX ?= /usr
SYSCONFDIR ?= /etc
DESTDIR ?=
# What `make install` installs; mosfs-full lies beside it.
MOSFS ?= target/release/mosfs
BINDIR = $(DESTDIR)$(PREFIX)/bin
SBINDIR = $(DESTDIR)$(PREFIX)/sbin
LIBDIR = $(DESTDIR)$(PREFIX)/lib
LIBEXECDIR = $(DESTDIR)$(PREFIX)/libexec/mosfs
SHAREDIR = $(DESTDIR)$(PREFIX)/share

# The version that `make deb` installs into target/tools where there is another one, or none.
CARGO_DEB = 3.8.0
# The version of the registry that `make campaign` installs there, as Debian has one alone.
FERRO = 1.0.0

# How long `make fuzz` runs each target, and `make soak` its load.
SECONDS ?= 600
MINUTES ?= 60
# What `make test` and `make bench` hand on, such as TEST='--test store' or BENCH='--quick'.
TEST ?=
BENCH ?=

# Tests mount; cargo builds as the user and runs each test program through this.
HOST := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
AS_ROOT = env "CARGO_TARGET_$(HOST)_RUNNER=$(CURDIR)/tests/as-root"
# Some tests wait, for a disk that never comes and the like: one more runs than there are processors.
export RUST_TEST_THREADS ?= $(shell echo $$(($$(nproc) + 1)))

.PHONY: help build programs demo test campaign fuzz bench scale soak fmt lint install deb clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name text; do
		printf '  make %-9s %s\n' "$$name" "$$text"
	done

build: ## Build mosfs (target/release/mosfs)
	@tests/setup build
	$(MAKE) programs

# Both programs, with what is needed already there. The start of a program that loads no shared library takes half a
# millisecond less, so mosfs, which starts the mounts, is linked statically. It uses nothing of the TPM's libraries, of
# which Debian has no static ones: empty archives stand in for them. Both are part of an initramfs, so they have no
# debugging symbols and no unwind tables (a panic ends them), and, where the linker can, packed relocations and each
# function once.
programs:
	mkdir -p target/static
	for library in esys mu rc sys tctildr; do
		ar rc "target/static/libtss2-$$library.a"
	done
	script=$(CURDIR)/target/static/no-unwind.ld
	echo 'SECTIONS { /DISCARD/ : { *(.eh_frame .eh_frame_hdr .gcc_except_table*) } } INSERT AFTER .text;' >"$$script"
	# A linker that knows an argument, as cargo is told to use it, makes a program that runs.
	try=target/static/try
	rm -rf "$$try"
	mkdir -p "$$try/src"
	printf '%s\n' '[package]' 'name = "try"' 'edition = "2024"' '[profile.dev]' 'panic = "abort"' '[workspace]' >"$$try/Cargo.toml"
	echo 'fn main() {}' >"$$try/src/main.rs"
	link=()
	for argument in "-Wl,-T,$$script" -Wl,-z,pack-relative-relocs -Wl,--icf=all; do
		if $(CARGO) rustc --quiet --manifest-path "$$try/Cargo.toml" --target-dir "$$try/target" -- \
			-C "link-arg=$$argument" 2>/dev/null && "$$try/target/debug/try"; then
			link+=(-C "link-arg=$$argument")
		fi
	done
	export CARGO_PROFILE_RELEASE_DEBUG=false
	$(CARGO) rustc --release --locked --bin mosfs-full -- "$${link[@]}"
	$(CARGO) rustc --release --locked --bin mosfs -- "$${link[@]}" \
		-C target-feature=+crt-static -C relocation-model=static -L native=target/static

demo: ## Go the whole way once on a real Debian root file system, and explain it
	@tests/setup demo
	tests/demo

test: ## Run all tests (as root, with sudo if need be); TEST='--test NAME' for some
	@tests/setup test
	$(AS_ROOT) $(if $(TEST),$(CARGO) test --locked --no-fail-fast $(TEST),CARGO='$(CARGO)' tests/all)

campaign: ## Run all tests with long campaigns of random faults and inputs
	@tests/setup test
	$(CARGO) install --quiet --locked --root target/tools --version $(FERRO) ferro-oci-server
	MOSFS_CAMPAIGN=long PROPTEST_CASES=20000 $(AS_ROOT) $(CARGO) test --locked --release --features failpoints,campaign $(TEST)

fuzz: ## Fuzz every reader of hostile input, SECONDS=600 for each
	@tests/setup fuzz
	tests/fuzz/run "$(SECONDS)"

# Benches are built in a folder of their own: cargo builds the programs for them too, and would put these in the place of
# those of `make programs`, which are measured.
BENCHES = $(CARGO) bench --locked --target-dir target/benches

bench: ## Measure mosfs beside its peers: target/bench/report.html; BENCH='--quick --rows find'
	@tests/setup bench
	$(MAKE) programs
	$(BENCHES) --bench compare -- $(BENCH)

scale: ## Measure how cost grows: millions of files, large folders, many layers
	@tests/setup bench
	$(MAKE) programs
	$(BENCHES) --bench compare -- --scale

soak: ## Mixed load for MINUTES=60; memory, descriptors and threads must stay flat
	@tests/setup bench
	$(MAKE) programs
	$(BENCHES) --bench compare -- --prepare
	tests/soak "$(MINUTES)"

fmt: ## Format the source
	$(CARGO) fmt

lint: ## Check format, lints, documentation and scripts
	@tests/setup lint
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets --all-features -- -D warnings
	$(CARGO) clippy --locked --lib --bins -- -D warnings
	$(CARGO) clippy --locked --config profile.dev.package.mosfs.debug-assertions=false --lib --bins --no-default-features -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --no-deps --document-private-items
	shellcheck -x -S warning $$(git ls-files | xargs grep -lE '^#!(/usr)?/bin/(env )?(ba)?sh')

install: ## Install under DESTDIR and PREFIX=/usr, laid out as Debian does
	@if [ ! -x "$(MOSFS)" ]; then
		$(MAKE) programs
	fi
	install -D -m 0755 "$(MOSFS)" "$(BINDIR)/mosfs"
	install -D -m 0755 "$(MOSFS)-full" "$(LIBEXECDIR)/mosfs-full"
	for file in mount-helpers/mount.*; do
		install -D -m 0755 "$$file" "$(SBINDIR)/$${file##*/}"
	done
	for file in mount-helpers/*.service mount-helpers/*.target mount-helpers/*.timer; do
		[ -e "$$file" ] || continue
		install -D -m 0644 "$$file" "$(LIBDIR)/systemd/system/$${file##*/}"
		sed -i 's|=/usr/bin/mosfs |=$(PREFIX)/bin/mosfs |' "$(LIBDIR)/systemd/system/$${file##*/}"
	done
	# Their folders carry the names that dracut and initramfs-tools look for; some files are sourced, not run.
	put() {
		(cd "$$1" && find . -type f -printf '%m %P\n') | while read -r mode file; do
			install -D -m "$$mode" "$$1/$$file" "$$2/$$file"
		done
	}
	put initramfs/dracut "$(LIBDIR)/dracut/modules.d"
	put initramfs/initramfs-tools "$(SHAREDIR)/initramfs-tools"
	install -d "$(SHAREDIR)/bash-completion/completions" "$(SHAREDIR)/zsh/vendor-completions" \
		"$(SHAREDIR)/fish/vendor_completions.d" "$(SHAREDIR)/man/man1"
	"$(MOSFS)" generate completions bash >"$(SHAREDIR)/bash-completion/completions/mosfs"
	"$(MOSFS)" generate completions zsh >"$(SHAREDIR)/zsh/vendor-completions/_mosfs"
	"$(MOSFS)" generate completions fish >"$(SHAREDIR)/fish/vendor_completions.d/mosfs.fish"
	"$(MOSFS)" generate man "$(SHAREDIR)/man/man1"

deb: ## Make Debian packages: target/debian/*.deb
	@tests/setup deb
	$(MAKE) programs
	rm -rf target/deb
	$(MAKE) install MOSFS=target/release/mosfs DESTDIR=target/deb PREFIX=/usr
	export PATH="$$PWD/target/tools/bin:$$PATH"
	if [[ $$(cargo-deb --version 2>/dev/null) != *$(CARGO_DEB) ]]; then
		$(CARGO) install --quiet --locked --root target/tools --version $(CARGO_DEB) cargo-deb
	fi
	rm -f target/debian/*.deb
	cargo-deb --no-build --strip --no-dbgsym --output target/debian/
	cargo-deb --no-build --strip --no-dbgsym --variant initramfs --output target/debian/

clean: ## Remove all that was built
	$(CARGO) clean

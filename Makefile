# Apiary's front door. `make help` lists what there is.

.DEFAULT_GOAL := help
.PHONY: help demo test build lint unit system lab differential stress bench guests clean-machine clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1 \2/p' $(firstword $(MAKEFILE_LIST)) | \
	    while read -r name what; do printf '  make %-14s %s\n' "$$name" "$$what"; done

demo: ## boot Debian's kernel in a virtual machine; on a terminal, with a shell in it
	@lab/demo

test: ## everything: lint, unit tests, real guests, nested KVM
	@tests/run lint unit system lab

build: ## the programs, optimised, in target/release
	cargo build --release

lint: ## formatting and clippy, warnings are errors
	@tests/run lint

unit: ## tests that need no guest
	@tests/run unit

system: ## real guests, driven through the real programs
	@tests/run system

lab: ## our KVM engine on a true kvm-amd, inside QEMU's emulated AMD-V
	@tests/run lab

differential: ## every user-mode instruction form against the host's processor, thousands of states each (long)
	DIFFERENTIAL_STATES=$${DIFFERENTIAL_STATES:-2000} \
	    cargo test --release -p apiary-engine-soft --test differential -- --nocapture

stress: ## proof programs and stress-ng on the soft engine, ten minutes each, eighty minutes in all
	@tests/run stress

bench: ## boot time and a suite of workloads, on the soft engine, QEMU's emulator and the bare host
	@bench/run

guests: ## fetch the guests and make their root file systems
	@lab/guests && lab/initramfs && lab/debian

clean-machine: ## the README's commands in a fresh Debian chroot (root, some minutes)
	@lab/clean-machine

clean: ## delete all that was built or fetched
	rm -rf target build

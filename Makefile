# SPDX-License-Identifier: MIT

PREFIX ?= /usr/local
# The kernels that test-vm boots, and the tests that a rung runs: make test-vm KERNEL=6.12 RUN=TestHook
KERNEL ?= 6.1 6.12
RUN    ?= .
# The packages whose tests also run in the machine, on a kernel with WireGuard.
VM_PACKAGES ?= ./bpf ./internal/wg ./tracker ./test

CLANG_FORMAT     := clang-format-19
GOLANGCI_VERSION := 2.15.0
GOLANGCI         := .cache/tools/golangci-lint
COMMIT           := $(shell git describe --always --dirty --abbrev=12 2>/dev/null)

# Go would stamp the commit itself, and fail where git refuses to read the tree, such as a clone owned by another user.
export GOFLAGS := $(GOFLAGS) -buildvcs=false
export PATH    := $(CURDIR)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help build demo test test-unit test-net test-vm vm-tests lint drift bench generate deps install clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build bin/wgroam
	CGO_ENABLED=0 go build -trimpath -ldflags '-X main.commit=$(COMMIT)' -o bin/wgroam ./cmd/wgroam

demo: build ## Show a roam and a failover on this machine, in network namespaces (root)
	bin/wgroam demo

test: deps ## Install what is missing and run every test there is
	@MAKE='$(MAKE)' test/tools/ladder lint drift test-unit test-net $(KERNEL:%=test-vm-%)

test-unit: ## Run the unit tests
	go test -race -v -run '$(RUN)' $$(go list ./... | grep -v '/test$$')

test-net: build ## Run the end-to-end tests in network namespaces of this machine (root)
	go test -race -v -count=1 -run '$(RUN)' ./test

test-vm: $(KERNEL:%=test-vm-%) ## Run the tests on Debian's kernels in QEMU: KERNEL=6.12 RUN=TestHook

test-vm-%: vm-tests
	@$(call in-guest,tests,$*,-test.v -test.run '$(RUN)')

# Static, for the machine has no C library; race detection makes it three times slower, where QEMU makes it fifty.
vm-tests: build
	CGO_ENABLED=1 go test -race -c -tags 'vm netgo osusergo' -ldflags '-linkmode external -extldflags -static' -o .cache/vm/tests/ $(VM_PACKAGES)

# Here, where most benchmarks find no WireGuard in the kernel and skip themselves, and then on Debian's kernels.
bench: VM_PACKAGES = ./bpf ./test
bench: SHELL       = bash
bench: .SHELLFLAGS = -o pipefail -c
bench: build ## Run the benchmarks here and on Debian's kernels in QEMU: KERNEL=6.12 RUN=Latency
	mkdir -p .cache/bench
	CGO_ENABLED=0 go test -c -tags vm -o .cache/vm/benchmarks/ $(VM_PACKAGES)
	go test -timeout 15m -run '^$$' -bench '$(RUN)' -benchtime 1x $(VM_PACKAGES) 2>&1 | tee .cache/bench/host.txt
	@status=0; for kernel in $(KERNEL); do \
		($(call in-guest,benchmarks,$$kernel,-test.run '^$$' -test.bench '$(RUN)' -test.benchtime 1x)) 2>&1 | \
			tee .cache/bench/$$kernel.txt || status=1; \
	done; exit $$status

# in-guest: runs the test binaries of VM_PACKAGES in .cache/vm/$(1) on the kernel $(2) with the arguments $(3).
in-guest = status=0; for package in $(VM_PACKAGES); do \
		name=$$(basename $$package).test; echo "== $(2) $$package"; \
		test/vm/run -t 1200 -f bin/wgroam -f .cache/vm/$(1)/$$name \
			$$([ ! -d $$package/testdata ] || echo -f $$package/testdata:/root/testdata) \
			$(2) $$name -test.timeout 19m $(3) || status=1; \
	done; exit $$status

lint: ## Check the sources' form
	@test -z "$$(gofmt -l . | tee /dev/stderr)"
	go vet ./...
	$(GOLANGCI) run --allow-serial-runners
	$(CLANG_FORMAT) --dry-run -Werror bpf/*.[ch]
	shellcheck $$(git ls-files -co --exclude-standard | xargs awk '/^#!.*[ \/](ba|da)?sh$$/ { print FILENAME } { nextfile }')

drift: ## Check that the generated files match their sources
	@test/tools/drift

generate: ## Compile the BPF programs and make their Go bindings
	go generate ./...

deps: ## Install what the tests need (root on Debian or Ubuntu), or say what is missing
	@test/tools/deps $(GOLANGCI) $(GOLANGCI_VERSION)

install: build ## Install wgroam and its systemd unit under PREFIX
	install -D bin/wgroam $(DESTDIR)$(PREFIX)/sbin/wgroam
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system
	sed 's|/usr/local/sbin/|$(PREFIX)/sbin/|' contrib/systemd/wgroam.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/wgroam.service

clean: ## Delete what was built and downloaded
	rm -rf bin .cache

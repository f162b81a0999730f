# SPDX-License-Identifier: MIT

PREFIX ?= /usr/local
# The kernels that test-vm boots, and the tests that a rung runs: make test-vm KERNEL=6.12-arm64 RUN=TestHook
KERNEL ?= 6.1 6.12 6.12-arm64
RUN    ?= .
# How long a machine may take.
MINUTES ?= 20
# How many minutes soak goes on, and from which seed; 0 draws one.
LIFE ?= 30
# How long fuzz gives each target.
FUZZTIME ?= 1m
SEED ?= 0
# The packages whose tests also run in the machine, on a kernel with WireGuard.
VM_PACKAGES ?= ./bpf ./internal/wg ./tracker ./failover ./test

CLANG_FORMAT     := clang-format-19
AMD64            := $(filter-out %-arm64,$(KERNEL))
GOLANGCI_VERSION := 2.15.0
NATSCLI_VERSION  := 0.5.0
TOOLS            := .cache/tools
GOLANGCI         := $(TOOLS)/golangci-lint
COMMIT           := $(shell git describe --always --dirty --abbrev=12 2>/dev/null)

# Go would stamp the commit itself, and fail where git refuses to read the tree, such as a clone owned by another user.
export GOFLAGS := $(GOFLAGS) -buildvcs=false
export PATH    := $(CURDIR)/bin:$(CURDIR)/$(TOOLS):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help build demo test test-unit test-model test-net test-vm vm-tests vm-tests-arm64 test-selftest soak fuzz lint drift bench generate deps install clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build bin/wgroam
	CGO_ENABLED=0 go build -trimpath -ldflags '-X main.commit=$(COMMIT)' -o bin/wgroam ./cmd/wgroam

demo: build ## Show a roam and a failover on this machine, in network namespaces (root)
	bin/wgroam demo

test: deps ## Install what is missing and run every test there is
	@MAKE='$(MAKE)' test/tools/ladder lint drift test-unit test-model fuzz test-net $(KERNEL:%=test-vm-%) $(AMD64:%=test-selftest-%)

test-unit: ## Run the unit tests
	go test -race -v -run '$(RUN)' $$(go list ./... | grep -v '/test$$')

# Eight kinds of group, 12 500 schedules each; test-unit runs a hundred of each with -race.
test-model: ## Let groups live through 100 000 random schedules of faults, in virtual time
	go test -v -count=1 -timeout 30m -run TestSchedules ./test/model -rapid.checks=12500

# The faults of TestFaults, six at a time: what they do most is wait.
test-net: build ## Run the end-to-end tests in network namespaces of this machine (root)
	go test -race -v -count=1 -timeout 20m -parallel 6 -run '$(RUN)' ./test

test-vm: $(KERNEL:%=test-vm-%) ## Run the tests on Debian's kernels in QEMU: KERNEL=6.12 RUN=TestHook

test-vm-%: vm-tests
	@$(call in-guest,tests,$*,-test.v -test.run '$(RUN)',bin/wgroam)

# What concerns the hook, which is another on another processor.
test-vm-%-arm64: VM_PACKAGES = ./bpf ./tracker
test-vm-%-arm64: vm-tests-arm64
	@$(call in-guest,tests-arm64,$*-arm64,-test.v -test.run '$(RUN)',.cache/vm/tests-arm64/wgroam)

test-selftest: $(AMD64:%=test-selftest-%) ## Run WireGuard's own test on Debian's kernels in QEMU, with the hook attached

test-selftest-%:
	CGO_ENABLED=0 go test -c -tags 'vm selftest' -o .cache/vm/selftest/ ./bpf
	@test/vm/selftest $* bpf.test -test.v -test.timeout 19m -test.run TestSelftest

# Static, for the machine has no C library; race detection makes it three times slower, where QEMU makes it fifty.
vm-tests: build
	CGO_ENABLED=1 go test -race -c -tags 'vm netgo osusergo' -ldflags '-linkmode external -extldflags -static' -o .cache/vm/tests/ $(VM_PACKAGES)

# Without race detection, which would need a C compiler for arm64.
vm-tests-arm64:
	CGO_ENABLED=0 GOARCH=arm64 go build -trimpath -o .cache/vm/tests-arm64/ ./cmd/wgroam
	CGO_ENABLED=0 GOARCH=arm64 go test -c -tags vm -o .cache/vm/tests-arm64/ $(VM_PACKAGES)

# Here, where most benchmarks find no WireGuard in the kernel and skip themselves, and then on Debian's kernels, in a
# machine whose clock counts instructions.
bench: VM_PACKAGES = ./bpf ./test
bench: VM_FLAGS    = -c
bench: MINUTES     = 40
bench: SHELL       = bash
bench: .SHELLFLAGS = -o pipefail -c
bench: build ## Run the benchmarks here and on Debian's kernels in QEMU: KERNEL=6.12 RUN=Latency
	mkdir -p .cache/bench
	CGO_ENABLED=0 go test -c -tags vm -o .cache/vm/benchmarks/ $(VM_PACKAGES)
	go test -timeout 15m -run '^$$' -bench '$(RUN)' -benchtime 1x $(VM_PACKAGES) 2>&1 | tee .cache/bench/host.txt
	@status=0; for kernel in $(AMD64); do \
		($(call in-guest,benchmarks,$$kernel,-test.run '^$$' -test.bench '$(RUN)' -test.benchtime 1x,bin/wgroam)) 2>&1 | \
			tee .cache/bench/$$kernel.txt || status=1; \
	done; exit $$status

fuzz: ## Fuzz what decodes bytes from outside: FUZZTIME=10s
	test/tools/fuzz $(FUZZTIME)

# Here, and then on each kernel.
soak: VM_PACKAGES = ./test
soak: MINUTES     = $(shell expr $(LIFE) + 10)
soak: vm-tests ## Let devices, peers and daemons live at random, here and in QEMU: LIFE=30 (minutes) SEED=1 (root)
	go test -race -v -count=1 -timeout 0 -run TestLife ./test -life $(LIFE)m -seed $(SEED)
	@$(foreach kernel,$(AMD64),($(call in-guest,tests,$(kernel),-test.v -test.run TestLife -life $(LIFE)m -seed $(SEED),bin/wgroam)) &&) true

# in-guest: runs the test binaries of VM_PACKAGES in .cache/vm/$(1) on the kernel $(2) with the arguments $(3), beside
# the wgroam $(4).
in-guest = status=0; for package in $(VM_PACKAGES); do \
		name=$$(basename $$package).test; echo "== $(2) $$package"; \
		test/vm/run $(VM_FLAGS) -t $(shell expr $(MINUTES) \* 60 + 60) -f $(4) -f .cache/vm/$(1)/$$name \
			$$([ ! -d $$package/testdata ] || echo -f $$package/testdata:/root/testdata) \
			$(2) $$name -test.timeout $(MINUTES)m $(3) || status=1; \
	done; exit $$status

lint: ## Check the sources' form
	@test -z "$$(gofmt -l . | tee /dev/stderr)"
	go vet -tags selftest ./...
	GOARCH=arm64 go vet -tags selftest ./...
	$(GOLANGCI) run --allow-serial-runners
	$(CLANG_FORMAT) --dry-run -Werror bpf/*.[ch]
	shellcheck $$(git ls-files -co --exclude-standard | xargs awk '/^#!.*[ \/](ba|da)?sh$$/ { print FILENAME } { nextfile }')

drift: ## Check that the generated files match their sources
	@test/tools/drift

generate: ## Compile the BPF programs and make their Go bindings
	go generate ./...

deps: ## Install what the tests need (root on Debian or Ubuntu), or say what is missing
	@test/tools/deps $(TOOLS) $(GOLANGCI_VERSION) $(NATSCLI_VERSION)

install: build ## Install wgroam and its systemd units under PREFIX
	install -D bin/wgroam $(DESTDIR)$(PREFIX)/sbin/wgroam
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system
	for unit in wgroam wgroam-shut; do sed 's|/usr/local/sbin/|$(PREFIX)/sbin/|' contrib/systemd/$$unit.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/$$unit.service || exit; done

clean: ## Delete what was built and downloaded
	rm -rf bin .cache

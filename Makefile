# KVM Replica. "make" alone lists what can be made. Everything that tests needs
# root on a Debian 12; "deps" installs what is missing.

SHELL := /bin/bash
.DEFAULT_GOAL := help

export PATH := $(CURDIR)/bin/tools:$(PATH):/usr/local/go/bin
export CGO_ENABLED ?= 0
export GOTOOLCHAIN ?= auto

FUZZTIME  ?= 60s
BENCHTIME ?= 1s
GUEST     := $(CURDIR)/.cache/guest
LAB       ?= /tmp/kvmlab
TESTARGS  ?=
DEMOARGS  ?=
FULL      ?=
BENCHARGS ?=

# Packages whose tests boot guests run one at a time: each may have two up.
SYSTEM = $(shell go list ./integration/... 2>/dev/null)
GUESTS = ./libvirt/...
ALL    = $(filter-out kvmreplica/integration/%,$(shell go list ./... 2>/dev/null))
UNIT   = $(filter-out kvmreplica/libvirt%,$(ALL))

# Sweeps live through thousands of crashes in one goroutine: the race detector
# finds nothing there and makes them ten times slower. In the hours of virtual
# time of ManyLongOnes the detector itself has crashed (SIGSEGV, Go 1.26.8).
SWEEPS = ManyLongOnes|LosesABlock|LosesNoBlock|Crash|EveryFail|EveryFault|Truncated|Damage|Sweep|EveryCell|CutAnywhere

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.PHONY: deps
deps: ## install packages, Go and linters, where they are missing
	@internal/tools/deps.sh

.PHONY: build
build: ## the programs, static, into bin/
	@mkdir -p bin
	@for c in ./cmd/* ./integration/lab/cmd/kvmlab ./integration/demo ./integration/bench; do \
	  ls $$c/*.go >/dev/null 2>&1 || continue; \
	  echo "build $$c"; CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o bin/ $$c || exit 1; \
	done

.PHONY: install
install: build ## programs, unit, hook, configuration: DESTDIR=, PREFIX=/usr/local
	@DESTDIR=$(DESTDIR) PREFIX=$(or $(PREFIX),/usr/local) packaging/install.sh bin

.PHONY: lint
lint: ## format, vet, staticcheck
	@out=$$(gofumpt -l .); \
	  [ -z "$$out" ] || { echo "not formatted (run: bin/tools/gofumpt -w FILE):"; echo "$$out"; exit 1; }
	go vet ./...
	staticcheck ./...
	@if command -v shellcheck >/dev/null; then shellcheck -S error .ci/run internal/tools/deps.sh packaging/install.sh packaging/hooks/kvmreplica; fi

.PHONY: check
check: build lint ## lint, and the rules of ARCHITECTURE.md
	go test ./internal/archtest
	cd internal/tools && go vet ./runtests && go test ./runtests

.PHONY: test
test: deps check ## everything: unit tests under the race detector, then whole systems
	@bin/kvmlab files $(GUEST)
	@KVMREPLICA_LAB=1 KVMREPLICA_GUEST=$(GUEST) CGO_ENABLED=1 runtests -skips .ci/skips \
	  -- -race -shuffle=on -timeout 12m -skip '$(SWEEPS)' $(TESTARGS) $(UNIT) \
	  -- -timeout 12m -run '$(SWEEPS)' $(TESTARGS) $(UNIT) \
	  -- -p 1 -timeout 12m $(TESTARGS) $(GUESTS) \
	  -- -p 1 -timeout 45m $(TESTARGS) $(SYSTEM)

.PHONY: unit
unit: ## unit tests alone, without installing anything
	go test -shuffle=on $(TESTARGS) $(ALL)

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME (60s)
	@grep -rl --include='*_test.go' '^func Fuzz' . | grep -v -e /testdata/ -e '^./internal/tools/' | sort | while read -r f; do \
	  grep -oE '^func Fuzz[A-Za-z0-9_]*' $$f | cut -c6- | while read -r name; do \
	    echo "fuzz $$(dirname $$f) $$name"; \
	    KVMREPLICA_FUZZ_CPU=100ms go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) $$(dirname $$f) </dev/null || exit 1; \
	  done || exit 1; \
	done

# Campaigns. Seeds, and the totals of "powerfail", "kill" and "faults", outlive a run.
N        ?= 15
DURATION ?= 1h
CAMPAIGN ?= docs/operations/campaigns
SYSTEMTEST = KVMREPLICA_LAB=1 go test -count=1 -v

.PHONY: powerfail
powerfail: deps ## N further power cuts (15) of a kernel with the product in it; adds to powerfail.jsonl in CAMPAIGN
	KVMREPLICA_POWERFAIL=$(N) KVMREPLICA_CAMPAIGN=$(abspath $(CAMPAIGN))/powerfail.jsonl $(SYSTEMTEST) -timeout 24h ./integration/powerfail

.PHONY: kill
kill: deps build ## N further kills (15) of daemons and data plane under four verified connections; adds to kill.jsonl in CAMPAIGN
	KVMREPLICA_KILLS=$$((($(N)+1)/2)) KVMREPLICA_CAMPAIGN=$(abspath $(CAMPAIGN))/kill.jsonl \
	  $(SYSTEMTEST) -timeout 24h -run TestKillsUnderFour ./integration/kvm

.PHONY: kernel
kernel: deps ## the kernel's NBD client on our exports, killed data planes, nbd-server below us, a database at every point
	KVMREPLICA_KERNEL=full $(SYSTEMTEST) -timeout 2h ./integration/kernel

.PHONY: faults
faults: deps build ## failing system calls of the real data plane, the whole table, and of the real daemons; adds to faults.jsonl in CAMPAIGN
	KVMREPLICA_FAULTS=full $(SYSTEMTEST) -timeout 2h ./integration/faults
	KVMREPLICA_FAULTS=full KVMREPLICA_CAMPAIGN=$(abspath $(CAMPAIGN))/faults.jsonl \
	  $(SYSTEMTEST) -timeout 12h -run TestFailingSystemCalls ./integration/kvm

.PHONY: soak
soak: deps ## three VMs over a bad line for DURATION (1h)
	KVMREPLICA_SOAK=$(DURATION) $(SYSTEMTEST) -timeout 100h ./integration/soak

.PHONY: sim
sim: ## two simulated hosts: SEEDS=10000 random lives from FIRST=1; SEED=k (SCRIPT='..') plays one again
	SEEDS=$(or $(SEEDS),10000) FIRST=$(or $(FIRST),1) SEED=$(SEED) SCRIPT=$(SCRIPT) go test -count=1 -timeout 12h -v -run TestSeeds ./integration/sim

.PHONY: sweep
sweep: ## every case of every sweep and the whole model, with counts (hours); FULL=1: and every byte of every file
	KVMREPLICA_SIM=full KVMREPLICA_MODEL=full KVMREPLICA_FULL=$(FULL) go test -count=1 -timeout 12h -v -run '$(SWEEPS)|Model|Mutant' $(ALL) ./integration/model ./integration/sim 2>&1 \
	  | grep -E --line-buffered 'cases|damages|truncations|points|states|violation|SWEEP|^(ok|FAIL|panic)|--- FAIL'

.PHONY: mutants
mutants: ## plant seeded bugs one by one; shows what catches each, fails if one survives (RUN=regexp, UNTRIED=1); adds to mutants.jsonl in CAMPAIGN
	go run ./integration/mutants -run '$(RUN)' $(if $(UNTRIED),-untried) -campaign $(abspath $(CAMPAIGN))/mutants.jsonl

.PHONY: histories
histories: deps build ## N=15 further random failover histories of the real daemons (SEED=k plays one again); adds to histories.jsonl in CAMPAIGN
	KVMREPLICA_HISTORIES=$(N) SEED=$(SEED) KVMREPLICA_CAMPAIGN=$(abspath $(CAMPAIGN))/histories.jsonl \
	  $(SYSTEMTEST) -timeout 24h -run TestRandomFailoverHistories ./integration/histories

.PHONY: pairs
pairs: ## PAIRS=200 random failover histories of two managers in one process, over real data planes and stores (SEED=k plays one again)
	KVMREPLICA_HISTORIES=$(or $(PAIRS),200) SEED=$(SEED) go test -count=1 -timeout 12h -v -run TestHistories ./replicad/vm

.PHONY: bench
bench: deps build ## our speed beside qemu-nbd's and nbdkit's: BENCHARGS=-quick, -json FILE, -h
	bin/bench $(BENCHARGS)

.PHONY: microbench
microbench: ## the benchmarks of single packages, BENCHTIME each (1s)
	go test -run '^$$' -bench . -benchmem -benchtime $(BENCHTIME) $(ALL)

.PHONY: demo
demo: deps build ## two hosts, one guest, a failover and the way back
	bin/demo

.PHONY: lab
lab: deps build ## two paired hosts and a running guest to play with, in LAB (/tmp/kvmlab)
	@mkdir -p -m 755 $(LAB)
	bin/demo -lab -dir $(LAB)

.PHONY: clean
clean: ## remove what was made; a lab in LAB is taken down
	@[ ! -e $(LAB)/lab.json ] || bin/kvmlab down $(LAB)
	rm -rf bin .cache .lab

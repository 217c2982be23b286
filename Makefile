# caddy-consul. `make` alone lists the targets. All of them need Go and git
# alone; whatever else they use is built once, at a pinned version.

GO   ?= go
LINT := $(GO) tool -modfile=tools/lint/go.mod

# The race detector needs cgo, which Go leaves out where there is no C compiler.
RACE := $(shell [ "$$($(GO) env CGO_ENABLED)" = 1 ] && echo -race)

# What one package's tests may take, real Consul agents included.
TEST_TIMEOUT ?= 15m
# What to test; say `make test PKG=./caddytest TEST='-run Traffic -v'`.
PKG  ?= ./...
TEST ?=
# What to measure; say `make bench BENCH='-only requests -sizes 3,1000'`.
BENCH ?=

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## build bin/caddy: Caddy with this plugin
	$(GO) build -o bin/caddy ./cmd/caddy

.PHONY: consul
consul: ## make sure that there is a Consul binary (the first time: about 7 minutes)
	@sh tools/build.sh consul

.PHONY: demo
demo: build consul ## watch Caddy follow a real Consul: half a minute
	@CADDY_BIN=bin/caddy $(GO) run ./examples/demo

.PHONY: test
test: consul ## run all tests, against real Consul agents, with the race detector
	@$(if $(RACE),,echo 'No C compiler found: testing without the race detector.')
	$(GO) test $(RACE) -count=1 -timeout $(TEST_TIMEOUT) $(TEST) $(PKG)

# How long `make soak` takes, but for its second part, and how many requests each
# operation of that one takes. SOAK_SEED repeats a script.
SOAK_DURATION ?= 20m
LOSS_REQUESTS ?= 100000
LOSS_RATE     ?= 1500

.PHONY: faults
faults: consul ## of the tests, those of faults, floods, secrets, operations under load, and a short soak
	$(GO) test $(RACE) -count=1 -timeout $(TEST_TIMEOUT) -run 'Fault|Lose|Soak|Cold|Stale|Keep|Secrets|Flood|MoreServices|Remembers' ./caddytest

.PHONY: soak
soak: consul ## 20 minutes of random changes, faults and reloads, then each operation over 100,000 requests
	SOAK_DURATION=$(SOAK_DURATION) $(GO) test $(RACE) -count=1 -timeout 0 -v -run 'TestSoak$$' ./caddytest
	LOSS_REQUESTS=$(LOSS_REQUESTS) LOSS_RATE=$(LOSS_RATE) \
		$(GO) test -count=1 -timeout 0 -v -run 'LoseNothing|LosesNothing' ./caddytest

.PHONY: bench
bench: build consul ## measure speed: a report, and bench/RESULTS.md; about 25 minutes
	@CADDY_BIN=bin/caddy $(GO) run ./bench $(BENCH)

.PHONY: lint
lint: ## check format and code: gofumpt, go vet, staticcheck
	@unformatted=$$($(LINT) gofumpt -l .) || exit; \
	if [ -n "$$unformatted" ]; then \
		printf 'Not in gofumpt style (run `make fmt`):\n%s\n' "$$unformatted"; exit 1; \
	fi
	$(GO) vet ./...
	$(LINT) staticcheck ./...

# How long `make fuzz` tries each target.
FUZZ_TIME ?= 10s

.PHONY: fuzz
fuzz: ## try each fuzz target for some seconds: FUZZ_TIME=5m for longer
	@for package in ./internal/discovery ./consulupstreams; do \
		for target in $$($(GO) test -list '^Fuzz' $$package | grep '^Fuzz'); do \
			echo "$$package $$target"; \
			$(GO) test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZ_TIME) -fuzzminimizetime 10x -parallel 1 $$package || exit; \
		done; \
	done

.PHONY: vuln
vuln: ## look for known vulnerabilities; needs https://vuln.go.dev, or GOVULNDB
	@report=$$($(LINT) govulncheck ./... 2>&1); code=$$?; printf '%s\n' "$$report"; \
	case $$report in \
	*'fetching vulnerabilities'*) echo 'The database of vulnerabilities is out of reach: nothing was checked.' ;; \
	*) exit $$code ;; \
	esac

.PHONY: fmt
fmt: ## format the code
	$(LINT) gofumpt -w .

.PHONY: clean
clean: ## remove what was built in the tree; the cached tools stay
	rm -rf bin

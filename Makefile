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

.PHONY: bench
bench: consul ## run the benchmarks
	$(GO) test -run '^$$' -bench . -benchmem -timeout $(TEST_TIMEOUT) $(TEST) $(PKG)

.PHONY: lint
lint: ## check format and code: gofumpt, go vet, staticcheck
	@unformatted=$$($(LINT) gofumpt -l .) || exit; \
	if [ -n "$$unformatted" ]; then \
		printf 'Not in gofumpt style (run `make fmt`):\n%s\n' "$$unformatted"; exit 1; \
	fi
	$(GO) vet ./...
	$(LINT) staticcheck ./...

.PHONY: fmt
fmt: ## format the code
	$(LINT) gofumpt -w .

.PHONY: clean
clean: ## remove what was built in the tree; the cached tools stay
	rm -rf bin

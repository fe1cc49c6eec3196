# Everything here needs only Go and make; lint and fmt also want golangci-lint
# and gofumpt, which .ci/run installs. Each target covers every module.

GO       ?= go
FUZZTIME ?= 5s
export PATH := $(PATH):$(shell $(GO) env GOPATH)/bin

MODULES := $(sort $(patsubst %/go.mod,%,$(shell find . -name go.mod -not -path '*/testdata/*')))

# The race detector needs cgo and a C compiler that works.
RACE     := $(shell $(GO) build -race -o /dev/null ./internal/near 2>/dev/null && echo -race)

TESTFLAGS := -shuffle=on -count=1 -timeout=15m

# each runs a command in every module, all of them even when one fails.
each = failed=; for m in $(MODULES); do (cd "$$m" && $(1)) || failed="$$failed $$m"; done; \
	[ -z "$$failed" ] || { echo "failed in:$$failed" >&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help test race bench vet lint fmt fuzz cover examples ci untested

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST) | while IFS='	' read -r t d; do printf '  %-10s %s\n' "$$t" "$$d"; done

test: ## run all tests, with the race detector where it can be built; JSON=file for go test -json
	@$(if $(JSON),: > "$(JSON)";) ( $(call each,$(GO) test $(RACE) $(TESTFLAGS) $(if $(JSON),-json) ./... $(if $(JSON),>> "$(abspath $(JSON))")) ); \
	status=$$?; $(MAKE) --no-print-directory untested; exit $$status

untested: # said last, where it is seen
	@[ -n "$(RACE)" ] || echo "NOT TESTED: data races, because there is no cgo or no C compiler" >&2
	@command -v redis-server >/dev/null || echo "NOT TESTED: a real Redis and examples/relay, because there is no redis-server in PATH" >&2
	@command -v postgres >/dev/null || ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || \
		echo "NOT TESTED: examples/postgres and examples/cart, because there is no postgres in PATH or /usr/lib/postgresql" >&2
	@command -v etcd >/dev/null || echo "NOT TESTED: examples/etcd, because there is no etcd in PATH" >&2

race: ## run all tests with the race detector, or fail where it cannot be built
	@$(call each,$(GO) test -race $(TESTFLAGS) ./...)

bench: ## run all benchmarks
	@$(call each,$(GO) test -run '^$$' -bench . -benchmem ./...)

vet: ## go vet for this platform, and for those that no test runs on
	@$(call each,$(GO) vet ./...)
	@$(foreach m,$(filter-out ./examples/%,$(MODULES)),for env in GOOS=windows GOOS=darwin GOARCH=386; do env $$env $(GO) -C $(m) vet ./... || exit 1; done;)

lint: ## formatting and golangci-lint
	@unformatted=$$(gofumpt -l .) && { [ -z "$$unformatted" ] || { printf 'not formatted:\n%s\n' "$$unformatted" >&2; exit 1; }; }
	@$(call each,golangci-lint run --config "$(CURDIR)/.golangci.yml" ./...)

fmt: ## format all Go files
	gofumpt -w .

fuzz: ## run each fuzz test for FUZZTIME (5s)
	@$(call each,for p in $$($(GO) list ./...); do \
		for f in $$($(GO) test -list '^Fuzz' "$$p" | grep '^Fuzz'); do \
			echo "$$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) "$$p" || exit 1; \
		done; \
	done)

cover: ## coverage by function, of the root module
	@$(GO) test -count=1 -coverpkg ./... -coverprofile cover.out ./... && $(GO) tool cover -func cover.out

examples: ## run the examples, two at a time, each for at most two minutes
	@printf '%s\n' $(patsubst %/main.go,%,$(wildcard examples/*/main.go)) | xargs -P 2 -I EXAMPLE sh -c \
		'out=$$(timeout -k 10 120 $(GO) -C EXAMPLE run . </dev/null 2>&1); status=$$?; printf "%s\n%s\n" EXAMPLE "$$out"; exit $$status'

ci: ## what a pull request must pass, in a new Debian machine too
	.ci/run

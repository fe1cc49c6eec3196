// Package lua holds the scripts that run inside Redis, each in a file with its
// contract. Every script survives being run twice: go-redis repeats commands
// that the server may already have executed.
package lua

import (
	_ "embed"

	"github.com/redis/go-redis/v9"
)

//go:embed swap.lua
var swap string

//go:embed heal.lua
var heal string

// The scripts. Run them with Script.Run, which falls back to EVAL when the
// server has forgotten them.
var (
	Swap = redis.NewScript(swap)
	Heal = redis.NewScript(heal)
)

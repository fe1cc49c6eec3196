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

//go:embed register.lua
var register string

//go:embed guarded.lua
var guarded string

// The scripts. Run them with Script.Run, which falls back to EVAL when the
// server has forgotten them.
var (
	Swap     = redis.NewScript(swap)
	Heal     = redis.NewScript(heal)
	Register = redis.NewScript(register)
)

// Guarded returns the script src behind the check of guarded.lua.
func Guarded(src string) *redis.Script { return redis.NewScript(guarded + src) }

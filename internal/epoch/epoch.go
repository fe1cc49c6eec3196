// Package epoch numbers what must never be numbered twice: the generations of a
// session's logins, the requests that modify one. A counter in Redis is no fence:
// after a failover that lost its last writes it issues a number again.
package epoch

// Max is the largest number that is exact wherever it goes: a Lua script's
// numbers are floats. In microseconds it is the year 2255.
const Max = 1<<53 - 1

// Next returns the number after last and floor, and never less than now, the
// store's time in microseconds since 1970: what a store has issued before it
// forgot its last writes is lower than that, unless its clock was put back.
func Next(last, floor, now uint64) uint64 { return max(last+1, floor+1, now) }

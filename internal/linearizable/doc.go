// Package linearizable holds tests only: what clients of a session's home have seen must
// be explained by their calls having taken effect one after the other. It is a module of
// its own, so that the checker of histories is nobody else's dependency.
package linearizable

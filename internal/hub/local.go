package hub

import "sync"

// Local is a hub of one process: what changes wakes who watches it. The zero value is
// ready. Safe for concurrent use.
type Local struct {
	mu      sync.Mutex // never held during a call of a watcher
	watched map[string]map[*func()]struct{}
}

// Watch has changed called by every Wake of channel, until stop. After stop has returned
// it is not called, except for a call already under way.
func (l *Local) Watch(channel string, changed func()) (stop func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.watched == nil {
		l.watched = map[string]map[*func()]struct{}{}
	}
	if l.watched[channel] == nil {
		l.watched[channel] = map[*func()]struct{}{}
	}
	l.watched[channel][&changed] = struct{}{}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.watched[channel], &changed)
		if len(l.watched[channel]) == 0 {
			delete(l.watched, channel)
		}
	}
}

// Wake calls who watches channel, one after the other, and returns then. Call it without
// locks that a watcher may want.
func (l *Local) Wake(channel string) {
	l.mu.Lock()
	wake := make([]func(), 0, len(l.watched[channel]))
	for changed := range l.watched[channel] {
		wake = append(wake, *changed)
	}
	l.mu.Unlock()
	for _, changed := range wake {
		changed()
	}
}

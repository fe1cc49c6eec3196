// keyring.go is kept out of options.go because a keyring has a life of its own:
// it is made before the clients, shared by them, and changes while they run.

package sessionlock

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/sessionlock/sessionlock/internal/record"
)

// Keyring holds the keys under which sessions are sealed in the store: token,
// values and expiry are encrypted, and bound to namespace, upstream, key and
// generation. Make it with [NewKeyring], pass it by [WithKeyring]; several
// clients may share it, and all methods are safe for concurrent use. It prints
// as [sessionlock keyring], whatever prints it.
//
// The whole fleet seals with one key. To replace it, one step at a time:
//
//  1. [Keyring.Also] the new key in every process. It opens, the old one seals.
//  2. Wait until every process has it, those still starting included.
//  3. Start the processes with NewKeyring(new) and Also(old): now the new one
//     seals. Old sessions stay good.
//  4. Drop the old key when the longest life of a session has passed since the
//     last process began to seal with the new one: 24 hours, or as long as
//     sessions can be refreshed.
//
// In this order no session is lost. In any other, and when an id is used again for
// another key, a process meets sessions that it has no key for. It cannot use
// them; one of them is replaced by a login, per key and window of
// [WithLoginBudget] in the whole fleet, and beyond that the process gets
// [ErrUnavailable] until [Keyring.Also] gives it the key.
//
// What the store shows all the same: that there is a session, its generation,
// its times and its size, and the ids of keys. Names in the store are hashed
// under another secret, [WithKeySecret]: it does not rotate along, and must not
// be one of these keys. Whoever can write to the store cannot read or make a
// session, but can remove one, or put back an older one of the same key.
type Keyring struct{ p *ring }

// ring is what the copies of a Keyring share.
type ring struct {
	mu   sync.Mutex // held by Also, so that of two at once neither is lost
	keys atomic.Pointer[record.Keys]
}

// NewKeyring returns a keyring whose one key seals and opens. key is 32 random
// bytes and is copied; id names it for ever. The id is no secret: 1 to 32
// printable ASCII characters, not blank, that stand in clear in the store and
// in logs; a date, for instance.
//
// It returns [ErrInvalid] for another id, and for a key of another size or with
// all bytes equal.
func NewKeyring(id string, key []byte) (*Keyring, error) {
	if err := checkSealingKey(id, key); err != nil {
		return nil, err
	}
	k := &Keyring{new(ring)}
	k.p.keys.Store(record.NewKeys(id, key))
	return k, nil
}

// Also adds a key that only opens: what NewKeyring's key seals does not change.
// Clients that use the keyring have it from their next read on.
//
// It returns [ErrInvalid] for what NewKeyring refuses, for an id or a key that
// the keyring has already, and on a Keyring that NewKeyring did not return. The
// keyring is then as it was.
func (k *Keyring) Also(id string, key []byte) error {
	if k.keys() == nil {
		return fmt.Errorf("%w: keyring is nil or was not made by NewKeyring", ErrInvalid)
	}
	if err := checkSealingKey(id, key); err != nil {
		return err
	}
	k.p.mu.Lock()
	defer k.p.mu.Unlock()
	keys := k.keys()
	if keys.HasID(id) {
		return fmt.Errorf("%w: key id is in the keyring already", ErrInvalid)
	}
	if keys.HasKey(key) {
		return fmt.Errorf("%w: key is in the keyring already, under another id", ErrInvalid)
	}
	k.p.keys.Store(keys.With(id, key))
	return nil
}

// keys returns the keys as they are now. nil means that there is no keyring, so
// WithKeyring must refuse a Keyring without keys: nil seals nothing.
func (k *Keyring) keys() *record.Keys {
	if k == nil || k.p == nil {
		return nil
	}
	return k.p.keys.Load()
}

// checkSealingKey reports all that is wrong with a key and its id, and quotes
// neither: the two are easily swapped.
func checkSealingKey(id string, key []byte) error {
	var wrong []error
	if strings.TrimSpace(id) == "" || len(id) > record.MaxKeyID || strings.ContainsFunc(id, func(r rune) bool { return r < ' ' || r > '~' }) {
		wrong = append(wrong, fmt.Errorf("%w: key id is blank, over %d bytes or not printable ASCII", ErrInvalid, record.MaxKeyID))
	}
	if len(key) != record.KeySize {
		wrong = append(wrong, fmt.Errorf("%w: key has %d bytes, not %d", ErrInvalid, len(key), record.KeySize))
	} else if strings.Count(string(key), string(key[:1])) == len(key) {
		wrong = append(wrong, fmt.Errorf("%w: all bytes of the key are equal", ErrInvalid))
	}
	return errors.Join(wrong...)
}

const keyringPrints = "[sessionlock keyring]"

// String returns a fixed word.
func (k Keyring) String() string { return keyringPrints }

// Format writes a fixed word whatever the verb.
func (k Keyring) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, keyringPrints) }

// LogValue returns a fixed word.
func (k Keyring) LogValue() slog.Value { return slog.StringValue(keyringPrints) }

// MarshalText returns a fixed word.
func (k Keyring) MarshalText() ([]byte, error) { return []byte(keyringPrints), nil }

package redistest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// The ways in which Redis is run, each of real servers. Clients of all of them
// but StartTLS log in as [User], who may do what [Commands] says and no more.

// Sentinel is a master and a replica, watched by three Sentinels that take a
// silent master for dead after 500 ms. Its methods are for one goroutine at a
// time.
type Sentinel struct {
	tb        testing.TB
	data      []*Server
	sentinels []*Server
}

const (
	masterName = "main"
	// synced lets a replica be fit for promotion as soon as it has copied its
	// master: by default it waits 5 s before it begins, and one that has not
	// begun is never promoted.
	synced = "--repl-diskless-sync-delay"
)

// StartSentinel returns when the replica is in step and every Sentinel knows all
// the others: from then on a dead master is replaced.
func StartSentinel(tb testing.TB) *Sentinel {
	tb.Helper()
	s := &Sentinel{tb: tb}
	with := func(args ...string) *Server {
		return start(tb, kind{args: func(s *Server) []string { return append(s.plain(), args...) }})
	}
	master := with(synced, "0")
	replica := with(synced, "0", "--replicaof", "127.0.0.1 "+master.port)
	s.data = []*Server{master, replica}
	for range 3 {
		s.sentinels = append(s.sentinels, start(tb, kind{args: func(s *Server) []string {
			return s.sentinel(master.port)
		}}))
	}
	grantAll(tb, s.data, slices.Concat(Commands(tb), others))
	await(tb, "replication", func() error { return replica.shows("INFO replication", "master_link_status", "up") })
	for _, one := range s.sentinels {
		await(tb, "sentinels", func() error {
			return one.shows("INFO sentinel", "master0", "status=ok", "slaves=1", "sentinels=3")
		})
	}
	return s
}

// sentinel is the command line of a Sentinel, which keeps its state in its
// configuration file.
func (s *Server) sentinel(master string) []string {
	conf := filepath.Join(s.dir, "sentinel.conf")
	lines := []string{
		"port " + s.port, "bind 127.0.0.1", "dir " + s.dir,
		"sentinel monitor " + masterName + " 127.0.0.1 " + master + " 2",
		"sentinel down-after-milliseconds " + masterName + " 500",
		"sentinel failover-timeout " + masterName + " 2000", // an election that nobody won is repeated after twice that
	}
	if err := os.WriteFile(conf, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		s.tb.Fatalf("redistest: write configuration: %v", err)
	}
	return []string{conf, "--sentinel"}
}

// Client returns a client that asks the Sentinels for the master, otherwise with
// go-redis' default options. It is closed when the test ends.
func (s *Sentinel) Client() redis.UniversalClient {
	s.tb.Helper()
	o := &redis.FailoverOptions{MasterName: masterName, Username: User, Password: Password}
	for _, one := range s.sentinels {
		o.SentinelAddrs = append(o.SentinelAddrs, one.Addr())
	}
	rdb := redis.NewFailoverClient(o)
	s.tb.Cleanup(func() { _ = rdb.Close() })
	return rdb
}

// Master returns the master as the Sentinels see it.
func (s *Sentinel) Master() *Server {
	s.tb.Helper()
	rdb := redis.NewSentinelClient(&redis.Options{Addr: s.sentinels[0].Addr()})
	defer rdb.Close()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.tb.Context()), patience)
	defer cancel()
	addr, err := rdb.GetMasterAddrByName(ctx, masterName).Result()
	if err != nil {
		s.tb.Fatalf("redistest: find the master: %v", err)
	}
	return find(s.tb, s.data, net.JoinHostPort(addr[0], addr[1]))
}

// Cluster is three masters with a replica each. A node that is silent for a
// second is taken for dead. Its methods are for one goroutine at a time.
type Cluster struct {
	tb    testing.TB
	nodes []*Server // first the masters, then the replica of each
}

const masters = 3

// StartCluster returns when every node serves and every replica is in step.
func StartCluster(tb testing.TB) *Cluster {
	tb.Helper()
	c := &Cluster{tb: tb}
	for range 2 * masters {
		c.nodes = append(c.nodes, start(tb, kind{
			port: portWithBus,
			args: func(s *Server) []string {
				// A replica is not shown to clients before its master has sent something, a ping at the least.
				return append(s.plain(), "--cluster-enabled", "yes", "--cluster-node-timeout", "1000",
					synced, "0", "--repl-ping-replica-period", "1")
			},
		}))
	}
	if err := c.join(); err != nil {
		tb.Fatalf("redistest: make a cluster: %v", err)
	}
	grantAll(tb, c.nodes, slices.Concat(Commands(tb), InCluster, others))
	return c
}

// portWithBus returns a free port that leaves room for the cluster bus, which
// listens 10000 above it.
func portWithBus(tb testing.TB) string {
	tb.Helper()
	for range 1000 {
		port, _ := strconv.Atoi(freePort(tb))
		if port > 55000 {
			continue
		}
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port+10000))) //nolint:noctx // returns at once
		if err == nil {
			_ = l.Close()
			return strconv.Itoa(port)
		}
	}
	tb.Fatal("redistest: no free port with a free one 10000 above it")
	return ""
}

// join makes a cluster of the nodes.
func (c *Cluster) join() error {
	ctx, cancel := context.WithTimeout(c.tb.Context(), 3*patience)
	defer cancel()
	const slots = 16384
	ids := make([]string, len(c.nodes))
	clients := make([]*redis.Client, len(c.nodes))
	for i, one := range c.nodes {
		rdb := one.Client()
		clients[i] = rdb
		ids[i] = rdb.ClusterMyID(ctx).Val()
		// Each node with an epoch of its own, so that none has to give way first.
		err := rdb.Do(ctx, "CLUSTER", "SET-CONFIG-EPOCH", i+1).Err()
		if i < masters {
			err = errors.Join(err, rdb.ClusterAddSlotsRange(ctx, i*slots/masters, (i+1)*slots/masters-1).Err())
		}
		if i > 0 {
			err = errors.Join(err, clients[0].ClusterMeet(ctx, "127.0.0.1", one.port).Err())
		}
		if err != nil {
			return err
		}
	}
	for _, one := range c.nodes {
		await(c.tb, "nodes to meet", func() error {
			return one.shows("CLUSTER INFO", "cluster_known_nodes", strconv.Itoa(len(c.nodes)))
		})
	}
	for i, master := range ids[:masters] {
		if err := clients[masters+i].ClusterReplicate(ctx, master).Err(); err != nil {
			return err
		}
	}
	for i, one := range c.nodes {
		await(c.tb, "cluster", func() error { return c.whole(ctx, clients[i]) })
		if i >= masters {
			await(c.tb, "replication", func() error { return one.shows("INFO replication", "master_link_status", "up") })
		}
	}
	return nil
}

// whole reports whether a node serves and knows the replica of every master.
func (c *Cluster) whole(ctx context.Context, node *redis.Client) error {
	info, err := node.ClusterInfo(ctx).Result()
	if err == nil && !strings.Contains(info, "cluster_state:ok") {
		err = errors.New(info)
	}
	slots, slotsErr := node.ClusterSlots(ctx).Result() //nolint:staticcheck // Redis 6.2 has nothing newer
	if slotsErr == nil && len(slots) != masters {
		slotsErr = fmt.Errorf("slots: %v", slots)
	}
	if err := errors.Join(err, slotsErr); err != nil {
		return err
	}
	for _, some := range slots {
		if len(some.Nodes) != 2 {
			return fmt.Errorf("no replica: %v", some)
		}
	}
	return nil
}

// Client returns a client that knows all nodes, otherwise with go-redis' default
// options. It is closed when the test ends.
func (c *Cluster) Client() *redis.ClusterClient {
	c.tb.Helper()
	o := &redis.ClusterOptions{Username: User, Password: Password}
	for _, one := range c.nodes {
		o.Addrs = append(o.Addrs, one.Addr())
	}
	rdb := redis.NewClusterClient(o)
	c.tb.Cleanup(func() { _ = rdb.Close() })
	return rdb
}

// Owner returns the master of key's slot, as the first node that runs sees it.
func (c *Cluster) Owner(key string) *Server {
	c.tb.Helper()
	i := slices.IndexFunc(c.nodes, func(s *Server) bool { return s.cmd != nil })
	if i < 0 {
		c.tb.Fatal("redistest: no node runs")
	}
	rdb := redis.NewClient(&redis.Options{Addr: c.nodes[i].Addr()})
	defer rdb.Close()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.tb.Context()), patience)
	defer cancel()
	slot, err := rdb.ClusterKeySlot(ctx, key).Result()
	slots, err2 := rdb.ClusterSlots(ctx).Result() //nolint:staticcheck // Redis 6.2 has nothing newer
	if err := errors.Join(err, err2); err != nil {
		c.tb.Fatalf("redistest: find an owner: %v", err)
	}
	for _, some := range slots {
		if some.Start <= int(slot) && int(slot) <= some.End {
			return find(c.tb, c.nodes, some.Nodes[0].Addr)
		}
	}
	c.tb.Fatalf("redistest: nobody owns slot %d", slot)
	return nil
}

// Isolate makes all that is written to a master from now on be lost with it: its
// replicas get nothing any more, though they and others can still talk to it.
func (s *Server) Isolate() {
	s.tb.Helper()
	ctx, rdb := s.tb.Context(), s.Admin()
	err := errors.Join(
		rdb.Do(ctx, "ACL", "SETUSER", "default", "-psync", "-sync").Err(),
		rdb.Do(ctx, "CLIENT", "KILL", "TYPE", "replica").Err(),
	)
	if err != nil {
		s.tb.Fatalf("redistest: isolate a master: %v", err)
	}
}

func find(tb testing.TB, servers []*Server, addr string) *Server {
	tb.Helper()
	for _, s := range servers {
		if s.Addr() == addr {
			return s
		}
	}
	tb.Fatalf("redistest: %s is none of ours", addr)
	return nil
}

// StartTLS starts a server that speaks TLS only, with a certificate of an
// authority that its clients alone trust.
func StartTLS(tb testing.TB) *Server {
	tb.Helper()
	trust, cert, key := certificate(tb)
	return start(tb, kind{
		tls: &tls.Config{RootCAs: trust, ServerName: "127.0.0.1", MinVersion: tls.VersionTLS12},
		args: func(s *Server) []string {
			return append(s.plain(), "--port", "0", "--tls-port", s.port, "--tls-auth-clients", "no",
				"--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", cert)
		},
	})
}

// certificate writes a certificate for loopback and its key, and returns who
// trusts it.
func certificate(tb testing.TB) (trust *x509.CertPool, cert, key string) {
	tb.Helper()
	must := func(err error) {
		if err != nil {
			tb.Fatalf("redistest: make a certificate: %v", err)
		}
	}
	pair := func(name string, authority bool, parent *x509.Certificate, signer *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(err)
		c := &x509.Certificate{
			SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
			IsCA: authority, BasicConstraintsValid: true,
			KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
			IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		}
		if parent == nil {
			parent, signer = c, k
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, k.Public(), signer)
		must(err)
		c, err = x509.ParseCertificate(der)
		must(err)
		return c, k
	}
	ca, signer := pair("redistest authority", true, nil, nil)
	leaf, k := pair("redistest server", false, ca, signer)
	der, err := x509.MarshalPKCS8PrivateKey(k)
	must(err)
	dir := tb.TempDir()
	cert, key = filepath.Join(dir, "server.crt"), filepath.Join(dir, "server.key")
	must(os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Raw}), 0o600))
	must(os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	trust = x509.NewCertPool()
	trust.AddCert(ca)
	return trust, cert, key
}

// The least user.
const (
	User     = "sessionlock"
	Password = "PASSWORD"
)

// StartACL starts a server whose clients log in as [User].
func StartACL(tb testing.TB) *Server {
	tb.Helper()
	s := start(tb, kind{user: func(o *redis.Options) { o.Username, o.Password = User, Password }})
	s.Grant(User, Commands(tb)...)
	return s
}

// Admin returns a client that may do everything. It is closed when the test ends.
func (s *Server) Admin() *redis.Client {
	s.tb.Helper()
	return s.Client(func(o *redis.Options) { o.Username, o.Password = "", "" })
}

// Grant makes user, whose password is [Password], one who may run these commands
// on what sessionlock keeps, and nothing else.
func (s *Server) Grant(user string, commands ...string) {
	s.tb.Helper()
	rule := []any{}
	for _, word := range Rule(user, commands...) {
		rule = append(rule, word)
	}
	if err := s.Admin().Do(s.tb.Context(), rule...).Err(); err != nil {
		s.tb.Fatalf("redistest: grant: %v", err)
	}
}

func grantAll(tb testing.TB, servers []*Server, commands []string) {
	tb.Helper()
	for _, s := range servers {
		s.Grant(User, commands...)
	}
}

// Rule returns the words of the command that Grant runs.
func Rule(user string, commands ...string) []string {
	rule := strings.Fields("ACL SETUSER " + user + " on >" + Password + " resetchannels &sl:* resetkeys ~sl:* -@all")
	for _, command := range commands {
		rule = append(rule, "+"+command)
	}
	return rule
}

// sent are the commands that clients send themselves, scripts aside, and what
// for. HELLO and AUTH need not be granted to anybody, CLIENT SETINFO is taken
// for granted by nobody: go-redis does not mind its refusal.
var sent = map[string]string{
	"evalsha":     "every swap, and all that is done to a lock",
	"eval":        "the same, on a server that does not know the script",
	"getrange":    "read an entry, up to its largest size",
	"time":        "the store's clock",
	"subscribe":   "wake-ups",
	"unsubscribe": "of what nobody waits for any more",
	"ping":        "is a silent subscription alive?",
}

// InCluster are the commands that go-redis needs besides to find its way in a
// cluster: who owns which slots; and what it has to know of each command, which
// it asks again before each call for as long as it is refused.
var InCluster = []string{"cluster|slots", "command"}

// others are what the packages beside the root need, whose tests share Sentinel and
// Cluster with it.
var others = []string{"@read", "@write", "wait"}

// scripts are the Lua files that a client runs, by package. Of redislock the one
// that is not run needs nothing of its own.
var scripts = map[string][]string{
	"github.com/sessionlock/sessionlock/internal/lua": {"swap.lua", "heal.lua"},
	"github.com/bsm/redislock":                        {"*.lua"},
}

var called = regexp.MustCompile(`redis\.p?call\((\s*["'](\w+)["'])?`)

// Commands returns all commands that sessionlock needs to be granted, in
// alphabetical order: those its clients send, and those their scripts call, as
// found in the sources.
func Commands(tb testing.TB) []string {
	tb.Helper()
	all := maps.Clone(sent)
	for pkg, patterns := range scripts {
		dir, err := exec.CommandContext(tb.Context(), "go", "list", "-f", "{{.Dir}}", pkg).Output()
		if err != nil {
			tb.Fatalf("redistest: find the scripts: %v", err)
		}
		for _, pattern := range patterns {
			files, _ := filepath.Glob(filepath.Join(strings.TrimSpace(string(dir)), pattern))
			if len(files) == 0 {
				tb.Fatalf("redistest: no %s in %s", pattern, dir)
			}
			for _, file := range files {
				readCalls(tb, file, all)
			}
		}
	}
	return slices.Sorted(maps.Keys(all))
}

// readCalls adds what a script calls to all.
func readCalls(tb testing.TB, file string, all map[string]string) {
	tb.Helper()
	lua, err := os.ReadFile(file)
	if err != nil {
		tb.Fatalf("redistest: read a script: %v", err)
	}
	for _, call := range called.FindAllSubmatch(lua, -1) {
		if len(call[2]) == 0 {
			tb.Fatalf("redistest: %s calls what cannot be told by reading it", file)
		}
		all[strings.ToLower(string(call[2]))] = file
	}
}

// shows reports whether the value of a field has all of want.
func (s *Server) shows(command, field string, want ...string) error {
	v, err := s.lookup(command, field)
	if err != nil {
		return err
	}
	parts := strings.Split(v, ",")
	for _, w := range want {
		if !slices.Contains(parts, w) {
			return fmt.Errorf("%s is %s, not %s", field, v, w)
		}
	}
	return nil
}

// await waits until ready has nothing to say any more.
func await(tb testing.TB, what string, ready func() error) {
	tb.Helper()
	var err error
	for end := time.Now().Add(3 * patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if err = ready(); err == nil {
			return
		}
	}
	tb.Fatalf("redistest: wait for %s: %v", what, err)
}

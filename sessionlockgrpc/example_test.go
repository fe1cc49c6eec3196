package sessionlockgrpc_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/sessionlock/sessionlock"
	"github.com/sessionlock/sessionlock/sessionlockgrpc"
)

// acme is somebody else's API: it serves who shows the token of the last login.
type acme struct {
	addr   string
	logins atomic.Int64
	live   atomic.Pointer[string]
	*grpc.Server
}

func startAcme() *acme {
	a := new(acme)
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	a.addr = l.Addr().String()
	a.Server = grpc.NewServer(
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			if err := a.check(ctx); err != nil {
				return nil, err
			}
			return handler(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
			if err := a.check(ss.Context()); err != nil {
				return err
			}
			return handler(srv, ss)
		}))
	healthgrpc.RegisterHealthServer(a.Server, health.NewServer())
	go func() { _ = a.Serve(l) }()
	return a
}

func (a *acme) check(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	if live := a.live.Load(); live == nil || len(md["authorization"]) != 1 || md["authorization"][0] != "Bearer "+*live {
		return status.Error(codes.Unauthenticated, "no such session")
	}
	return nil
}

func (a *acme) Login(_ context.Context, key string) (sessionlock.Session, error) {
	token := fmt.Sprint(key, "/", a.logins.Add(1))
	a.live.Store(&token)
	return sessionlock.Session{Token: sessionlock.NewToken(token)}, nil
}

func (a *acme) Restart() { a.live.Store(nil) } // its sessions are gone

func ExampleUnaryClientInterceptor() {
	upstream := startAcme()
	defer upstream.Stop()
	// A fleet shares its sessions by sessionlock.WithRedis.
	client, err := sessionlock.New("grpc://api.acme.test", upstream, sessionlock.WithCache(new(sessionlock.MemoryCache)))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close(context.Background())

	conn, err := grpc.NewClient(upstream.addr,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // this machine; credentials.NewTLS elsewhere
		grpc.WithChainUnaryInterceptor(sessionlockgrpc.UnaryClientInterceptor(client, nil)))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	api := healthgrpc.NewHealthClient(conn)

	ctx := sessionlock.KeyContext(context.Background(), "tenant-7") // whose session
	for range 2 {
		answer, err := api.Check(ctx, &healthgrpc.HealthCheckRequest{})
		fmt.Println(answer.GetStatus(), err, upstream.logins.Load())
		upstream.Restart()
	}
	// Output:
	// SERVING <nil> 1
	// SERVING <nil> 2
}

func ExampleStreamClientInterceptor() {
	upstream := startAcme()
	defer upstream.Stop()
	client, err := sessionlock.New("grpc://api.acme.test", upstream, sessionlock.WithCache(new(sessionlock.MemoryCache)))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close(context.Background())

	service := func(context.Context) (string, error) { return "reporting", nil } // one account for all calls
	conn, err := grpc.NewClient(upstream.addr,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithChainStreamInterceptor(sessionlockgrpc.StreamClientInterceptor(client, service)))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	api := healthgrpc.NewHealthClient(conn)

	for range 2 {
		ctx, cancel := context.WithCancel(context.Background())
		stream, err := api.Watch(ctx, &healthgrpc.HealthCheckRequest{})
		if err != nil {
			log.Fatal(err)
		}
		news, err := stream.Recv()
		fmt.Println(news.GetStatus(), err, upstream.logins.Load())
		cancel()
		upstream.Restart()
	}
	// Output:
	// SERVING <nil> 1
	// SERVING <nil> 2
}

// Where the network itself is trusted, inside a service mesh that encrypts for
// instance, the token may go out in clear.
func ExampleAllowPlaintext() {
	conn, err := grpc.NewClient("orders.internal:80",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(sessionlockgrpc.AllowPlaintext()))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(conn.Target(), conn.Close())
	// Output: orders.internal:80 <nil>
}

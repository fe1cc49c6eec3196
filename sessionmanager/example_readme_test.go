package sessionmanager_test

import (
	"context"
	"fmt"

	"github.com/sessionlock/sessionlock/sessionmanager"
)

// What the README shows.
func Example_readme() {
	ctx := context.Background()
	user, page := "ann", "page 1"
	err := func() error {
		manager, err := sessionmanager.New[*Printer](sessionmanager.WithMax(200)) // at once, in this process
		if err != nil {
			return err
		}
		defer manager.Shutdown(context.Background()) // ends every worker, in 15 s at most
		go manager.Run(ctx)                          // ends those whose lease is over: 30 min without use

		// Your func(ctx, id) (*Printer, error), whose ctx ends with Open; ErrLimit at once if there are 200.
		session, err := manager.Open(ctx, sessionmanager.Spec{Owner: user}, StartPrinter)
		if err != nil {
			return err
		}
		// … in a later request:
		session, err = manager.Get(session.ID(), user) // ErrNotFound, for somebody else's too
		if err != nil {
			return err
		}
		return session.Do(ctx, func(ctx context.Context, p *Printer) error { // has a timeout, renews the lease, survives a panic
			jobs, err := p.Print(ctx, page)
			fmt.Println(jobs, err)
			return err
		})
	}()
	fmt.Println(err)
	// Output:
	// 1 <nil>
	// <nil>
}

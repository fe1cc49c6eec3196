package sessionguard_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"

	"github.com/sessionlock/sessionlock/sessionguard"
)

// shop stands for a database of carts.
type shop map[string]*cart

func (s shop) Save(ctx context.Context, id, items string, epoch uint64) (applied bool, err error) {
	return s[id].Save(ctx, items, epoch)
}

// What the README shows.
func Example_readme() {
	rdb, stop := exampleRedis()
	defer stop()
	mux, db := http.NewServeMux(), shop{"7": new(cart)}
	err := func() error {
		monitor, err := sessionguard.New(rdb)
		if err != nil {
			return err
		}
		guarded := monitor.Middleware(func(r *http.Request) string { return r.PathValue("cart") }) // "": not guarded
		mux.Handle("POST /cart/{cart}", guarded(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			guard := sessionguard.FromContext(r.Context()) // r.Context() ends as soon as a newer request arrives, on any node
			err := guard.Commit(r.Context(), func(ctx context.Context, epoch uint64) (bool, error) {
				return db.Save(ctx, r.PathValue("cart"), r.FormValue("items"), epoch) // UPDATE … WHERE epoch <= $epoch; false: no row
			})
			if err == nil {
				fmt.Fprintln(w, "saved") // else, superseded, it is answered with 409
			}
		})))
		defer monitor.Close(context.Background())
		r := httptest.NewRequestWithContext(context.Background(), http.MethodPost, "/cart/7?items=lamp", strings.NewReader(""))
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, r)
		fmt.Print(w.Code, " ", w.Body)
		return nil
	}()
	fmt.Println(db["7"].items, err)
	// Output:
	// 200 saved
	// lamp <nil>
}

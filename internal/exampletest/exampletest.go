// Package exampletest shows that the examples of a package leave out nothing of what it
// exports.
package exampletest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// bodies finds the examples of a file, to their closing brace.
var bodies = regexp.MustCompile(`(?ms)^func Example.*?^}$`)

// ReachAll fails t for every exported name of the package in the working directory that
// is in no example, nor in what those of example_test.go share, but those that unshown
// matches: methods of standard interfaces, and what a struct or group is shown by.
func ReachAll(t *testing.T, unshown *regexp.Regexp) {
	t.Helper()
	files, err := filepath.Glob("*.go")
	must(t, err)
	var shown strings.Builder
	names := map[string]bool{}
	for _, file := range files {
		b, err := os.ReadFile(file) //nolint:gosec // of this directory
		must(t, err)
		switch {
		case file == "example_test.go":
			shown.Write(b)
		case strings.HasSuffix(file, "_test.go"):
			for _, body := range bodies.FindAll(b, -1) {
				shown.Write(body)
			}
		default:
			parsed, err := parser.ParseFile(token.NewFileSet(), file, b, parser.SkipObjectResolution)
			must(t, err)
			for _, decl := range parsed.Decls {
				for _, id := range declared(decl) {
					if id.IsExported() && !unshown.MatchString(id.Name) {
						names[id.Name] = true
					}
				}
			}
		}
	}
	if len(names) == 0 {
		t.Error("no exported names: is this the package's directory?")
	}
	for name := range names {
		if !regexp.MustCompile(`[.)]\s*` + name + `\b`).MatchString(shown.String()) {
			t.Errorf("%s is in no example", name)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// declared returns the names of a declaration, but those of methods that nobody else can
// call.
func declared(decl ast.Decl) (names []*ast.Ident) {
	switch d := decl.(type) {
	case *ast.FuncDecl:
		if d.Recv == nil || ast.IsExported(receiver(d)) {
			names = append(names, d.Name)
		}
	case *ast.GenDecl:
		for _, spec := range d.Specs {
			switch s := spec.(type) {
			case *ast.TypeSpec:
				names = append(names, s.Name)
			case *ast.ValueSpec:
				names = append(names, s.Names...)
			}
		}
	}
	return names
}

// receiver is the name of a method's type.
func receiver(d *ast.FuncDecl) (name string) {
	ast.Inspect(d.Recv.List[0].Type, func(n ast.Node) bool {
		id, ok := n.(*ast.Ident)
		if ok && name == "" {
			name = id.Name
		}
		return !ok
	})
	return name
}

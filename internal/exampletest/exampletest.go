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
	"slices"
	"strings"
	"testing"
)

// bodies finds the examples of a file, to their closing brace.
var bodies = regexp.MustCompile(`(?ms)^func Example.*?^}$`)

// ReachAll fails t for every name that is [Missing].
func ReachAll(t *testing.T, unshown *regexp.Regexp) {
	t.Helper()
	names, err := Missing(unshown)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		t.Errorf("%s is in no example", name)
	}
}

// Missing returns the exported names of the package in the working directory that are in
// no example, nor in what those of example_test.go share, but those that unshown matches:
// methods of standard interfaces, and what a struct or group is shown by.
func Missing(unshown *regexp.Regexp) (names []string, err error) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		return nil, err
	}
	var shown strings.Builder
	for _, file := range files {
		b, err := os.ReadFile(file) //nolint:gosec // of this directory
		if err != nil {
			return nil, err
		}
		switch {
		case file == "example_test.go":
			shown.Write(b)
		case strings.HasSuffix(file, "_test.go"):
			for _, body := range bodies.FindAll(b, -1) {
				shown.Write(body)
			}
		default:
			parsed, err := parser.ParseFile(token.NewFileSet(), file, b, parser.SkipObjectResolution)
			if err != nil {
				return nil, err
			}
			for _, decl := range parsed.Decls {
				for _, id := range declared(decl) {
					if id.IsExported() && !unshown.MatchString(id.Name) {
						names = append(names, id.Name)
					}
				}
			}
		}
	}
	return slices.DeleteFunc(names, func(name string) bool {
		return regexp.MustCompile(`[.)]\s*` + name + `\b`).MatchString(shown.String())
	}), nil
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

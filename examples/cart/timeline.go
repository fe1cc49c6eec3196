package main

// timeline.go draws stories: client, nodes and database, over the time. It can be
// read in light and dark, and in a page that is narrower than a screen.

import (
	"bytes"
	"fmt"
	"html"
	"strings"
)

// style is the classes that a picture uses; what is not said for dark is the same.
const style = `
    .page { fill: #ffffff; stroke: #d0d7de }
    text { fill: #24292f }
    text.quiet { fill: #57606a }
    text.bad { fill: #cf222e; font-weight: 600 }
    text.good { fill: #1a7f37; font-weight: 600 }
    .strong { font-weight: 600 }
    rect.old { fill: #fff8e5; stroke: #d4a72c }
    rect.deaf { fill: #ffebe9; stroke: #cf222e; stroke-dasharray: 4 3 }
    rect.new { fill: #dafbe1; stroke: #1a7f37 }
    rect.row { fill: #eef6ff; stroke: #54aeff }
    rect.lost { fill: #ffebe9; stroke: #cf222e }
    .line { stroke: #57606a; stroke-width: 1.5; fill: none }
    .line.bad { stroke: #cf222e; stroke-width: 2 }
    .line.good { stroke: #1a7f37 }
    .grid { stroke: #d0d7de; stroke-dasharray: 2 4 }
    @media (prefers-color-scheme: dark) {
      .page { fill: #0d1117; stroke: #30363d }
      text { fill: #e6edf3 }
      text.quiet { fill: #9198a1 }
      text.bad { fill: #ff7b72 }
      text.good { fill: #56d364 }
      rect.old { fill: #3a2d0a; stroke: #bb8009 }
      rect.deaf { fill: #3d1416; stroke: #f85149 }
      rect.new { fill: #12351d; stroke: #3fb950 }
      rect.row { fill: #0c2d4d; stroke: #388bfd }
      rect.lost { fill: #3d1416; stroke: #f85149 }
      .line { stroke: #9198a1 }
      .line.bad { stroke: #f85149 }
      .line.good { stroke: #3fb950 }
      .grid { stroke: #30363d }
    }
`

const (
	width, height = 860, 520
	zero, second  = 112.0, 305.0 // where the time begins, and how long a second is
	ends          = 848.0
)

// picture is an SVG that is being written.
type picture struct{ bytes.Buffer }

func (p *picture) add(format string, args ...any) { fmt.Fprintf(p, format+"\n", args...) }

func (p *picture) text(x, y float64, class, text string) {
	p.add(`  <text x="%.1f" y="%.1f" class="%s">%s</text>`, x, y, class, html.EscapeString(text))
}

// before writes text that ends at x.
func (p *picture) before(x, y float64, class, text string) {
	p.add(`  <text x="%.1f" y="%.1f" class="%s" text-anchor="end">%s</text>`, x, y, class, html.EscapeString(text))
}

func (p *picture) bar(from, to, y, h float64, class string) {
	p.add(`  <rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" rx="3" class="%s"/>`, from, y, max(to-from, 1), h, class)
}

func (p *picture) arrow(x, from, to float64, class string) {
	p.add(`  <path d="M%.1f %.1f V%.1f" class="line %s"/>`, x, from, to, class)
	p.add(`  <path d="M%.1f %.1f l4 -6 m-4 6 l-4 -6" class="line %s"/>`, x, to, class)
}

// draw draws the same story without the guard and with it.
func draw(without, with story) []byte {
	p := &picture{}
	p.add(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="ui-sans-serif, system-ui, sans-serif" font-size="12.5">`, width, height)
	p.add(`  <title>A late write, without the guard and with it</title>`)
	p.add(`  <style>%s  </style>`, style)
	p.add(`  <rect x="0.5" y="0.5" width="%d" height="%d" rx="6" class="page"/>`, width-1, height-1)
	p.add(`  <text x="16" y="28" class="strong" font-size="16">Node 1 is slow, so the request is sent again, to node 2. Then node 1 saves what it knew.</text>`)
	for t := 0.0; t <= 2; t += 0.5 {
		p.add(`  <path d="M%.1f 44 V%d" class="grid"/>`, zero+t*second, height-28)
		p.add(`  <text x="%.1f" y="%d" class="quiet" text-anchor="middle">%.1f s</text>`, zero+t*second, height-12, t)
	}
	without.draw(p, 48, "Without the guard")
	with.draw(p, 272, "With the guard, and a handler that ignores it")
	p.add(`</svg>`)
	return p.Bytes()
}

func (st story) x(e event) float64 { return zero + second*e.At.Sub(st.start).Seconds() }

// at is where something happened; what did not is at the end.
func (st story) at(request int, what string) float64 {
	e, ok := st.find(request, what)
	if !ok {
		return ends
	}
	return st.x(e)
}

// draw draws a story below y.
func (st story) draw(p *picture, y float64, title string) {
	client, node1, node2, row := y+50, y+60, y+116, y+164
	p.add(`  <text x="16" y="%.1f" class="strong" font-size="14">%s</text>`, y+16, title)
	st.drawNodes(p, node1, node2)
	st.drawClient(p, client, node1, node2)
	st.drawRow(p, node1, node2, row)
}

func (st story) drawClient(p *picture, y, node1, node2 float64) {
	p.text(16, y-4, "strong", "client")
	for n, text := range []string{"add the lamp", "no answer: again", "add the book"} {
		x := st.at(n+1, asked)
		p.text(x+6, y-6, "", text)
		p.arrow(x, y-16, []float64{node1, node2, node1 + 24}[n], "")
	}
	p.before(ends, y-6, "quiet", st.status(1)+", too late")
}

func (st story) drawNodes(p *picture, node1, node2 float64) {
	p.text(16, node1+15, "strong", "node 1")
	p.text(16, node2+15, "strong", "node 2")
	start, end := st.at(1, registered), st.at(1, left)
	p.bar(start, end, node1, 20, "old")
	p.text(start+6, node1+14, "", "read it empty, is slow")
	if d, ok := st.told(); ok { // in two parts, beside the arrow of the third request
		p.bar(st.at(1, told), end, node1, 20, "deaf")
		p.text(st.at(1, told)+7, node1+14, "bad", "told to stop")
		p.text(st.at(3, asked)+7, node1+14, "bad", fmt.Sprintf("after %.1f ms; this handler goes on", d.Seconds()*1000))
	}
	p.bar(st.at(2, registered), st.at(2, left), node2, 20, "new")
	p.text(st.at(2, left)+6, node2+14, "quiet", "answers "+st.status(2))
	p.bar(st.at(3, registered), st.at(3, left), node1+24, 20, "new")
	p.text(st.at(3, left)+6, node1+38, "quiet", "answers "+st.status(3))
}

// drawRow draws what is in the database: it changes by updates that change a row.
func (st story) drawRow(p *picture, node1, node2, row float64) {
	p.text(16, row+16, "strong", "cart in the")
	p.text(16, row+31, "strong", "database")
	x, class, items := zero, "row", "empty"
	for _, e := range st.events {
		if e.What != updated || e.Rows == 0 {
			continue
		}
		p.segment(x, st.x(e), row, class, items)
		if class = "row"; e.Request == 1 {
			class = "lost"
		}
		x, items = st.x(e), strings.Join(e.Items, ", ")
	}
	p.segment(x, ends, row, class, items)
	p.arrow(st.at(2, updated), node2+20, row, "good")
	p.arrow(st.at(3, updated), node1+44, row, "good")
	late := st.at(1, updated)
	if e, _ := st.find(1, updated); e.Rows > 0 {
		p.arrow(late, node1+20, row, "bad")
		p.before(late-9, node2+14, "", "UPDATE of what it read at 0 s:")
		p.before(late-9, node2+31, "bad", st.update()+", the book is lost")
		return
	}
	p.add(`  <path d="M%.1f %.1f V%.1f m-6 -6 l12 12 m0 -12 l-12 12" class="line bad"/>`, late, node1+20, row-12)
	p.before(late-9, node2+14, "", "UPDATE … AND epoch <= mine:")
	p.before(late-9, node2+31, "good", st.update()+", the book stays")
}

func (p *picture) segment(from, to, y float64, class, text string) {
	p.bar(from, to, y, 24, class)
	p.text(from+6, y+16, "", text)
}

package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// The chart's measures, in pixels.
const (
	chartWidth, chartHeight = 720, 410
	plotLeft, plotRight     = 70, 700
	plotTop, plotBottom     = 30, 290
)

var lineColours = []string{"#777777", "#c9b400", "#e08214", "#b2182b", "#2166ac", "#1b9e77"}

// chart draws requests per second by the number of instances, in SVG: as a share
// of what three static upstreams do in the same rounds, since the sizes are not
// measured at the same time.
func (r *results) chart() string {
	sizes := slices.Sorted(maps.Keys(r.Requests))
	const highest, step = 120.0, 20.0
	share := func(n int, name string) float64 {
		q := r.Requests[n]
		return 100 * medianRatio(q.Samples[name], q.Samples[static], sample.rate)
	}
	x := func(i int) float64 {
		if len(sizes) < 2 {
			return (plotLeft + plotRight) / 2
		}
		return plotLeft + 40 + float64(i)*(plotRight-plotLeft-80)/float64(len(sizes)-1)
	}
	y := func(share float64) float64 { return plotBottom - share/highest*(plotBottom-plotTop) }

	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="13">`+"\n", chartWidth, chartHeight)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="white"/>`+"\n", chartWidth, chartHeight)
	text := func(x, y float64, anchor, text string) {
		fmt.Fprintf(&b, `<text x="%.0f" y="%.0f" text-anchor="%s" fill="#222222">%s</text>`+"\n", x, y, anchor, text)
	}
	text(plotLeft-60, plotTop-12, "start", "requests per second, in % of three static upstreams")
	for at := 0.0; at <= highest; at += step {
		fmt.Fprintf(&b, `<path d="M%d %.1fH%d" stroke="#dddddd"/>`+"\n", plotLeft, y(at), plotRight)
		text(plotLeft-8, y(at)+4, "end", grouped(int(at)))
	}
	for i, n := range sizes {
		text(x(i), plotBottom+20, "middle", grouped(n))
	}
	text((plotLeft+plotRight)/2, plotBottom+40, "middle", "instances of the service")

	line := 0
	for _, c := range contenders {
		if c.line == "" {
			continue
		}
		colour := lineColours[line%len(lineColours)]
		var points []string
		for i, n := range sizes {
			if len(r.Requests[n].Samples[c.name]) > 0 {
				at := y(share(n, c.name))
				points = append(points, fmt.Sprintf("%.1f,%.1f", x(i), at))
				fmt.Fprintf(&b, `<circle cx="%.1f" cy="%.1f" r="4" fill="%s"/>`+"\n", x(i), at, colour)
			}
		}
		dash := ""
		if c.name == static {
			dash = ` stroke-dasharray="6 4"`
		}
		fmt.Fprintf(&b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2.5"%s/>`+"\n", strings.Join(points, " "), colour, dash)
		left, top := float64(plotLeft+line%2*300), float64(plotBottom+64+line/2*18)
		fmt.Fprintf(&b, `<path d="M%.0f %.0fh24" stroke="%s" stroke-width="2.5"%s/>`+"\n", left, top-4, colour, dash)
		text(left+32, top, "start", c.line)
		line++
	}
	b.WriteString("</svg>\n")
	return b.String()
}

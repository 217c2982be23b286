// Command bench measures a real Caddy with this plugin, between real backends
// and a separate load generator, following real Consul agents. It prints tables
// in Markdown, keeps what it measured in bench/out, and writes bench/RESULTS.md
// and bench/speed.svg from the newest figures of each part.
//
// Run it with `make bench`; BENCH='-only requests -sizes 5000' for a part of it.
package main

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddy-consul/caddy-consul/caddytest"
)

// settings are the flags.
type settings struct {
	parts    []string
	sizes    []int
	rounds   int
	warmUp   time.Duration
	duration time.Duration
	profiles string
}

// parts are what can be measured, in the order of the report.
var parts = []struct {
	name    string
	measure func(caddytest.TB, *settings, *results)
}{
	{"requests", measureRequests},
	{"micro", measureMicro},
	{"updates", measureUpdates},
	{"services", measureServices},
	{"names", measureNames},
}

func main() {
	isBackend := flag.Bool("backend", false, "be a process of the backend; for the program itself")
	only := flag.String("only", "", "measure only these `parts`: "+strings.Join(partNames(), ","))
	reportOnly := flag.Bool("report", false, "write the report of what earlier runs have measured, and measure nothing")
	sizes := flag.String("sizes", "3,100,1000,5000", "the `numbers` of instances, for the part requests")
	s := &settings{}
	flag.IntVar(&s.rounds, "rounds", 11, "how many `rounds` the contenders go, in the parts requests and names")
	flag.DurationVar(&s.warmUp, "warmup", 2*time.Second, "how long each Caddy is warmed up")
	flag.DurationVar(&s.duration, "duration", time.Second, "how long each contender takes a round")
	flag.StringVar(&s.profiles, "profiles", "", "write CPU profiles of Caddy into this `folder`, in the part requests")
	flag.Parse()
	if *isBackend {
		fail(serveBackend())
		return
	}
	fail(s.parse(*only, *sizes))

	r, err := loadResults()
	fail(err)
	ok := caddytest.Run("bench", func(t caddytest.TB) {
		for _, part := range parts {
			if !*reportOnly && slices.Contains(s.parts, part.name) {
				progress("measuring %s", part.name)
				part.measure(t, s, r)
			}
		}
	})
	if !ok {
		os.Exit(1)
	}
	fail(r.save())
	r.write(os.Stdout, s.parts)
}

func partNames() (names []string) {
	for _, part := range parts {
		names = append(names, part.name)
	}
	return names
}

func (s *settings) parse(only, sizes string) error {
	s.parts = partNames()
	if only != "" {
		s.parts = strings.Split(only, ",")
	}
	for _, name := range s.parts {
		if !slices.Contains(partNames(), name) {
			return fmt.Errorf("-only %s: there is no such part; there are %s", name, strings.Join(partNames(), ", "))
		}
	}
	for _, text := range strings.Split(sizes, ",") {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > maxInstances {
			return fmt.Errorf("-sizes %s: want numbers from 1 to %d", text, maxInstances)
		}
		s.sizes = append(s.sizes, n)
	}
	return nil
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// progress says on standard error what is going on.
func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().Format(time.TimeOnly)+" "+format+"\n", args...)
}

package main

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"
)

// report gathers everything that was measured; its JSON is the
// machine-readable copy.
type report struct {
	Started time.Time         `json:"started"`
	CPUs    int               `json:"cpus"`
	Go      string            `json:"go"`
	Options map[string]string `json:"options"`
	Cells   []cell            `json:"cells"`
	Values  []value           `json:"values"`
}

// cell is one server at one workload.
type cell struct {
	Section  string       `json:"section"`
	Workload string       `json:"workload"`
	Server   string       `json:"server"`
	Rate     spread       `json:"ops_per_second"`
	CPU      spread       `json:"cpu_us_per_op"`
	P50      spread       `json:"p50_us"`
	P99      spread       `json:"p99_us"`
	Against  []relation   `json:"against,omitempty"`
	Foreign  float64      `json:"foreign_cpus"` // used by others meanwhile, median
	rates    []float64    // by round
	cpus     []float64    // by round
	lats     [2][]float64 // by round
	foreign  []float64    // by round
	load     load         // what was asked
}

// relation is a cell divided by another server's, round by round.
type relation struct {
	Server string `json:"server"`
	Rate   spread `json:"rate"`
	CPU    spread `json:"cpu"`
}

// value is any other figure.
type value struct {
	Section string  `json:"section"`
	Name    string  `json:"name"`
	Unit    string  `json:"unit"`
	Value   spread  `json:"value"`
	Must    float64 `json:"must,omitempty"` // 0: no goal
}

// spread is a median and its quartiles.
type spread struct {
	Median float64 `json:"median"`
	Low    float64 `json:"q1"`
	High   float64 `json:"q3"`
}

func spreadOf(v []float64) spread {
	if len(v) == 0 {
		return spread{}
	}
	v = slices.Sorted(slices.Values(v))
	at := func(q float64) float64 { return round3(v[int(q*float64(len(v)-1)+0.5)]) }
	return spread{at(0.5), at(0.25), at(0.75)}
}

// round3 keeps four digits, so that the JSON stays readable.
func round3(x float64) float64 {
	if x == 0 || math.IsNaN(x) || math.IsInf(x, 0) {
		return 0
	}
	p := math.Pow(10, 3-math.Floor(math.Log10(math.Abs(x))))
	return math.Round(x*p) / p
}

// ratios divides round by round.
func ratios(a, b []float64) spread {
	var r []float64
	for i := range min(len(a), len(b)) {
		if b[i] != 0 {
			r = append(r, a[i]/b[i])
		}
	}
	return spreadOf(r)
}

func newReport(o options) *report {
	return &report{
		Started: time.Now().UTC().Truncate(time.Second), CPUs: runtime.NumCPU(), Go: runtime.Version(),
		Options: map[string]string{
			"rounds": fmt.Sprint(o.rounds), "round": o.round.String(), "pin": o.pin,
			"real_time": fmt.Sprint(o.realTime), "dir": o.dir,
		},
	}
}

// finish makes the figures of the cells of one workload; the first is compared
// with the others.
func (r *report) finish(cells []*cell) {
	for _, c := range cells {
		c.Rate, c.CPU = spreadOf(c.rates), spreadOf(c.cpus)
		c.P50, c.P99 = spreadOf(c.lats[0]), spreadOf(c.lats[1])
		c.Foreign = spreadOf(c.foreign).Median
		for _, o := range cells {
			if o != c {
				c.Against = append(c.Against, relation{o.Server, ratios(c.rates, o.rates), ratios(c.cpus, o.cpus)})
			}
		}
		r.Cells = append(r.Cells, *c)
	}
}

// against finds the relation to a server.
func (c *cell) against(server string) relation {
	for _, r := range c.Against {
		if r.Server == server {
			return r
		}
	}
	return relation{}
}

func (r *report) value(section, name, unit string, v spread, must float64) {
	r.Values = append(r.Values, value{section, name, unit, v, must})
}

// write writes the machine-readable copy.
func (r *report) write(path string) error {
	if path == "" {
		return nil
	}
	p, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(p, '\n'), 0o644)
}

// title begins a section.
func title(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	fmt.Printf("\n%s\n%s\n", text, strings.Repeat("-", len(text)))
}

// rateText is operations per second, or bytes where they are large.
func rateText(ops float64, size int) string {
	switch {
	case size >= 64<<10:
		return fmt.Sprintf("%.2f GB/s", ops*float64(size)/1e9)
	case ops >= 10000:
		return fmt.Sprintf("%.0fk/s", ops/1e3)
	case ops >= 1000:
		return fmt.Sprintf("%.1fk/s", ops/1e3)
	}
	return fmt.Sprintf("%.0f/s", ops)
}

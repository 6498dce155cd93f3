package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// goal is what a workload must reach with tracking on: operations per second
// (at least) and server CPU per operation (at most), as ratios to the peers.
// Zero: no goal.
type goal struct {
	rateQEMU, rateKit float64
	cpuQEMU, cpuKit   float64
}

// contest is a workload and its goal.
type contest struct {
	load
	goal
}

// contests are the workloads of section peers.
func contests() []contest {
	one := goal{1.25, 1.0, 0.75, 1.05}
	return []contest{
		{load{Kind: writes, Size: 4 << 10, Depth: 1}, one},
		{load{Kind: reads, Size: 4 << 10, Depth: 1}, one},
		{load{Kind: writes, Size: 4 << 10, Depth: 16}, goal{2.8, 1.2, 0.35, 0.80}},
		{load{Kind: reads, Size: 4 << 10, Depth: 16}, goal{4, 1.6, 0.35, 0.80}},
		{load{Kind: reads, Size: 4 << 10, Depth: 16, Simple: true}, goal{3.5, 1.6, 0.35, 0.80}},
		{load{Kind: writes, Size: 4 << 10, Depth: 64}, goal{}},
		{load{Kind: reads, Size: 4 << 10, Depth: 64}, goal{}},
		{load{Kind: writes, Size: 64 << 10, Depth: 8, Sequential: true}, goal{rateQEMU: 1.8, rateKit: 1.0}},
		{load{Kind: reads, Size: 64 << 10, Depth: 8, Sequential: true}, goal{}},
		{load{Kind: writes, Size: 1 << 20, Depth: 8, Sequential: true}, goal{2, 1.3, 0.45, 0}},
		{load{Kind: reads, Size: 1 << 20, Depth: 8, Sequential: true}, goal{3.5, 1.8, 0.15, 0}},
		{load{Kind: writeFlush, Size: 4 << 10, Depth: 1}, goal{rateQEMU: 1.25, rateKit: 1.0}},
	}
}

// contestants starts all servers: the peers and our untracked one on the same
// image, the tracked one on its own, since it alone may write there.
func (r *rig) contestants(ctx context.Context, wrap ...string) ([]*server, error) {
	var all []*server
	shared, err := r.image("disk")
	if err != nil {
		return nil, err
	}
	names := []string{tracked, untracked, qemuNBD, nbdkit}
	if r.baseline != "" && len(wrap) == 0 {
		names = append(names, baseline)
	}
	for _, name := range names {
		img := shared
		if name != qemuNBD && name != nbdkit { // ours take the image's lock
			if img, err = r.image(name); err != nil {
				break
			}
		}
		s, serr := r.start(ctx, name, img, wrap...)
		if err = serr; err != nil {
			break
		}
		all = append(all, s)
	}
	if err != nil {
		return nil, errors.Join(err, stopAll(all))
	}
	return all, nil
}

func stopAll(all []*server) error {
	var errs []error
	for _, s := range all {
		errs = append(errs, s.stop())
	}
	return errors.Join(errs...)
}

// takeTurns runs rounds of a workload against the servers, whose order rotates.
func (r *rig) takeTurns(ctx context.Context, section string, all []*server, w load, rounds int, d time.Duration) ([]*cell, error) {
	cells := make([]*cell, len(all))
	for i, s := range all {
		cells[i] = &cell{Section: section, Workload: w.String(), Server: s.name, load: w}
	}
	for round := range rounds {
		for i := range all {
			k := (i + round) % len(all)
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			before, begun := readMachine(), time.Now()
			m, err := all[k].measure(w, d, r.size, uint64(round), r.pin != "free")
			if err != nil {
				return nil, err
			}
			cells[k].add(m, before.foreign(m.all, time.Since(begun)))
		}
	}
	return cells, nil
}

// add notes a round.
func (c *cell) add(m sample, foreign float64) {
	slices.Sort(m.lat)
	c.rates = append(c.rates, float64(m.ops)/m.took.Seconds())
	c.cpus = append(c.cpus, m.cpu.Seconds()*1e6/float64(m.ops))
	c.foreign = append(c.foreign, foreign)
	if n := len(m.lat); n > 0 {
		c.lats[0] = append(c.lats[0], m.lat[n/2].Seconds()*1e6)
		c.lats[1] = append(c.lats[1], m.lat[n*99/100].Seconds()*1e6)
	}
}

// comparePeers is the main table.
func comparePeers(ctx context.Context, o *options, r *rig, rep *report) (err error) {
	all, err := r.contestants(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopAll(all)) }()
	title("Our export with tracking on against peers (%s; %d rounds of %v; structured replies unless \"simple\")", o.pin, o.rounds, o.round)
	fmt.Println("x: operations per second, ours / theirs. cpu: server CPU per operation, ours / theirs. [quartiles]. * falls short of \"must\".")
	fmt.Printf("%-21s %10s %8s | %-40s | %-40s | %-13s\n", "workload", "tracked", "cpu/op", "against qemu-nbd (must x, cpu)", "against nbdkit (must x, cpu)", "on/off x, cpu")
	for _, c := range contests() {
		if !strings.Contains(c.String(), o.only) {
			continue
		}
		cells, err := r.takeTurns(ctx, "peers", all, c.load, o.rounds, o.round)
		if err != nil {
			return err
		}
		rep.finish(cells)
		c.print(cells[0])
	}
	return nil
}

func (c contest) print(t *cell) {
	off := t.against(untracked)
	fmt.Printf("%-21s %10s %6.1fus | %-40s | %-40s | %.2f  %.2f", c.load, rateText(t.Rate.Median, c.Size), t.CPU.Median,
		verdict(t.against(qemuNBD), c.rateQEMU, c.cpuQEMU), verdict(t.against(nbdkit), c.rateKit, c.cpuKit), off.Rate.Median, off.CPU.Median)
	if b := t.against(baseline); b.Server != "" {
		fmt.Printf(" | against the baseline x %.2f [%.2f %.2f] cpu %.2f", b.Rate.Median, b.Rate.Low, b.Rate.High, b.CPU.Median)
	}
	fmt.Println()
}

// verdict is one comparison as text.
func verdict(r relation, rate, cpu float64) string {
	mark := func(bad bool) string {
		if bad {
			return "*"
		}
		return ""
	}
	must := func(v float64) string {
		if v == 0 {
			return "-"
		}
		return fmt.Sprintf("%.4g", v)
	}
	return fmt.Sprintf("x %.2f%s [%.2f %.2f] cpu %.2f%s (%s, %s)", r.Rate.Median, mark(rate > 0 && r.Rate.Median < rate), r.Rate.Low, r.Rate.High,
		r.CPU.Median, mark(cpu > 0 && r.CPU.Median > cpu), must(rate), must(cpu))
}

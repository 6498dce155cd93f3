package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"time"
)

// outsider is a workload as somebody else's client does it.
type outsider struct {
	contest
	client string // qemu-img or fio
	count  int    // requests of a round
}

// outsiders are the workloads of section clients; goals only where there are
// any (operations per second against qemu-nbd).
func outsiders() []outsider {
	small := func(k kind, must float64) contest {
		return contest{load{Kind: k, Size: 4 << 10, Depth: 16}, goal{rateQEMU: must}}
	}
	large := func(k kind, must float64) contest {
		return contest{load{Kind: k, Size: 1 << 20, Depth: 8, Sequential: true}, goal{rateQEMU: must}}
	}
	return []outsider{
		{small(writes, 1.6), "qemu-img", 20000},
		{small(reads, 2), "qemu-img", 20000},
		{large(writes, 2), "qemu-img", 400},
		{large(reads, 3.5), "qemu-img", 800},
		{small(writes, 0), "fio", 20000},
		{small(reads, 0), "fio", 20000},
		{large(writes, 0), "fio", 400},
		{large(reads, 0), "fio", 800},
	}
}

// compareClients measures with clients that are not ours.
func compareClients(ctx context.Context, o *options, r *rig, rep *report) (err error) {
	all, err := r.contestants(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopAll(all)) }()
	title("The same through other people's clients: QEMU's (qemu-img bench) and fio's nbd engine (libnbd)")
	for _, w := range outsiders() {
		cells := make([]*cell, len(all))
		for i, s := range all {
			cells[i] = &cell{Section: "clients", Workload: w.client + " " + w.load.String(), Server: s.name, load: w.load}
		}
		for round := range max(3, o.rounds*2/3) {
			for i := range all {
				k := (i + round) % len(all)
				before, begun := readMachine(), time.Now()
				m, err := w.measure(ctx, r, all[k])
				if err != nil {
					return err
				}
				cells[k].add(m, before.foreign(m.all, time.Since(begun)))
			}
		}
		rep.finish(cells)
		t := cells[0]
		fmt.Printf("%-27s %10s %6.1fus | %-40s | %-40s\n", t.Workload, rateText(t.Rate.Median, w.Size), t.CPU.Median,
			verdict(t.against(qemuNBD), w.rateQEMU, 0), verdict(t.against(nbdkit), 0, 0))
	}
	return nil
}

// measure is one round by a foreign client.
func (w outsider) measure(ctx context.Context, r *rig, s *server) (sample, error) {
	uri := "nbd+unix:///" + s.export + "?socket=" + s.socket
	var argv []string
	switch w.client {
	case "fio":
		rw := map[kind]string{reads: "read", writes: "write"}[w.Kind]
		if !w.Sequential {
			rw = "rand" + rw
		}
		argv = []string{
			"fio", "--name=b", "--ioengine=nbd", "--uri=" + uri, "--rw=" + rw, "--bs=" + strconv.Itoa(w.Size),
			"--iodepth=" + strconv.Itoa(w.Depth), "--size=" + strconv.FormatInt(r.size, 10),
			"--number_ios=" + strconv.Itoa(w.count), "--output-format=json", "--randrepeat=1", "--norandommap",
		}
	default:
		argv = []string{
			"qemu-img", "bench", "-f", "raw", "-t", "none", "-c", strconv.Itoa(w.count), "-d", strconv.Itoa(w.Depth),
			"-s", strconv.Itoa(w.Size), uri,
		}
		if w.Kind == writes {
			argv = append(argv[:2], append([]string{"-w"}, argv[2:]...)...)
		}
	}
	if r.pin != "free" {
		argv = append([]string{"taskset", "-c", strconv.Itoa(clientCPU)}, argv...)
	}
	before := s.cpu()
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
	used := s.cpu() - before
	if err != nil {
		return sample{}, fmt.Errorf("%v: %w\n%s", argv, err, out)
	}
	took, err := w.took(out)
	if err != nil {
		return sample{}, fmt.Errorf("%v: %w\n%s", argv, err, out)
	}
	return sample{ops: w.count, took: took, cpu: used, all: used}, nil
}

// took reads how long a client says its requests took.
func (w outsider) took(out []byte) (time.Duration, error) {
	if w.client != "fio" {
		m := regexp.MustCompile(`completed in ([0-9.]+) seconds`).FindSubmatch(out)
		if m == nil {
			return 0, errors.New("no result")
		}
		sec, err := strconv.ParseFloat(string(m[1]), 64)
		return time.Duration(sec * float64(time.Second)), err
	}
	var res struct {
		Jobs []struct {
			Read, Write struct {
				TotalIOs  int     `json:"total_ios"`
				IOPS      float64 `json:"iops"`
				RuntimeMS int     `json:"runtime"`
			}
		}
	}
	_, out, _ = bytes.Cut(out, []byte("\n{")) // a greeting comes first
	if err := json.Unmarshal(append([]byte("{"), out...), &res); err != nil {
		return 0, err
	}
	if len(res.Jobs) != 1 {
		return 0, errors.New("no result")
	}
	iops := res.Jobs[0].Read.IOPS + res.Jobs[0].Write.IOPS // of each pass only one is not zero
	if iops <= 0 {
		return 0, errors.New("no operation")
	}
	return time.Duration(float64(w.count) / iops * float64(time.Second)), nil
}

package session

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// Transcripts in testdata/machine: each line of input is one event, the
// expected output is what the machine asks for. Rewrite with -rewrite and read
// the difference.
func TestMachineTranscripts(t *testing.T) {
	datadriven.Walk(t, "testdata/machine", func(t *testing.T, path string) {
		h := newTranscript()
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			out, err := h.run(d)
			if err != nil {
				d.Fatalf(t, "%v", err)
			}
			return out
		})
	})
}

var start = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

type transcript struct {
	now time.Time
	m   *Machine
	// The two halves of the next handshake.
	req    wire.HandshakeRequest
	reply  wire.HandshakeReply
	source dataplane.Status
	// limits of the cut asked for last.
	limits map[wire.DiskName]int64
}

func gen(name string) (g delta.Generation) {
	copy(g[:], name)
	return g
}

// pos reads "A/7" or "A/7/x" (another digest), "-" is none.
func pos(s string) (p delta.Pos, err error) {
	if s == "-" || s == "" {
		return p, nil
	}
	f := strings.Split(s, "/")
	if len(f) < 2 {
		return p, fmt.Errorf("position %q", s)
	}
	p.Generation = gen(f[0])
	if p.Epoch, err = strconv.ParseUint(f[1], 10, 64); err != nil {
		return p, err
	}
	copy(p.Digest[:], s+"#")
	return p, nil
}

func newTranscript() *transcript {
	h := &transcript{now: start}
	h.m = NewMachine(MachineConfig{Interval: 10 * time.Second, ScrubRate: 16 << 20, Verified: true, Rand: func() float64 { return 0 }}, start)
	h.req = wire.HandshakeRequest{VM: "vm", Generation: gen("A"), Running: true, Disks: []wire.Disk{{Name: "vda", Size: 100 << 20}}}
	h.reply = wire.HandshakeReply{Role: "replica", Generation: gen("A")}
	h.source = dataplane.Status{Tracker: true, Instance: "1", Generation: gen("A")}
	return h
}

// args are key=value pairs of a command line.
func arg(d *datadriven.TestData, key, def string) string {
	for _, a := range d.CmdArgs {
		if a.Key == key && len(a.Vals) > 0 {
			return a.Vals[0]
		}
		if a.Key == key {
			return "true"
		}
	}
	return def
}

func num(d *datadriven.TestData, key string, def int64) int64 {
	n, err := strconv.ParseInt(arg(d, key, strconv.FormatInt(def, 10)), 10, 64)
	if err != nil {
		return def
	}
	return n
}

func (h *transcript) run(d *datadriven.TestData) (string, error) {
	switch d.Cmd {
	case "config":
		h.m.cfg.Verified = arg(d, "verified", "true") == "true"
		h.m.verified = h.m.cfg.Verified
		if s := arg(d, "interval", ""); s != "" {
			v, err := time.ParseDuration(s)
			if err != nil {
				return "", err
			}
			h.m.cfg.Interval = v
		}
		return "", nil
	case "primary":
		return "", h.primary(d)
	case "replica":
		return "", h.replica(d)
	case "after":
		v, err := time.ParseDuration(arg(d, "d", "0s"))
		if err != nil {
			return "", err
		}
		h.now = h.now.Add(v)
		return h.step(EvWake{}), nil
	case "status":
		return h.status(), nil
	case "restart": // the daemon; the data plane and what it holds stay
		h.m = NewMachine(h.m.cfg, h.now)
		return "", nil
	}
	ev, err := h.event(d)
	if err != nil {
		return "", err
	}
	return h.step(ev), nil
}

func (h *transcript) primary(d *datadriven.TestData) (err error) {
	set := func(key string, dst *delta.Pos) {
		if v := arg(d, key, "?"); v != "?" && err == nil {
			*dst, err = pos(v)
		}
	}
	set("base", &h.req.Base)
	set("acked", &h.req.Acked)
	h.req.Highest = uint64(num(d, "highest", int64(h.req.Highest)))
	h.req.Running = arg(d, "running", "true") == "true"
	h.source.Suspect = num(d, "suspect", 0)
	h.source.Instance = arg(d, "instance", h.source.Instance)
	if g := arg(d, "gen", ""); g != "" {
		h.req.Generation, h.source.Generation = gen(g), gen(g)
	}
	if a := arg(d, "parent", ""); a != "" {
		p, perr := pos(a)
		h.req.Ancestors, err = []delta.Pos{p}, errors.Join(err, perr)
	}
	h.joining(d)
	h.source.Frozen = nil
	if f := arg(d, "frozen", ""); f != "" {
		e := dataplane.Epoch{Generation: h.req.Generation, Epoch: uint64(num(d, "frozen", 0)), Nonce: uint64(num(d, "nonce", 1)), Bytes: 4096, Cut: h.now, Limits: h.limits}
		set("on", &e.Parent)
		if g := arg(d, "digest", ""); g != "" {
			var p delta.Pos
			set("digest", &p)
			e.Digest = &p.Digest
		}
		e.Lost = arg(d, "lost", "")
		h.source.Frozen = &e
	}
	return err
}

func (h *transcript) replica(d *datadriven.TestData) (err error) {
	h.reply = wire.HandshakeReply{Role: arg(d, "role", "replica"), Generation: gen(arg(d, "gen", "A"))}
	if h.reply.Committed, err = pos(arg(d, "at", "-")); err != nil {
		return err
	}
	if a := arg(d, "parent", ""); a != "" {
		p, err := pos(a)
		if err != nil {
			return err
		}
		h.reply.Ancestors = []delta.Pos{p}
	}
	if c := num(d, "cursor", -1); c >= 0 {
		h.reply.Seeding = map[wire.DiskName]int64{"vda": c}
	}
	if has := num(d, "has", -1); has >= 0 {
		h.reply.Sizes = map[wire.DiskName]int64{"vda": 100 << 20}
		if has > 0 {
			h.reply.Sizes["vdb"] = has << 20
		}
	}
	h.reply.Sealed = arg(d, "sealed", "") != ""
	h.reply.Running = arg(d, "running", "") != ""
	h.reply.Diverged = arg(d, "diverged", "") != ""
	h.reply.VerifyAll = arg(d, "verify", "")
	return nil
}

// joining adds vdb, with so many MiB, or says that it is a disk like any other.
func (h *transcript) joining(d *datadriven.TestData) {
	size := num(d, "joins", -1) << 20
	if size >= 0 {
		h.req.Disks = append(h.req.Disks[:1:1], wire.Disk{Name: "vdb", Size: size, Joining: true})
	}
	if arg(d, "whole", "") != "" {
		h.req.Disks[1].Joining = false
	}
	if len(h.req.Disks) > 1 {
		n := num(d, "suspectb", 0) << 20
		h.source.Disks = []dataplane.DiskStatus{{Name: "vda"}, {Name: "vdb", Suspect: n}}
		h.source.Suspect += n
	}
}

// mibs lists sizes in MiB; nothing for none.
func mibs(what string, sizes map[wire.DiskName]int64) string {
	for _, n := range slices.Sorted(maps.Keys(sizes)) {
		what += fmt.Sprintf(" %s=%dM", n, sizes[n]>>20)
	}
	if len(sizes) == 0 {
		return ""
	}
	return what
}

func (h *transcript) event(d *datadriven.TestData) (Event, error) {
	p, err := pos(arg(d, "pos", "-"))
	if err != nil {
		return nil, err
	}
	switch d.Cmd {
	case "start":
		return EvStart{}, nil
	case "pause":
		return EvPause{}, nil
	case "resume":
		return EvResume{}, nil
	case "retry":
		return EvRetry{}, nil
	case "trigger":
		return EvTrigger{}, nil
	case "final":
		return EvFinal{}, nil
	case "final-cancel":
		return EvFinalCancel{}, nil
	case "shake":
		return EvHandshake{h.req, h.reply, h.source}, nil
	case "marked":
		return EvMarked{}, nil
	case "seeded":
		return EvSeeded{Disk: "vda", Cursor: num(d, "cursor", 100<<20), Sent: 1000}, nil
	case "verified":
		return EvVerified{}, nil
	case "frozen":
		e := dataplane.Epoch{Generation: h.req.Generation, Epoch: uint64(num(d, "epoch", 1)), Nonce: uint64(num(d, "nonce", 1)), Bytes: num(d, "bytes", 4096), Parent: h.m.parent}
		e.Empty, e.Limits = arg(d, "empty", "") != "", h.limits
		return EvFrozen{Epoch: e}, nil
	case "shipped":
		return EvShipped{Pos: p, Sent: 500, From: uint32(num(d, "from", 0))}, nil
	case "acked":
		return EvAcked{h.source}, nil
	case "abandoned":
		return EvAbandoned{}, nil
	case "beaten":
		return EvBeaten{}, nil
	case "scrubbed":
		return EvScrubbed{Next: Cursor{"vda", num(d, "next", 0)}, Done: arg(d, "done", "") != "", Bytes: 16 << 20, Mismatched: num(d, "mismatched", 0)}, nil
	case "failed":
		return EvFailed{Class: Class(arg(d, "class", "link")), Text: arg(d, "text", "broken"), Advanced: arg(d, "advanced", "") != ""}, nil
	}
	return nil, fmt.Errorf("unknown command %q", d.Cmd)
}

func (h *transcript) step(ev Event) string {
	busy := h.m.Busy()
	acts := h.m.Step(h.now, ev)
	var b strings.Builder
	started := 0
	for _, a := range acts {
		b.WriteString(describe(a) + "\n")
		if f, ok := a.(DoFreeze); ok {
			h.limits = f.Limits
		}
		switch a.(type) {
		case DoCancel, FinalDone, FinalFailed, Committed, Joined:
		default:
			started++
		}
	}
	if started > 1 || started == 1 && !h.m.Busy() {
		b.WriteString("BUG: more than one operation\n")
	}
	if _, wake := ev.(EvWake); wake && busy && started > 0 {
		b.WriteString("BUG: an operation began while one was outstanding\n")
	}
	fmt.Fprintf(&b, "%s", h.m.phase)
	if at, ok := h.m.Wake(); ok {
		fmt.Fprintf(&b, " until +%v", at.Sub(start))
	} else if !h.m.Busy() {
		b.WriteString(" for good")
	}
	return b.String() + "\n"
}

func short(p delta.Pos) string {
	if p.IsZero() {
		return "-"
	}
	return fmt.Sprintf("%s/%d", strings.TrimRight(string(p.Generation[:]), "\x00"), p.Epoch)
}

func describe(a Action) string {
	switch a := a.(type) {
	case DoHandshake:
		return "do handshake"
	case DoMark:
		return "do mark: " + a.Decision.Outcome.String()
	case DoSeed:
		return fmt.Sprintf("do seed %s from %d (%d of %d)", a.Disk, a.Offset, a.Done, a.Total)
	case DoVerify:
		return fmt.Sprintf("do verify at %s all=%v%s: %s", short(a.Pos), a.All, mibs(" below", a.Below), a.Reason)
	case DoFreeze:
		return "do freeze on " + short(a.Parent) + mibs(" limits", a.Limits)
	case DoShip:
		return fmt.Sprintf("do ship epoch %d resume=%v", a.Epoch.Epoch, a.Resume)
	case DoAck:
		return "do ack " + short(a.Pos)
	case DoAbandon:
		return fmt.Sprintf("do abandon %d", a.Epoch)
	case DoBeat:
		return "do beat " + short(a.Pos)
	case DoScrub:
		return fmt.Sprintf("do scrub from %s:%d%s", a.From.Disk, a.From.Offset, mibs(" below", a.Below))
	case DoCancel:
		return "cancel"
	case FinalDone:
		return "final done at " + short(a.Pos)
	case FinalFailed:
		return "final failed: " + a.Stop.Row
	case Committed:
		return "firmware committed"
	case Joined:
		return fmt.Sprint("joined ", a.Disks)
	}
	return fmt.Sprintf("%T", a)
}

func (h *transcript) status() string {
	s := h.m.Status()
	var b strings.Builder
	fmt.Fprintf(&b, "phase=%s protected=%v seeding=%v paused=%v at=%s rpo=%v\n", s.Phase, s.Protected, s.Seeding, s.Paused, short(s.Committed), s.RPO(h.now))
	fmt.Fprintf(&b, "cycles=%d empty=%d missed=%d errors=%d abandoned=%d resumed=%d failures=%d verified=%v\n",
		s.Stats.Cycles, s.Stats.Empty, s.Stats.CyclesMissed, s.Stats.Errors, s.Stats.Abandoned, s.Stats.Resumed, s.Failures, s.Verified)
	for _, n := range slices.Sorted(maps.Keys(s.Joining)) {
		fmt.Fprintf(&b, "%s joins: %dM of %dM; pending=%dM suspect=%dM\n", n, s.Joining[n].Done>>20, s.Joining[n].Total>>20, s.Pending>>20, s.Suspect>>20)
	}
	for _, c := range s.Conditions {
		fmt.Fprintf(&b, "%s: %s\n", c.Code, c.Text)
	}
	if s.Stop != nil {
		fmt.Fprintf(&b, "stop: %s %s diverged=%v\n", s.Stop.Outcome, s.Stop.Row, s.Stop.Diverged)
	}
	return b.String()
}

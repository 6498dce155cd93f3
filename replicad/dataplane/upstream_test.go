package dataplane_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
	"kvmreplica/replicad/dataplane"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
)

// kept survives the end of the server that offers it.
type kept struct{ block.Device }

func (kept) Close() error { return nil }

func TestALostUpstreamServerIsADelayAndEverythingIsMarked(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), dt.Patience)
	defer cancel()
	cfg := dt.Config(t, 8*mib)
	socket := filepath.Join(cfg.RunDir, "up.sock")
	disk := kept{block.NewMem(8 * mib)}
	serve := func() func() {
		_ = os.Remove(socket)
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Error(err)
			return func() {}
		}
		s := nbd.NewServer(nbd.Options{})
		if err := s.Add(nbd.Export{Name: "x", Device: disk}); err != nil {
			t.Error(err)
		}
		done := make(chan struct{})
		go func() { defer close(done); _ = s.Serve(ctx, l) }()
		return func() {
			if err := s.Shutdown(ctx); err != nil {
				t.Error(err)
			}
			<-done
		}
	}
	stop := serve()
	cfg.Disks[0] = dataplane.DiskConfig{Name: "vda", Kind: dataplane.NBD, URI: "nbd+unix:///x?socket=" + socket}
	p := dt.Serve(t, cfg)
	p.Create(dataplane.CreateRequest{Generation: dt.Generation(1)})
	g := dt.Boot(t, cfg, 21)
	g.Scribble(20)
	stop()
	back := make(chan func())
	go func() { back <- serve() }()
	g.Scribble(20) // waits for the server; any error fails the test
	stop = <-back
	defer func() { p.Stop(); stop() }()
	g.Check()
	dt.SameContent(t, "upstream", dt.Content(t, disk), g.Snapshot()["vda"])
	for {
		st, err := p.Status(ctx)
		if err != nil {
			t.Fatalf("not everything is marked: %v", err)
		}
		if st.Pending == 8*mib {
			return
		}
	}
}

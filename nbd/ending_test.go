package nbd_test

import (
	"log/slog"
	"strings"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
)

// told keeps the log's lines that say that a client is gone.
type told chan string

func (l told) Write(p []byte) (int, error) {
	if strings.Contains(string(p), "client disconnected") {
		l <- string(p)
	}
	return len(p), nil
}

func TestTheLogSaysWhyAClientIsGone(t *testing.T) {
	t.Parallel()
	log := make(told, 2)
	s := serve(t, nbd.Options{Log: slog.New(slog.NewTextHandler(log, nil))}, nbd.Export{Name: "x", Device: block.NewMem(4096)})
	must(t, s.dial(t, nbd.ClientOptions{Export: "x"}).Close())
	if line := <-log; !strings.Contains(line, `reason="the client asked for it"`) {
		t.Errorf("an orderly end: %s", line)
	}
}

package lab

import (
	"testing"
	"time"
)

// The lifeline is what a dead test process leaves open ended.
func TestHostsEndWithTheProcessThatMadeThem(t *testing.T) {
	if m := Missing(); len(m) > 0 {
		t.Skipf("needs %v", m)
	}
	l, err := Up(t.Context(), t.TempDir(), Options{NoLibvirt: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Down(); err != nil {
			t.Error(err)
		}
	}()
	if err := l.life.Close(); err != nil {
		t.Fatal(err)
	}
	for _, h := range l.all() {
		select {
		case <-h.ended:
		case <-time.After(2 * time.Minute):
			t.Errorf("host %s goes on", h.name)
		}
	}
	l.life = nil
}

func TestProcessNumbersUsedAgainAreNotOurs(t *testing.T) {
	self, err := identify(1)
	if err != nil {
		t.Fatal(err)
	}
	if !self.alive() {
		t.Error("process 1 is not alive")
	}
	self.Start += "0"
	if self.alive() {
		t.Error("another process with the number was taken for ours")
	}
	if err := self.kill(time.Second); err != nil { // must not touch it
		t.Error(err)
	}
}

package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"kvmreplica/integration/lab/micro/ask"
)

// serve keeps one connection to the host open that waits for a request; when
// one comes, the next connection is made.
func serve(host string) error {
	for {
		c, err := net.Dial("tcp", host)
		if err != nil {
			time.Sleep(retry)
			continue
		}
		r := bufio.NewReaderSize(c, 64<<10)
		line, err := r.ReadBytes('\n')
		if err != nil {
			_ = c.Close()
			if errors.Is(err, io.EOF) {
				return nil // the host ends
			}
			continue
		}
		go answer(c, r, line)
	}
}

// answer does what one request asks for.
func answer(c net.Conn, r *bufio.Reader, line []byte) {
	defer c.Close()
	var q ask.Request
	if err := json.Unmarshal(line, &q); err != nil {
		reply(c, ask.Reply{Error: err.Error()})
		return
	}
	switch {
	case q.Dial != "":
		join(c, r, q.Dial)
	case q.Put != "":
		err := os.MkdirAll(filepath.Dir(q.Put), 0o755)
		if err == nil {
			err = os.WriteFile(q.Put, q.Data, os.FileMode(q.Mode))
		}
		reply(c, ask.Reply{Error: text(err)})
	case q.Load != "":
		reply(c, ask.Reply{Error: text(load(q.Load))})
	default:
		out, err := run(q.Exec)
		reply(c, ask.Reply{Output: out, Error: text(err)})
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func reply(c net.Conn, a ask.Reply) {
	b, err := json.Marshal(a)
	if err != nil {
		return
	}
	_, _ = c.Write(append(b, '\n'))
}

// run runs a program to its end. A program that goes on in the background must
// give up its output.
func run(argv []string) (string, error) {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// join connects the host's connection with a unix socket of the guest.
func join(c net.Conn, r io.Reader, path string) {
	u, err := net.Dial("unix", path)
	reply(c, ask.Reply{Error: text(err)})
	if err != nil {
		return
	}
	defer u.Close()
	var once sync.Once
	over := func() { once.Do(func() { _, _ = c.Close(), u.Close() }) }
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(c, u)
		over()
	}()
	_, _ = io.Copy(u, r)
	over()
	<-done
}

package main

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// pressed reports whether the power key was pressed.
func (g *guest) pressed() bool {
	select {
	case <-g.powerKey:
		return true
	default:
		return false
	}
}

// watchPowerKey listens on every input device; the ACPI button is one of them.
func (g *guest) watchPowerKey() {
	nodes, err := filepath.Glob("/dev/input/event*")
	if err != nil || len(nodes) == 0 {
		g.say("ERROR op=powerkey err=%q", "no input device")
	}
	var once sync.Once
	for _, n := range nodes {
		f, err := os.Open(n)
		if err != nil {
			g.say("ERROR op=powerkey err=%q", err.Error())
			continue
		}
		go func() {
			if waitPowerKey(f) == nil {
				once.Do(func() { close(g.powerKey) })
			}
		}()
	}
}

// waitPowerKey reads events of 24 bytes (time 16, type 2, code 2, value 4)
// until EV_KEY, KEY_POWER, pressed.
func waitPowerKey(r io.Reader) error {
	var ev [24]byte
	for {
		if _, err := io.ReadFull(r, ev[:]); err != nil {
			return err
		}
		if binary.LittleEndian.Uint16(ev[16:]) == 1 && binary.LittleEndian.Uint16(ev[18:]) == 116 &&
			binary.LittleEndian.Uint32(ev[20:]) == 1 {
			return nil
		}
	}
}

const agentPort = "org.qemu.guest_agent.0"

// startAgent runs the QEMU guest agent when its port and program are there.
func (g *guest) startAgent() {
	port, err := findPort(agentPort)
	if err != nil {
		g.say("ERROR op=agent err=%q", err.Error())
		return
	}
	cmd := exec.Command("/usr/sbin/qemu-ga", "-m", "virtio-serial", "-p", port,
		"-t", "/run", "-f", "/run/qga.pid", "-l", "/run/qga.log")
	if err := cmd.Start(); err != nil {
		g.say("ERROR op=agent err=%q", err.Error())
		return
	}
	g.say("AGENT port=%s", port)
}

// findPort looks a virtio-serial port up by name.
func findPort(name string) (string, error) {
	for end := time.Now().Add(deviceWait); time.Now().Before(end); time.Sleep(devicePoll) {
		files, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return "", err
		}
		for _, f := range files {
			text, err := os.ReadFile(f)
			if err == nil && strings.TrimSpace(string(text)) == name {
				return filepath.Join("/dev", filepath.Base(filepath.Dir(f))), nil
			}
		}
	}
	return "", errors.New("no port " + name)
}

// dhcp asks for an address on eth0 and reports it.
func (g *guest) dhcp() {
	if out, err := tool("/bin/busybox", "ip", "link", "set", "eth0", "up"); err != nil {
		g.say("ERROR op=net err=%q", out)
		return
	}
	out, err := tool("/bin/busybox", "udhcpc", "-i", "eth0", "-n", "-q", "-t", "5", "-s", "/etc/udhcpc.sh")
	if err != nil {
		g.say("ERROR op=net err=%q", out)
		return
	}
	addr, err := tool("/bin/busybox", "ip", "-4", "-o", "addr", "show", "dev", "eth0")
	if err != nil {
		g.say("ERROR op=net err=%q", addr)
		return
	}
	ip := ""
	if _, rest, ok := strings.Cut(addr, "inet "); ok {
		ip, _, _ = strings.Cut(rest, "/")
	}
	g.say("NET ip=%s", ip)
}

package replicad

import "github.com/coreos/go-systemd/v22/daemon"

// notifyReady tells systemd, when it started us, that we serve.
func notifyReady() { _, _ = daemon.SdNotify(false, daemon.SdNotifyReady) } // not under systemd: nobody to tell

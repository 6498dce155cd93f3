package main

import (
	"time"

	"github.com/spf13/cobra"

	"kvmreplica/replicad/api"
)

// settingFlags are the flags of what a person may set of a VM.
type settingFlags struct {
	every, appEvery, shutdown time.Duration
	onSilent                  string
}

func (s *settingFlags) add(c *cobra.Command) {
	f := c.Flags()
	f.DurationVar(&s.every, "every", 30*time.Second, "replication interval from 1s; 0 = back to back")
	f.DurationVar(&s.appEvery, "app-every", 0, "interval of application-consistent points (guest agent), e.g. 1h; 0 = none")
	f.DurationVar(&s.shutdown, "shutdown-time", 0, "how long the guest may take to shut down in a planned failover; 0 = 5m")
	f.StringVar(&s.onSilent, "on-silent-peer", "", "after an unclean boot with a silent peer: start or hold (default start)")
}

// check refuses what no daemon would take.
func (s *settingFlags) check() error {
	if s.every < 0 || s.every > 24*time.Hour || s.every%time.Second != 0 {
		return usagef("--every takes whole seconds from 1s to 24h, or 0 for back to back")
	}
	if s.onSilent != "" && s.onSilent != "start" && s.onSilent != "hold" {
		return usagef("--on-silent-peer is %q: start or hold", s.onSilent)
	}
	if d := s.shutdown; d != 0 && (d < time.Second || d > 24*time.Hour || d%time.Second != 0) {
		return usagef("--shutdown-time takes whole seconds from 1s to 24h, or 0 for the default of 5m")
	}
	return nil
}

// given are those that were typed.
func (s *settingFlags) given(c *cobra.Command) *api.Settings {
	out, any := api.Settings{}, false
	pick := func(name string, set func()) {
		if c.Flags().Changed(name) {
			any = true
			set()
		}
	}
	pick("every", func() { out.Interval = &s.every })
	pick("app-every", func() { out.AppEvery = &s.appEvery })
	pick("shutdown-time", func() { out.Shutdown = &s.shutdown })
	pick("on-silent-peer", func() { out.OnSilent = &s.onSilent })
	if !any {
		return nil
	}
	return &out
}

func newVMSet(a *app) *cobra.Command {
	var s settingFlags
	c := &cobra.Command{
		Use: "set NAME", Short: "Change settings of a protected VM",
		Long: `Change settings of a protected VM, on its primary. They take effect at once, last, and go with the VM when the
roles change. What is not named stays. Beside these: "vm limit" bounds what this host sends, and "point keep"
on the replica's host says which recovery points it keeps; that is not the primary's to change.` + "\n" + exitHelp,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := s.check(); err != nil {
				return err
			}
			set := s.given(cmd)
			if set == nil {
				return usagef("say what to set, e.g. --every 5s")
			}
			if set.OnSilent != nil && *set.OnSilent == "" {
				return usagef("--on-silent-peer is empty: start or hold")
			}
			return a.act(cmd.Context(), api.Action{Verb: api.VMSet, VM: args[0], Set: set})
		},
	}
	s.add(c)
	c.Flags().Lookup("every").DefValue = "0" // what is not named stays: none is shown
	c.Flags().Lookup("on-silent-peer").Usage = "after an unclean boot with a silent peer: start or hold"
	return c
}

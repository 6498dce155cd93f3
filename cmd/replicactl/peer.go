package main

import (
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"kvmreplica/replicad/api"
)

func newPeer(a *app) *cobra.Command {
	c := &cobra.Command{Use: "peer", Short: "Pair this host with others and say what they may do", RunE: needVerb}
	c.AddCommand(newInvite(a), newJoin(a), newPeerList(a), newPeerTest(a), newPeerAddress(a), newAllow(a), newPeerRemove(a))
	return c
}

// rights are the flags that say what the other host may do here.
type rights struct {
	api.Rights
	rate string
	ask  bool
}

func (r *rights) flags(c *cobra.Command) {
	f := c.Flags()
	f.BoolVar(&r.MaySend, "may-send", false, "the other host may replicate VMs to this one")
	f.BoolVar(&r.ask, "may-ask", false, "it may ask this host to fail a VM over to it, and after its own failover to give up\nwhat was written here since (default as --may-send)")
	f.StringVar(&r.Root, "root", "", "storage root for its replicas (default from the daemon's configuration)")
	f.IntVar(&r.MaxVMs, "max-vms", 0, "how many VMs it may send (0 = default limit)")
	f.Int64Var(&r.Limit, "max-bytes", 0, "total size of the disks it may send (0 = no limit)")
	f.StringVar(&r.rate, "bandwidth", "0", "bytes per second it may send, e.g. 20M (0 = no limit)")
}

// given is what was typed.
func (r *rights) given(c *cobra.Command) (api.Rights, error) {
	out := r.Rights
	if c.Flags().Changed("may-ask") {
		out.MayAsk = &r.ask
	}
	var err error
	if out.Bandwidth, err = parseSize(r.rate); err != nil {
		return out, usagef("--bandwidth: %v", err)
	}
	return out, nil
}

func newInvite(a *app) *cobra.Command {
	var (
		r   rights
		ttl time.Duration
	)
	c := &cobra.Command{
		Use: "invite", Short: "Print a one-time code with which one other host may pair", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			g, err := r.given(cmd)
			if err != nil {
				return err
			}
			v, err := a.client().Invite(cmd.Context(), api.InviteRequest{TTL: ttl, Rights: g})
			if err != nil {
				return err
			}
			if a.json {
				return a.print(v)
			}
			fmt.Fprintln(a.out, v.Code)
			fmt.Fprintf(a.err, "Valid once, until %s. On the other host:\n  replicactl peer join %s %s\n", v.Expires.Format(time.TimeOnly), v.Address, v.Code)
			return nil
		},
	}
	r.flags(c)
	c.Flags().DurationVar(&ttl, "valid", 15*time.Minute, "how long the code is valid")
	return c
}

func newJoin(a *app) *cobra.Command {
	var r rights
	c := &cobra.Command{
		Use: "join HOST CODE", Short: "Pair with the host that printed CODE", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			g, err := r.given(cmd)
			if err != nil {
				return err
			}
			p, err := a.client().Join(cmd.Context(), api.JoinRequest{Address: args[0], Code: args[1], Rights: g})
			if err != nil {
				return err
			}
			if a.json {
				return a.print(p)
			}
			fmt.Fprintf(a.out, "paired with %s (%s) at %s\n", clean(p.Name), clean(string(p.Host)), clean(p.Address))
			return nil
		},
	}
	r.flags(c)
	return c
}

func newAllow(a *app) *cobra.Command {
	var r rights
	c := &cobra.Command{
		Use: "allow PEER", Short: "Change what a paired host may do here", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			g, err := r.given(cmd)
			if err != nil {
				return err
			}
			return a.client().Allow(cmd.Context(), api.AllowRequest{Peer: args[0], Rights: g})
		},
	}
	r.flags(c)
	return c
}

func newPeerList(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List paired hosts", Aliases: []string{"show"}, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ps, err := a.client().Peers(cmd.Context())
			if err != nil {
				return err
			}
			if a.json {
				return a.print(ps)
			}
			w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
			fmt.Fprintln(w, "NAME\tADDRESS\tREACHABLE\tMAY SEND\tMAY ASK\tHOST")
			for _, p := range ps {
				fmt.Fprintf(w, "%s\t%s\t%v\t%v\t%v\t%s\n", clean(p.Name), clean(p.Address), p.Reachable, p.MaySend, p.MayAsk, clean(string(p.Host)))
			}
			return w.Flush()
		},
	}
}

func newPeerTest(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "test PEER", Short: "Check everything a connection needs, each with its remedy", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.act(cmd.Context(), api.Action{Verb: api.PeerTest, Peer: args[0]})
		},
	}
}

func newPeerRemove(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "remove PEER", Short: "Forget a paired host and end its connections", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.client().RemovePeer(cmd.Context(), args[0])
		},
	}
}

func newPeerAddress(a *app) *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use: "address PEER HOST[:PORT]", Short: "Record where a paired host is to be found from now on", Args: cobra.ExactArgs(2),
		Long: `Record where a paired host is to be found from now on, after it has got another address. That host must answer
there, with the key it was paired with. Connections to where it was end at once; what was under way goes on
over new ones, and no VM is copied again.` + exitHelp,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.act(cmd.Context(), api.Action{Verb: api.PeerAddress, Peer: args[0], To: args[1], Force: force})
		},
	}
	c.Flags().BoolVar(&force, "force", false, "also if it does not answer there now")
	return c
}

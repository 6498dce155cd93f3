package main

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/status"
)

func newPointMount(a *app) *cobra.Command {
	act := api.Action{Verb: api.PointMount}
	c := &cobra.Command{
		Use: "mount NAME", Short: "Show a point to NBD clients of this host",
		Long: `Show a recovery point's disks over NBD, read-only, while replication goes on. Each disk is an export of
its name on a unix socket that only root may open, or on the loopback interface. With --rw each disk gets
a scratch overlay: what is written is gone when the mount ends. A mount ends with "point unmount", when
the daemon stops, and when this host gives the replica's role up. A mounted point is not thinned.

  qemu-nbd --connect=/dev/nbd0 -f raw -r 'URI'; mount -o ro,noload /dev/nbd0p1 /mnt` + "\n" + pointHelp + "\n" + exitHelp,
		Args: cobra.ExactArgs(1),
	}
	a.mounting(c, &act)
	c.Flags().StringVar(&act.Point, "point", "", "the recovery point (default latest)")
	return c
}

// mounting gives a command the flags of a mount; its arguments are a VM and,
// maybe, a patch.
func (a *app) mounting(c *cobra.Command, act *api.Action) {
	var size string
	var port int
	c.RunE = func(cmd *cobra.Command, args []string) error {
		act.VM = args[0]
		if len(args) > 1 {
			act.Patch = args[1]
		}
		if cmd.Flags().Changed("quota") {
			n, err := parseSize(size)
			if err != nil {
				return err
			}
			if !act.Writable || n == 0 {
				return usagef("--quota takes a size above 0 and goes with --rw")
			}
			act.Quota = &n
		}
		if cmd.Flags().Changed("tcp") {
			act.TCP = &port
		}
		return a.act(cmd.Context(), *act)
	}
	f := c.Flags()
	f.BoolVar(&act.Writable, "rw", false, "writable, with a scratch overlay that ends with the mount")
	f.StringVar(&size, "quota", "10G", "with --rw: how much each disk's overlay may hold")
	f.IntVar(&port, "tcp", 0, "listen on this port of 127.0.0.1 instead of a unix socket; 0 = any free one")
}

// mount prints one mount.
func (a *app) mount(m status.Mount) {
	how := "read-only"
	if m.Writable {
		how = "writable, up to " + bytesText(m.Quota) + " a disk"
	}
	what := ""
	if m.Patch != "" {
		what = "patch " + clean(m.Patch) + " over "
	}
	fmt.Fprintf(a.out, "%s: %spoint %d of %s, %s\n", m.ID, what, m.Number, m.Time.UTC().Format("2006-01-02T15:04:05Z"), how)
	for _, d := range m.Disks {
		fmt.Fprintf(a.out, "  %-6s %s  %s\n", d.Name, bytesText(d.Size), d.URI)
	}
}

func newPointMounts(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "mounts", Short: "List the points mounted on this host", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ms, err := a.client().Mounts(cmd.Context())
			if err != nil {
				return err
			}
			if a.json {
				return a.print(ms)
			}
			w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
			fmt.Fprintln(w, "MOUNT\tVM\tPOINT\tTIME (UTC)\tACCESS\tUSED\tCLIENTS\tWHERE")
			for _, m := range ms {
				access := map[bool]string{false: "ro", true: "rw"}[m.Writable]
				if m.Patch != "" {
					access += "+patch"
				}
				for _, d := range m.Disks {
					fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\t%s\t%d\t%s\n", m.ID, clean(m.VM), m.Number, m.Time.UTC().Format("2006-01-02T15:04:05Z"),
						access, bytesText(m.Used), m.Connections, d.URI)
				}
			}
			return w.Flush()
		},
	}
}

func newPointUnmount(a *app) *cobra.Command {
	act := api.Action{Verb: api.PointUnmount}
	var all bool
	c := &cobra.Command{
		Use: "unmount NAME [MOUNT]|--all", Short: "End a mount, or all of a VM's, or of all VMs; what was written to it is gone", Args: cobra.MaximumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case all && len(args) == 2:
				return usagef("--all ends every mount: leave %s out", args[1])
			case all && len(args) == 0:
				return a.unmountAll(cmd.Context(), act)
			case len(args) == 0:
				return usagef("name a VM, or say --all")
			}
			act.VM = args[0]
			if len(args) == 2 {
				act.Mount = args[1]
			}
			return a.act(cmd.Context(), act)
		},
	}
	c.Flags().BoolVar(&act.Force, "force", false, "also while clients are connected")
	c.Flags().BoolVar(&all, "all", false, "every mount of the VM, or without NAME of every VM")
	return c
}

// unmountAll goes from VM to VM; one whose mounts are in use stops no other.
func (a *app) unmountAll(ctx context.Context, act api.Action) error {
	mounts, err := a.client().Mounts(ctx)
	if err != nil {
		return err
	}
	var vms []string
	for _, m := range mounts {
		if !slices.Contains(vms, m.VM) {
			vms = append(vms, m.VM)
		}
	}
	if len(vms) == 0 && !a.json {
		fmt.Fprintln(a.out, "Nothing is mounted.")
	}
	failed := 0
	for _, name := range vms {
		act.VM = name
		if err := a.act(ctx, act); err != nil {
			failed++
			a.printError(fmt.Errorf("%s: %w", name, err), codeOf(ctx, err), "replicactl point unmount")
		}
	}
	return partly(len(vms), failed, "kept mounts")
}

func newPointExport(a *app) *cobra.Command {
	act := api.Action{Verb: api.PointExport}
	c := &cobra.Command{
		Use: "export NAME --to PATH", Short: "Write a point's disks into files, raw or qcow2",
		Long: `Write all disks of a recovery point into files of this host, sparse, while replication goes on. PATH is a
directory, which gets NAME-DISK.FORMAT per disk, or, for a VM with one disk, the file's name. Nothing is
overwritten. All files appear together in the end, durable, or none: an export that failed or was
interrupted leaves nothing and is begun anew.` + "\n" + pointHelp + "\n" + exitHelp,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			act.VM = args[0]
			if act.To == "" {
				return usagef("--to PATH is missing")
			}
			var err error
			if act.To, err = filepath.Abs(act.To); err != nil {
				return fmt.Errorf("find %s: %w", act.To, err)
			}
			return a.act(cmd.Context(), act)
		},
	}
	f := c.Flags()
	f.StringVar(&act.Point, "point", "", "the recovery point (default latest)")
	f.StringVar(&act.To, "to", "", "file or directory on this host")
	f.StringVar(&act.Format, "format", "raw", "raw or qcow2")
	return c
}

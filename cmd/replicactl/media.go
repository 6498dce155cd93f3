package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"kvmreplica/replicad/api"
)

func newVMExport(a *app) *cobra.Command {
	var (
		act        = api.Action{Verb: api.VMExport}
		passphrase string
	)
	c := &cobra.Command{
		Use: "export NAME --to DIR", Short: "Write a VM's disks onto an external medium, for the initial copy",
		Long: `Write the content of a VM's disks into DIR/VM_UUID, checksummed, compressed and, if wanted, encrypted, while
the guest runs. The VM need not be protected yet. Carry the medium to the replica host, type "vm import"
there, then "vm enable --initial existing" here: what the guest wrote meanwhile is found by digest and sent.
Files are small enough for FAT. An export that was interrupted goes on when the command is repeated.` + "\n" + exitHelp,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			act.VM = args[0]
			if act.To == "" {
				return usagef("--to DIR is missing")
			}
			var err error
			if act.To, err = filepath.Abs(act.To); err == nil {
				act.Passphrase, err = secret(passphrase)
			}
			if err != nil {
				return err
			}
			return a.act(cmd.Context(), act)
		},
	}
	f := c.Flags()
	f.StringVar(&act.To, "to", "", "directory on the medium")
	f.StringSliceVar(&act.Disks, "disk", nil, "only these disks (target names, e.g. vda)")
	f.StringVar(&act.Recipient, "recipient", "", "encrypt for this age key (age1…; made by age-keygen)")
	f.StringVar(&passphrase, "passphrase-file", "", "encrypt with the passphrase in this file")
	c.MarkFlagsMutuallyExclusive("recipient", "passphrase-file")
	return c
}

func newVMImport(a *app) *cobra.Command {
	var (
		act                  = api.Action{Verb: api.VMImport}
		passphrase, identity string
	)
	c := &cobra.Command{
		Use: "import DIR --from PEER", Short: "Make images of an external medium, on the replica host",
		Long: `Make raw images of the medium that "vm export" wrote, where "vm enable --initial existing" looks for them.
Every block is verified; a damaged or incomplete medium is refused and leaves no image. Nothing is
overwritten. An import that was interrupted goes on when the command is repeated.` + "\n" + exitHelp,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if act.Peer == "" {
				return usagef("--from PEER is missing (see: replicactl peer list)")
			}
			var err error
			if act.From, err = filepath.Abs(args[0]); err == nil {
				act.Passphrase, err = secret(passphrase)
			}
			if err == nil {
				act.Identity, err = secret(identity)
			}
			if err != nil {
				return err
			}
			return a.act(cmd.Context(), act)
		},
	}
	f := c.Flags()
	f.StringVar(&act.Peer, "from", "", "paired host that will send the VM")
	f.StringVar(&identity, "identity", "", "age identity file that the medium was encrypted for")
	f.StringVar(&passphrase, "passphrase-file", "", "file with the passphrase it was encrypted with")
	c.MarkFlagsMutuallyExclusive("identity", "passphrase-file")
	return c
}

// maxSecret is more than any key or passphrase has.
const maxSecret = 64 << 10

// secret reads a key or passphrase from a file; no name is no secret.
func secret(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	f, err := os.Open(path)
	if err != nil {
		return "", usagef("%v", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
	if err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	s := strings.TrimRight(string(b), "\r\n")
	if s == "" || len(b) > maxSecret {
		return "", usagef("%s is empty or longer than %d bytes", path, maxSecret)
	}
	return s, nil
}

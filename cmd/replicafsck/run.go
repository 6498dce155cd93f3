package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"

	"kvmreplica/internal/version"
)

const usage = `usage: replicafsck VERB ...

  check DIR                       verify every file of a replica; changes nothing
  dump DIR|FILE                   show a replica, or a delta stream in a file
  recover DIR --in-place          finish what is committed, record a forced
                                  promotion, leave the images ready to use
  recover DIR --out OUT           the same, and copy the images to OUT/DISK.raw
  recover DIR --read-only-copy OUT
                                  copy only: the replica stays a replica
  release NAME|UUID...|--all      give domains of this host their own disks back,
                                  without any daemon; their guests must be off
  version

DIR may be the name of a VM in the state directory.

flags of recover and check:
  --disk NAME=PATH    an image that is not DIR/NAME.raw (repeatable)
flags of recover:
  --point EPOCH       an older recovery point instead of the newest state
  --keep-writes       the VM was failed over on trial: keep what its guest wrote
flags of release:
  --force             although replicad runs, or the two copies diverged
  --socket PATH       libvirt's socket instead of the usual ones
  --libvirt-state DIR where libvirt keeps firmware state (/var/lib/libvirt)
flags of all:
  --state-dir DIR     replicad's state directory (/var/lib/replicad)
  --run-dir DIR       replicad's boot-scoped directory (/run/replicad)

exit status: 0 done, 1 damage found or refused, 2 wrong usage
`

// errUsage asks for the usage text.
var errUsage = errors.New("wrong usage")

// errFound: what was asked for was done, and damage was found.
var errFound = errors.New("damage was found")

// command is one invocation.
type command struct {
	out             io.Writer
	args            []string
	images          map[string]string
	point           uint64
	inPlace, helped bool
	outDir, copyDir string

	stateDir, runDir, socket string
	libvirtState             string
	vmDir                    string   // of the VM named, empty for a bare directory
	known                    []vmDisk // what the record beside the store says
	all, force               bool
	keepWrites               bool
}

// run executes one command line and returns the exit status.
func run(args []string, stdout, stderr io.Writer) int {
	c := &command{out: stdout, images: map[string]string{}}
	err := c.parse(args)
	if err == nil && !c.helped {
		err = c.do()
	}
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errUsage):
		fmt.Fprintf(stderr, "replicafsck: %v\n\n%s", err, usage)
		return 2
	}
	fmt.Fprintf(stderr, "replicafsck: %v\n", err)
	return 1
}

// parse takes flags wherever they stand.
func (c *command) parse(args []string) error {
	f := flag.NewFlagSet("replicafsck", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.BoolVar(&c.inPlace, "in-place", false, "")
	f.StringVar(&c.outDir, "out", "", "")
	f.StringVar(&c.copyDir, "read-only-copy", "", "")
	f.Uint64Var(&c.point, "point", 0, "")
	f.StringVar(&c.stateDir, "state-dir", "/var/lib/replicad", "")
	f.StringVar(&c.runDir, "run-dir", "/run/replicad", "")
	f.StringVar(&c.socket, "socket", "", "")
	f.StringVar(&c.libvirtState, "libvirt-state", "/var/lib/libvirt", "")
	f.BoolVar(&c.keepWrites, "keep-writes", false, "")
	f.BoolVar(&c.all, "all", false, "")
	f.BoolVar(&c.force, "force", false, "")
	f.Func("disk", "", func(s string) error {
		name, path, ok := strings.Cut(s, "=")
		if !ok || name == "" || path == "" {
			return errors.New("want NAME=PATH")
		}
		c.images[name] = path
		return nil
	})
	for len(args) > 0 {
		if err := f.Parse(args); errors.Is(err, flag.ErrHelp) {
			c.helped = true
			fmt.Fprint(c.out, usage)
			return nil
		} else if err != nil {
			return fmt.Errorf("%w: %w", errUsage, err)
		}
		if args = f.Args(); len(args) > 0 {
			c.args, args = append(c.args, args[0]), args[1:]
		}
	}
	return nil
}

func (c *command) do() error {
	if len(c.args) == 1 && c.args[0] == "version" {
		fmt.Fprintln(c.out, version.String())
		return nil
	}
	if len(c.args) > 0 && c.args[0] == "release" {
		return c.release(c.args[1:])
	}
	if len(c.args) != 2 {
		return fmt.Errorf("%w: want a verb and a directory", errUsage)
	}
	verb, target := c.args[0], c.args[1]
	if verb == "dump" {
		return c.dump(target)
	}
	switch verb {
	case "check":
		return c.check(target)
	case "recover":
		return c.recover(target)
	default:
		return fmt.Errorf("%w: unknown verb %q", errUsage, verb)
	}
}

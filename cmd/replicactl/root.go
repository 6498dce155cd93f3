package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode"

	"github.com/spf13/cobra"

	"kvmreplica/internal/version"
	"kvmreplica/replicad/api"
	"kvmreplica/replicad/wire"
)

// Exit codes; they are part of the interface (see the help's EXIT STATUS).
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitPartly      = 3
	exitUnhealthy   = 4
	exitNoDaemon    = 5
	exitRefused     = 6
	exitInterrupted = 130
)

const exitHelp = `
EXIT STATUS
  0 done   1 failed   2 wrong usage   3 partly done   4 unhealthy
  5 the daemon does not answer   6 refused in this state   130 interrupted`

// app is what every verb needs.
type app struct {
	socket   string
	json     bool
	out, err io.Writer
	in       io.Reader
}

func (a *app) client() *api.Client { return api.NewClient(a.socket) }

// exitError carries a code of its own past cobra.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// errUsage marks mistakes of the command line.
var errUsage = errors.New("wrong usage")

func usagef(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{errUsage}, args...)...)
}

func run(ctx context.Context, args []string, out, errw io.Writer, in io.Reader) int {
	a := &app{out: out, err: errw, in: in}
	root := newRoot(a)
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(errw)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	code := codeOf(ctx, err)
	a.printError(err, code, cmd.CommandPath())
	return code
}

func codeOf(ctx context.Context, err error) int {
	var e *exitError
	var w *wire.Error
	switch {
	case errors.As(err, &e):
		return e.code
	case ctx.Err() != nil:
		return exitInterrupted
	case errors.Is(err, api.ErrNoDaemon):
		return exitNoDaemon
	case errors.As(err, &w):
		if w.Kind == wire.KindRefused || w.Kind == wire.KindConflict || w.Kind == wire.KindDiverged {
			return exitRefused
		}
		if w.Kind == wire.KindInvalid {
			return exitUsage
		}
		return exitFailed
	case errors.Is(err, errUsage), strings.HasPrefix(err.Error(), "unknown "), strings.Contains(err.Error(), "arg(s)"), strings.Contains(err.Error(), "required flag"):
		return exitUsage
	}
	return exitFailed
}

// failure is how an error looks in JSON.
type failure struct {
	Kind string `json:"kind"`
	Text string `json:"text"`
	Hint string `json:"hint,omitempty"`
}

// kindName is a kind of error for scripts; the names are stable.
func kindName(k wire.Kind) string {
	names := []string{"internal", "not-found", "conflict", "refused", "diverged", "unavailable", "corrupt", "no-space", "invalid", "position", "version", "suspect"}
	if k < 0 || int(k) >= len(names) {
		return names[0]
	}
	return names[k]
}

// explain is what is said of an error: kind, cause and the next command.
func explain(err error, code int, command string) failure {
	e := api.AsError(err)
	f := failure{Kind: kindName(e.Kind), Text: e.Text, Hint: e.Hint}
	switch {
	case code == exitNoDaemon:
		f.Kind, f.Hint = kindName(wire.KindUnavailable), "systemctl status replicad; journalctl -u replicad"
	case code == exitInterrupted:
		f = failure{Kind: "interrupted", Text: "interrupted; an action that had begun goes on in the daemon", Hint: "replicactl vm list"}
	case code == exitUsage:
		f.Kind = kindName(wire.KindInvalid)
		if f.Hint == "" {
			f.Hint = command + " --help"
		}
	}
	return f
}

func (a *app) printError(err error, code int, command string) {
	f := explain(err, code, command)
	if a.json {
		_ = json.NewEncoder(a.err).Encode(map[string]any{"error": f, "exit": code})
		return
	}
	fmt.Fprintf(a.err, "replicactl: %s\n", clean(f.Text))
	if f.Hint != "" {
		fmt.Fprintf(a.err, "  next: %s\n", clean(f.Hint))
	}
}

// clean keeps what a peer or a guest wrote from steering the terminal, and on
// one line.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case unicode.IsControl(r), unicode.Is(unicode.Bidi_Control, r), r == '\u2028', r == '\u2029':
			return '?'
		}
		return r
	}, strings.ReplaceAll(s, "\n", "; "))
}

func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:           "replicactl",
		Short:         "Protect virtual machines on a second host and fail over to it",
		Long:          "Protect KVM/libvirt virtual machines on a second host that shares nothing with the first, and fail over to it." + exitHelp,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version.String(),
	}
	root.PersistentFlags().StringVar(&a.socket, "socket", api.DefaultSocket, "control socket of the daemon")
	root.PersistentFlags().BoolVar(&a.json, "json", false, "print JSON (one object, or one per line while an action runs)")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usagef("%v", err) })
	root.AddCommand(newVM(a), newPolicy(a), newPoint(a), newPeer(a), newFailover(a), newDrill(a), newHealth(a), newStats(a), newDoctor(a), newReload(a), newVersion(a))
	return root
}

func newVersion(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Show the versions of this command and of the daemon", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := a.client().Host(cmd.Context())
			if a.json {
				return errors.Join(a.print(map[string]any{"command": version.String(), "daemon": h.Version}), nil)
			}
			fmt.Fprintf(a.out, "replicactl %s\n", version.String())
			if err != nil {
				fmt.Fprintf(a.out, "replicad   not answering on %s\n", a.socket)
				return nil
			}
			fmt.Fprintf(a.out, "replicad   %s on %s (%s)\n", h.Version, h.Name, h.ID)
			return nil
		},
	}
}

// print writes v as one JSON object.
func (a *app) print(v any) error {
	e := json.NewEncoder(a.out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

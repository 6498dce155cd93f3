// Command replicad is the daemon; "replicad nbd" serves one disk alone.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"
)

func main() {
	root := &cobra.Command{Use: "replicad", Short: "Replicate virtual machines", SilenceUsage: true, SilenceErrors: true}
	root.AddCommand(newNBDCommand(), newKeeperCommand(), newDataplaneCommand())
	if err := root.ExecuteContext(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "replicad:", err)
		os.Exit(1)
	}
}

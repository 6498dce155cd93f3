// Command replicafsck checks, shows and recovers a replica from its files
// alone, and gives protected domains their own disks back: no daemon, no
// network; release alone speaks to the libvirtd of this machine. It is the tool
// for the day when nothing else is left.
//
// Exit status: 0 done and nothing found, 1 damage found or refused, 2 wrong
// usage.
package main

import "os"

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

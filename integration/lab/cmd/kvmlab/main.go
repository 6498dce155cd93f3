// Command kvmlab makes, uses and removes a lab of two pretend KVM hosts.
//
//	kvmlab up DIR [-nonroot B]         make a lab that outlives this command
//	kvmlab status DIR                  list the hosts
//	kvmlab exec DIR A CMD ARGS...      run a command inside host A
//	kvmlab daemon DIR A CMD ARGS...    start one that stays; prints its number and log
//	kvmlab crash DIR A                 cut the power of host A
//	kvmlab start DIR A                 boot it again
//	kvmlab link DIR A up|down          plug or pull its network cable
//	kvmlab guest DIR A NAME [flags]    make disks and define the test guest
//	kvmlab wait DIR A NAME WORD [-n N] wait for the guest to announce WORD
//	kvmlab last DIR A NAME WORD        its latest announcement of WORD
//	kvmlab files DIR                   link the guest's kernel and initramfs into DIR
//	kvmlab down DIR                    remove everything
//
// Exit codes: 0 done, 1 failed, 2 wrong usage; exec passes the command's on.
package main

import (
	"fmt"
	"os"
)

func main() {
	code, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "kvmlab:", err)
		if code == 0 {
			code = 1
		}
	}
	os.Exit(code)
}

// Command kvmlab makes, uses and removes a lab of two pretend KVM hosts.
//
//	kvmlab up DIR [-nonroot B]      make a lab that outlives this command
//	kvmlab exec DIR A CMD ARGS...   run a command inside host A
//	kvmlab crash DIR A              cut the power of host A
//	kvmlab start DIR A              boot it again
//	kvmlab link DIR A up|down       plug or pull its network cable
//	kvmlab status DIR               list the hosts
//	kvmlab guest DIR                put the test guest's kernel into both hosts
//	kvmlab down DIR                 remove everything
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

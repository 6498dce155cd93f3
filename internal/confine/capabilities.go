package confine

import (
	"errors"

	"golang.org/x/sys/unix"
)

// kept are the capabilities of a confined process: those by which root opens,
// changes and gives away files of QEMU's user, and writes into what a file
// system keeps for root.
const kept = 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_DAC_READ_SEARCH | 1<<unix.CAP_FOWNER | 1<<unix.CAP_FSETID | 1<<unix.CAP_SYS_RESOURCE

// dropCapabilities takes all others from the calling thread.
func dropCapabilities() error {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData // low and high words
	if err := unix.Capget(&head, &have[0]); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	if have[0].Effective&(1<<unix.CAP_SETPCAP) != 0 {
		for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
			if kept&(uint64(1)<<c) != 0 {
				continue
			}
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); errors.Is(err, unix.EINVAL) {
				break // an older kernel has fewer
			} else if err != nil {
				return err
			}
		}
	}
	less := [2]unix.CapUserData{{Effective: have[0].Permitted & kept, Permitted: have[0].Permitted & kept}}
	return unix.Capset(&head, &less[0])
}

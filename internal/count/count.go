// Package count says how many things there are, in English.
//
// It is for texts that people read, where a single thing is common; what is
// counted has a plural in s.
package count

import "fmt"

// Of is "1 disk" or "2 disks".
func Of[N ~int | ~int32 | ~int64 | ~uint32 | ~uint64](n N, what string) string {
	if n == 1 {
		return fmt.Sprintf("1 %s", what)
	}
	return fmt.Sprintf("%d %ss", n, what)
}

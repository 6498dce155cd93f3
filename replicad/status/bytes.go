package status

import "fmt"

// Bytes is a size for people, in binary units; a negative one is unknown: "-".
func Bytes(n int64) string {
	const units = "KMGTPE"
	if n < 0 {
		return "-"
	}
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, u := float64(n), -1
	for f >= 1024 && u < len(units)-1 {
		f /= 1024
		u++
	}
	return fmt.Sprintf("%.1f %ciB", f, units[u])
}

// Package version is the one place where this build says what it is.
package version

import "runtime/debug"

// Number is the release.
const Number = "0.1.0-dev"

// String is the release and, where the build knows it, the commit.
func String() string {
	if bi, ok := debug.ReadBuildInfo(); ok {
		for _, s := range bi.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				return Number + "+" + s.Value[:12]
			}
		}
	}
	return Number
}

package health

import (
	"fmt"
	"time"
)

// NotProtected is the condition of a domain that a policy asks to be protected
// and that is not, since the daemon saw it so.
func NotProtected(name, policy string, since time.Time) Condition {
	return Condition{
		Code: "not-protected", Severity: Warning,
		Text:   fmt.Sprintf("not protected, although policy %q fits it; seen so since %s", policy, since.Format(time.DateTime)),
		Remedy: "replicactl policy apply " + name + "; or exclude it from the [[policy]]",
	}
}

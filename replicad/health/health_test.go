package health_test

import (
	"testing"
	"time"

	"kvmreplica/replicad/health"
)

func TestEveryFactBecomesItsConditionWithARemedy(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	well := health.Facts{Name: "g", Primary: true, Interval: 5 * time.Second, LastCommit: now.Add(-4 * time.Second)}
	if cs, s := health.Evaluate(well, now); s != health.Normal || len(cs) != 0 {
		t.Fatalf("a well VM: %v %v", s, cs)
	}
	for code, c := range map[string]struct {
		mutate func(*health.Facts)
		want   health.Severity
	}{
		"diverged":         {func(f *health.Facts) { f.Diverged = "x" }, health.Critical},
		"plan-interrupted": {func(f *health.Facts) { f.Interrupted = "x" }, health.Critical},
		"replica-suspect":  {func(f *health.Facts) { f.StoreSuspect = "x" }, health.Critical},
		"unverified":       {func(f *health.Facts) { f.Primary, f.Unproven = false, "x" }, health.Warning},
		"data-plane-down":  {func(f *health.Facts) { f.DataPlane = "x" }, health.Critical},
		"no-space":         {func(f *health.Facts) { f.NoSpace = "x" }, health.Critical},
		"released":         {func(f *health.Facts) { f.Released = "x" }, health.Critical},
		"start-held":       {func(f *health.Facts) { f.Held = "x" }, health.Critical},
		"no-reverse":       {func(f *health.Facts) { f.NoReverse = true }, health.Critical},
		"session-stopped":  {func(f *health.Facts) { f.Stopped = "x" }, health.Critical},
		"paused":           {func(f *health.Facts) { f.Paused = true }, health.Warning},
		"seeding":          {func(f *health.Facts) { f.Seeding = true }, health.Warning},
		"unprotected":      {func(f *health.Facts) { f.NoCopy = true }, health.Warning},
		"bypass":           {func(f *health.Facts) { f.Bypass = "x" }, health.Critical},
		"tracking-lost":    {func(f *health.Facts) { f.TrackingLost = "x" }, health.Critical},
		"outdated":         {func(f *health.Facts) { f.Outdated = "x" }, health.Warning},
		"overlay":          {func(f *health.Facts) { f.Overlay = "x" }, health.Warning},
		"verifying":        {func(f *health.Facts) { f.Verifying = "x" }, health.Warning},
		"peer-unreachable": {func(f *health.Facts) { f.LinkError = "x" }, health.Warning},
		"source-error":     {func(f *health.Facts) { f.SourceError = "x" }, health.Critical},
		"peer-refuses":     {func(f *health.Facts) { f.Refused = "x" }, health.Critical},
		"corrupt":          {func(f *health.Facts) { f.Corrupt = "x" }, health.Critical},
		"apply-failed":     {func(f *health.Facts) { f.Primary = false; f.ApplyError = "x" }, health.Critical},
		"incomplete":       {func(f *health.Facts) { f.Primary = false; f.Incomplete = true }, health.Warning},
		"backlog":          {func(f *health.Facts) { f.Primary = false; f.Backlog = "x" }, health.Warning},
	} {
		f := well
		c.mutate(&f)
		cs, s := health.Evaluate(f, now)
		if s != c.want || len(cs) != 1 || cs[0].Code != code || cs[0].Remedy == "" || cs[0].Text == "" {
			t.Errorf("%s: severity %v, conditions %+v", code, s, cs)
		}
	}
}

func TestThePrimaryNamesWhatItsReplicaDistrusts(t *testing.T) {
	t.Parallel()
	cs, s := health.Evaluate(health.Facts{Name: "g", Primary: true, PeerSuspect: "an image was changed"}, time.Now())
	want := health.Condition{Code: "replica-suspect", Severity: health.Critical, Text: "the replica takes nothing: an image was changed", Remedy: "find out why, then on the replica host: replicactl vm resync g"}
	if s != health.Critical || len(cs) != 1 || cs[0] != want {
		t.Errorf("%v: %+v", s, cs)
	}
}

func TestLatenessFollowsTheIntervalNotTheClockOfOthers(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, c := range []struct {
		interval, age time.Duration
		want          health.Severity
	}{
		{5 * time.Second, 15 * time.Second, health.Normal},
		{5 * time.Second, 16 * time.Second, health.Warning},
		{5 * time.Second, 61 * time.Second, health.Critical},
		{5 * time.Minute, 15 * time.Minute, health.Normal},
		{5 * time.Minute, 16 * time.Minute, health.Warning},
		{5 * time.Minute, 61 * time.Minute, health.Critical},
		{0, 16 * time.Second, health.Warning},
	} {
		_, s := health.Evaluate(health.Facts{Primary: true, Interval: c.interval, LastCommit: now.Add(-c.age)}, now)
		if s != c.want {
			t.Errorf("interval %v age %v: %v, want %v", c.interval, c.age, s, c.want)
		}
	}
}

func TestWorstConditionComesFirst(t *testing.T) {
	t.Parallel()
	now := time.Now()
	cs, s := health.Evaluate(health.Facts{Primary: true, Paused: true, Bypass: "x", Overlay: "y"}, now)
	if s != health.Critical || cs[0].Code != "bypass" || len(cs) != 3 {
		t.Fatalf("%v %+v", s, cs)
	}
}

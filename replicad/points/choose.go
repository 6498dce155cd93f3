package points

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// ChoiceHelp is the syntax of Choose for people.
const ChoiceHelp = `latest, oldest, latest-app, its number from "point list", the beginning of its time (2026-11-22T10:3, 10:31) or of its position (4b1f20c1/17)`

// maxChoice bounds the text of a choice in bytes.
const maxChoice = 160

// ErrChoice: the text is no way to name a recovery point.
var ErrChoice = errors.New("this does not name a recovery point")

// AmbiguousError: the text fits several points.
type AmbiguousError struct {
	Text       string
	Candidates []Point // oldest first
}

// Error lists what fits, the newest first, up to a few.
func (e *AmbiguousError) Error() string {
	const shown = 5
	var b strings.Builder
	fmt.Fprintf(&b, "%q fits %d recovery points:", e.Text, len(e.Candidates))
	for i := range min(len(e.Candidates), shown) {
		p := e.Candidates[len(e.Candidates)-1-i]
		fmt.Fprintf(&b, " %d (%s)", p.Ordinal, p.TimeText())
	}
	if n := len(e.Candidates) - shown; n > 0 {
		fmt.Fprintf(&b, " and %d more", n)
	}
	return b.String()
}

// TimeText is the time of the cut as lists show it and Choose reads it.
func (p Point) TimeText() string { return p.Cut.UTC().Format("2006-01-02T15:04:05Z") }

// PosText is the position as Choose reads it: generation, epoch, digest.
func (p Point) PosText() string {
	return fmt.Sprintf("%v/%d/%v", p.Pos.Generation, p.Pos.Epoch, p.Pos.Digest)
}

// Choose finds the point of ps (oldest first, as Store.States lists them) that
// a person means. Every command that takes a point reads it here:
//
//	latest, ""     the newest state
//	oldest         the oldest one that can be read
//	latest-app     the newest application-consistent one
//	17 or #17      the one with this number
//	2026-11-22T10  the beginning of its time, in UTC; "T" may be a space
//	10:31          the beginning of its time of day, in UTC
//	4b1f20c1/17    the beginning of its generation, its epoch; a digest may follow
//
// What fits nothing is ErrNoPoint, what fits several *AmbiguousError, what is
// no such text ErrChoice. A damaged point is found, and its damage is the error.
func Choose(ps []Point, text string) (Point, error) {
	text = strings.TrimSpace(text)
	if len(text) > maxChoice {
		return Point{}, fmt.Errorf("%w: %d bytes of text; say %s", ErrChoice, len(text), ChoiceHelp)
	}
	match, err := matcher(text)
	if err != nil {
		return Point{}, err
	}
	var fit []Point
	for _, p := range ps {
		if match(p) {
			fit = append(fit, p)
		}
	}
	if len(fit) > 1 {
		switch text {
		case "", "latest", "latest-app":
			fit = fit[len(fit)-1:]
		case "oldest":
			fit = fit[:1]
		default:
			return Point{}, &AmbiguousError{Text: text, Candidates: fit}
		}
	}
	if len(fit) == 0 {
		return Point{}, fmt.Errorf("%q: %w", text, ErrNoPoint)
	}
	if p := fit[0]; p.Damage != nil {
		return p, fmt.Errorf("recovery point %d (%s): %w", p.Ordinal, p.TimeText(), p.Damage)
	}
	return fit[0], nil
}

// matcher is what a text asks of a point.
func matcher(text string) (func(Point) bool, error) {
	bad := fmt.Errorf("%.48q: %w; say %s", text, ErrChoice, ChoiceHelp)
	switch {
	case text == "" || text == "latest":
		return func(p Point) bool { return p.Latest }, nil
	case text == "oldest":
		return func(p Point) bool { return p.Damage == nil }, nil
	case text == "latest-app":
		return func(p Point) bool { return p.App && p.Damage == nil }, nil
	case strings.Contains(text, "/"):
		return byPosition(text, bad)
	case strings.ContainsAny(text, "-:"):
		return byTime(text, bad)
	}
	n, err := strconv.ParseUint(strings.TrimPrefix(text, "#"), 10, 64)
	if err != nil || n == 0 {
		return nil, bad
	}
	return func(p Point) bool { return p.Ordinal == n }, nil
}

func byPosition(text string, bad error) (func(Point) bool, error) {
	f := strings.Split(strings.ToLower(text), "/")
	epoch, err := strconv.ParseUint(f[1], 10, 64)
	if err != nil || len(f) > 3 || len(f[0]) < 4 || !isHex(f[0]) {
		return nil, bad
	}
	digest := ""
	if len(f) == 3 {
		if digest = f[2]; !isHex(digest) {
			return nil, bad
		}
	}
	return func(p Point) bool {
		return p.Pos.Epoch == epoch && strings.HasPrefix(p.Pos.Generation.String(), f[0]) && strings.HasPrefix(p.Pos.Digest.String(), digest)
	}, nil
}

func isHex(s string) bool { return strings.Trim(s, "0123456789abcdef") == "" }

// byTime reads the beginning of a time in UTC, or a whole time with its zone.
func byTime(text string, bad error) (func(Point) bool, error) {
	if t, err := time.Parse(time.RFC3339, strings.Replace(text, " ", "T", 1)); err == nil {
		return func(p Point) bool { return p.Cut.Truncate(time.Second).Equal(t.Truncate(time.Second)) }, nil
	}
	s := strings.ToUpper(strings.Replace(text, " ", "T", 1))
	day, clock, both := strings.Cut(s, "T")
	if !both && strings.Contains(s, ":") {
		day, clock = "", s
	}
	if !fits(day, "0000-00-00") || !fits(clock, "00:00:00Z") || (both && len(day) != len("0000-00-00")) {
		return nil, bad
	}
	if day == "" {
		return func(p Point) bool { return strings.HasPrefix(p.TimeText()[len("0000-00-00T"):], clock) }, nil
	}
	return func(p Point) bool { return strings.HasPrefix(p.TimeText(), s) }, nil
}

// fits reports whether s is a beginning of shape, where 0 stands for a digit.
func fits(s, shape string) bool {
	if len(s) > len(shape) {
		return false
	}
	for i := range len(s) {
		digit := s[i] >= '0' && s[i] <= '9'
		if digit != (shape[i] == '0') || !digit && s[i] != shape[i] {
			return false
		}
	}
	return true
}

// States lists what can be chosen, oldest first: the recovery points and, as
// the last one, the newest committed state, which is marked Latest.
func (s *Store) States() []Point {
	out := s.Points()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sup.role == rolePromoted || s.sup.role == roleRolling || s.committed.pos.IsZero() {
		return out
	}
	if n := len(out); n > 0 && out[n-1].Pos == s.committed.pos {
		out[n-1].Latest = true
		return out
	}
	c := s.committed
	return append(out, Point{
		Pos: c.pos, Ordinal: c.ordinal, At: c.at, Cut: c.cut, Disks: s.disks(), Config: c.config, App: c.app, Latest: true,
	})
}

// Take chooses a state and opens it. Of two epochs that come one after the
// other the first may pass on before it is opened, without ever having become a
// recovery point: then the choice is made again. The caller closes the view.
func (s *Store) Take(text string) (Point, *View, error) {
	for try := 0; ; try++ {
		p, err := s.Choose(text)
		if err != nil {
			return Point{}, nil, err
		}
		v, err := s.View(p.Pos)
		if err == nil || !errors.Is(err, ErrNoPoint) || try == maxTakes {
			return p, v, err
		}
	}
}

// maxTakes bounds the choices of one Take: each was overtaken.
const maxTakes = 100

// Choose finds the state that a person means: see the function Choose.
func (s *Store) Choose(text string) (Point, error) { return Choose(s.States(), text) }

package fsxtest

import "math/rand/v2"

// Chooser decides one pending item: it returns a number in [0, n), where 0 is
// the oldest value the item may have and n-1 the newest.
type Chooser func(n int) int

// Oldest loses everything that was not synced.
func Oldest(int) int { return 0 }

// Newest loses nothing.
func Newest(n int) int { return n - 1 }

// Random decides by the seed alone.
func Random(seed uint64) Chooser {
	r := rand.New(rand.NewPCG(seed, 0x9e3779b97f4a7c15))
	return func(n int) int { return r.IntN(n) }
}

// Fixed replays a list of decisions; behind its end everything is Oldest.
func Fixed(choices []int) Chooser {
	i := 0
	return func(n int) int {
		c := 0
		if i < len(choices) {
			c = min(choices[i], n-1)
		}
		i++
		return c
	}
}

// Record passes choose on and notes its answers and the number of choices.
func Record(choose Chooser, choices, radices *[]int) Chooser {
	return func(n int) int {
		c := choose(n)
		*choices = append(*choices, c)
		*radices = append(*radices, n)
		return c
	}
}

// Survivors calls try with choosers that together cover what a cut may leave:
// all combinations when there are at most maxAll of them, else oldest, newest
// and random ones up to n in all. try must make all its decisions through the
// chooser, and the same ones for the same answers. It returns the number of
// cases and whether they were all there are; an error of try ends it, together
// with the decisions that led to it.
func Survivors(maxAll, n int, seed uint64, try func(Chooser) error) (cases int, all bool, bad []int, err error) {
	var first, radices []int
	run := func(c Chooser) error {
		var choices []int
		radices = radices[:0]
		cases++
		e := try(Record(c, &choices, &radices))
		first = choices
		return e
	}
	if err := run(Oldest); err != nil {
		return cases, false, first, err
	}
	total := 1
	for _, r := range radices {
		if total <= maxAll {
			total *= r
		}
	}
	if total > maxAll {
		for i := 1; i < n; i++ {
			c := Random(seed + uint64(i))
			if i == 1 {
				c = Newest
			}
			if err := run(c); err != nil {
				return cases, false, first, err
			}
		}
		return cases, false, nil, nil
	}
	for next := odometer(first, radices); next != nil; next = odometer(first, radices) {
		if err := run(Fixed(next)); err != nil {
			return cases, false, first, err
		}
	}
	return cases, true, nil, nil
}

// odometer returns the decisions after cur, depth first, or nil at the end.
func odometer(cur, radices []int) []int {
	for i := len(cur) - 1; i >= 0; i-- {
		if cur[i]+1 < radices[i] {
			next := append([]int(nil), cur[:i+1]...)
			next[i]++
			return next
		}
	}
	return nil
}

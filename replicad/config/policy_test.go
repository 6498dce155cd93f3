package config

import "testing"

func TestTheFirstPolicyThatFitsCounts(t *testing.T) {
	t.Parallel()
	c, err := Parse([]byte(`
[[policy]]
name = "scratch-kept"
match = ["web-1-scratch"]
to = "b"
[[policy]]
name = "web"
match = ["web-?*", "shop[0-9]"]
exclude = ["*-scratch", "shop9"]
to = "b"
[[policy]]
name = "gold"
tags = ["gold", "Silver"]
exclude = ["web-1*"]
to = "b"
`))
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name string
		tags []string
		want string
	}{
		{"web-1", nil, "web"},
		{"web-", nil, ""},
		{"Web-1", nil, ""},
		{"myweb-1", nil, ""},
		{"shop3", nil, "web"},
		{"shop33", nil, ""},
		{"web-1-scratch", nil, "scratch-kept"},
		{"web-2-scratch", nil, ""},
		{"web-2-scratch", []string{"x", "gold"}, "gold"},
		{"web-12-scratch", []string{"gold"}, ""},
		{"db", []string{"Gold"}, ""},
		{"db", []string{"Silver"}, "gold"},
		{"shop9", nil, ""},
		{"", nil, ""},
		{"web-1/x", nil, ""},
	} {
		p, ok := c.PolicyFor(x.name, x.tags)
		if p.Name != x.want || ok != (x.want != "") {
			t.Errorf("%q with %q: %q, %t; want %q", x.name, x.tags, p.Name, ok, x.want)
		}
	}
}

// What is not written is not the policy's to say; zero is.
func TestASettingThatIsLeftOutIsNotZero(t *testing.T) {
	t.Parallel()
	c, err := Parse([]byte("[[policy]]\nname = \"a\"\nmatch = [\"*\"]\nto = \"b\"\nevery = \"0s\"\nbandwidth = \"0\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	p := c.Policies[0]
	if p.Every == nil || *p.Every != 0 || p.Bandwidth == nil || *p.Bandwidth != 0 || p.AppEvery != nil || p.Shutdown != nil || p.InitialAt != nil || p.AlarmAfter != defaultAlarmAfter {
		t.Errorf("%+v", p)
	}
}

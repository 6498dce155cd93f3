package libvirt

import "fmt"

// SetGenID returns the document with another generation id. A document without
// one comes back as it is: the guest has no such device.
func SetGenID(doc []byte, id string) ([]byte, error) {
	if _, err := parseUUID(id); err != nil {
		return nil, fmt.Errorf("set the generation id: %w", err)
	}
	root, err := domainRoot(doc)
	if err != nil {
		return nil, err
	}
	g := root.kid("genid")
	if g == nil {
		return doc, nil
	}
	return apply(doc, []splice{{g.whole, "<genid>" + id + "</genid>"}})
}

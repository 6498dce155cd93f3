package dataplane

import (
	"context"
	"errors"
)

var errTODO = errors.New("not built yet")

// Ensure starts the keeper of cfg's VM unless it runs, waits until the data
// plane answers and returns a client. A data plane that runs with another
// configuration keeps running; Reconfigure with Stop and Ensure.
func Ensure(ctx context.Context, cfg Config) (*Client, error) { return nil, errTODO }

// Stop drains and ends the data plane and its keeper. It is a no-op when
// neither runs.
func Stop(ctx context.Context, cfg Config) error { return errTODO }

// RunKeeper is the verb "keeper": it returns when the data plane was drained.
func RunKeeper(ctx context.Context, configFile string) error { return errTODO }

// RunPlane is the verb "dataplane": it needs the two listening sockets as file
// descriptors 3 (NBD) and 4 (control).
func RunPlane(ctx context.Context, configFile string) error { return errTODO }

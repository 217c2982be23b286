package discovery

import (
	"encoding/json"
	"errors"
	"fmt"
)

// decode reads Consul's answer about a service. What isn't one is an error: it
// must not pass for a service without instances.
func decode(body []byte) ([]instance, error) {
	var instances []instance
	if err := json.Unmarshal(body, &instances); err != nil {
		return nil, fmt.Errorf("decoding the answer of %d bytes: %w", len(body), err)
	}
	if instances == nil {
		return nil, errors.New("the answer is no list of instances")
	}
	for i := range instances {
		if instances[i].Node == nil || instances[i].Service == nil {
			return nil, fmt.Errorf("element %d of the answer has no node or no service: is it a Consul agent?", i)
		}
	}
	return instances, nil
}

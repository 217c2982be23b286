package discovery

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"slices"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// reader reads Consul's answers about a service. It decodes only what it has not
// seen in the answer before: when one of thousands of instances flaps, the
// others come again byte by byte and in the same order, so it looks for each of
// them where it should be. Only where it isn't is it looked for where an object
// ends, which costs ten times as much, and decoded if it is new, which costs a
// hundred times as much again. It belongs to one goroutine.
type reader struct {
	query *Query
	last  []*element // of the last answer that was taken, in its order; nil before the first
}

// element is what became of one element of an answer.
type element struct {
	size     int
	hash     uint64 // of its bytes
	endpoint endpoint.Endpoint
	wanted   bool
	err      error // why it can't be dialled
}

// isNext reports whether e is what comes next.
func (e *element) isNext(w *window) bool {
	return w.holds(e.size) && w.unread[e.size-1] == '}' && hashOf(w.unread[:e.size]) == e.hash
}

// hashSeed makes hashes unpredictable: nobody can register instances that pass
// for one another. By chance two do once in 2⁶⁴.
var hashSeed = maphash.MakeSeed()

func hashOf(text []byte) uint64 { return maphash.Bytes(hashSeed, text) }

// read reads an answer. What isn't a list of instances is an error: it must not
// pass for a service without any.
func (r *reader) read(answer io.Reader) ([]*element, error) {
	w := openWindow(answer)
	defer w.close()
	reading := reading{reader: r, window: w, elements: make([]*element, 0, len(r.last)+1)}
	if err := w.readList(reading.next); err != nil {
		return nil, fmt.Errorf("element %d of the answer: %w", len(reading.elements), err)
	}
	return reading.elements, nil
}

// repeats reports whether an answer says what the last one did.
func (r *reader) repeats(elements []*element) bool {
	return r.last != nil && slices.Equal(elements, r.last)
}

// take makes an answer the last one.
func (r *reader) take(elements []*element) { r.last = elements }

// endpoints returns what an answer has to offer, and why the rest can't be
// dialled.
func (q *Query) endpoints(elements []*element) (endpoints []endpoint.Endpoint, refused []error) {
	wanted := make([]*endpoint.Endpoint, 0, len(elements))
	for _, e := range elements {
		switch {
		case e.err != nil:
			refused = append(refused, e.err)
		case e.wanted:
			wanted = append(wanted, &e.endpoint)
		}
	}
	return q.inOrder(wanted), refused
}

// reading is the reading of one answer.
type reading struct {
	*reader
	*window
	elements []*element
	at       int            // in the last answer, of the element that should be next
	places   map[uint64]int // in the last answer, by hash; nil until an element is not where it should be
}

// lookAhead is how many elements may have gone at one place for the next one to
// be found as cheaply as if they were there.
const lookAhead = 4

// next takes the next element.
func (r *reading) next() error {
	e := r.expected()
	if e == nil {
		var err error
		if e, err = r.search(); err != nil {
			return err
		}
	}
	r.skip(e.size)
	r.elements = append(r.elements, e)
	return nil
}

// expected returns the next element if in the last answer too it followed the
// one before, else nil.
func (r *reading) expected() *element {
	for at := r.at; at < min(r.at+lookAhead, len(r.last)); at++ {
		if e := r.last[at]; e.isNext(r.window) {
			r.at = at + 1
			return e
		}
	}
	return nil
}

// search returns the next element, wherever it was in the last answer.
func (r *reading) search() (*element, error) {
	raw, err := r.object()
	if err != nil {
		return nil, err
	}
	if r.places == nil {
		r.places = make(map[uint64]int, len(r.last))
		for at, e := range r.last {
			r.places[e.hash] = at
		}
	}
	hash := hashOf(raw)
	if at, ok := r.places[hash]; ok {
		r.at = at + 1
		return r.last[at], nil
	}
	e, err := r.decode(raw)
	if err != nil {
		return nil, err
	}
	e.size, e.hash = len(raw), hash
	return e, nil
}

func (r *reader) decode(raw []byte) (*element, error) {
	var in instance
	if err := json.Unmarshal(raw, &in); err != nil {
		return nil, err
	}
	if in.Node == nil || in.Service == nil {
		return nil, errors.New("it has no node or no service: is it a Consul agent?")
	}
	e := new(element)
	e.endpoint, e.wanted, e.err = r.query.endpoint(&in)
	return e, nil
}

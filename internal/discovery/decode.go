package discovery

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"

	"github.com/caddy-consul/caddy-consul/internal/endpoint"
)

// reader reads Consul's answers about a service. It decodes only what it has not
// seen in the answer before: when one of thousands of instances flaps, the
// others come again byte by byte, and finding where each ends is far cheaper
// than decoding it. It belongs to one goroutine.
type reader struct {
	query *Query
	known map[uint64]*element // of the last answer, by the hash of the element's bytes
}

// element is what became of one element of an answer.
type element struct {
	endpoint endpoint.Endpoint
	wanted   bool
	err      error // why it can't be dialled
}

// instances is what an answer says.
type instances struct {
	count     int // of elements, wanted or not
	endpoints []endpoint.Endpoint
	refused   []error // instances that can't be dialled, and why
}

// elementSeed makes the hashes of elements unpredictable: nobody can register
// instances that pass for one another. By chance two do once in 2⁶⁴.
var elementSeed = maphash.MakeSeed()

// read reads an answer. What isn't a list of instances is an error: it must not
// pass for a service without any.
func (r *reader) read(body []byte) (*instances, error) {
	read := &instances{endpoints: make([]endpoint.Endpoint, 0, len(r.known))}
	seen := make(map[uint64]*element, len(r.known))
	err := forEachElement(body, func(raw []byte) error {
		hash := maphash.Bytes(elementSeed, raw)
		e, ok := r.known[hash]
		if !ok {
			var err error
			if e, err = r.decode(raw); err != nil {
				return fmt.Errorf("element %d of the answer of %d bytes: %w", read.count, len(body), err)
			}
		}
		seen[hash] = e
		read.count++
		switch {
		case e.err != nil:
			read.refused = append(read.refused, e.err)
		case e.wanted:
			read.endpoints = append(read.endpoints, e.endpoint)
		}
		return nil
	})
	if err != nil {
		return nil, &answerError{err}
	}
	r.known = seen
	r.query.sort(read.endpoints)
	return read, nil
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

var errNoList = errors.New("the answer is no list of instances")

// forEachElement calls yield with each object in the JSON array that text holds.
// It checks what stands between the objects; whether they are valid is for yield
// to find out, which must see each one.
func forEachElement(text []byte, yield func([]byte) error) error {
	text = bytes.Trim(text, " \t\r\n")
	if len(text) < 2 || text[0] != '[' || text[len(text)-1] != ']' {
		return errNoList
	}
	text = bytes.TrimLeft(text[1:len(text)-1], " \t\r\n")
	for len(text) > 0 {
		end := objectEnd(text)
		if end < 0 {
			return errNoList
		}
		if err := yield(text[:end]); err != nil {
			return err
		}
		text = bytes.TrimLeft(text[end:], " \t\r\n")
		if len(text) == 0 {
			return nil
		}
		if text[0] != ',' {
			return errNoList
		}
		if text = bytes.TrimLeft(text[1:], " \t\r\n"); len(text) == 0 {
			return errNoList // a comma and nothing after it
		}
	}
	return nil
}

// objectEnd returns where the JSON object ends that text begins with, or -1 if
// it begins with none.
func objectEnd(text []byte) int {
	if text[0] != '{' {
		return -1
	}
	depth := 0
	for i := 0; i < len(text); i++ {
		switch text[i] {
		case '{', '[':
			depth++
		case '}', ']':
			if depth--; depth == 0 {
				return i + 1
			}
		case '"':
			length := stringEnd(text[i+1:])
			if length < 0 {
				return -1
			}
			i += length
		}
	}
	return -1
}

// stringEnd returns the number of bytes up to and with the quote that ends the
// JSON string that text is in, or -1.
func stringEnd(text []byte) int {
	for from := 0; ; {
		at := bytes.IndexByte(text[from:], '"')
		if at < 0 {
			return -1
		}
		at += from
		escapes := 0
		for escapes < at && text[at-1-escapes] == '\\' {
			escapes++
		}
		from = at + 1
		if escapes%2 == 0 {
			return from
		}
	}
}

package discovery

import (
	"bytes"
	"errors"
	"io"
	"sync"
)

// window is what is held of a text while it is read piece by piece: an answer of
// megabytes is never in memory as a whole.
type window struct {
	text   io.Reader
	buffer []byte
	unread []byte // the part of buffer that is yet to be used
	ended  bool   // nothing follows what is unread
}

const (
	windowSize = 64 << 10

	// maxWindow is the largest that is kept for the next text. A window grows
	// where an element is longer.
	maxWindow = 1 << 20
)

var windows = sync.Pool{New: func() any { return &window{buffer: make([]byte, windowSize)} }}

// openWindow returns a window on the start of a text.
func openWindow(text io.Reader) *window {
	w := windows.Get().(*window)
	w.text, w.unread, w.ended = text, nil, false
	return w
}

// close ends the use of the window and of all that was in it.
func (w *window) close() {
	w.text, w.unread = nil, nil
	if len(w.buffer) <= maxWindow {
		windows.Put(w)
	}
}

// holds reads on until size bytes are unread. It is false if the text ends before.
func (w *window) holds(size int) bool {
	if len(w.unread) < size && !w.ended {
		buffer := w.buffer
		if size > len(buffer) {
			buffer = make([]byte, max(size, 2*len(buffer)))
		}
		kept := copy(buffer, w.unread)
		n, err := io.ReadAtLeast(w.text, buffer[kept:], size-kept)
		w.buffer, w.unread, w.ended = buffer, buffer[:kept+n], err != nil
	}
	return len(w.unread) >= size
}

// skip drops bytes that are unread.
func (w *window) skip(size int) { w.unread = w.unread[size:] }

// peek drops white space and returns the byte that follows, or 0 at the end.
func (w *window) peek() byte {
	for w.holds(1) {
		if w.unread = bytes.TrimLeft(w.unread, " \t\r\n"); len(w.unread) > 0 {
			return w.unread[0]
		}
	}
	return 0
}

// object returns the JSON object that begins here. Whether it is a valid one is
// for others to find out.
func (w *window) object() ([]byte, error) {
	for {
		if size := objectEnd(w.unread); size >= 0 {
			return w.unread[:size], nil
		}
		if w.ended {
			return nil, errNoList
		}
		w.holds(2 * len(w.unread)) // so that looking again costs no more than as much again
	}
}

var errNoList = errors.New("the answer is no list of instances")

// readList calls next at the start of each object of a JSON array, which next
// has to skip. It checks what stands between the objects, and that nothing
// follows the array.
func (w *window) readList(next func() error) error {
	if w.peek() != '[' {
		return errNoList
	}
	w.skip(1)
	for more := w.peek() != ']'; more; {
		if w.peek() != '{' {
			return errNoList
		}
		if err := next(); err != nil {
			return err
		}
		switch w.peek() {
		case ',':
			w.skip(1)
		case ']':
			more = false
		default:
			return errNoList
		}
	}
	w.skip(1)
	w.peek()
	if len(w.unread) > 0 {
		return errNoList
	}
	return nil
}

// objectEnd returns where the JSON object ends that text begins with, or -1 if
// it does not end.
func objectEnd(text []byte) int {
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

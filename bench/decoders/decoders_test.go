// Package decoders compares JSON decoders by the answers that Consul gives about
// a service. It is a module of its own, so that none of them becomes a dependency
// of the plugin, and holds nothing but this test. To run it, with encoding/json as
// it is, and then with what Go 1.27 makes of it:
//
//	cd bench/decoders && go test -bench . -benchmem -count 5
//	cd bench/decoders && GOEXPERIMENT=jsonv2 go test -bench . -benchmem -count 5
//
// The benchmarks FirstAnswer and Flap of internal/discovery say what the plugin
// takes for the same answer. It decodes one instance at a time, and only those
// that have changed.
package decoders

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/bytedance/sonic"
	experiment "github.com/go-json-experiment/json"
	goccy "github.com/goccy/go-json"
	"github.com/hashicorp/consul/api"
	jsoniter "github.com/json-iterator/go"
	"github.com/minio/simdjson-go"
	segmentio "github.com/segmentio/encoding/json"
	"github.com/valyala/fastjson"
)

// instance has the fields that internal/discovery uses.
type instance struct {
	Node    *node
	Service *service
	Checks  []check
}

type node struct {
	Node       string
	Address    string
	Datacenter string
}

type service struct {
	ID         string
	Service    string
	Address    string
	Port       int
	SocketPath string
	Tags       []string
	Meta       map[string]string
	Weights    *weights
}

type weights struct{ Passing, Warning int }

type check struct {
	CheckID string
	Status  string
}

// decoder is one to be compared.
type decoder struct {
	name string
	one  func([]byte, *instance) error
	list func([]byte, *[]instance) error
	// unlike are the oddities that it doesn't read as encoding/json does.
	unlike []string
}

var decoders = []decoder{
	reflecting("encoding/json", json.Unmarshal),
	reflecting("go-json-experiment", func(text []byte, to any) error { return experiment.Unmarshal(text, to) },
		invalidUTF8, halfSurrogatePair, keyTwice, keyInOtherCase),
	reflecting("goccy", goccy.Unmarshal),
	reflecting("sonic", sonic.ConfigStd.Unmarshal),
	reflecting("sonic-default", sonic.ConfigDefault.Unmarshal, invalidUTF8, controlCharacter),
	reflecting("segmentio", segmentio.Unmarshal, manyLevels),
	reflecting("jsoniter", jsoniter.ConfigCompatibleWithStandardLibrary.Unmarshal, invalidUTF8),
	{name: "fastjson", one: fastjsonOne, list: fastjsonList, unlike: []string{
		invalidUTF8, halfSurrogatePair, keyTwice, keyInOtherCase, controlCharacter, stringForNumber, fractionForPort, leadingZero,
	}},
	{name: "simdjson", one: simdjsonOne, list: simdjsonList, unlike: []string{
		invalidUTF8, halfSurrogatePair, keyInOtherCase, fractionForPort, manyLevels,
	}},
}

// reflecting returns a decoder that finds the fields by itself.
func reflecting(name string, unmarshal func([]byte, any) error, unlike ...string) decoder {
	return decoder{
		name:   name,
		one:    func(text []byte, to *instance) error { return unmarshal(text, to) },
		list:   func(text []byte, to *[]instance) error { return unmarshal(text, to) },
		unlike: unlike,
	}
}

var fastjsonParsers fastjson.ParserPool

func fastjsonOne(text []byte, to *instance) error {
	parser := fastjsonParsers.Get()
	defer fastjsonParsers.Put(parser)
	value, err := parser.ParseBytes(text)
	if err != nil {
		return err
	}
	*to = fastjsonInstance(value)
	return nil
}

func fastjsonList(text []byte, to *[]instance) error {
	parser := fastjsonParsers.Get()
	defer fastjsonParsers.Put(parser)
	value, err := parser.ParseBytes(text)
	if err != nil {
		return err
	}
	elements, err := value.Array()
	if err != nil {
		return err
	}
	*to = make([]instance, len(elements))
	for i, element := range elements {
		(*to)[i] = fastjsonInstance(element)
	}
	return nil
}

func fastjsonInstance(value *fastjson.Value) (in instance) {
	text := func(of *fastjson.Value, key string) string { return string(of.GetStringBytes(key)) }
	if n := value.Get("Node"); n != nil {
		in.Node = &node{Node: text(n, "Node"), Address: text(n, "Address"), Datacenter: text(n, "Datacenter")}
	}
	if s := value.Get("Service"); s != nil {
		in.Service = &service{
			ID: text(s, "ID"), Service: text(s, "Service"), Address: text(s, "Address"),
			Port: s.GetInt("Port"), SocketPath: text(s, "SocketPath"),
		}
		for _, tag := range s.GetArray("Tags") {
			in.Service.Tags = append(in.Service.Tags, string(tag.GetStringBytes()))
		}
		if meta := s.GetObject("Meta"); meta != nil {
			in.Service.Meta = make(map[string]string, meta.Len())
			meta.Visit(func(key []byte, value *fastjson.Value) { in.Service.Meta[string(key)] = string(value.GetStringBytes()) })
		}
		if w := s.Get("Weights"); w != nil {
			in.Service.Weights = &weights{Passing: w.GetInt("Passing"), Warning: w.GetInt("Warning")}
		}
	}
	for _, c := range value.GetArray("Checks") {
		in.Checks = append(in.Checks, check{CheckID: text(c, "CheckID"), Status: text(c, "Status")})
	}
	return in
}

func simdjsonOne(text []byte, to *instance) error {
	root, err := simdjsonRoot(text)
	if err != nil {
		return err
	}
	return simdjsonInstance(root, to)
}

func simdjsonList(text []byte, to *[]instance) error {
	root, err := simdjsonRoot(text)
	if err != nil {
		return err
	}
	array, err := root.Array(nil)
	if err != nil {
		return err
	}
	*to = nil
	for element := array.Iter(); element.Advance() == simdjson.TypeObject; {
		var in instance
		if err := simdjsonInstance(&element, &in); err != nil {
			return err
		}
		*to = append(*to, in)
	}
	return nil
}

func simdjsonRoot(text []byte) (*simdjson.Iter, error) {
	parsed, err := simdjson.Parse(text, nil)
	if err != nil {
		return nil, err
	}
	all := parsed.Iter()
	all.Advance()
	_, root, err := all.Root(nil)
	return root, err
}

func simdjsonInstance(value *simdjson.Iter, to *instance) error {
	return simdjsonFields(value, func(key string, value *simdjson.Iter) (err error) {
		switch key {
		case "Node":
			to.Node = new(node)
			return simdjsonFields(value, to.Node.simdjsonField)
		case "Service":
			to.Service = new(service)
			return simdjsonFields(value, to.Service.simdjsonField)
		case "Checks":
			return simdjsonElements(value, func(value *simdjson.Iter) error {
				to.Checks = append(to.Checks, check{})
				return simdjsonFields(value, to.Checks[len(to.Checks)-1].simdjsonField)
			})
		}
		return nil
	})
}

func (n *node) simdjsonField(key string, value *simdjson.Iter) (err error) {
	switch key {
	case "Node":
		n.Node, err = value.String()
	case "Address":
		n.Address, err = value.String()
	case "Datacenter":
		n.Datacenter, err = value.String()
	}
	return err
}

func (s *service) simdjsonField(key string, value *simdjson.Iter) (err error) {
	switch key {
	case "ID":
		s.ID, err = value.String()
	case "Service":
		s.Service, err = value.String()
	case "Address":
		s.Address, err = value.String()
	case "Port":
		s.Port, err = simdjsonInt(value)
	case "SocketPath":
		s.SocketPath, err = value.String()
	case "Tags":
		return simdjsonElements(value, func(value *simdjson.Iter) error {
			tag, err := value.String()
			s.Tags = append(s.Tags, tag)
			return err
		})
	case "Meta":
		s.Meta = make(map[string]string)
		return simdjsonFields(value, func(key string, value *simdjson.Iter) (err error) {
			s.Meta[key], err = value.String()
			return err
		})
	case "Weights":
		s.Weights = new(weights)
		return simdjsonFields(value, s.Weights.simdjsonField)
	}
	return err
}

func (w *weights) simdjsonField(key string, value *simdjson.Iter) (err error) {
	switch key {
	case "Passing":
		w.Passing, err = simdjsonInt(value)
	case "Warning":
		w.Warning, err = simdjsonInt(value)
	}
	return err
}

func (c *check) simdjsonField(key string, value *simdjson.Iter) (err error) {
	switch key {
	case "CheckID":
		c.CheckID, err = value.String()
	case "Status":
		c.Status, err = value.String()
	}
	return err
}

func simdjsonInt(value *simdjson.Iter) (int, error) {
	number, err := value.Int()
	return int(number), err
}

func simdjsonFields(value *simdjson.Iter, yield func(string, *simdjson.Iter) error) error {
	if value.Type() == simdjson.TypeNull {
		return nil
	}
	object, err := value.Object(nil)
	if err != nil {
		return err
	}
	for {
		var field simdjson.Iter
		key, kind, err := object.NextElement(&field)
		if err != nil || kind == simdjson.TypeNone {
			return err
		}
		if err := yield(key, &field); err != nil {
			return err
		}
	}
}

func simdjsonElements(value *simdjson.Iter, yield func(*simdjson.Iter) error) error {
	if value.Type() == simdjson.TypeNull {
		return nil
	}
	array, err := value.Array(nil)
	if err != nil {
		return err
	}
	for element := array.Iter(); element.Advance() != simdjson.TypeNone; {
		if err := yield(&element); err != nil {
			return err
		}
	}
	return nil
}

// entry returns the instance that the benchmarks of internal/discovery take.
func entry(i int) *api.ServiceEntry {
	nodeName, id := "node-"+strconv.Itoa(i%100), "web-"+strconv.Itoa(i)
	address := fmt.Sprintf("10.1.%d.%d", i/250, 1+i%250)
	definition := api.HealthCheckDefinition{HTTP: "http://" + address + ":8080/health", Method: "GET"}
	return &api.ServiceEntry{
		Node: &api.Node{
			ID: "8b1d1e4c-0f4c-4b8e-9c50-0e2f0d7f7a11", Node: nodeName, Address: "10.0.0." + strconv.Itoa(i%100), Datacenter: "dc1",
			TaggedAddresses: map[string]string{"lan": "10.0.0.1", "wan": "10.0.0.1", "lan_ipv4": "10.0.0.1", "wan_ipv4": "10.0.0.1"},
			Meta:            map[string]string{"consul-network-segment": "", "consul-version": "1.22.7"},
			CreateIndex:     13, ModifyIndex: 15,
		},
		Service: &api.AgentService{
			ID: id, Service: "web", Address: address, Port: 8080, Datacenter: "dc1",
			Tags: []string{"http", "v1", "production"}, Meta: map[string]string{"version": "1.0." + strconv.Itoa(i%10), "zone": "a"},
			TaggedAddresses: map[string]api.ServiceAddress{"lan_ipv4": {Address: address, Port: 8080}, "wan_ipv4": {Address: address, Port: 8080}},
			Weights:         api.AgentWeights{Passing: 1 + i*7919%100, Warning: 1},
			CreateIndex:     uint64(100 + i), ModifyIndex: uint64(100 + i),
		},
		Checks: api.HealthChecks{
			{Node: nodeName, CheckID: "serfHealth", Name: "Serf Health Status", Status: api.HealthPassing, Output: "Agent alive and reachable"},
			{
				Node: nodeName, CheckID: "service:" + id, Name: "Service 'web' check", Status: api.HealthPassing, ServiceID: id, ServiceName: "web",
				ServiceTags: []string{"http", "v1", "production"}, Output: "HTTP GET http://" + address + ":8080/health: 200 OK Output: ok",
				Type: "http", Definition: definition,
			},
		},
	}
}

// answerSize is the number of instances in the answer.
const answerSize = 5000

func answer(tb testing.TB) []byte {
	tb.Helper()
	entries := make([]*api.ServiceEntry, answerSize)
	for i := range entries {
		entries[i] = entry(i)
	}
	return marshal(tb, entries)
}

func marshal(tb testing.TB, value any) []byte {
	tb.Helper()
	text, err := json.Marshal(value)
	if err != nil {
		tb.Fatal(err)
	}
	return text
}

// A decoder that is fast because it reads less is not to be compared.
func TestDecodersAgree(t *testing.T) {
	all, one := answer(t), marshal(t, entry(1))
	var wantAll []instance
	var wantOne instance
	if err := errors.Join(json.Unmarshal(all, &wantAll), json.Unmarshal(one, &wantOne)); err != nil {
		t.Fatal(err)
	}
	for _, d := range decoders {
		t.Run(d.name, func(t *testing.T) {
			var gotAll []instance
			if err := d.list(all, &gotAll); err != nil || len(gotAll) != answerSize || !reflect.DeepEqual(gotAll, wantAll) {
				t.Errorf("the answer: got %d instances and error %v, want the %d of encoding/json", len(gotAll), err, answerSize)
			}
			var gotOne instance
			if err := d.one(one, &gotOne); err != nil || !reflect.DeepEqual(gotOne, wantOne) {
				t.Errorf("an instance: got %+v and error %v, want %+v", gotOne, err, wantOne)
			}
		})
	}
}

// Oddities that decoders read differently.
const (
	invalidUTF8       = "invalid UTF-8"
	halfSurrogatePair = "half a surrogate pair"
	keyTwice          = "a key twice"
	keyInOtherCase    = "a key in another case"
	controlCharacter  = "a control character"
	stringForNumber   = "a string for a number"
	fractionForPort   = "a fraction for a port"
	leadingZero       = "a leading zero"
	invalidSkipped    = "invalid JSON in a field that isn't used"
	surplus           = "text after the end"
	manyLevels        = "10,001 levels"
)

var oddities = map[string]string{
	invalidUTF8:       "{\"Service\":{\"ID\":\"a\xffb\"}}",
	halfSurrogatePair: `{"Service":{"ID":"\ud800"}}`,
	keyTwice:          `{"Service":{"ID":"a","ID":"b"}}`,
	keyInOtherCase:    `{"service":{"id":"a"}}`,
	controlCharacter:  "{\"Service\":{\"ID\":\"a\nb\"}}",
	stringForNumber:   `{"Service":{"Port":"80"}}`,
	fractionForPort:   `{"Service":{"Port":80.5}}`,
	leadingZero:       `{"Service":{"Port":080}}`,
	invalidSkipped:    `{"Other":{"a":tru},"Service":{"ID":"a"}}`,
	surplus:           `{"Service":{"ID":"a"}}}`,
	manyLevels:        `{"Other":` + strings.Repeat("[", 10001) + strings.Repeat("]", 10001) + `}`,
}

// Decoders differ from Go's in what isn't as Consul writes it: only where this
// says so.
func TestOddities(t *testing.T) {
	for _, d := range decoders {
		t.Run(d.name, func(t *testing.T) {
			for name, text := range oddities {
				var got, want instance
				gotErr, wantErr := d.one([]byte(text), &got), json.Unmarshal([]byte(text), &want)
				same := (gotErr == nil) == (wantErr == nil) && (gotErr != nil || reflect.DeepEqual(got, want))
				if wantSame := !slices.Contains(d.unlike, name); same != wantSame {
					t.Errorf("%s: got %+v and error %v, encoding/json %+v and %v; want the same: %t", name, got, gotErr, want, wantErr, wantSame)
				}
			}
		})
	}
}

// BenchmarkAnswer is what the whole answer takes. Of the memory it tells what is
// held by what was decoded: some decoders' strings hold all of the text.
func BenchmarkAnswer(b *testing.B) {
	all := answer(b)
	for _, d := range decoders {
		b.Run(d.name, func(b *testing.B) {
			b.SetBytes(int64(len(all)))
			var decoded []instance
			for b.Loop() {
				decoded = nil
				if err := d.list(all, &decoded); err != nil {
					b.Fatal(err)
				}
			}
			b.StopTimer()
			with := heap()
			runtime.KeepAlive(decoded)
			decoded = nil
			b.ReportMetric(float64(with-heap())/(1<<20), "MB-held")
		})
	}
	runtime.KeepAlive(all)
}

func heap() int64 {
	var stats runtime.MemStats
	for range 2 { // pools give up what they hold at the second
		runtime.GC()
	}
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapAlloc)
}

// BenchmarkInstance is what one takes that has changed.
func BenchmarkInstance(b *testing.B) {
	one := marshal(b, entry(1))
	for _, d := range decoders {
		b.Run(d.name, func(b *testing.B) {
			b.SetBytes(int64(len(one)))
			for b.Loop() {
				var in instance
				if err := d.one(one, &in); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

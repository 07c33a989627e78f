// Command adapter takes part in the conformance tests: calls as lines of JSON on standard input, what came back as
// lines of JSON on standard output. clients/conformance/README.md describes both.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/lda-service/lda/clients/go/gen/ldav1"
	"github.com/lda-service/lda/clients/go/lda"
)

type call struct {
	ID          string          `json:"id"`
	Target      string          `json:"target"`
	Verb        string          `json:"verb"`
	Request     json.RawMessage `json:"request"`
	TimeoutMs   int64           `json:"timeoutMs"`
	Token       string          `json:"token"`
	TLS         *tlsFiles       `json:"tls"`
	CancelAfter *int            `json:"cancelAfter"`
}

type tlsFiles struct {
	CA          string `json:"ca"`
	Certificate string `json:"certificate"`
	Key         string `json:"key"`
	ServerName  string `json:"serverName"`
}

type answer struct {
	ID     string            `json:"id"`
	Ended  string            `json:"ended"`
	Events []json.RawMessage `json:"events"`
	Result interface{}       `json:"result"`
	Error  *failure          `json:"error"`
}

type failure struct {
	Class       string            `json:"class"`
	Code        *string           `json:"code"`
	Reason      *string           `json:"reason"`
	Message     string            `json:"message"`
	Metadata    map[string]string `json:"metadata"`
	Violations  []violation       `json:"violations"`
	RetryAfterS *float64          `json:"retryAfterS"`
}

type violation struct {
	Field       string `json:"field"`
	Description string `json:"description"`
}

type refusal struct {
	ID          string `json:"id"`
	Unsupported string `json:"unsupported"`
}

type completion struct {
	SequenceIndex uint32      `json:"sequenceIndex"`
	Role          interface{} `json:"role"`
	Text          string      `json:"text"`
	TokenIDs      []uint32    `json:"tokenIds"`
	Reason        interface{} `json:"reason"`
	StopString    string      `json:"stopString"`
	Seed          uint64      `json:"seed,string"`
}

func main() {
	if err := serve(os.Stdin, os.Stdout); err != nil {
		log.Fatal(err)
	}
}

// serve answers the calls in order, until the input ends.
func serve(input io.Reader, output io.Writer) error {
	clients := clients{}
	defer clients.close()
	calls, answers := json.NewDecoder(input), json.NewEncoder(output)
	for {
		var next call
		if err := calls.Decode(&next); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		if err := answers.Encode(clients.reply(next)); err != nil {
			return err
		}
	}
}

// clients are kept open between calls, by what they were made of.
type clients map[string]*lda.Client

func (c clients) close() {
	for _, client := range c {
		client.Close()
	}
}

func (c clients) reply(call call) interface{} {
	client, err := c.of(call)
	if err != nil {
		return refusal{call.ID, err.Error()}
	}
	ctx, cancel := context.WithCancel(context.Background())
	if call.TimeoutMs > 0 {
		ctx, cancel = context.WithTimeout(ctx, time.Duration(call.TimeoutMs)*time.Millisecond)
	}
	defer cancel()
	answer := &answer{ID: call.ID, Ended: "ok", Events: []json.RawMessage{}}
	err = answer.run(ctx, client, call)
	var failed *lda.Error
	switch {
	case err == nil:
		return answer
	case !errors.As(err, &failed):
		return refusal{call.ID, err.Error()}
	}
	answer.Ended, answer.Error = "error", failureOf(failed)
	return answer
}

func (c clients) of(call call) (*lda.Client, error) {
	key, err := json.Marshal([]interface{}{call.Target, call.Token, call.TLS})
	if err != nil {
		return nil, err
	}
	if client := c[string(key)]; client != nil {
		return client, nil
	}
	client, err := lda.Dial(call.Target, optionsOf(call)...)
	if err == nil {
		c[string(key)] = client
	}
	return client, err
}

func optionsOf(call call) []lda.Option {
	var options []lda.Option
	if call.Token != "" {
		options = append(options, lda.WithToken(call.Token))
	}
	if call.TLS != nil {
		options = append(options, lda.WithTLSFiles(lda.TLSFiles(*call.TLS)))
	}
	return options
}

// run makes the call and keeps what came back; its error is the client's, or says what cannot be done.
func (a *answer) run(ctx context.Context, client *lda.Client, call call) error {
	switch call.Verb {
	case "generate":
		return follow(ctx, a, call, &ldav1.GenerateLDARequest{}, client.Generate)
	case "generateBoth":
		return follow(ctx, a, call, &ldav1.GenerateBothRequest{}, client.GenerateBoth)
	case "score":
		return follow(ctx, a, call, &ldav1.ScoreRequest{}, client.Score)
	case "complete":
		return a.complete(ctx, client, call)
	case "tokenizerCompat":
		return a.look(asMessage(client.TokenizerCompat(ctx)))
	case "modelPair":
		return a.look(asMessage(client.ModelPair(ctx)))
	}
	return fmt.Errorf("no verb %q", call.Verb)
}

func follow[Q, E proto.Message](ctx context.Context, a *answer, call call, request Q,
	verb func(context.Context, Q) (*lda.Stream[E], error)) error {
	if err := call.readRequest(request); err != nil {
		return err
	}
	stream, err := verb(ctx, request)
	if err != nil {
		return err
	}
	defer stream.Close()
	for call.CancelAfter == nil || len(a.Events) < *call.CancelAfter {
		event, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := a.keep(event); err != nil {
			return err
		}
	}
	a.Ended = "cancelled"
	return nil
}

func (c call) readRequest(request proto.Message) error {
	if len(c.Request) == 0 {
		return nil
	}
	if err := protojson.Unmarshal(c.Request, request); err != nil {
		return fmt.Errorf("request: %w", err)
	}
	return nil
}

func (a *answer) keep(event proto.Message) error {
	written, err := protojson.Marshal(event)
	a.Events = append(a.Events, written)
	return err
}

func (a *answer) complete(ctx context.Context, client *lda.Client, call call) error {
	request := &ldav1.GenerateLDARequest{}
	if err := call.readRequest(request); err != nil {
		return err
	}
	completions, err := client.Complete(ctx, request)
	if err != nil {
		return err
	}
	result := []completion{}
	for _, each := range completions {
		result = append(result, completionOf(each))
	}
	a.Result = result
	return nil
}

func completionOf(from *lda.Completion) completion {
	ids := []uint32{}
	for _, token := range from.Tokens {
		ids = append(ids, token.GetId())
	}
	return completion{
		SequenceIndex: from.Finished.GetSequenceIndex(),
		Role:          nameOf(from.Finished.GetRole()),
		Text:          from.Text,
		TokenIDs:      ids,
		Reason:        nameOf(from.Finished.GetReason()),
		StopString:    from.Finished.GetStopString(),
		Seed:          from.Started.GetSeed(),
	}
}

// nameOf returns the name of an enum value as proto3 JSON has it: the number of one that is not known here.
func nameOf(value protoreflect.Enum) interface{} {
	if known := value.Descriptor().Values().ByNumber(value.Number()); known != nil {
		return known.Name()
	}
	return value.Number()
}

func asMessage[R proto.Message](response R, err error) (proto.Message, error) { return response, err }

func (a *answer) look(response proto.Message, err error) error {
	if err != nil {
		return err
	}
	written, err := protojson.Marshal(response)
	a.Result = json.RawMessage(written)
	return err
}

func failureOf(from *lda.Error) *failure {
	to := &failure{
		Class:      from.Kind(),
		Message:    from.Message,
		Metadata:   map[string]string{},
		Violations: []violation{},
	}
	if from.Code != codes.OK {
		name := code.Code_name[int32(from.Code)]
		to.Code = &name
	}
	if from.Reason != "" {
		to.Reason = &from.Reason
	}
	for key, value := range from.Metadata {
		to.Metadata[key] = value
	}
	for _, each := range from.Violations {
		to.Violations = append(to.Violations, violation(each))
	}
	if from.RetryAfter > 0 {
		seconds := from.RetryAfter.Seconds()
		to.RetryAfterS = &seconds
	}
	return to
}

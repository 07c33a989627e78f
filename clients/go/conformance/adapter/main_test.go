package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"reflect"
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/lda-service/lda/clients/go/gen/ldav1"
)

// service draws one sequence of one token, refuses the prompt "full", and is silent after the token for "hold".
type service struct {
	ldav1.UnimplementedLdaServiceServer
}

func (service) GenerateLDA(request *ldav1.GenerateLDARequest, stream ldav1.LdaService_GenerateLDAServer) error {
	if request.GetPrompt().GetText() == "full" {
		full, err := status.New(codes.ResourceExhausted, "The queue is full.").WithDetails(
			&errdetails.ErrorInfo{Domain: "lda.v1", Reason: "QUEUE_FULL", Metadata: map[string]string{"depth": "4"}})
		if err != nil {
			return err
		}
		return full.Err()
	}
	stream.Send(&ldav1.GenerateLDAResponse{Event: &ldav1.GenerateLDAResponse_Started{
		Started: &ldav1.Started{Seed: 7, SequenceCount: 1}}})
	stream.Send(&ldav1.GenerateLDAResponse{Event: &ldav1.GenerateLDAResponse_Delta{
		Delta: &ldav1.TokenDelta{Text: "a", Tokens: []*ldav1.Token{{Id: 97}}}}})
	if request.GetPrompt().GetText() == "hold" {
		<-stream.Context().Done()
		return status.FromContextError(stream.Context().Err()).Err()
	}
	return stream.Send(&ldav1.GenerateLDAResponse{Event: &ldav1.GenerateLDAResponse_Finished{
		Finished: &ldav1.Finished{Reason: ldav1.FinishReason_FINISH_REASON_EOS}}})
}

func (service) GetModelPair(context.Context, *ldav1.GetModelPairRequest) (*ldav1.GetModelPairResponse, error) {
	return &ldav1.GetModelPairResponse{Device: "cpu"}, nil
}

func listen(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	ldav1.RegisterLdaServiceServer(server, service{})
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	return listener.Addr().String()
}

// The adapter answers every call with one line, in order, as the conformance README says.
func TestAnswers(t *testing.T) {
	target := listen(t)
	cases := []struct{ name, call, want string }{
		{"generate", `"verb":"generate","request":{"prompt":{"text":"hi"}}`,
			`"ended":"ok","events":[{"started":{"seed":"7","sequenceCount":1}},{"delta":{"text":"a","tokens":[{"id":97}]}},` +
				`{"finished":{"reason":"FINISH_REASON_EOS"}}],"result":null,"error":null`},
		{"complete", `"verb":"complete","request":{"prompt":{"text":"hi"}}`,
			`"ended":"ok","events":[],"result":[{"sequenceIndex":0,"role":"MODEL_ROLE_UNSPECIFIED","text":"a","tokenIds":[97],` +
				`"reason":"FINISH_REASON_EOS","stopString":"","seed":"7"}],"error":null`},
		{"modelPair", `"verb":"modelPair"`, `"ended":"ok","events":[],"result":{"device":"cpu"},"error":null`},
		{"cancelled", `"verb":"generate","request":{"prompt":{"text":"hold"}},"cancelAfter":1`,
			`"ended":"cancelled","events":[{"started":{"seed":"7","sequenceCount":1}}],"result":null,"error":null`},
		{"refused", `"verb":"generate","request":{"prompt":{"text":"full"}}`,
			`"ended":"error","events":[],"result":null,"error":{"class":"QueueFull","code":"RESOURCE_EXHAUSTED",` +
				`"reason":"QUEUE_FULL","message":"The queue is full.","metadata":{"depth":"4"},"violations":[],"retryAfterS":null}`},
		{"deadline", `"verb":"complete","request":{"prompt":{"text":"hold"}},"timeoutMs":50`,
			`"ended":"error","events":[],"result":null,"error":{"class":"DeadlineExceeded","code":"DEADLINE_EXCEEDED",` +
				`"reason":null,"message":"context deadline exceeded","metadata":{},"violations":[],"retryAfterS":null}`},
		{"unknown verb", `"verb":"dance"`, `"unsupported":"no verb \"dance\""`},
		{"bad token", `"verb":"modelPair","token":"a b"`,
			`"unsupported":"lda: WithToken: the token is empty or has white space in it; give the token alone"`},
	}
	var input, output strings.Builder
	for _, each := range cases {
		fmt.Fprintf(&input, `{"id":%q,"target":%q,%s}`+"\n", each.name, target, each.call)
	}
	if err := serve(strings.NewReader(input.String()), &output); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(output.String()), "\n")
	if len(lines) != len(cases) {
		t.Fatalf("%d lines for %d calls", len(lines), len(cases))
	}
	for i, each := range cases {
		if want := fmt.Sprintf(`{"id":%q,%s}`, each.name, each.want); !equalJSON(t, lines[i], want) {
			t.Errorf("got  %s\nwant %s", lines[i], want)
		}
	}
}

func equalJSON(t *testing.T, left, right string) bool {
	t.Helper()
	return reflect.DeepEqual(parsed(t, left), parsed(t, right))
}

func parsed(t *testing.T, text string) (value interface{}) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &value); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return value
}

// Calls to one target share a client, and so its connection; another token makes another client.
func TestClientsAreKept(t *testing.T) {
	target, clients := listen(t), clients{}
	defer clients.close()
	for _, token := range []string{"", "", "secret", "secret"} {
		clients.reply(call{Target: target, Verb: "modelPair", Token: token})
	}
	if len(clients) != 2 {
		t.Errorf("%d clients", len(clients))
	}
}

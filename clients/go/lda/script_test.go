package lda

import (
	"context"
	"net"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/lda-service/lda/clients/go/gen/ldav1"
)

// play is how the scripted server answers one call: what it sends and how it ends.
type play func(stream grpc.ServerStream) error

// scripted is a real server that plays one script for each call; the last one goes on for ever.
type scripted struct {
	ldav1.UnimplementedLdaServiceServer
	plays chan play
	// calls has the context of every call as it came in.
	calls chan context.Context
	// requests has every request of GenerateLDA.
	requests chan *ldav1.GenerateLDARequest
}

func (s *scripted) next(ctx context.Context) play {
	s.calls <- ctx
	play := <-s.plays
	if len(s.plays) == 0 {
		s.plays <- play
	}
	return play
}

func (s *scripted) GenerateLDA(request *ldav1.GenerateLDARequest, stream ldav1.LdaService_GenerateLDAServer) error {
	s.requests <- request
	return s.next(stream.Context())(stream)
}

func (s *scripted) GenerateBoth(_ *ldav1.GenerateBothRequest, stream ldav1.LdaService_GenerateBothServer) error {
	return s.next(stream.Context())(stream)
}

func (s *scripted) Score(_ *ldav1.ScoreRequest, stream ldav1.LdaService_ScoreServer) error {
	return s.next(stream.Context())(stream)
}

// unary is a short call to a script; its answer is fixed.
type unary struct {
	grpc.ServerStream
	ctx context.Context
}

func (u unary) Context() context.Context { return u.ctx }

func (u unary) SendHeader(header metadata.MD) error { return grpc.SendHeader(u.ctx, header) }

func (s *scripted) GetModelPair(ctx context.Context, _ *ldav1.GetModelPairRequest) (*ldav1.GetModelPairResponse, error) {
	return &ldav1.GetModelPairResponse{Device: "cpu"}, s.next(ctx)(unary{ctx: ctx})
}

// serve plays the scripts until the test ends, and returns the server, its address and a way to kill it.
func serve(t *testing.T, plays []play, options ...grpc.ServerOption) (*scripted, string, func()) {
	t.Helper()
	service := &scripted{
		plays:    make(chan play, len(plays)),
		calls:    make(chan context.Context, 100),
		requests: make(chan *ldav1.GenerateLDARequest, 100),
	}
	for _, each := range plays {
		service.plays <- each
	}
	server := grpc.NewServer(options...)
	ldav1.RegisterLdaServiceServer(server, service)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	return service, listener.Addr().String(), server.Stop
}

// dial makes a client that is closed when the test ends.
func dial(t *testing.T, target string, options ...Option) *Client {
	t.Helper()
	client, err := Dial(target, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// against makes a client of a server that plays these scripts.
func against(t *testing.T, plays ...play) (*Client, *scripted) {
	t.Helper()
	service, target, _ := serve(t, plays)
	return dial(t, target), service
}

// soon bounds how long a test waits for what must happen.
func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// sends plays these messages, then OK.
func sends[E proto.Message](messages ...E) play {
	return func(stream grpc.ServerStream) error {
		for _, message := range messages {
			if err := stream.SendMsg(message); err != nil {
				return err
			}
		}
		return nil
	}
}

// fails plays an error.
func fails(err error) play {
	return func(grpc.ServerStream) error { return err }
}

// holds sends these messages and stays silent until the call is cancelled.
func holds[E proto.Message](messages ...E) play {
	return func(stream grpc.ServerStream) error {
		if err := sends(messages...)(stream); err != nil {
			return err
		}
		<-stream.Context().Done()
		return status.FromContextError(stream.Context().Err()).Err()
	}
}

// refusal is an error as the service makes them.
func refusal(t *testing.T, code codes.Code, domain, reason string) error {
	t.Helper()
	info := &errdetails.ErrorInfo{Domain: domain, Reason: reason, Metadata: map[string]string{"limit": "9"}}
	detailed, err := status.New(code, "said the server").WithDetails(info)
	if err != nil {
		t.Fatal(err)
	}
	return detailed.Err()
}

func started(count uint32) *ldav1.GenerateLDAResponse {
	return &ldav1.GenerateLDAResponse{Event: &ldav1.GenerateLDAResponse_Started{
		Started: &ldav1.Started{Seed: 7, SequenceCount: count}}}
}

func delta(index uint32, text string) *ldav1.GenerateLDAResponse {
	return &ldav1.GenerateLDAResponse{Event: &ldav1.GenerateLDAResponse_Delta{Delta: &ldav1.TokenDelta{
		SequenceIndex: index,
		Role:          ldav1.ModelRole_MODEL_ROLE_AMPLIFIED,
		Text:          text,
		Tokens:        []*ldav1.Token{{Id: uint32(len(text))}},
	}}}
}

func finished(index uint32) *ldav1.GenerateLDAResponse {
	return &ldav1.GenerateLDAResponse{Event: &ldav1.GenerateLDAResponse_Finished{Finished: &ldav1.Finished{
		SequenceIndex: index,
		Role:          ldav1.ModelRole_MODEL_ROLE_AMPLIFIED,
		Reason:        ldav1.FinishReason_FINISH_REASON_EOS,
	}}}
}

// unknown is an event of a kind that only a newer contract has: field 99, a varint.
func unknown[E proto.Message](message E) E {
	message.ProtoReflect().SetUnknown([]byte{0x98, 0x06, 0x01})
	return message
}

func whole() play { return sends(started(1), delta(0, "a"), finished(0)) }

func request() *ldav1.GenerateLDARequest { return &ldav1.GenerateLDARequest{Prompt: Text("hi")} }

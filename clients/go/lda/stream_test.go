package lda

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/lda-service/lda/clients/go/gen/ldav1"
)

// read returns the events of a stream and how it ended.
func read[E proto.Message](t *testing.T, stream *Stream[E], err error) ([]E, error) {
	t.Helper()
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	var events []E
	for {
		event, err := stream.Recv()
		if err != nil {
			return events, err
		}
		events = append(events, event)
	}
}

// first opens a stream and reads its first event.
func first(t *testing.T, ctx context.Context, client *Client) *GenerateStream {
	t.Helper()
	stream, err := client.Generate(ctx, request())
	if err != nil {
		t.Fatal(err)
	}
	if event, err := stream.Recv(); err != nil || event.GetStarted() == nil {
		t.Fatalf("got %v, %v instead of started", event, err)
	}
	return stream
}

// A stream that follows the grammar ends with io.EOF, any other with ErrStreamBroken.
func TestGenerateGrammar(t *testing.T) {
	type script = []*ldav1.GenerateLDAResponse
	cases := map[string]struct {
		script script
		want   error
	}{
		"one sequence":                  {script{started(1), delta(0, "a"), finished(0)}, io.EOF},
		"interleaved":                   {script{started(2), delta(0, "a"), delta(1, "b"), finished(1), delta(0, "c"), finished(0)}, io.EOF},
		"a sequence without tokens":     {script{started(1), finished(0)}, io.EOF},
		"a sequence out of range":       {script{started(1), finished(5)}, ErrStreamBroken},
		"count not announced":           {script{started(0), finished(0)}, io.EOF},
		"nothing":                       {script{}, ErrStreamBroken},
		"started alone":                 {script{started(1)}, ErrStreamBroken},
		"no started":                    {script{delta(0, "a"), finished(0)}, ErrStreamBroken},
		"started twice":                 {script{started(1), started(1), finished(0)}, ErrStreamBroken},
		"one of two finished":           {script{started(2), delta(0, "a"), delta(1, "b"), finished(0)}, ErrStreamBroken},
		"an unannounced one unfinished": {script{started(1), finished(0), delta(1, "b")}, ErrStreamBroken},
		"more finished than announced":  {script{started(1), finished(0), finished(1)}, ErrStreamBroken},
		"finished twice":                {script{started(2), finished(0), finished(0)}, ErrStreamBroken},
		"delta after finished":          {script{started(1), finished(0), delta(0, "a")}, ErrStreamBroken},
	}
	for name, each := range cases {
		t.Run(name, func(t *testing.T) {
			client, _ := against(t, sends(each.script...))
			stream, err := client.Generate(soon(t), request())
			_, err = read(t, stream, err)
			if !errors.Is(err, each.want) {
				t.Errorf("ended with %v, want %v", err, each.want)
			}
		})
	}
}

// The two models of GenerateBoth count their sequences apart, and both must finish.
func TestGenerateBothGrammar(t *testing.T) {
	event := func(role ldav1.ModelRole) *ldav1.GenerateBothResponse {
		return &ldav1.GenerateBothResponse{Event: &ldav1.GenerateBothResponse_Finished{
			Finished: &ldav1.Finished{Role: role}}}
	}
	start := &ldav1.GenerateBothResponse{Event: &ldav1.GenerateBothResponse_Started{Started: &ldav1.Started{}}}
	after, before := event(ldav1.ModelRole_MODEL_ROLE_AFTER), event(ldav1.ModelRole_MODEL_ROLE_BEFORE)
	for want, script := range map[error]play{
		io.EOF:          sends(start, after, before),
		ErrStreamBroken: sends(start, after),
	} {
		client, _ := against(t, script)
		stream, err := client.GenerateBoth(soon(t), &ldav1.GenerateBothRequest{Prompt: Text("hi")})
		if _, err = read(t, stream, err); !errors.Is(err, want) {
			t.Errorf("ended with %v, want %v", err, want)
		}
	}
}

// The blocks of Score follow on one another up to the announced total.
func TestScoreGrammar(t *testing.T) {
	block := func(offset uint32, tokens int, total uint32) *ldav1.ScoreResponse {
		block := &ldav1.ScoreResponse{Offset: offset, TotalTokenCount: total}
		for range make([]int, tokens) {
			block.Tokens = append(block.Tokens, &ldav1.Token{Id: 1})
		}
		return block
	}
	cases := map[string]struct {
		script play
		want   error
	}{
		"whole":      {sends(block(0, 2, 3), block(2, 1, 3)), io.EOF},
		"unknown":    {sends(block(0, 2, 3), unknown(&ldav1.ScoreResponse{}), block(2, 1, 3)), io.EOF},
		"nothing":    {sends[*ldav1.ScoreResponse](), ErrStreamBroken},
		"a gap":      {sends(block(0, 1, 3), block(2, 1, 3)), ErrStreamBroken},
		"cut short":  {sends(block(0, 2, 3)), ErrStreamBroken},
		"overlapped": {sends(block(0, 2, 3), block(1, 2, 3)), ErrStreamBroken},
	}
	for name, each := range cases {
		t.Run(name, func(t *testing.T) {
			client, _ := against(t, each.script)
			stream, err := client.Score(soon(t), &ldav1.ScoreRequest{Prompt: Text("hi"), Continuation: Text("abc")})
			if _, err = read(t, stream, err); !errors.Is(err, each.want) {
				t.Errorf("ended with %v, want %v", err, each.want)
			}
		})
	}
}

// What a newer server adds is no error: events of an unknown kind are passed over, unknown fields and enum values kept.
func TestNewerServer(t *testing.T) {
	end := finished(0)
	end.GetFinished().Reason = 99
	client, _ := against(t, sends(
		unknown(&ldav1.GenerateLDAResponse{}), started(1), unknown(&ldav1.GenerateLDAResponse{}), unknown(delta(0, "a")), end))
	stream, err := client.Generate(soon(t), request())
	events, err := read(t, stream, err)
	if err != io.EOF || len(events) != 3 {
		t.Fatalf("%d events, then %v; want 3, then EOF", len(events), err)
	}
	if reason := events[2].GetFinished().GetReason(); reason != 99 {
		t.Errorf("the finish reason is %v", reason)
	}
}

// However a stream is left, its call is cancelled on the server, and reading on says so.
func TestLeavingCancels(t *testing.T) {
	leave := map[string]func(stream *GenerateStream, cancel context.CancelFunc){
		"close":          func(stream *GenerateStream, _ context.CancelFunc) { stream.Close() },
		"cancel context": func(_ *GenerateStream, cancel context.CancelFunc) { cancel() },
	}
	for name, leave := range leave {
		t.Run(name, func(t *testing.T) {
			client, service := against(t, holds(started(1), delta(0, "never read")))
			ctx, cancel := context.WithCancel(soon(t))
			defer cancel()
			stream := first(t, ctx, client)
			leave(stream, cancel)
			if _, err := stream.Recv(); !errors.Is(err, ErrAborted) || !errors.Is(err, context.Canceled) {
				t.Errorf("reading on gives %v", err)
			}
			waitUntilCancelled(t, service)
		})
	}
}

func waitUntilCancelled(t *testing.T, service *scripted) {
	t.Helper()
	select {
	case <-(<-service.calls).Done():
	// Well before the deadline of the call, which would end it as well.
	case <-time.After(5 * time.Second):
		t.Error("the server was not told")
	}
}

// Close from another goroutine ends a Recv that waits.
func TestCloseWhileReceiving(t *testing.T) {
	client, _ := against(t, holds(started(1)))
	stream := first(t, soon(t), client)
	received := make(chan error)
	go func() {
		_, err := stream.Recv()
		received <- err
	}()
	stream.Close()
	if err := <-received; !errors.Is(err, ErrAborted) {
		t.Errorf("Recv gave %v", err)
	}
}

// A stream that breaks the grammar is cancelled on the server, and stays broken.
func TestBrokenStreamIsCancelled(t *testing.T) {
	client, service := against(t, holds(started(1), started(1)))
	stream := first(t, soon(t), client)
	for range [2]int{} {
		if _, err := stream.Recv(); !errors.Is(err, ErrStreamBroken) {
			t.Errorf("Recv gave %v", err)
		}
	}
	waitUntilCancelled(t, service)
}

// A whole stream stays whole: io.EOF again and again, after Close too.
func TestEndIsKept(t *testing.T) {
	client, _ := against(t, whole())
	stream, err := client.Generate(soon(t), request())
	if _, err := read(t, stream, err); err != io.EOF {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != io.EOF {
		t.Errorf("Recv after the end gave %v", err)
	}
}

// The deadline of the context, or of the client, ends a stream and a short call as ErrDeadlineExceeded.
func TestDeadline(t *testing.T) {
	_, target, _ := serve(t, []play{holds(started(1))})
	brief := 50 * time.Millisecond
	short, cancel := context.WithTimeout(context.Background(), brief)
	defer cancel()
	_, silentTarget, _ := serve(t, []play{holds[*ldav1.GenerateLDAResponse]()})
	for name, call := range map[string]func() error{
		"context": func() error {
			_, err := dial(t, target).Complete(short, request())
			return err
		},
		"stream timeout": func() error {
			_, err := dial(t, target, WithStreamTimeout(brief)).Complete(soon(t), request())
			return err
		},
		"lookup timeout": func() error {
			_, err := dial(t, silentTarget, WithLookupTimeout(brief)).ModelPair(soon(t))
			return err
		},
	} {
		err := call()
		if !errors.Is(err, ErrDeadlineExceeded) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: ended with %v", name, err)
		}
	}
}

// Complete returns every sequence whole, in the order in which they finished.
func TestComplete(t *testing.T) {
	client, _ := against(t, sends(
		started(2), delta(0, "a"), delta(1, "b"), delta(1, "cc"), finished(1), delta(0, "d"), finished(0)))
	completions, err := client.Complete(soon(t), request())
	if err != nil || len(completions) != 2 {
		t.Fatalf("%d completions, %v", len(completions), err)
	}
	for i, want := range []struct {
		index  uint32
		text   string
		tokens int
	}{{1, "bcc", 2}, {0, "ad", 2}} {
		got := completions[i]
		if got.Finished.GetSequenceIndex() != want.index || got.Text != want.text || len(got.Tokens) != want.tokens {
			t.Errorf("completion %d is %+v", i, got)
		}
		if got.Started.GetSeed() != 7 {
			t.Errorf("completion %d has seed %d", i, got.Started.GetSeed())
		}
	}
}

// Complete never returns half an answer.
func TestCompleteOfBrokenStream(t *testing.T) {
	client, _ := against(t, sends(started(1), delta(0, "half")))
	if completions, err := client.Complete(soon(t), request()); !errors.Is(err, ErrStreamBroken) || completions != nil {
		t.Errorf("got %v, %v", completions, err)
	}
}

// Gather refuses a stream of which something was read: the answer would lack it.
func TestGatherOfPartlyReadStream(t *testing.T) {
	client, _ := against(t, holds(started(1)))
	if _, err := Gather(first(t, soon(t), client)); err != errPartlyRead {
		t.Errorf("Gather gave %v", err)
	}
}

// Messages of up to 20 MiB pass in both directions; grpc's own limit is 4 MiB.
func TestMessageSize(t *testing.T) {
	text := strings.Repeat("w", 19<<20)
	_, target, _ := serve(t, []play{sends(started(1), delta(0, text), finished(0))}, grpc.MaxRecvMsgSize(messageBytesMax))
	client := dial(t, target)
	completions, err := client.Complete(soon(t), &ldav1.GenerateLDARequest{Prompt: Text(text)})
	if err != nil || len(completions[0].Text) != len(text) {
		t.Error(err)
	}
}

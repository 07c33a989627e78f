package lda

import (
	"context"
	"io"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/lda-service/lda/clients/go/gen/ldav1"
)

// Stream is the events of one call, which is under way. One goroutine at a time may call Recv; any may call Close.
//
//	stream, err := client.Generate(ctx, request)
//	...
//	defer stream.Close()
//	for {
//		event, err := stream.Recv()
//		if err == io.EOF {
//			break
//		}
//		...
//	}
type Stream[E proto.Message] struct {
	ctx      context.Context
	cancel   context.CancelFunc
	call     receiver[E]
	grammar  grammar[E]
	target   string
	answered bool
	end      error
}

// GenerateStream is what Generate returns.
type GenerateStream = Stream[*ldav1.GenerateLDAResponse]

// GenerateBothStream is what GenerateBoth returns.
type GenerateBothStream = Stream[*ldav1.GenerateBothResponse]

// ScoreStream is what Score returns.
type ScoreStream = Stream[*ldav1.ScoreResponse]

type receiver[E any] interface {
	Recv() (E, error)
}

// open begins a call whose answer must follow the grammar.
func open[E proto.Message](ctx context.Context, client *Client, grammar grammar[E],
	begin func(context.Context) (receiver[E], error)) (*Stream[E], error) {
	ctx, cancel := withTimeout(ctx, client.options.streamTimeout)
	if err := client.connect(ctx); err != nil {
		cancel()
		return nil, err
	}
	call, err := begin(ctx)
	if err != nil {
		cancel()
		return nil, errorFromRPC(err, client.target, false)
	}
	return &Stream[E]{ctx: ctx, cancel: cancel, call: call, grammar: grammar, target: client.target}, nil
}

// Recv waits for the next event. It returns io.EOF when the stream is whole, and an *Error when the call has failed:
// ErrStreamBroken if the server ended it too early, ErrAborted after Close. Events of a kind that only a newer
// contract knows are passed over.
func (s *Stream[E]) Recv() (E, error) {
	var none E
	if s.end != nil {
		return none, s.end
	}
	event, err := s.next()
	if err != nil {
		s.end = err
		s.cancel()
		return none, err
	}
	return event, nil
}

func (s *Stream[E]) next() (E, error) {
	for {
		event, err := s.receive()
		if err != nil {
			return event, err
		}
		if isKnown(event) {
			return event, s.grammar.observe(event)
		}
	}
}

func (s *Stream[E]) receive() (E, error) {
	var none E
	// Events that had arrived before Close are not given out after it.
	if err := s.ctx.Err(); err != nil {
		return none, errorFromRPC(err, s.target, s.answered)
	}
	event, err := s.call.Recv()
	switch {
	case err == io.EOF:
		return none, s.grammar.end()
	case err != nil:
		return none, errorFromRPC(err, s.target, s.answered)
	}
	s.answered = true
	return event, nil
}

// Close leaves the stream: the call is cancelled on the server if it is still under way. It may be called twice, and
// from another goroutine than Recv, whose call then returns ErrAborted.
func (s *Stream[E]) Close() { s.cancel() }

// isKnown tells whether any field of the message is known here.
func isKnown(message proto.Message) bool {
	known := false
	message.ProtoReflect().Range(func(protoreflect.FieldDescriptor, protoreflect.Value) bool {
		known = true
		return false
	})
	return known
}

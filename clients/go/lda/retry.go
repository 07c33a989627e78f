package lda

import (
	"context"
	"fmt"
	"math/rand"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const (
	attemptsMax  = 4
	backoffFirst = 100 * time.Millisecond
	backoffMax   = time.Second
)

// retryOptions makes sure that UNAVAILABLE is retried by the service config, where grpc follows its retryPolicy, and
// by the interceptors below, where it does not.
func retryOptions(version string) []grpc.DialOption {
	if followsRetryPolicy(version) {
		return nil
	}
	return []grpc.DialOption{
		// GRPC_GO_RETRY=on would turn on the library's own retries below ours, and the attempts would multiply.
		grpc.WithDisableRetry(),
		grpc.WithChainUnaryInterceptor(retryUnary),
		grpc.WithChainStreamInterceptor(retryStream),
	}
}

// followsRetryPolicy tells whether this version of grpc retries by the service config whatever the environment says.
// Up to 1.41 it did so with GRPC_GO_RETRY=on alone, and 1.42 could be told not to.
func followsRetryPolicy(version string) bool {
	var major, minor int
	if _, err := fmt.Sscanf(version, "%d.%d", &major, &minor); err != nil {
		return false
	}
	return major > 1 || minor >= 43
}

// attempts counts the failed attempts of one call.
type attempts int

// next waits for the next attempt; the error it returns, if any, is how the call ends.
func (a *attempts) next(ctx context.Context, failure error) error {
	*a++
	if status.Code(failure) != codes.Unavailable || *a >= attemptsMax {
		return failure
	}
	timer := time.NewTimer(a.backoff())
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

// backoff doubles with every attempt; a fifth of it either way is left to chance, so that callers do not come in step.
func (a attempts) backoff() time.Duration {
	wait := backoffFirst << (a - 1)
	if wait > backoffMax {
		wait = backoffMax
	}
	return time.Duration(float64(wait) * (0.8 + 0.4*rand.Float64()))
}

func retryUnary(ctx context.Context, method string, request, reply interface{}, conn *grpc.ClientConn,
	invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
	var failed attempts
	for {
		var header metadata.MD
		err := invoke(ctx, method, request, reply, conn, append(options[:len(options):len(options)], grpc.Header(&header))...)
		if err == nil || len(header) > 0 {
			return err
		}
		if err := failed.next(ctx, err); err != nil {
			return err
		}
	}
}

func retryStream(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string,
	streamer grpc.Streamer, options ...grpc.CallOption) (grpc.ClientStream, error) {
	stream := &retryingStream{ctx: ctx, open: func() (grpc.ClientStream, error) {
		return streamer(ctx, desc, conn, method, options...)
	}}
	if err := stream.begin(); err != nil {
		return nil, err
	}
	return stream, nil
}

// retryingStream is a call with one request. It begins again until the server answers with anything but UNAVAILABLE.
type retryingStream struct {
	grpc.ClientStream
	ctx     context.Context
	open    func() (grpc.ClientStream, error)
	request interface{}
	failed  attempts
}

func (s *retryingStream) begin() error {
	for {
		stream, err := s.open()
		if err == nil {
			s.ClientStream = stream
			return nil
		}
		if err := s.failed.next(s.ctx, err); err != nil {
			return err
		}
	}
}

func (s *retryingStream) SendMsg(message interface{}) error {
	s.request = message
	return s.ClientStream.SendMsg(message)
}

func (s *retryingStream) RecvMsg(message interface{}) error {
	for {
		err := s.ClientStream.RecvMsg(message)
		if err == nil || s.hasHeader() {
			return err
		}
		if err := s.failed.next(s.ctx, err); err != nil {
			return err
		}
		if err := s.beginAgain(); err != nil {
			return err
		}
	}
}

// hasHeader tells whether the server began to answer, after which gRPC retries nothing. Events follow the header.
func (s *retryingStream) hasHeader() bool {
	header, err := s.ClientStream.Header()
	return err == nil && len(header) > 0
}

func (s *retryingStream) beginAgain() error {
	if err := s.begin(); err != nil {
		return err
	}
	if err := s.ClientStream.SendMsg(s.request); err != nil {
		return err
	}
	return s.ClientStream.CloseSend()
}

// Package lda is a client of the LDA service: logit diff amplification over gRPC.
//
//	client, err := lda.Dial(lda.DefaultTarget)
//	...
//	defer client.Close()
//	completions, err := client.Complete(ctx, &ldav1.GenerateLDARequest{Prompt: lda.Text("Who are you?")})
//
// Requests and events are the messages of the contract, in package ldav1. Deadlines and cancellation are those of the
// context. Every failed call returns an *Error, which errors.Is compares with the sentinels of this package.
package lda

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"

	"github.com/lda-service/lda/clients/go/gen/ldav1"
)

// DefaultTarget is the address at which a server listens unless it is told otherwise.
const DefaultTarget = "127.0.0.1:50051"

// Client has the verbs of the service. Goroutines may share it.
type Client struct {
	target  string
	options options
	conn    *grpc.ClientConn
	stub    ldav1.LdaServiceClient
}

// Dial makes a client of the server at target, "host:port" or any target of gRPC. It does not wait for the
// connection: a server that is away is reported by the first call. The error is about the options.
func Dial(target string, opts ...Option) (*Client, error) {
	options := options{lookupTimeout: 30 * time.Second}
	for _, option := range opts {
		if err := option(&options); err != nil {
			return nil, fmt.Errorf("lda: %w", err)
		}
	}
	conn, err := grpc.Dial(withScheme(target), options.dialOptions()...)
	if err != nil {
		return nil, fmt.Errorf("lda: cannot dial %q: %w", target, err)
	}
	return &Client{target: target, options: options, conn: conn, stub: ldav1.NewLdaServiceClient(conn)}, nil
}

// Close closes the connection; calls under way are cancelled.
func (c *Client) Close() error { return c.conn.Close() }

// Generate streams text sampled from after + alpha * (after - before).
func (c *Client) Generate(ctx context.Context, request *ldav1.GenerateLDARequest) (*GenerateStream, error) {
	grammar := newGeneration[*ldav1.GenerateLDAResponse](sequencesOf(request))
	return open[*ldav1.GenerateLDAResponse](ctx, c, grammar,
		func(ctx context.Context) (receiver[*ldav1.GenerateLDAResponse], error) {
			return c.stub.GenerateLDA(ctx, request)
		})
}

// GenerateBoth streams text sampled from each model on its own; the role of an event tells them apart.
func (c *Client) GenerateBoth(ctx context.Context, request *ldav1.GenerateBothRequest) (*GenerateBothStream, error) {
	grammar := newGeneration[*ldav1.GenerateBothResponse](2 * sequencesOf(request))
	return open[*ldav1.GenerateBothResponse](ctx, c, grammar,
		func(ctx context.Context) (receiver[*ldav1.GenerateBothResponse], error) {
			return c.stub.GenerateBoth(ctx, request)
		})
}

// Score runs a given text through both models and streams blocks of tokens, each with diagnostics.
func (c *Client) Score(ctx context.Context, request *ldav1.ScoreRequest) (*ScoreStream, error) {
	return open[*ldav1.ScoreResponse](ctx, c, &scoring{},
		func(ctx context.Context) (receiver[*ldav1.ScoreResponse], error) {
			return c.stub.Score(ctx, request)
		})
}

// Complete generates and returns the sequences, in the order in which they finished.
func (c *Client) Complete(ctx context.Context, request *ldav1.GenerateLDARequest) ([]*Completion, error) {
	stream, err := c.Generate(ctx, request)
	if err != nil {
		return nil, err
	}
	return Gather(stream)
}

// TokenizerCompat tells whether the two tokenizers can be used as one pair, with the evidence.
func (c *Client) TokenizerCompat(ctx context.Context) (*ldav1.TokenizerCompatResponse, error) {
	return lookup(ctx, c, c.stub.TokenizerCompat, &ldav1.TokenizerCompatRequest{})
}

// ModelPair describes the loaded models, the limits in force and the defaults of the server.
func (c *Client) ModelPair(ctx context.Context) (*ldav1.GetModelPairResponse, error) {
	return lookup(ctx, c, c.stub.GetModelPair, &ldav1.GetModelPairRequest{})
}

// Load tells how busy the server is.
func (c *Client) Load(ctx context.Context) (*ldav1.GetLoadResponse, error) {
	return lookup(ctx, c, c.stub.GetLoad, &ldav1.GetLoadRequest{})
}

// lookup makes a short call.
func lookup[Q, R any](ctx context.Context, client *Client,
	call func(context.Context, Q, ...grpc.CallOption) (R, error), request Q) (R, error) {
	var none R
	ctx, cancel := withTimeout(ctx, client.options.lookupTimeout)
	defer cancel()
	if err := client.connect(ctx); err != nil {
		return none, err
	}
	response, err := call(ctx, request)
	if err != nil {
		return none, errorFromRPC(err, client.target, false)
	}
	return response, nil
}

// connect waits for the connection, if the client was told to.
func (c *Client) connect(ctx context.Context) error {
	limit := c.options.connectTimeout
	if limit == 0 {
		return nil
	}
	waiting, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for state := c.conn.GetState(); state != connectivity.Ready; state = c.conn.GetState() {
		c.wake()
		if c.conn.WaitForStateChange(waiting, state) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return errorFromRPC(err, c.target, false)
		}
		return serverAway(c.target, limit)
	}
	return nil
}

// wake makes an idle connection connect. Newer versions of grpc let connections fall idle, older ones have no Connect.
func (c *Client) wake() {
	if conn, ok := interface{}(c.conn).(interface{ Connect() }); ok {
		conn.Connect()
	}
}

func withTimeout(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	if timeout == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, timeout)
}

// sequencesOf returns how many sequences a request asks for; unset means one.
func sequencesOf(request interface{ GetNumSequences() uint32 }) uint32 {
	if asked := request.GetNumSequences(); asked > 0 {
		return asked
	}
	return 1
}

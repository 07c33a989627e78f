package lda

import (
	"errors"
	"io"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/lda-service/lda/clients/go/gen/ldav1"
)

// Completion is one finished sequence.
type Completion struct {
	// Text is all of its text, without the stop string.
	Text string
	// Tokens are all of its tokens, with log-probabilities and diagnostics as asked for.
	Tokens []*ldav1.Token
	// Finished is its last event: which sequence, which role, why it ended, what it cost.
	Finished *ldav1.Finished
	// Started is the first event of its stream: generation id, seed and alpha in force.
	Started *ldav1.Started
}

// GenerateEvent is an event of Generate or GenerateBoth.
type GenerateEvent interface {
	proto.Message
	GetStarted() *ldav1.Started
	GetDelta() *ldav1.TokenDelta
	GetFinished() *ldav1.Finished
}

var errPartlyRead = errors.New("lda: Gather needs a stream of which nothing was read; open another one")

// Gather reads a stream to its end and returns its sequences, in the order in which they finished. It closes the
// stream.
func Gather[E GenerateEvent](stream *Stream[E]) ([]*Completion, error) {
	defer stream.Close()
	if stream.answered {
		return nil, errPartlyRead
	}
	all := &gathering{growing: map[sequence]*growth{}}
	for {
		event, err := stream.Recv()
		if err == io.EOF {
			return all.finished, nil
		}
		if err != nil {
			return nil, err
		}
		all.add(event)
	}
}

// gathering is what the events of a generation add up to so far.
type gathering struct {
	started  *ldav1.Started
	growing  map[sequence]*growth
	finished []*Completion
}

// growth is one sequence while it grows.
type growth struct {
	text   strings.Builder
	tokens []*ldav1.Token
}

func (g *gathering) add(event GenerateEvent) {
	if started := event.GetStarted(); started != nil {
		g.started = started
	}
	if delta := event.GetDelta(); delta != nil {
		growing := g.of(delta)
		growing.text.WriteString(delta.GetText())
		growing.tokens = append(growing.tokens, delta.GetTokens()...)
	}
	if finished := event.GetFinished(); finished != nil {
		grown := g.of(finished)
		g.finished = append(g.finished, &Completion{grown.text.String(), grown.tokens, finished, g.started})
	}
}

func (g *gathering) of(event sequenceEvent) *growth {
	key := sequenceOf(event)
	if g.growing[key] == nil {
		g.growing[key] = &growth{}
	}
	return g.growing[key]
}

package lda

import (
	"io"

	"github.com/lda-service/lda/clients/go/gen/ldav1"
)

// grammar follows a stream event by event.
type grammar[E any] interface {
	// observe checks one event; it returns nil or ErrStreamBroken.
	observe(event E) error
	// end returns io.EOF if the stream may end here with OK, else ErrStreamBroken.
	end() error
}

// sequence names one sequence of a generation.
type sequence struct {
	role  ldav1.ModelRole
	index uint32
}

type sequenceEvent interface {
	GetRole() ldav1.ModelRole
	GetSequenceIndex() uint32
}

func sequenceOf(event sequenceEvent) sequence {
	return sequence{event.GetRole(), event.GetSequenceIndex()}
}

// generation is the grammar of Generate and GenerateBoth: started (delta)* finished{count}.
type generation[E GenerateEvent] struct {
	// requested is how many sequences were asked for, for a server that does not announce their number.
	requested uint32
	started   *ldav1.Started
	running   map[sequence]bool
	finished  map[sequence]bool
}

func newGeneration[E GenerateEvent](requested uint32) *generation[E] {
	return &generation[E]{requested: requested, running: map[sequence]bool{}, finished: map[sequence]bool{}}
}

func (g *generation[E]) observe(event E) error {
	if started := event.GetStarted(); started != nil {
		if g.started != nil {
			return streamBroken("it sent `started` twice")
		}
		g.started = started
	}
	if delta := event.GetDelta(); delta != nil {
		return g.grow(sequenceOf(delta))
	}
	if finished := event.GetFinished(); finished != nil {
		return g.finish(sequenceOf(finished))
	}
	return nil
}

func (g *generation[E]) grow(key sequence) error {
	if g.started == nil {
		return streamBroken("it did not begin with `started`")
	}
	if int(key.index) >= g.expected() {
		return streamBroken("sequence %d is none of the %d that were announced", key.index, g.expected())
	}
	if g.finished[key] {
		return streamBroken("sequence %d went on after it had finished", key.index)
	}
	g.running[key] = true
	return nil
}

func (g *generation[E]) finish(key sequence) error {
	if err := g.grow(key); err != nil {
		return err
	}
	delete(g.running, key)
	g.finished[key] = true
	if len(g.finished) > g.expected() {
		return streamBroken("more than %d sequences finished", g.expected())
	}
	return nil
}

func (g *generation[E]) expected() int {
	if announced := g.started.GetSequenceCount(); announced > 0 {
		return int(announced)
	}
	return int(g.requested)
}

func (g *generation[E]) end() error {
	if g.started == nil {
		return streamBroken("it ended before `started`")
	}
	if len(g.finished) < g.expected() || len(g.running) > 0 {
		return streamBroken("it ended when %d of %d sequences had finished", len(g.finished), g.expected())
	}
	return io.EOF
}

// scoring is the grammar of Score: blocks without gaps, up to the total that each of them announces.
type scoring struct {
	begun  bool
	scored int
	total  int
}

func (s *scoring) observe(block *ldav1.ScoreResponse) error {
	if int(block.GetOffset()) != s.scored {
		return streamBroken("a block begins at token %d, not at %d", block.GetOffset(), s.scored)
	}
	s.begun = true
	s.scored += len(block.GetTokens())
	s.total = int(block.GetTotalTokenCount())
	return nil
}

func (s *scoring) end() error {
	if !s.begun {
		return streamBroken("it ended before its first block")
	}
	if s.scored != s.total {
		return streamBroken("it ended when %d of %d tokens were scored", s.scored, s.total)
	}
	return io.EOF
}

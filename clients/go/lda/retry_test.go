package lda

import (
	"context"
	"errors"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// These tests hold for both ways of retrying: by the interceptors, and by a version of grpc that follows retryPolicy.

var unavailable = status.Error(codes.Unavailable, "not now")

// UNAVAILABLE before the first event is tried again, with the same request, up to four times in all.
func TestRetriesUntilAnswered(t *testing.T) {
	client, service := against(t, fails(unavailable), fails(unavailable), fails(unavailable), whole())
	sent := request()
	completions, err := client.Complete(soon(t), sent)
	if err != nil || completions[0].Text != "a" {
		t.Fatalf("got %v, %v", completions, err)
	}
	if len(service.requests) != 4 {
		t.Errorf("%d attempts", len(service.requests))
	}
	for len(service.requests) > 0 {
		if got := <-service.requests; !proto.Equal(got, sent) {
			t.Errorf("an attempt sent %v", got)
		}
	}
}

// The fourth refusal is final, for streams and for short calls, and keeps its reason.
func TestGivesUpAfterFour(t *testing.T) {
	loading := refusal(t, codes.Unavailable, errorDomain, "LOADING")
	for name, call := range map[string]func(*Client) error{
		"stream": func(client *Client) error { _, err := client.Complete(soon(t), request()); return err },
		"short":  func(client *Client) error { _, err := client.ModelPair(soon(t)); return err },
	} {
		client, service := against(t, fails(loading))
		begun := time.Now()
		err := call(client)
		if failed := asError(t, err); !errors.Is(err, ErrLoading) || failed.Metadata["limit"] != "9" {
			t.Errorf("%s: got %v", name, err)
		}
		if attempts := len(service.calls); attempts != 4 {
			t.Errorf("%s: %d attempts", name, attempts)
		}
		if waited := time.Since(begun); waited > 10*time.Second {
			t.Errorf("%s: took %s", name, waited)
		}
	}
}

// A short call is tried again like a stream.
func TestShortCallIsRetried(t *testing.T) {
	client, service := against(t, fails(unavailable), fails(nil))
	pair, err := client.ModelPair(soon(t))
	if err != nil || pair.GetDevice() != "cpu" || len(service.calls) != 2 {
		t.Errorf("got %v, %v after %d attempts", pair, err, len(service.calls))
	}
}

// Nothing is tried again once the server has begun to answer, and nothing but UNAVAILABLE ever.
func TestNotRetried(t *testing.T) {
	afterHeader := func(stream grpc.ServerStream) error {
		stream.SendHeader(metadata.Pairs("x-generation-id", "g-1"))
		return unavailable
	}
	afterEvent := func(stream grpc.ServerStream) error {
		stream.SendMsg(started(1))
		return unavailable
	}
	for name, script := range map[string]play{
		"after the header":   afterHeader,
		"after an event":     afterEvent,
		"resource exhausted": fails(status.Error(codes.ResourceExhausted, "full")),
		"aborted":            fails(status.Error(codes.Aborted, "ended")),
		"internal":           fails(status.Error(codes.Internal, "fault")),
	} {
		client, service := against(t, script)
		if _, err := client.Complete(soon(t), request()); err == nil {
			t.Errorf("%s: no error", name)
		}
		if attempts := len(service.calls); attempts != 1 {
			t.Errorf("%s: %d attempts", name, attempts)
		}
	}
	client, service := against(t, afterHeader)
	if _, err := client.ModelPair(soon(t)); !errors.Is(err, ErrServerAway) || len(service.calls) != 1 {
		t.Errorf("short call: got %v after %d attempts", err, len(service.calls))
	}
}

// Leaving a call between two attempts ends it at once, as leaving does.
func TestCancelWhileWaiting(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	var failed attempts
	if err := failed.next(ctx, unavailable); status.Code(err) != codes.Canceled {
		t.Errorf("the wait ended with %v", err)
	}
	client, _ := against(t, fails(unavailable))
	if _, err := client.Complete(ctx, request()); !errors.Is(err, ErrAborted) || !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// The waits double from 0.1 s up to 1 s, give or take a fifth.
func TestBackoff(t *testing.T) {
	for failed, want := range map[attempts]time.Duration{
		1: 100 * time.Millisecond, 2: 200 * time.Millisecond, 3: 400 * time.Millisecond, 5: time.Second, 9: time.Second,
	} {
		if got := failed.backoff(); got < want*8/10 || got > want*12/10 {
			t.Errorf("after %d failures it waits %s, want about %s", failed, got, want)
		}
	}
}

// grpc follows the retryPolicy of a service config unconditionally from 1.43 on; before, we do.
func TestWhoRetries(t *testing.T) {
	for version, library := range map[string]bool{
		"1.33.3": false, "1.39.0": false, "1.42.0": false, "1.43.0": true, "1.56.3": true, "1.85.0-dev": true, "2.0.0": true,
		"unreadable": false,
	} {
		if got := len(retryOptions(version)) == 0; got != library {
			t.Errorf("grpc %s retries: %v", version, got)
		}
	}
}

// Command cancel leaves a long generation after three tokens and sees that the server frees it.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/lda-service/lda/clients/go/gen/ldav1"
	"github.com/lda-service/lda/clients/go/lda"
)

func main() {
	if err := run(); err != nil {
		log.Fatal(err)
	}
	fmt.Println("ok")
}

func run() error {
	client, err := lda.Dial(target())
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := leaveEarly(ctx, client); err != nil {
		return err
	}
	return waitUntilFree(ctx, client)
}

func leaveEarly(ctx context.Context, client *lda.Client) error {
	// section:cancel
	stream, err := client.Generate(ctx, &ldav1.GenerateLDARequest{
		Prompt:   lda.Chat(lda.Turn("user", "Tell me a story")),
		Stopping: &ldav1.Stopping{MaxNewTokens: proto.Uint32(200), IgnoreEos: true},
	})
	if err != nil {
		return err
	}
	defer stream.Close()
	for tokens := 0; tokens < 3; {
		event, err := stream.Recv()
		if err != nil {
			return err
		}
		tokens += len(event.GetDelta().GetTokens())
	}
	stream.Close()
	// endsection:cancel
	if _, err := stream.Recv(); !errors.Is(err, context.Canceled) || !errors.Is(err, lda.ErrAborted) {
		return fmt.Errorf("the stream ended as %v, not as cancelled", err)
	}
	return nil
}

// waitUntilFree returns once the server has no open request; the context bounds the wait.
func waitUntilFree(ctx context.Context, client *lda.Client) error {
	for {
		load, err := client.Load(ctx)
		if err != nil {
			return err
		}
		if load.GetOpenRequests() == 0 {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func target() string {
	if target := os.Getenv("LDA_TARGET"); target != "" {
		return target
	}
	return lda.DefaultTarget
}

// Command stream prints a text as it arrives, and compares it with the same text gathered.
package main

import (
	"context"
	"fmt"
	"io"
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
	request := &ldav1.GenerateLDARequest{
		Prompt:   lda.Chat(lda.Turn("user", "Good morning")),
		Alpha:    proto.Float32(0.5),
		Sampling: &ldav1.Sampling{Seed: proto.Uint64(7)},
	}
	streamed, err := printed(ctx, client, request)
	if err != nil {
		return err
	}
	completions, err := client.Complete(ctx, request)
	if err != nil {
		return err
	}
	if gathered := completions[0].Text; streamed != gathered {
		return fmt.Errorf("streamed %q, gathered %q", streamed, gathered)
	}
	return nil
}

// printed streams one sequence to standard output and returns its text.
func printed(ctx context.Context, client *lda.Client, request *ldav1.GenerateLDARequest) (string, error) {
	text := ""
	// section:stream
	stream, err := client.Generate(ctx, request)
	if err != nil {
		return "", err
	}
	defer stream.Close()
	for {
		event, err := stream.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			return "", err
		}
		fmt.Print(event.GetDelta().GetText())
		text += event.GetDelta().GetText()
	}
	// endsection:stream
	fmt.Println()
	return text, nil
}

func target() string {
	if target := os.Getenv("LDA_TARGET"); target != "" {
		return target
	}
	return lda.DefaultTarget
}

// Command basic draws two completions and prints them.
package main

import (
	"context"
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
	// section:dial
	target := os.Getenv("LDA_TARGET")
	if target == "" {
		target = lda.DefaultTarget
	}
	client, err := lda.Dial(target)
	if err != nil {
		return err
	}
	defer client.Close()
	// endsection:dial

	// section:complete
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	completions, err := client.Complete(ctx, &ldav1.GenerateLDARequest{
		Prompt:       lda.Chat(lda.Turn("user", "Who are you?")),
		Alpha:        proto.Float32(1),
		NumSequences: proto.Uint32(2),
		Sampling:     &ldav1.Sampling{Seed: proto.Uint64(1)},
	})
	if err != nil {
		return err
	}
	for _, completion := range completions {
		finished := completion.Finished
		fmt.Println(finished.GetSequenceIndex(), finished.GetReason(), completion.Text)
	}
	// endsection:complete

	return check(completions)
}

func check(completions []*lda.Completion) error {
	if len(completions) != 2 {
		return fmt.Errorf("asked for 2 sequences, got %d", len(completions))
	}
	for _, completion := range completions {
		if completion.Finished.GetReason() == ldav1.FinishReason_FINISH_REASON_UNSPECIFIED {
			return fmt.Errorf("a sequence did not say why it ended")
		}
		if completion.Text == "" {
			return fmt.Errorf("a sequence has no text")
		}
	}
	return nil
}

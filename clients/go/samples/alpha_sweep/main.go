// Command alpha_sweep draws the same prompt at several alphas and shows how far the two models are apart.
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

var prompt = lda.Chat(lda.Turn("user", "Who are you?"))

// sampling is greedy, so that alpha 0 is the after model token by token.
var sampling = &ldav1.Sampling{Temperature: proto.Float32(0), Seed: proto.Uint64(3)}

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
	texts, err := sweep(ctx, client, 0, 0.5, 1)
	if err != nil {
		return err
	}
	after, err := afterText(ctx, client)
	if err != nil {
		return err
	}
	if texts[0] != after {
		return fmt.Errorf("alpha 0 gives %q, the after model %q", texts[0], after)
	}
	return nil
}

// sweep prints and returns the text at each alpha.
func sweep(ctx context.Context, client *lda.Client, alphas ...float32) ([]string, error) {
	var texts []string
	// section:sweep
	for _, alpha := range alphas {
		completions, err := client.Complete(ctx, &ldav1.GenerateLDARequest{
			Prompt:   prompt,
			Alpha:    proto.Float32(alpha),
			Sampling: sampling,
			Output:   &ldav1.OutputOptions{Diagnostics: true},
		})
		if err != nil {
			return nil, err
		}
		fmt.Printf("%4.1f  mean KL %.3f nats  %s\n", alpha, meanKL(completions[0]), completions[0].Text)
		texts = append(texts, completions[0].Text)
	}
	// endsection:sweep
	return texts, nil
}

func meanKL(completion *lda.Completion) float64 {
	sum := 0.0
	for _, token := range completion.Tokens {
		sum += float64(token.GetDiagnostics().GetAfterBeforeKl())
	}
	return sum / float64(len(completion.Tokens))
}

// afterText returns what the after model writes on its own.
func afterText(ctx context.Context, client *lda.Client) (string, error) {
	// section:both
	stream, err := client.GenerateBoth(ctx, &ldav1.GenerateBothRequest{Prompt: prompt, Sampling: sampling})
	if err != nil {
		return "", err
	}
	completions, err := lda.Gather(stream)
	if err != nil {
		return "", err
	}
	for _, completion := range completions {
		if completion.Finished.GetRole() == ldav1.ModelRole_MODEL_ROLE_AFTER {
			return completion.Text, nil
		}
	}
	// endsection:both
	return "", fmt.Errorf("the after model drew no sequence")
}

func target() string {
	if target := os.Getenv("LDA_TARGET"); target != "" {
		return target
	}
	return lda.DefaultTarget
}

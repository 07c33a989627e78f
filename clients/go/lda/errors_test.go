package lda

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/lda-service/lda/clients/go/gen/ldav1"
)

// Every status becomes its kind of the tree: by the reason if it is ours and known, else by the code.
func TestKinds(t *testing.T) {
	cases := []struct {
		code    codes.Code
		domain  string
		reason  string
		kind    string
		parents []error
	}{
		{codes.InvalidArgument, errorDomain, "VALIDATION_FAILED", "ValidationFailed", []error{ErrValidationFailed, ErrRequestRejected}},
		{codes.InvalidArgument, errorDomain, "CONTEXT_EXCEEDED", "ContextExceeded", []error{ErrContextExceeded, ErrRequestRejected}},
		{codes.InvalidArgument, errorDomain, "PROMPT_UNUSABLE", "PromptUnusable", []error{ErrPromptUnusable, ErrRequestRejected}},
		{codes.InvalidArgument, errorDomain, "LIMIT_EXCEEDED", "LimitExceeded", []error{ErrLimitExceeded, ErrRequestRejected}},
		{codes.FailedPrecondition, errorDomain, "NO_CHAT_TEMPLATE", "NoChatTemplate", []error{ErrNoChatTemplate, ErrRequestRejected}},
		{codes.FailedPrecondition, errorDomain, "TOKENIZERS_INCOMPATIBLE", "TokenizersIncompatible", []error{ErrTokenizersIncompatible, ErrRequestRejected}},
		{codes.NotFound, errorDomain, "UNKNOWN_GENERATION", "UnknownGeneration", []error{ErrUnknownGeneration, ErrRequestRejected}},
		{codes.Unauthenticated, errorDomain, "UNAUTHENTICATED", "Unauthenticated", []error{ErrUnauthenticated, ErrAccessDenied, ErrRequestRejected}},
		{codes.PermissionDenied, errorDomain, "PERMISSION_DENIED", "PermissionDenied", []error{ErrPermissionDenied, ErrAccessDenied, ErrRequestRejected}},
		{codes.ResourceExhausted, errorDomain, "QUEUE_FULL", "QueueFull", []error{ErrQueueFull, ErrExhausted}},
		{codes.ResourceExhausted, errorDomain, "CALLER_LIMIT", "CallerLimit", []error{ErrCallerLimit, ErrExhausted}},
		{codes.ResourceExhausted, errorDomain, "SLOW_CONSUMER", "SlowConsumer", []error{ErrSlowConsumer, ErrExhausted}},
		{codes.ResourceExhausted, errorDomain, "OUT_OF_MEMORY", "OutOfMemory", []error{ErrOutOfMemory, ErrExhausted}},
		{codes.Unavailable, errorDomain, "LOADING", "Loading", []error{ErrLoading, ErrUnavailable}},
		{codes.Unavailable, errorDomain, "DRAINING", "Draining", []error{ErrDraining, ErrUnavailable}},
		{codes.Unavailable, errorDomain, "WORKER_DIED", "WorkerDied", []error{ErrWorkerDied, ErrUnavailable}},
		{codes.DeadlineExceeded, errorDomain, "DEADLINE_TOO_SHORT", "DeadlineTooShort", []error{ErrDeadlineTooShort, ErrDeadlineExceeded}},
		{codes.Aborted, errorDomain, "ABORTED", "Aborted", []error{ErrAborted}},
		{codes.Internal, errorDomain, "INTERNAL", "InternalServerError", []error{ErrInternalServerError}},
		{codes.Unavailable, errorDomain, "OF_THE_FUTURE", "Unavailable", []error{ErrUnavailable}},
		{codes.ResourceExhausted, errorDomain, "OF_THE_FUTURE", "Exhausted", []error{ErrExhausted}},
		{codes.Unavailable, "somebody.else", "QUEUE_FULL", "ServerAway", []error{ErrServerAway, ErrUnavailable}},
		{codes.Unavailable, "", "", "ServerAway", []error{ErrServerAway, ErrUnavailable}},
		{codes.InvalidArgument, "", "", "RequestRejected", []error{ErrRequestRejected}},
		{codes.FailedPrecondition, "", "", "RequestRejected", []error{ErrRequestRejected}},
		{codes.OutOfRange, "", "", "RequestRejected", []error{ErrRequestRejected}},
		{codes.NotFound, "", "", "RequestRejected", []error{ErrRequestRejected}},
		{codes.AlreadyExists, "", "", "RequestRejected", []error{ErrRequestRejected}},
		{codes.Unimplemented, "", "", "RequestRejected", []error{ErrRequestRejected}},
		{codes.Unauthenticated, "", "", "AccessDenied", []error{ErrAccessDenied, ErrRequestRejected}},
		{codes.PermissionDenied, "", "", "AccessDenied", []error{ErrAccessDenied, ErrRequestRejected}},
		{codes.ResourceExhausted, "", "", "Exhausted", []error{ErrExhausted}},
		{codes.DeadlineExceeded, "", "", "DeadlineExceeded", []error{ErrDeadlineExceeded}},
		{codes.Aborted, "", "", "Aborted", []error{ErrAborted}},
		{codes.Canceled, "", "", "Aborted", []error{ErrAborted}},
		{codes.Internal, "", "", "InternalServerError", []error{ErrInternalServerError}},
		{codes.Unknown, "", "", "InternalServerError", []error{ErrInternalServerError}},
		{codes.DataLoss, "", "", "InternalServerError", []error{ErrInternalServerError}},
	}
	for _, each := range cases {
		t.Run(each.code.String()+" "+each.reason, func(t *testing.T) {
			answer := status.Error(each.code, "said the server")
			if each.domain != "" {
				answer = refusal(t, each.code, each.domain, each.reason)
			}
			// After an event nothing is retried, so that the table runs fast.
			client, _ := against(t, func(stream grpc.ServerStream) error {
				stream.SendMsg(started(1))
				return answer
			})
			_, err := client.Complete(soon(t), request())
			failed := asError(t, err)
			if failed.Kind() != each.kind || failed.Code != each.code {
				t.Errorf("%s, %s: want %s, %s", failed.Kind(), failed.Code, each.kind, each.code)
			}
			isOnly(t, err, append(each.parents, ErrLdaClientError))
		})
	}
}

func asError(t *testing.T, err error) *Error {
	t.Helper()
	var failed *Error
	if !errors.As(err, &failed) {
		t.Fatalf("%v is no *Error", err)
	}
	return failed
}

// isOnly checks that the error matches these sentinels and no other.
func isOnly(t *testing.T, err error, sentinels []error) {
	t.Helper()
	matched := 0
	for _, each := range allKinds() {
		if errors.Is(err, each) {
			matched++
		}
	}
	for _, each := range sentinels {
		if !errors.Is(err, each) {
			t.Errorf("%v is not %v", err, each)
		}
	}
	if matched != len(sentinels) {
		t.Errorf("%v matches %d sentinels, want %d", err, matched, len(sentinels))
	}
}

func allKinds() map[string]error {
	all := map[string]error{}
	for _, each := range kindsByReason {
		all[each.Error()] = each
	}
	for _, each := range kindsByCode {
		all[each.Error()] = each
	}
	all["ServerAway"], all["StreamBroken"] = ErrServerAway, ErrStreamBroken
	return all
}

// No reason of the contract is left without a kind.
func TestEveryReasonHasAKind(t *testing.T) {
	for number, name := range ldav1.ErrorReason_name {
		if kindsByReason[ldav1.ErrorReason(number)] == nil {
			t.Errorf("%s has no kind", name)
		}
	}
}

// An error carries what the server said: message, reason, metadata, fields at fault, and when to try again.
func TestErrorCarriesDetails(t *testing.T) {
	detailed, err := status.New(codes.InvalidArgument, "prompt is required.").WithDetails(
		&errdetails.ErrorInfo{Domain: errorDomain, Reason: "VALIDATION_FAILED", Metadata: map[string]string{"a": "b"}},
		&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
			{Field: "prompt", Description: "is required"},
			{Field: "sampling.top_p", Description: "must be at most 1"},
		}},
		&errdetails.RetryInfo{RetryDelay: durationpb.New(1500 * time.Millisecond)},
	)
	if err != nil {
		t.Fatal(err)
	}
	client, _ := against(t, fails(detailed.Err()))
	_, err = client.ModelPair(soon(t))
	failed := asError(t, err)
	if failed.Reason != "VALIDATION_FAILED" || failed.Metadata["a"] != "b" || failed.RetryAfter != 1500*time.Millisecond {
		t.Errorf("got %+v", failed)
	}
	if len(failed.Violations) != 2 || failed.Violations[1] != (Violation{"sampling.top_p", "must be at most 1"}) {
		t.Errorf("violations are %v", failed.Violations)
	}
	if want := "lda: ValidationFailed: prompt is required.; sampling.top_p: must be at most 1"; err.Error() != want {
		t.Errorf("it reads %q, want %q", err, want)
	}
}

// A server that nobody runs is ErrServerAway, and the message names the target.
func TestServerAway(t *testing.T) {
	_, target, stop := serve(t, []play{whole()})
	stop()
	_, err := dial(t, target).Complete(soon(t), request())
	if !errors.Is(err, ErrServerAway) || !strings.Contains(err.Error(), "no LDA server answers at "+target) {
		t.Errorf("got %v", err)
	}
}

// A connection that breaks in the middle of a stream is ErrServerAway too, and the message says that it was lost.
func TestConnectionLost(t *testing.T) {
	_, target, stop := serve(t, []play{holds(started(1))})
	stream := first(t, soon(t), dial(t, target))
	stop()
	if _, err := stream.Recv(); !errors.Is(err, ErrServerAway) || !strings.Contains(err.Error(), "was lost") {
		t.Errorf("got %v", err)
	}
}

// A stream that went against the contract has no code: no status said so.
func TestStreamBrokenHasNoCode(t *testing.T) {
	client, _ := against(t, sends(started(1)))
	_, err := client.Complete(soon(t), request())
	if failed := asError(t, err); failed.Kind() != "StreamBroken" || failed.Code != codes.OK {
		t.Errorf("got %s with code %s", failed.Kind(), failed.Code)
	}
	if errors.Is(err, context.Canceled) {
		t.Error("it counts as cancelled")
	}
}

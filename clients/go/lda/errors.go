package lda

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/lda-service/lda/clients/go/gen/ldav1"
)

const errorDomain = "lda.v1"

// kind is a node of the error tree; the sentinels are its values.
type kind struct {
	name   string
	parent *kind
}

func (k *kind) Error() string { return "lda: " + k.name }

func newKind(name string, parent error) error {
	above, _ := parent.(*kind)
	return &kind{name, above}
}

// The kinds of failure of a call, for errors.Is. A kind matches the kinds below it too: a full queue is
// ErrQueueFull and ErrExhausted.
var (
	// ErrLdaClientError matches every error of a call.
	ErrLdaClientError = newKind("LdaClientError", nil)

	// ErrRequestRejected says that the request cannot be served as it stands; change it before trying again.
	ErrRequestRejected = newKind("RequestRejected", ErrLdaClientError)
	// ErrValidationFailed says that a field breaks a rule of the contract; Violations holds its path and the rule.
	ErrValidationFailed = newKind("ValidationFailed", ErrRequestRejected)
	// ErrContextExceeded says that prompt and output do not fit the context window.
	// Metadata: prompt_tokens, max_new_tokens, limit.
	ErrContextExceeded = newKind("ContextExceeded", ErrRequestRejected)
	// ErrPromptUnusable says that the prompt has no tokens, or ids that the two models do not share.
	// Metadata: token_id, where one id is at fault.
	ErrPromptUnusable = newKind("PromptUnusable", ErrRequestRejected)
	// ErrNoChatTemplate says that the pair has no chat template; send Text or Tokens instead of Chat.
	ErrNoChatTemplate = newKind("NoChatTemplate", ErrRequestRejected)
	// ErrLimitExceeded says that a value is above a limit of this server. Metadata: field, limit.
	ErrLimitExceeded = newKind("LimitExceeded", ErrRequestRejected)
	// ErrTokenizersIncompatible says that the two vocabularies do not match; TokenizerCompat says where.
	ErrTokenizersIncompatible = newKind("TokenizersIncompatible", ErrRequestRejected)
	// ErrUnknownGeneration says that no generation of this id is open. Metadata: generation_id.
	ErrUnknownGeneration = newKind("UnknownGeneration", ErrRequestRejected)
	// ErrAccessDenied says that token or certificate do not give the right to this call.
	ErrAccessDenied = newKind("AccessDenied", ErrRequestRejected)
	// ErrUnauthenticated says that there was no token, or one that is unknown or expired.
	ErrUnauthenticated = newKind("Unauthenticated", ErrAccessDenied)
	// ErrPermissionDenied says that token or certificate do not allow this method. Metadata: scope, if one is missing.
	ErrPermissionDenied = newKind("PermissionDenied", ErrAccessDenied)

	// ErrUnavailable says that nothing is wrong with the request; try again later or at another server.
	ErrUnavailable = newKind("Unavailable", ErrLdaClientError)
	// ErrLoading says that the models are still being loaded or warmed up.
	ErrLoading = newKind("Loading", ErrUnavailable)
	// ErrDraining says that the server is shutting down and takes no new work.
	ErrDraining = newKind("Draining", ErrUnavailable)
	// ErrWorkerDied says that the process that owns the models died; a fresh one is being started.
	ErrWorkerDied = newKind("WorkerDied", ErrUnavailable)
	// ErrServerAway says that nobody answers at the target, or that the connection was lost.
	ErrServerAway = newKind("ServerAway", ErrUnavailable)

	// ErrExhausted says that something ran out: room in the queue, patience with a slow reader, or memory.
	ErrExhausted = newKind("Exhausted", ErrLdaClientError)
	// ErrQueueFull says that as many requests wait as may wait. Metadata: depth, capacity.
	ErrQueueFull = newKind("QueueFull", ErrExhausted)
	// ErrCallerLimit says that this caller has as many requests open as it may. Metadata: open, limit.
	ErrCallerLimit = newKind("CallerLimit", ErrExhausted)
	// ErrSlowConsumer says that the stream was read too slowly and was ended. Metadata: buffered_tokens.
	ErrSlowConsumer = newKind("SlowConsumer", ErrExhausted)
	// ErrOutOfMemory says that device memory ran out while serving this request.
	ErrOutOfMemory = newKind("OutOfMemory", ErrExhausted)

	// ErrDeadlineExceeded says that the deadline of the context went by.
	ErrDeadlineExceeded = newKind("DeadlineExceeded", ErrLdaClientError)
	// ErrDeadlineTooShort says that the server refused at once: the wait would have been longer than the deadline.
	// Metadata: expected_wait_ms, remaining_ms.
	ErrDeadlineTooShort = newKind("DeadlineTooShort", ErrDeadlineExceeded)

	// ErrAborted says that the call was ended: by an operator, by a shutdown, or by its own context.
	ErrAborted = newKind("Aborted", ErrLdaClientError)
	// ErrInternalServerError says that the server has a fault; its log holds more. Metadata: request_id.
	ErrInternalServerError = newKind("InternalServerError", ErrLdaClientError)
	// ErrStreamBroken says that the stream ended or went on against the contract.
	ErrStreamBroken = newKind("StreamBroken", ErrLdaClientError)
)

var kindsByReason = map[ldav1.ErrorReason]error{
	ldav1.ErrorReason_ERROR_REASON_UNSPECIFIED:             ErrLdaClientError,
	ldav1.ErrorReason_ERROR_REASON_VALIDATION_FAILED:       ErrValidationFailed,
	ldav1.ErrorReason_ERROR_REASON_CONTEXT_EXCEEDED:        ErrContextExceeded,
	ldav1.ErrorReason_ERROR_REASON_PROMPT_UNUSABLE:         ErrPromptUnusable,
	ldav1.ErrorReason_ERROR_REASON_NO_CHAT_TEMPLATE:        ErrNoChatTemplate,
	ldav1.ErrorReason_ERROR_REASON_TOKENIZERS_INCOMPATIBLE: ErrTokenizersIncompatible,
	ldav1.ErrorReason_ERROR_REASON_LIMIT_EXCEEDED:          ErrLimitExceeded,
	ldav1.ErrorReason_ERROR_REASON_QUEUE_FULL:              ErrQueueFull,
	ldav1.ErrorReason_ERROR_REASON_SLOW_CONSUMER:           ErrSlowConsumer,
	ldav1.ErrorReason_ERROR_REASON_LOADING:                 ErrLoading,
	ldav1.ErrorReason_ERROR_REASON_DRAINING:                ErrDraining,
	ldav1.ErrorReason_ERROR_REASON_WORKER_DIED:             ErrWorkerDied,
	ldav1.ErrorReason_ERROR_REASON_OUT_OF_MEMORY:           ErrOutOfMemory,
	ldav1.ErrorReason_ERROR_REASON_ABORTED:                 ErrAborted,
	ldav1.ErrorReason_ERROR_REASON_INTERNAL:                ErrInternalServerError,
	ldav1.ErrorReason_ERROR_REASON_DEADLINE_TOO_SHORT:      ErrDeadlineTooShort,
	ldav1.ErrorReason_ERROR_REASON_CALLER_LIMIT:            ErrCallerLimit,
	ldav1.ErrorReason_ERROR_REASON_UNAUTHENTICATED:         ErrUnauthenticated,
	ldav1.ErrorReason_ERROR_REASON_PERMISSION_DENIED:       ErrPermissionDenied,
	ldav1.ErrorReason_ERROR_REASON_UNKNOWN_GENERATION:      ErrUnknownGeneration,
}

// For a status without a reason that is known here: one made by gRPC itself, by a proxy, or by a newer server.
var kindsByCode = map[codes.Code]error{
	codes.InvalidArgument:    ErrRequestRejected,
	codes.FailedPrecondition: ErrRequestRejected,
	codes.OutOfRange:         ErrRequestRejected,
	codes.NotFound:           ErrRequestRejected,
	codes.AlreadyExists:      ErrRequestRejected,
	codes.Unimplemented:      ErrRequestRejected,
	codes.Unauthenticated:    ErrAccessDenied,
	codes.PermissionDenied:   ErrAccessDenied,
	codes.Unavailable:        ErrUnavailable,
	codes.ResourceExhausted:  ErrExhausted,
	codes.DeadlineExceeded:   ErrDeadlineExceeded,
	codes.Aborted:            ErrAborted,
	codes.Canceled:           ErrAborted,
	codes.Internal:           ErrInternalServerError,
	codes.Unknown:            ErrInternalServerError,
	codes.DataLoss:           ErrInternalServerError,
}

// Violation is a field that breaks a rule: its path, such as sampling.top_p, and the rule in words.
type Violation struct {
	Field       string
	Description string
}

// Error is what every failed call returns. errors.Is compares it with the sentinels of this package, and with
// context.Canceled and context.DeadlineExceeded.
type Error struct {
	// Code is the status of gRPC; codes.OK where no status was received, as for ErrStreamBroken.
	Code codes.Code
	// Reason is the name of the contract's ErrorReason without its prefix, such as QUEUE_FULL; empty without one.
	Reason string
	// Message says what went wrong, in words of the server where it spoke.
	Message string
	// Metadata holds the facts that the contract documents for the reason.
	Metadata map[string]string
	// Violations are the fields at fault, for ErrValidationFailed.
	Violations []Violation
	// RetryAfter is how long the server suggests to wait before another attempt; zero where it does not.
	RetryAfter time.Duration

	kind  error
	cause error
}

// Error returns the kind, the message, and the violations that the message does not name.
func (e *Error) Error() string {
	parts := []string{e.Message}
	for _, violation := range e.Violations {
		if !strings.Contains(e.Message, violation.Field) {
			parts = append(parts, violation.Field+": "+violation.Description)
		}
	}
	return fmt.Sprintf("lda: %s: %s", e.Kind(), strings.Join(parts, "; "))
}

// Kind returns the name of the error's kind, the same in every client, such as QueueFull.
func (e *Error) Kind() string { return e.kind.(*kind).name }

// Is reports whether the target is the kind of this error or one above it.
func (e *Error) Is(target error) bool {
	switch target {
	case context.Canceled:
		return e.Code == codes.Canceled
	case context.DeadlineExceeded:
		return e.Code == codes.DeadlineExceeded
	}
	for above := e.kind.(*kind); above != nil; above = above.parent {
		if target == error(above) {
			return true
		}
	}
	return false
}

// Unwrap returns the error of gRPC, if one is behind this.
func (e *Error) Unwrap() error { return e.cause }

// errorFromRPC makes an Error of what a call returned. answered tells whether the server had begun to answer, so
// that the connection was lost and not refused.
func errorFromRPC(cause error, target string, answered bool) *Error {
	received := statusOf(cause)
	failure := &Error{Code: received.Code(), Message: received.Message(), cause: cause}
	failure.readDetails(received)
	failure.kind = kindOf(failure.Code, failure.Reason)
	if failure.kind == ErrServerAway {
		failure.Message = awayMessage(failure.Message, target, answered)
	}
	return failure
}

func statusOf(cause error) *status.Status {
	if received, ok := status.FromError(cause); ok {
		return received
	}
	if errors.Is(cause, context.Canceled) || errors.Is(cause, context.DeadlineExceeded) {
		return status.FromContextError(cause)
	}
	return status.New(codes.Unknown, cause.Error())
}

func (e *Error) readDetails(received *status.Status) {
	for _, detail := range received.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.GetDomain() == errorDomain {
				e.Reason, e.Metadata = detail.GetReason(), detail.GetMetadata()
			}
		case *errdetails.BadRequest:
			for _, each := range detail.GetFieldViolations() {
				e.Violations = append(e.Violations, Violation{each.GetField(), each.GetDescription()})
			}
		case *errdetails.RetryInfo:
			e.RetryAfter = detail.GetRetryDelay().AsDuration()
		}
	}
}

func kindOf(code codes.Code, reason string) error {
	if reason == "" && code == codes.Unavailable {
		return ErrServerAway
	}
	if number, known := ldav1.ErrorReason_value["ERROR_REASON_"+reason]; known {
		return kindsByReason[ldav1.ErrorReason(number)]
	}
	if kind, known := kindsByCode[code]; known {
		return kind
	}
	return ErrLdaClientError
}

func awayMessage(cause, target string, answered bool) string {
	if answered {
		return fmt.Sprintf("the connection to %s was lost before the answer was complete (%s)", target, cause)
	}
	return fmt.Sprintf("no LDA server answers at %s (%s): start it with `lda-service serve`, or dial another address",
		target, cause)
}

func serverAway(target string, waited time.Duration) *Error {
	message := awayMessage(fmt.Sprintf("no connection within %s", waited), target, false)
	return &Error{Message: message, kind: ErrServerAway}
}

func streamBroken(format string, arguments ...interface{}) *Error {
	finding := fmt.Sprintf(format, arguments...)
	message := "the stream broke its contract: " + finding + "; server and client may be of different versions"
	return &Error{Message: message, kind: ErrStreamBroken}
}

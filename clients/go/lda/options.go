package lda

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

// Version is the version of this client, as its user agent says it.
const Version = "0.1.0"

const messageBytesMax = 20 << 20

// UNAVAILABLE alone is retried: the server sends it before any work was done.
const serviceConfig = `{
  "loadBalancingConfig": [{"round_robin": {}}],
  "methodConfig": [{
    "name": [{"service": "lda.v1.LdaService"}],
    "retryPolicy": {
      "maxAttempts": 4,
      "initialBackoff": "0.1s",
      "maxBackoff": "1s",
      "backoffMultiplier": 2,
      "retryableStatusCodes": ["UNAVAILABLE"]
    }
  }]
}`

// Option sets up a client.
type Option func(*options) error

type options struct {
	token          string
	tls            *tls.Config
	connectTimeout time.Duration
	lookupTimeout  time.Duration
	streamTimeout  time.Duration
	dial           []grpc.DialOption
}

// WithToken sends a bearer token with every call. Without TLS it crosses the network readable.
func WithToken(token string) Option {
	return func(o *options) error {
		if token == "" || strings.ContainsAny(token, " \t\r\n") {
			return errors.New("WithToken: the token is empty or has white space in it; give the token alone")
		}
		o.token = token
		return nil
	}
}

// WithTLS speaks TLS as the configuration says.
func WithTLS(config *tls.Config) Option {
	return func(o *options) error {
		if config == nil {
			return errors.New("WithTLS: the configuration is nil; leave the option out for plain text")
		}
		o.tls = config
		return nil
	}
}

// TLSFiles names the files of a TLS connection, in PEM, and what else it needs.
type TLSFiles struct {
	// CA is the authority that signed the server's certificate; empty trusts those of the system.
	CA string
	// Certificate and Key are shown to a server that asks for them.
	Certificate string
	Key         string
	// ServerName is the name that the server's certificate must carry, where it is not that of the target.
	ServerName string
}

// WithTLSFiles speaks TLS with certificates from files, which Dial reads.
func WithTLSFiles(files TLSFiles) Option {
	return func(o *options) (err error) {
		o.tls, err = files.config()
		return err
	}
}

func (f TLSFiles) config() (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: f.ServerName}
	if f.CA != "" {
		pem, err := os.ReadFile(f.CA)
		if err != nil {
			return nil, fmt.Errorf("WithTLSFiles: CA: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("WithTLSFiles: %s holds no certificate in PEM", f.CA)
		}
	}
	if f.Certificate != "" || f.Key != "" {
		pair, err := tls.LoadX509KeyPair(f.Certificate, f.Key)
		if err != nil {
			return nil, fmt.Errorf("WithTLSFiles: Certificate and Key: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

// WithConnectTimeout makes every call wait so long for the connection, as for a server that is just starting. Without
// it, a server that is away is reported after the retries.
func WithConnectTimeout(timeout time.Duration) Option {
	return positive("WithConnectTimeout", timeout, func(o *options) *time.Duration { return &o.connectTimeout })
}

// WithLookupTimeout is the deadline of TokenizerCompat, ModelPair and Load where their context has no earlier one.
// The default is 30 seconds.
func WithLookupTimeout(timeout time.Duration) Option {
	return positive("WithLookupTimeout", timeout, func(o *options) *time.Duration { return &o.lookupTimeout })
}

// WithStreamTimeout is the deadline of Generate, GenerateBoth, Score and Complete where their context has no earlier
// one. The default is none.
func WithStreamTimeout(timeout time.Duration) Option {
	return positive("WithStreamTimeout", timeout, func(o *options) *time.Duration { return &o.streamTimeout })
}

func positive(name string, timeout time.Duration, field func(*options) *time.Duration) Option {
	return func(o *options) error {
		if timeout <= 0 {
			return fmt.Errorf("%s: %s is no time to wait; give a positive duration", name, timeout)
		}
		*field(o) = timeout
		return nil
	}
}

// WithDialOptions passes options to gRPC, after those of this client.
func WithDialOptions(opts ...grpc.DialOption) Option {
	return func(o *options) error {
		o.dial = append(o.dial, opts...)
		return nil
	}
}

func (o *options) dialOptions() []grpc.DialOption {
	dial := []grpc.DialOption{
		grpc.WithUserAgent("lda-client-go/" + Version),
		grpc.WithDefaultServiceConfig(serviceConfig),
		// No service config from TXT records of the name server.
		grpc.WithDisableServiceConfig(),
		// Pings while a call is open, so that a dead peer is noticed during a long silent prefill.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(messageBytesMax), grpc.MaxCallSendMsgSize(messageBytesMax)),
		o.transport(),
	}
	if o.token != "" {
		dial = append(dial, grpc.WithPerRPCCredentials(bearer(o.token)))
	}
	dial = append(dial, retryOptions(grpc.Version)...)
	return append(dial, o.dial...)
}

func (o *options) transport() grpc.DialOption {
	if o.tls == nil {
		// The packaged grpc of Debian 12 has no package insecure yet; this stays throughout version 1.
		return grpc.WithInsecure()
	}
	return grpc.WithTransportCredentials(credentials.NewTLS(o.tls))
}

// bearer is a token that is sent over plain text too: servers on loopback and behind a mesh have no TLS of their own.
type bearer string

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

func (b bearer) RequireTransportSecurity() bool { return false }

// withScheme has the addresses behind a name looked up, so that calls go to each in turn; older versions of grpc need
// to be told.
func withScheme(target string) string {
	if strings.Contains(target, "://") || strings.HasPrefix(target, "unix:") {
		return target
	}
	return "dns:///" + target
}

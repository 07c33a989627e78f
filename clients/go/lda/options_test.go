package lda

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	"github.com/lda-service/lda/clients/go/gen/ldav1"
)

// certified writes a certificate that is its own authority, for one DNS name, and returns the two files.
func certified(t *testing.T, name string) (certificate, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: name},
		DNSNames:              []string{name},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	signed, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	packed, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return inFile(t, name+".pem", "CERTIFICATE", signed), inFile(t, name+".key", "PRIVATE KEY", packed)
}

func inFile(t *testing.T, name, kind string, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: content}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// secured is the option of a server that shows the certificate and asks callers for one of the authority, if any.
func secured(t *testing.T, certificate, key, callers string) grpc.ServerOption {
	t.Helper()
	config, err := TLSFiles{CA: callers, Certificate: certificate, Key: key}.config()
	if err != nil {
		t.Fatal(err)
	}
	if callers != "" {
		config.ClientCAs, config.ClientAuth = config.RootCAs, tls.RequireAndVerifyClientCert
	}
	return grpc.Creds(credentials.NewTLS(config))
}

func authorization(ctx context.Context) []string {
	received, _ := metadata.FromIncomingContext(ctx)
	return received["authorization"]
}

// The token goes with every call, long or short, over plain text and over TLS.
func TestToken(t *testing.T) {
	certificate, key := certified(t, "lda.test")
	plain, plainTarget, _ := serve(t, []play{whole()})
	secure, secureTarget, _ := serve(t, []play{whole()}, secured(t, certificate, key, ""))
	over := WithTLSFiles(TLSFiles{CA: certificate, ServerName: "lda.test"})
	for service, client := range map[*scripted]*Client{
		plain:  dial(t, plainTarget, WithToken("secret")),
		secure: dial(t, secureTarget, WithToken("secret"), over),
	} {
		if _, err := client.Complete(soon(t), request()); err != nil {
			t.Fatal(err)
		}
		if got := authorization(<-service.calls); len(got) != 1 || got[0] != "Bearer secret" {
			t.Errorf("authorization is %q", got)
		}
	}
}

// A client without a token sends none.
func TestNoToken(t *testing.T) {
	client, service := against(t, whole())
	if _, err := client.Complete(soon(t), request()); err != nil {
		t.Fatal(err)
	}
	if got := authorization(<-service.calls); got != nil {
		t.Errorf("authorization is %q", got)
	}
}

// TLS checks the server against the CA and the name, and shows the client's certificate to a server that asks.
func TestTLS(t *testing.T) {
	certificate, key := certified(t, "lda.test")
	other, otherKey := certified(t, "other.test")
	_, open, _ := serve(t, []play{whole()}, secured(t, certificate, key, ""))
	_, closed, _ := serve(t, []play{whole()}, secured(t, certificate, key, other))
	for _, each := range []struct {
		name   string
		target string
		files  TLSFiles
		want   error
	}{
		{"CA and name", open, TLSFiles{CA: certificate, ServerName: "lda.test"}, nil},
		{"another CA", open, TLSFiles{CA: other, ServerName: "lda.test"}, ErrServerAway},
		{"another name", open, TLSFiles{CA: certificate, ServerName: "elsewhere.test"}, ErrServerAway},
		{"the name of the target", open, TLSFiles{CA: certificate}, ErrServerAway},
		{"certificate", closed, TLSFiles{CA: certificate, ServerName: "lda.test", Certificate: other, Key: otherKey}, nil},
		{"no certificate", closed, TLSFiles{CA: certificate, ServerName: "lda.test"}, ErrServerAway},
	} {
		_, err := dial(t, each.target, WithTLSFiles(each.files)).Complete(soon(t), request())
		if !errors.Is(err, each.want) {
			t.Errorf("%s: got %v, want %v", each.name, err, each.want)
		}
	}
}

// A TLS configuration of the caller's own is used as it is.
func TestOwnTLS(t *testing.T) {
	certificate, key := certified(t, "lda.test")
	_, target, _ := serve(t, []play{whole()}, secured(t, certificate, key, ""))
	config, err := TLSFiles{CA: certificate, ServerName: "lda.test"}.config()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dial(t, target, WithTLS(config)).Complete(soon(t), request()); err != nil {
		t.Error(err)
	}
}

// An option that cannot work is refused by Dial, and the message names it.
func TestBadOptions(t *testing.T) {
	certificate, key := certified(t, "lda.test")
	for name, each := range map[string]Option{
		"WithToken: ":                             WithToken(""),
		"WithToken: the":                          WithToken("secret\n"),
		"WithTLS: ":                               WithTLS(nil),
		"WithTLSFiles: CA: ":                      WithTLSFiles(TLSFiles{CA: "nowhere.pem"}),
		"WithTLSFiles: " + key:                    WithTLSFiles(TLSFiles{CA: key}),
		"WithTLSFiles: Certificate and Key":       WithTLSFiles(TLSFiles{Certificate: certificate}),
		"WithTLSFiles: Certificate and Key: open": WithTLSFiles(TLSFiles{Key: key}),
		"WithConnectTimeout: ":                    WithConnectTimeout(0),
		"WithLookupTimeout: ":                     WithLookupTimeout(-time.Second),
		"WithStreamTimeout: ":                     WithStreamTimeout(0),
	} {
		if _, err := Dial(DefaultTarget, each); err == nil || !strings.HasPrefix(err.Error(), "lda: "+name) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// With a connect timeout a call waits for a server that comes up late.
func TestWaitsForTheConnection(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	target := listener.Addr().String()
	server := grpc.NewServer()
	t.Cleanup(server.Stop)
	service := &scripted{plays: make(chan play, 1), calls: make(chan context.Context, 1)}
	service.plays <- fails(nil)
	ldav1.RegisterLdaServiceServer(server, service)
	// The first connection is dropped, the second one served.
	go func() {
		if refused, err := listener.Accept(); err == nil {
			refused.Close()
		}
		server.Serve(listener)
	}()
	if _, err := dial(t, target, WithConnectTimeout(20*time.Second)).ModelPair(soon(t)); err != nil {
		t.Errorf("got %v", err)
	}
}

// A connection that does not come up in time is ErrServerAway; a context that ends first is what it always is.
func TestConnectTimeout(t *testing.T) {
	_, target, stop := serve(t, []play{whole()})
	stop()
	_, err := dial(t, target, WithConnectTimeout(50*time.Millisecond)).Complete(soon(t), request())
	if !errors.Is(err, ErrServerAway) || !strings.Contains(err.Error(), "no connection within 50ms") {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := dial(t, target, WithConnectTimeout(time.Hour)).ModelPair(ctx); !errors.Is(err, ErrDeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// A bare address is looked up, so that calls go to every address of a name; a target with a scheme stays as it is.
func TestScheme(t *testing.T) {
	for target, want := range map[string]string{
		"127.0.0.1:50051":  "dns:///127.0.0.1:50051",
		"[::1]:50051":      "dns:///[::1]:50051",
		"dns:///lda:50051": "dns:///lda:50051",
		"unix:/run/lda":    "unix:/run/lda",
		"passthrough:///x": "passthrough:///x",
	} {
		if got := withScheme(target); got != want {
			t.Errorf("%s becomes %s, want %s", target, got, want)
		}
	}
}

// The prompt helpers fill exactly one form.
func TestPrompts(t *testing.T) {
	if got := Text("hi").GetText(); got != "hi" {
		t.Errorf("text is %q", got)
	}
	turns := Chat(Turn("system", "Be brief."), Turn("user", "hi")).GetChat().GetMessages()
	if len(turns) != 2 || turns[0].GetRole() != "system" || turns[1].GetContent() != "hi" {
		t.Errorf("turns are %v", turns)
	}
	if ids := Tokens(1, 2, 3).GetTokens().GetIds(); len(ids) != 3 || ids[2] != 3 {
		t.Errorf("ids are %v", ids)
	}
}

package lda.v1;

import static io.grpc.MethodDescriptor.generateFullMethodName;

/**
 * <pre>
 * Streams text generated from a pair of models that share one vocabulary.
 * Stream contract of `GenerateLDA` and `GenerateBoth`:
 *  * the first message is `started`;
 *  * every sequence ends with exactly one `finished`;
 *  * the stream closes with status OK only after every sequence has finished.
 * A stream that ends without `finished` always carries a non-OK status. Errors are
 * gRPC statuses with `google.rpc` details, never messages inside the stream.
 * </pre>
 */
@javax.annotation.Generated(
    value = "by gRPC proto compiler",
    comments = "Source: lda/v1/lda_service.proto")
@io.grpc.stub.annotations.GrpcGenerated
public final class LdaServiceGrpc {

  private LdaServiceGrpc() {}

  public static final String SERVICE_NAME = "lda.v1.LdaService";

  // Static method descriptors that strictly reflect the proto.
  private static volatile io.grpc.MethodDescriptor<lda.v1.GenerateLDARequest,
      lda.v1.GenerateLDAResponse> getGenerateLDAMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "GenerateLDA",
      requestType = lda.v1.GenerateLDARequest.class,
      responseType = lda.v1.GenerateLDAResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.SERVER_STREAMING)
  public static io.grpc.MethodDescriptor<lda.v1.GenerateLDARequest,
      lda.v1.GenerateLDAResponse> getGenerateLDAMethod() {
    io.grpc.MethodDescriptor<lda.v1.GenerateLDARequest, lda.v1.GenerateLDAResponse> getGenerateLDAMethod;
    if ((getGenerateLDAMethod = LdaServiceGrpc.getGenerateLDAMethod) == null) {
      synchronized (LdaServiceGrpc.class) {
        if ((getGenerateLDAMethod = LdaServiceGrpc.getGenerateLDAMethod) == null) {
          LdaServiceGrpc.getGenerateLDAMethod = getGenerateLDAMethod =
              io.grpc.MethodDescriptor.<lda.v1.GenerateLDARequest, lda.v1.GenerateLDAResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.SERVER_STREAMING)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "GenerateLDA"))
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  lda.v1.GenerateLDARequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  lda.v1.GenerateLDAResponse.getDefaultInstance()))
              .setSchemaDescriptor(new LdaServiceMethodDescriptorSupplier("GenerateLDA"))
              .build();
        }
      }
    }
    return getGenerateLDAMethod;
  }

  private static volatile io.grpc.MethodDescriptor<lda.v1.GenerateBothRequest,
      lda.v1.GenerateBothResponse> getGenerateBothMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "GenerateBoth",
      requestType = lda.v1.GenerateBothRequest.class,
      responseType = lda.v1.GenerateBothResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.SERVER_STREAMING)
  public static io.grpc.MethodDescriptor<lda.v1.GenerateBothRequest,
      lda.v1.GenerateBothResponse> getGenerateBothMethod() {
    io.grpc.MethodDescriptor<lda.v1.GenerateBothRequest, lda.v1.GenerateBothResponse> getGenerateBothMethod;
    if ((getGenerateBothMethod = LdaServiceGrpc.getGenerateBothMethod) == null) {
      synchronized (LdaServiceGrpc.class) {
        if ((getGenerateBothMethod = LdaServiceGrpc.getGenerateBothMethod) == null) {
          LdaServiceGrpc.getGenerateBothMethod = getGenerateBothMethod =
              io.grpc.MethodDescriptor.<lda.v1.GenerateBothRequest, lda.v1.GenerateBothResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.SERVER_STREAMING)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "GenerateBoth"))
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  lda.v1.GenerateBothRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  lda.v1.GenerateBothResponse.getDefaultInstance()))
              .setSchemaDescriptor(new LdaServiceMethodDescriptorSupplier("GenerateBoth"))
              .build();
        }
      }
    }
    return getGenerateBothMethod;
  }

  private static volatile io.grpc.MethodDescriptor<lda.v1.TokenizerCompatRequest,
      lda.v1.TokenizerCompatResponse> getTokenizerCompatMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "TokenizerCompat",
      requestType = lda.v1.TokenizerCompatRequest.class,
      responseType = lda.v1.TokenizerCompatResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<lda.v1.TokenizerCompatRequest,
      lda.v1.TokenizerCompatResponse> getTokenizerCompatMethod() {
    io.grpc.MethodDescriptor<lda.v1.TokenizerCompatRequest, lda.v1.TokenizerCompatResponse> getTokenizerCompatMethod;
    if ((getTokenizerCompatMethod = LdaServiceGrpc.getTokenizerCompatMethod) == null) {
      synchronized (LdaServiceGrpc.class) {
        if ((getTokenizerCompatMethod = LdaServiceGrpc.getTokenizerCompatMethod) == null) {
          LdaServiceGrpc.getTokenizerCompatMethod = getTokenizerCompatMethod =
              io.grpc.MethodDescriptor.<lda.v1.TokenizerCompatRequest, lda.v1.TokenizerCompatResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "TokenizerCompat"))
              .setSafe(true)
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  lda.v1.TokenizerCompatRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  lda.v1.TokenizerCompatResponse.getDefaultInstance()))
              .setSchemaDescriptor(new LdaServiceMethodDescriptorSupplier("TokenizerCompat"))
              .build();
        }
      }
    }
    return getTokenizerCompatMethod;
  }

  private static volatile io.grpc.MethodDescriptor<lda.v1.ScoreRequest,
      lda.v1.ScoreResponse> getScoreMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "Score",
      requestType = lda.v1.ScoreRequest.class,
      responseType = lda.v1.ScoreResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.SERVER_STREAMING)
  public static io.grpc.MethodDescriptor<lda.v1.ScoreRequest,
      lda.v1.ScoreResponse> getScoreMethod() {
    io.grpc.MethodDescriptor<lda.v1.ScoreRequest, lda.v1.ScoreResponse> getScoreMethod;
    if ((getScoreMethod = LdaServiceGrpc.getScoreMethod) == null) {
      synchronized (LdaServiceGrpc.class) {
        if ((getScoreMethod = LdaServiceGrpc.getScoreMethod) == null) {
          LdaServiceGrpc.getScoreMethod = getScoreMethod =
              io.grpc.MethodDescriptor.<lda.v1.ScoreRequest, lda.v1.ScoreResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.SERVER_STREAMING)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "Score"))
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  lda.v1.ScoreRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  lda.v1.ScoreResponse.getDefaultInstance()))
              .setSchemaDescriptor(new LdaServiceMethodDescriptorSupplier("Score"))
              .build();
        }
      }
    }
    return getScoreMethod;
  }

  private static volatile io.grpc.MethodDescriptor<lda.v1.GetModelPairRequest,
      lda.v1.GetModelPairResponse> getGetModelPairMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "GetModelPair",
      requestType = lda.v1.GetModelPairRequest.class,
      responseType = lda.v1.GetModelPairResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<lda.v1.GetModelPairRequest,
      lda.v1.GetModelPairResponse> getGetModelPairMethod() {
    io.grpc.MethodDescriptor<lda.v1.GetModelPairRequest, lda.v1.GetModelPairResponse> getGetModelPairMethod;
    if ((getGetModelPairMethod = LdaServiceGrpc.getGetModelPairMethod) == null) {
      synchronized (LdaServiceGrpc.class) {
        if ((getGetModelPairMethod = LdaServiceGrpc.getGetModelPairMethod) == null) {
          LdaServiceGrpc.getGetModelPairMethod = getGetModelPairMethod =
              io.grpc.MethodDescriptor.<lda.v1.GetModelPairRequest, lda.v1.GetModelPairResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "GetModelPair"))
              .setSafe(true)
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  lda.v1.GetModelPairRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  lda.v1.GetModelPairResponse.getDefaultInstance()))
              .setSchemaDescriptor(new LdaServiceMethodDescriptorSupplier("GetModelPair"))
              .build();
        }
      }
    }
    return getGetModelPairMethod;
  }

  private static volatile io.grpc.MethodDescriptor<lda.v1.GetLoadRequest,
      lda.v1.GetLoadResponse> getGetLoadMethod;

  @io.grpc.stub.annotations.RpcMethod(
      fullMethodName = SERVICE_NAME + '/' + "GetLoad",
      requestType = lda.v1.GetLoadRequest.class,
      responseType = lda.v1.GetLoadResponse.class,
      methodType = io.grpc.MethodDescriptor.MethodType.UNARY)
  public static io.grpc.MethodDescriptor<lda.v1.GetLoadRequest,
      lda.v1.GetLoadResponse> getGetLoadMethod() {
    io.grpc.MethodDescriptor<lda.v1.GetLoadRequest, lda.v1.GetLoadResponse> getGetLoadMethod;
    if ((getGetLoadMethod = LdaServiceGrpc.getGetLoadMethod) == null) {
      synchronized (LdaServiceGrpc.class) {
        if ((getGetLoadMethod = LdaServiceGrpc.getGetLoadMethod) == null) {
          LdaServiceGrpc.getGetLoadMethod = getGetLoadMethod =
              io.grpc.MethodDescriptor.<lda.v1.GetLoadRequest, lda.v1.GetLoadResponse>newBuilder()
              .setType(io.grpc.MethodDescriptor.MethodType.UNARY)
              .setFullMethodName(generateFullMethodName(SERVICE_NAME, "GetLoad"))
              .setSafe(true)
              .setSampledToLocalTracing(true)
              .setRequestMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  lda.v1.GetLoadRequest.getDefaultInstance()))
              .setResponseMarshaller(io.grpc.protobuf.ProtoUtils.marshaller(
                  lda.v1.GetLoadResponse.getDefaultInstance()))
              .setSchemaDescriptor(new LdaServiceMethodDescriptorSupplier("GetLoad"))
              .build();
        }
      }
    }
    return getGetLoadMethod;
  }

  /**
   * Creates a new async stub that supports all call types for the service
   */
  public static LdaServiceStub newStub(io.grpc.Channel channel) {
    io.grpc.stub.AbstractStub.StubFactory<LdaServiceStub> factory =
      new io.grpc.stub.AbstractStub.StubFactory<LdaServiceStub>() {
        @java.lang.Override
        public LdaServiceStub newStub(io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
          return new LdaServiceStub(channel, callOptions);
        }
      };
    return LdaServiceStub.newStub(factory, channel);
  }

  /**
   * Creates a new blocking-style stub that supports unary and streaming output calls on the service
   */
  public static LdaServiceBlockingStub newBlockingStub(
      io.grpc.Channel channel) {
    io.grpc.stub.AbstractStub.StubFactory<LdaServiceBlockingStub> factory =
      new io.grpc.stub.AbstractStub.StubFactory<LdaServiceBlockingStub>() {
        @java.lang.Override
        public LdaServiceBlockingStub newStub(io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
          return new LdaServiceBlockingStub(channel, callOptions);
        }
      };
    return LdaServiceBlockingStub.newStub(factory, channel);
  }

  /**
   * Creates a new ListenableFuture-style stub that supports unary calls on the service
   */
  public static LdaServiceFutureStub newFutureStub(
      io.grpc.Channel channel) {
    io.grpc.stub.AbstractStub.StubFactory<LdaServiceFutureStub> factory =
      new io.grpc.stub.AbstractStub.StubFactory<LdaServiceFutureStub>() {
        @java.lang.Override
        public LdaServiceFutureStub newStub(io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
          return new LdaServiceFutureStub(channel, callOptions);
        }
      };
    return LdaServiceFutureStub.newStub(factory, channel);
  }

  /**
   * <pre>
   * Streams text generated from a pair of models that share one vocabulary.
   * Stream contract of `GenerateLDA` and `GenerateBoth`:
   *  * the first message is `started`;
   *  * every sequence ends with exactly one `finished`;
   *  * the stream closes with status OK only after every sequence has finished.
   * A stream that ends without `finished` always carries a non-OK status. Errors are
   * gRPC statuses with `google.rpc` details, never messages inside the stream.
   * </pre>
   */
  public static abstract class LdaServiceImplBase implements io.grpc.BindableService {

    /**
     * <pre>
     * Samples from `after + alpha * (after - before)`. Its events carry
     * MODEL_ROLE_AMPLIFIED at every alpha.
     * </pre>
     */
    public void generateLDA(lda.v1.GenerateLDARequest request,
        io.grpc.stub.StreamObserver<lda.v1.GenerateLDAResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getGenerateLDAMethod(), responseObserver);
    }

    /**
     * <pre>
     * Samples from each model of the pair on its own, for comparison.
     * </pre>
     */
    public void generateBoth(lda.v1.GenerateBothRequest request,
        io.grpc.stub.StreamObserver<lda.v1.GenerateBothResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getGenerateBothMethod(), responseObserver);
    }

    /**
     * <pre>
     * Reports whether the two tokenizers can be used as one pair.
     * </pre>
     */
    public void tokenizerCompat(lda.v1.TokenizerCompatRequest request,
        io.grpc.stub.StreamObserver<lda.v1.TokenizerCompatResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getTokenizerCompatMethod(), responseObserver);
    }

    /**
     * <pre>
     * Teacher-forces a given text through both models, position by position.
     * </pre>
     */
    public void score(lda.v1.ScoreRequest request,
        io.grpc.stub.StreamObserver<lda.v1.ScoreResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getScoreMethod(), responseObserver);
    }

    /**
     * <pre>
     * Describes the loaded pair and the limits this server enforces.
     * </pre>
     */
    public void getModelPair(lda.v1.GetModelPairRequest request,
        io.grpc.stub.StreamObserver<lda.v1.GetModelPairResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getGetModelPairMethod(), responseObserver);
    }

    /**
     * <pre>
     * Tells how busy this server is, for balancers and autoscalers.
     * </pre>
     */
    public void getLoad(lda.v1.GetLoadRequest request,
        io.grpc.stub.StreamObserver<lda.v1.GetLoadResponse> responseObserver) {
      io.grpc.stub.ServerCalls.asyncUnimplementedUnaryCall(getGetLoadMethod(), responseObserver);
    }

    @java.lang.Override public final io.grpc.ServerServiceDefinition bindService() {
      return io.grpc.ServerServiceDefinition.builder(getServiceDescriptor())
          .addMethod(
            getGenerateLDAMethod(),
            io.grpc.stub.ServerCalls.asyncServerStreamingCall(
              new MethodHandlers<
                lda.v1.GenerateLDARequest,
                lda.v1.GenerateLDAResponse>(
                  this, METHODID_GENERATE_LDA)))
          .addMethod(
            getGenerateBothMethod(),
            io.grpc.stub.ServerCalls.asyncServerStreamingCall(
              new MethodHandlers<
                lda.v1.GenerateBothRequest,
                lda.v1.GenerateBothResponse>(
                  this, METHODID_GENERATE_BOTH)))
          .addMethod(
            getTokenizerCompatMethod(),
            io.grpc.stub.ServerCalls.asyncUnaryCall(
              new MethodHandlers<
                lda.v1.TokenizerCompatRequest,
                lda.v1.TokenizerCompatResponse>(
                  this, METHODID_TOKENIZER_COMPAT)))
          .addMethod(
            getScoreMethod(),
            io.grpc.stub.ServerCalls.asyncServerStreamingCall(
              new MethodHandlers<
                lda.v1.ScoreRequest,
                lda.v1.ScoreResponse>(
                  this, METHODID_SCORE)))
          .addMethod(
            getGetModelPairMethod(),
            io.grpc.stub.ServerCalls.asyncUnaryCall(
              new MethodHandlers<
                lda.v1.GetModelPairRequest,
                lda.v1.GetModelPairResponse>(
                  this, METHODID_GET_MODEL_PAIR)))
          .addMethod(
            getGetLoadMethod(),
            io.grpc.stub.ServerCalls.asyncUnaryCall(
              new MethodHandlers<
                lda.v1.GetLoadRequest,
                lda.v1.GetLoadResponse>(
                  this, METHODID_GET_LOAD)))
          .build();
    }
  }

  /**
   * <pre>
   * Streams text generated from a pair of models that share one vocabulary.
   * Stream contract of `GenerateLDA` and `GenerateBoth`:
   *  * the first message is `started`;
   *  * every sequence ends with exactly one `finished`;
   *  * the stream closes with status OK only after every sequence has finished.
   * A stream that ends without `finished` always carries a non-OK status. Errors are
   * gRPC statuses with `google.rpc` details, never messages inside the stream.
   * </pre>
   */
  public static final class LdaServiceStub extends io.grpc.stub.AbstractAsyncStub<LdaServiceStub> {
    private LdaServiceStub(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      super(channel, callOptions);
    }

    @java.lang.Override
    protected LdaServiceStub build(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      return new LdaServiceStub(channel, callOptions);
    }

    /**
     * <pre>
     * Samples from `after + alpha * (after - before)`. Its events carry
     * MODEL_ROLE_AMPLIFIED at every alpha.
     * </pre>
     */
    public void generateLDA(lda.v1.GenerateLDARequest request,
        io.grpc.stub.StreamObserver<lda.v1.GenerateLDAResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncServerStreamingCall(
          getChannel().newCall(getGenerateLDAMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Samples from each model of the pair on its own, for comparison.
     * </pre>
     */
    public void generateBoth(lda.v1.GenerateBothRequest request,
        io.grpc.stub.StreamObserver<lda.v1.GenerateBothResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncServerStreamingCall(
          getChannel().newCall(getGenerateBothMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Reports whether the two tokenizers can be used as one pair.
     * </pre>
     */
    public void tokenizerCompat(lda.v1.TokenizerCompatRequest request,
        io.grpc.stub.StreamObserver<lda.v1.TokenizerCompatResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getTokenizerCompatMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Teacher-forces a given text through both models, position by position.
     * </pre>
     */
    public void score(lda.v1.ScoreRequest request,
        io.grpc.stub.StreamObserver<lda.v1.ScoreResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncServerStreamingCall(
          getChannel().newCall(getScoreMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Describes the loaded pair and the limits this server enforces.
     * </pre>
     */
    public void getModelPair(lda.v1.GetModelPairRequest request,
        io.grpc.stub.StreamObserver<lda.v1.GetModelPairResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getGetModelPairMethod(), getCallOptions()), request, responseObserver);
    }

    /**
     * <pre>
     * Tells how busy this server is, for balancers and autoscalers.
     * </pre>
     */
    public void getLoad(lda.v1.GetLoadRequest request,
        io.grpc.stub.StreamObserver<lda.v1.GetLoadResponse> responseObserver) {
      io.grpc.stub.ClientCalls.asyncUnaryCall(
          getChannel().newCall(getGetLoadMethod(), getCallOptions()), request, responseObserver);
    }
  }

  /**
   * <pre>
   * Streams text generated from a pair of models that share one vocabulary.
   * Stream contract of `GenerateLDA` and `GenerateBoth`:
   *  * the first message is `started`;
   *  * every sequence ends with exactly one `finished`;
   *  * the stream closes with status OK only after every sequence has finished.
   * A stream that ends without `finished` always carries a non-OK status. Errors are
   * gRPC statuses with `google.rpc` details, never messages inside the stream.
   * </pre>
   */
  public static final class LdaServiceBlockingStub extends io.grpc.stub.AbstractBlockingStub<LdaServiceBlockingStub> {
    private LdaServiceBlockingStub(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      super(channel, callOptions);
    }

    @java.lang.Override
    protected LdaServiceBlockingStub build(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      return new LdaServiceBlockingStub(channel, callOptions);
    }

    /**
     * <pre>
     * Samples from `after + alpha * (after - before)`. Its events carry
     * MODEL_ROLE_AMPLIFIED at every alpha.
     * </pre>
     */
    public java.util.Iterator<lda.v1.GenerateLDAResponse> generateLDA(
        lda.v1.GenerateLDARequest request) {
      return io.grpc.stub.ClientCalls.blockingServerStreamingCall(
          getChannel(), getGenerateLDAMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Samples from each model of the pair on its own, for comparison.
     * </pre>
     */
    public java.util.Iterator<lda.v1.GenerateBothResponse> generateBoth(
        lda.v1.GenerateBothRequest request) {
      return io.grpc.stub.ClientCalls.blockingServerStreamingCall(
          getChannel(), getGenerateBothMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Reports whether the two tokenizers can be used as one pair.
     * </pre>
     */
    public lda.v1.TokenizerCompatResponse tokenizerCompat(lda.v1.TokenizerCompatRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getTokenizerCompatMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Teacher-forces a given text through both models, position by position.
     * </pre>
     */
    public java.util.Iterator<lda.v1.ScoreResponse> score(
        lda.v1.ScoreRequest request) {
      return io.grpc.stub.ClientCalls.blockingServerStreamingCall(
          getChannel(), getScoreMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Describes the loaded pair and the limits this server enforces.
     * </pre>
     */
    public lda.v1.GetModelPairResponse getModelPair(lda.v1.GetModelPairRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getGetModelPairMethod(), getCallOptions(), request);
    }

    /**
     * <pre>
     * Tells how busy this server is, for balancers and autoscalers.
     * </pre>
     */
    public lda.v1.GetLoadResponse getLoad(lda.v1.GetLoadRequest request) {
      return io.grpc.stub.ClientCalls.blockingUnaryCall(
          getChannel(), getGetLoadMethod(), getCallOptions(), request);
    }
  }

  /**
   * <pre>
   * Streams text generated from a pair of models that share one vocabulary.
   * Stream contract of `GenerateLDA` and `GenerateBoth`:
   *  * the first message is `started`;
   *  * every sequence ends with exactly one `finished`;
   *  * the stream closes with status OK only after every sequence has finished.
   * A stream that ends without `finished` always carries a non-OK status. Errors are
   * gRPC statuses with `google.rpc` details, never messages inside the stream.
   * </pre>
   */
  public static final class LdaServiceFutureStub extends io.grpc.stub.AbstractFutureStub<LdaServiceFutureStub> {
    private LdaServiceFutureStub(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      super(channel, callOptions);
    }

    @java.lang.Override
    protected LdaServiceFutureStub build(
        io.grpc.Channel channel, io.grpc.CallOptions callOptions) {
      return new LdaServiceFutureStub(channel, callOptions);
    }

    /**
     * <pre>
     * Reports whether the two tokenizers can be used as one pair.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<lda.v1.TokenizerCompatResponse> tokenizerCompat(
        lda.v1.TokenizerCompatRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getTokenizerCompatMethod(), getCallOptions()), request);
    }

    /**
     * <pre>
     * Describes the loaded pair and the limits this server enforces.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<lda.v1.GetModelPairResponse> getModelPair(
        lda.v1.GetModelPairRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getGetModelPairMethod(), getCallOptions()), request);
    }

    /**
     * <pre>
     * Tells how busy this server is, for balancers and autoscalers.
     * </pre>
     */
    public com.google.common.util.concurrent.ListenableFuture<lda.v1.GetLoadResponse> getLoad(
        lda.v1.GetLoadRequest request) {
      return io.grpc.stub.ClientCalls.futureUnaryCall(
          getChannel().newCall(getGetLoadMethod(), getCallOptions()), request);
    }
  }

  private static final int METHODID_GENERATE_LDA = 0;
  private static final int METHODID_GENERATE_BOTH = 1;
  private static final int METHODID_TOKENIZER_COMPAT = 2;
  private static final int METHODID_SCORE = 3;
  private static final int METHODID_GET_MODEL_PAIR = 4;
  private static final int METHODID_GET_LOAD = 5;

  private static final class MethodHandlers<Req, Resp> implements
      io.grpc.stub.ServerCalls.UnaryMethod<Req, Resp>,
      io.grpc.stub.ServerCalls.ServerStreamingMethod<Req, Resp>,
      io.grpc.stub.ServerCalls.ClientStreamingMethod<Req, Resp>,
      io.grpc.stub.ServerCalls.BidiStreamingMethod<Req, Resp> {
    private final LdaServiceImplBase serviceImpl;
    private final int methodId;

    MethodHandlers(LdaServiceImplBase serviceImpl, int methodId) {
      this.serviceImpl = serviceImpl;
      this.methodId = methodId;
    }

    @java.lang.Override
    @java.lang.SuppressWarnings("unchecked")
    public void invoke(Req request, io.grpc.stub.StreamObserver<Resp> responseObserver) {
      switch (methodId) {
        case METHODID_GENERATE_LDA:
          serviceImpl.generateLDA((lda.v1.GenerateLDARequest) request,
              (io.grpc.stub.StreamObserver<lda.v1.GenerateLDAResponse>) responseObserver);
          break;
        case METHODID_GENERATE_BOTH:
          serviceImpl.generateBoth((lda.v1.GenerateBothRequest) request,
              (io.grpc.stub.StreamObserver<lda.v1.GenerateBothResponse>) responseObserver);
          break;
        case METHODID_TOKENIZER_COMPAT:
          serviceImpl.tokenizerCompat((lda.v1.TokenizerCompatRequest) request,
              (io.grpc.stub.StreamObserver<lda.v1.TokenizerCompatResponse>) responseObserver);
          break;
        case METHODID_SCORE:
          serviceImpl.score((lda.v1.ScoreRequest) request,
              (io.grpc.stub.StreamObserver<lda.v1.ScoreResponse>) responseObserver);
          break;
        case METHODID_GET_MODEL_PAIR:
          serviceImpl.getModelPair((lda.v1.GetModelPairRequest) request,
              (io.grpc.stub.StreamObserver<lda.v1.GetModelPairResponse>) responseObserver);
          break;
        case METHODID_GET_LOAD:
          serviceImpl.getLoad((lda.v1.GetLoadRequest) request,
              (io.grpc.stub.StreamObserver<lda.v1.GetLoadResponse>) responseObserver);
          break;
        default:
          throw new AssertionError();
      }
    }

    @java.lang.Override
    @java.lang.SuppressWarnings("unchecked")
    public io.grpc.stub.StreamObserver<Req> invoke(
        io.grpc.stub.StreamObserver<Resp> responseObserver) {
      switch (methodId) {
        default:
          throw new AssertionError();
      }
    }
  }

  private static abstract class LdaServiceBaseDescriptorSupplier
      implements io.grpc.protobuf.ProtoFileDescriptorSupplier, io.grpc.protobuf.ProtoServiceDescriptorSupplier {
    LdaServiceBaseDescriptorSupplier() {}

    @java.lang.Override
    public com.google.protobuf.Descriptors.FileDescriptor getFileDescriptor() {
      return lda.v1.LdaServiceProto.getDescriptor();
    }

    @java.lang.Override
    public com.google.protobuf.Descriptors.ServiceDescriptor getServiceDescriptor() {
      return getFileDescriptor().findServiceByName("LdaService");
    }
  }

  private static final class LdaServiceFileDescriptorSupplier
      extends LdaServiceBaseDescriptorSupplier {
    LdaServiceFileDescriptorSupplier() {}
  }

  private static final class LdaServiceMethodDescriptorSupplier
      extends LdaServiceBaseDescriptorSupplier
      implements io.grpc.protobuf.ProtoMethodDescriptorSupplier {
    private final String methodName;

    LdaServiceMethodDescriptorSupplier(String methodName) {
      this.methodName = methodName;
    }

    @java.lang.Override
    public com.google.protobuf.Descriptors.MethodDescriptor getMethodDescriptor() {
      return getServiceDescriptor().findMethodByName(methodName);
    }
  }

  private static volatile io.grpc.ServiceDescriptor serviceDescriptor;

  public static io.grpc.ServiceDescriptor getServiceDescriptor() {
    io.grpc.ServiceDescriptor result = serviceDescriptor;
    if (result == null) {
      synchronized (LdaServiceGrpc.class) {
        result = serviceDescriptor;
        if (result == null) {
          serviceDescriptor = result = io.grpc.ServiceDescriptor.newBuilder(SERVICE_NAME)
              .setSchemaDescriptor(new LdaServiceFileDescriptorSupplier())
              .addMethod(getGenerateLDAMethod())
              .addMethod(getGenerateBothMethod())
              .addMethod(getTokenizerCompatMethod())
              .addMethod(getScoreMethod())
              .addMethod(getGetModelPairMethod())
              .addMethod(getGetLoadMethod())
              .build();
        }
      }
    }
    return result;
  }
}

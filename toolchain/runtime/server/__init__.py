"""The server runtime: bundles behind the Open Inference Protocol, over REST and gRPC."""

"""What stages need to know about an ONNX graph: counts, random inputs, and how far two results differ."""

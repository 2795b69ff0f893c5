"""Lower precisions of an ONNX model: calibration, static and dynamic int8, float16, sensitivity, report."""

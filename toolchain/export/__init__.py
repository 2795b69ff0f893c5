"""From a model's source to ONNX: load, bind inputs, trace, clean, describe, and explain what fails."""

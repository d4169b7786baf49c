"""Core ML packages: ONNX written as an ML Program (MIL) with compressed weights, read back, checked and interpreted."""

"""ONNX files into programs: read, run operator by operator under torch.export, normalise."""

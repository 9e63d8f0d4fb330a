"""ONNX and TensorRT forms of the denoiser."""

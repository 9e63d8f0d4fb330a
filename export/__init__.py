"""ONNX and TensorRT forms of the denoiser.

`network.export_onnx` writes a model's denoiser as one ONNX file with every control as an input;
`metadata.read_metadata` says what a file is, once it was found whole; `check.check_network`
compares it with its model. `kinetiq.Engine.load(..., backend=...)` runs it.
"""

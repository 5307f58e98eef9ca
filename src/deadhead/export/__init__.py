"""A model, cut or not, in the formats of the runtimes that people serve models with, each file checked in its runtime.

`export_model` writes and checks; `gguf`, `onnx`, `openvino` and `padded` know one format each; `llama_cpp` and `flat`
run the files; `agreement` holds a runtime's logits against PyTorch's.
"""

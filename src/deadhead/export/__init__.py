"""Export of models, cut or not, to the formats of other runtimes; each file is checked in its runtime.

`export_model` writes and checks; `gguf`, `onnx`, `openvino` and `padded` know one format each; `llama_cpp` and `flat`
run the files; `agreement` compares a runtime's logits with PyTorch's.
"""

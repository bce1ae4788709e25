"""How a network is said in the formats that inference engines read. Needs the extra `lowering`.

One module for each format: `onnx`, `tflite`, and `torch`, which needs PyTorch. Importing this package imports none of
them.
"""

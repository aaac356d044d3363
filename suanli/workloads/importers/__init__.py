"""Models of other origins as torch modules: ONNX, Keras, configurations of transformers."""

"""A bake as one GGUF file: llama.cpp's own converter and quantiser, and the proof in llama.cpp itself."""

"""Files of models: what each family calls its tensors, safetensors and GGUF, in and out."""

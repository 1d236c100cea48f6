"""The decoder, its families, Hugging Face weights and generation; the only place that imports flax."""

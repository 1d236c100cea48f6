"""Phased instruction fine-tuning of Llama-2 and Mistral in JAX (Pang et al., Findings of ACL 2024)."""

__version__ = "0.1.0"

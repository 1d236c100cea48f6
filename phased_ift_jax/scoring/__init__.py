"""Paid questions to a language model: how hard a record is, which of two answers is better. The only room that knows `openai`; it knows no JAX."""

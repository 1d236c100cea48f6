"""Input as it should not be, and what must come of it: tables that `test_malformed.py` goes through."""

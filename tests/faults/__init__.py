"""Faults put on real processes: kills, requests to stop, exact points of death, and a disk that is full."""

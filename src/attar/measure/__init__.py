"""Metric intervals, latency, size, operations, memory."""

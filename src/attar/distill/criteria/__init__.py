"""Distillation criteria: what a student is taught by. One file each."""

"""Pruning criteria: what makes a weight or a channel important. One file each."""

"""What to make of a network for a budget: costs of its layers, and a solver that chooses."""

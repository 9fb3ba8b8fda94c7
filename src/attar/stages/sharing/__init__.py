"""How the share stage does what a recipe says, a file a method."""

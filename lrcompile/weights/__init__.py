"""What a weight becomes: the mathematics, the eager modules, the Plan and its adoption."""

"""Running a model: recipes, steps, checkpoints, logs."""

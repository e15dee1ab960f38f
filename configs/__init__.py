"""Recipes: one YAML file for a model, its data and its training. Data only."""

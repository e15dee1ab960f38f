"""The models, patterns, plans and memories themselves: a flat folder that travels to the Hub beside the weights."""

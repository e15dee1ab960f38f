"""A package, so that those that others put at the top of site-packages (rxnmapper does) do not take its name."""

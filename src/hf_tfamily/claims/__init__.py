"""What papers claim, a module each: its experiment, and `CLAIM`, a `hf_tfamily.reproduction.Claim`."""

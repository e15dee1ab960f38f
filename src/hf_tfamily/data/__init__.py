"""Real data as token sequences."""

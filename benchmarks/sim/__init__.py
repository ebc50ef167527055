"""The cluster simulator: a simulated world around the production Conductor and store nodes (DESIGN 2.3)."""

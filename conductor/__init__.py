"""The Conductor: pure scheduling policy, and the gateway and dispatch that carry it out."""

"""Other people's checkpoints, as descriptions and weights of ours, and back."""

"""Speed: what a step costs, and how a layer is timed and reported."""

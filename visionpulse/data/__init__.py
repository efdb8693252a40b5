"""The tiny model of the demo and its task; weights are read only when asked for."""

"""What numbers and traces mean: costs, correlations, calibration, plots."""

"""What every step kept, for a person to look at: the record, its layout, plots, a page."""

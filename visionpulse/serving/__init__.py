"""The method inside serving engines: what is common to all here, one folder for each engine."""

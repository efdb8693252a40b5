"""Plugins for evaluation harnesses; each is imported by its harness, never by the package."""

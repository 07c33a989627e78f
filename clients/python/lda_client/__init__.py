"""Typed client for the LDA service."""

"""Configs of ARGUS."""

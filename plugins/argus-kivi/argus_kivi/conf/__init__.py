"""Configs of argus-kivi."""

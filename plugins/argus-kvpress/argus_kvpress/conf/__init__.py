"""Configs of argus-kvpress."""

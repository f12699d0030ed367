"""Configs of argus-rotation."""

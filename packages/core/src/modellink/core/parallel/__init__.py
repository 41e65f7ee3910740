"""Cutting a sequence over ranks."""

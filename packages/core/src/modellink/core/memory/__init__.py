"""Spending time to save memory."""

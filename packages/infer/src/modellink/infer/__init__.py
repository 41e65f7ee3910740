"""Text generation from any checkpoint ModelLink can read."""

__version__ = "0.1.0"

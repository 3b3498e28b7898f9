"""The one place where the version stands; setup.py, the package and the wheel tools read it."""

__version__ = "0.1.0"
